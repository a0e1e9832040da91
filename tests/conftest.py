import os
from pathlib import Path

import pytest

from mld.settings import TINY

os.environ.setdefault("MPLBACKEND", "agg")

ROOT = Path(__file__).resolve().parents[1]

# As small as a whole run can be; its numbers mean nothing.
TINY = TINY | dict(n_train=600, ae_steps=40, clf_steps=20, steps=60, samplers={"dpm": {"steps": 3}, "em": {"steps": 5}})


@pytest.fixture
def tiny():
    return dict(TINY)


@pytest.fixture
def in_16_bits(monkeypatch):
    "As on a device with units for bfloat16; others imitate it, slowly."
    monkeypatch.setenv("MLD_BF16", "1")


@pytest.fixture
def root():
    return ROOT
