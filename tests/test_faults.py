"Killed, corrupted or started twice: the rows come out the same."
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from mld.experiment import Run
from mld.measure import rows_of
from mld.training import CorruptFile, load_weights

SCRIPT = """
import json, sys
from mld.training import Trainer
from mld.experiment import Run
from mld.measure import rows_of
out, overrides, slow = sys.argv[1], json.loads(sys.argv[2]), float(sys.argv[3])
import functools, time, mld.training as training
if slow:  # leave time to be killed, and write a checkpoint at every step
    step, go = Trainer.one_step, Trainer.run
    Trainer.one_step = lambda self, index: (time.sleep(slow), step(self, index))[1]
    Trainer.run = lambda self, every, label, progress: go(self, 0., label, progress)
torch = __import__("torch"); torch.set_num_threads(1)
rows_of(Run("polydigits", out=out, overrides=overrides, device="cpu", progress=False))
"""
SAME = ["model", "metric", "given", "target", "value", "seed", "n", "sampler", "nfe"]


def start(out, tiny, slow=0.):
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(out), json.dumps(tiny), str(slow)], stderr=subprocess.PIPE, text=True)


def rows(out):
    path, = Path(out).rglob("rows.csv")
    made = pd.read_csv(path)[SAME]
    return made[~made.metric.isin(["training seconds", "samples a second"])].reset_index(drop=True)  # these depend on the day


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    from conftest import TINY
    out = tmp_path_factory.mktemp("undisturbed")
    assert start(out, TINY).wait() == 0
    return out


@pytest.mark.parametrize("stage, how", [("autoencoder-view1", signal.SIGKILL), ("classifier-view0", signal.SIGKILL),
                                        ("score", signal.SIGKILL), ("score", signal.SIGTERM)])
def test_killed_in_a_stage_and_started_again(stage, how, tiny, tmp_path, undisturbed):
    job = start(tmp_path, tiny, slow=.03)
    deadline = time.monotonic() + 120
    while not (found := list(tmp_path.glob(f"stages/{stage}-*/checkpoints/00000001*.pt"))):
        assert job.poll() is None, job.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(.02)
    job.send_signal(how)
    assert job.wait() != 0
    assert not list(tmp_path.glob(f"stages/{stage}-*/result.safetensors")) and not list(tmp_path.rglob("rows.csv"))
    again = start(tmp_path, tiny)
    assert again.wait() == 0, again.stderr.read()
    pd.testing.assert_frame_equal(rows(tmp_path), rows(undisturbed))


def test_the_same_seed_twice_gives_the_same_rows(tiny, tmp_path, undisturbed):
    assert start(tmp_path, tiny).wait() == 0
    pd.testing.assert_frame_equal(rows(tmp_path), rows(undisturbed))


def test_another_seed_shares_autoencoders_and_gives_other_rows(tiny, tmp_path, undisturbed):
    shutil.copytree(undisturbed, tmp_path / "runs")
    made = lambda stage: len(list((tmp_path / "runs").glob(f"stages/{stage}-*")))
    before = made("autoencoder"), made("score")
    other = rows_of(Run("polydigits", seed=1, out=tmp_path / "runs", overrides=tiny, device="cpu", progress=False))
    assert (made("autoencoder"), made("score")) == (before[0], before[1] + 1)
    distances = [set(r.query("model == 'MLD' and metric == 'fmd'").value) for r in (other, rows(undisturbed))]
    assert not distances[0] & distances[1]


def test_two_processes_on_one_run_do_each_stage_once(tiny, tmp_path, undisturbed):
    jobs = [start(tmp_path, tiny, slow=.005) for _ in range(2)]
    assert [job.wait() for job in jobs] == [0, 0]
    pd.testing.assert_frame_equal(rows(tmp_path), rows(undisturbed))
    assert len(list(tmp_path.glob("stages/score-*"))) == 1


@pytest.mark.parametrize("damage", [lambda b: b[:-10], lambda b: b[:len(b) // 2] + b"\x00" + b[len(b) // 2 + 1:], lambda b: b""])
def test_a_damaged_result_is_put_aside_and_made_again(damage, tiny, tmp_path, undisturbed):
    shutil.copytree(undisturbed, tmp_path / "runs")
    path, = (tmp_path / "runs").glob("stages/score-*/result.safetensors")
    good = path.read_bytes()
    path.write_bytes(damage(good))
    with pytest.raises(CorruptFile):
        load_weights(path)
    for stage in ("rows", "samples"):
        for folder in (tmp_path / "runs" / "stages").glob(f"{stage}-*"):
            shutil.rmtree(folder)
    with pytest.warns(UserWarning, match="put aside"):
        torch.set_num_threads(1)
        rows_of(Run("polydigits", out=tmp_path / "runs", overrides=tiny, device="cpu", progress=False))
    assert (path.parent / "result.corrupt").read_bytes() == damage(good)
    pd.testing.assert_frame_equal(rows(tmp_path), rows(undisturbed))


def test_a_foreign_result_is_not_used(tiny, tmp_path, undisturbed):
    shutil.copytree(undisturbed, tmp_path / "runs")
    mine, = (tmp_path / "runs").glob("stages/autoencoder-view0-*/result.safetensors")
    other, = (tmp_path / "runs").glob("stages/autoencoder-view1-*/result.safetensors")
    mine.write_bytes(other.read_bytes())
    with pytest.warns(UserWarning, match="other settings"):
        Run("polydigits", out=tmp_path / "runs", overrides=tiny, device="cpu", progress=False).autoencoder_stages
