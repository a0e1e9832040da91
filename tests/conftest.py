import os
from pathlib import Path

import pytest

os.environ.setdefault("MPLBACKEND", "agg")

ROOT = Path(__file__).resolve().parents[1]

# As small as a whole run can be; its numbers mean nothing.
TINY = dict(n_train=600, n_val=60, n_test=60, ae_steps=40, ae_batch=32, clf_steps=20, clf_batch=32, width=32, groups=4, time_width=16,
            steps=60, warmup=2, n_joint=30, n_given=20, samplers={"dpm": {"steps": 3}, "em": {"steps": 5}})


@pytest.fixture
def tiny():
    return dict(TINY)


@pytest.fixture
def root():
    return ROOT
