"""The `mld` command with a table of its own, on drawn data that is there at once. Worker processes import this file too, and so know the same.

MLD_TOY_SLOW: seconds that each training step takes longer."""
import os
import time
from functools import cache

import numpy as np

import mld.data.polydigits as polydigits
from mld.settings import METHODS, TABLES, Table
from mld.training import Trainer

TABLES["toy"] = Table(("polydigits",), {"MLD": {}, "MLD-Uni": METHODS["MLD-Uni"]})
TABLES["toy_too"] = Table(("polydigits",), {"MLD again": {}, "broken": {"groups": 5}})


@cache
def drawn():
    rng = np.random.default_rng(0)
    return rng.integers(256, size=(5000, 28, 28)).astype(np.uint8), np.arange(5000) % 10


polydigits.digits, polydigits.grounds = drawn, cache(lambda: [np.random.default_rng(v).random((60, 60, 3), np.float32) for v in range(5)])

if slow := float(os.environ.get("MLD_TOY_SLOW", 0)):  # leave time to be killed, and write a checkpoint at every step
    step, go = Trainer.one_step, Trainer.run
    Trainer.one_step = lambda self, index: (time.sleep(slow), step(self, index))[1]
    Trainer.run = lambda self, every, label, progress: go(self, 0., label, progress)

if __name__ == "__main__":
    from mld.cli import app
    app()
