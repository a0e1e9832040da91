"Whole tables: planned without being made, made once, and made whole after whatever has happened."
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

import mld.batch
from mld.batch import summary
from mld.data import polydigits
from mld.plan import as_json, from_json, make, plan
from mld.settings import TABLES, TINY

SAME = ["dataset", "model", "variant", "metric", "given", "target", "value", "seed", "n", "sampler", "nfe"]
OPTIONS = ["--device", "cpu", *[a for k, v in TINY.items() for a in ("--set", f"{k}={v}")]]
ENV = os.environ | {"OMP_NUM_THREADS": "1"}
TOY = Path(__file__).with_name("toy_batch.py")


@pytest.fixture(scope="module", autouse=True)
def toy_tables():
    "The tables and the data of `toy_batch` are those of this process, too, as long as these tests run."
    tables, digits, grounds = dict(TABLES), polydigits.digits, polydigits.grounds
    import toy_batch  # noqa: F401
    yield
    TABLES.clear(), TABLES.update(tables)
    polydigits.digits, polydigits.grounds = digits, grounds


def start(*args, slow=0.):
    return subprocess.Popen([sys.executable, TOY, *map(str, args)], env=ENV | {"MLD_TOY_SLOW": str(slow)},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def reproduce(out, *args, jobs=1, **kw):
    job = start("reproduce", "--out", out, "--jobs", jobs, *OPTIONS, *args, **kw)
    said, why = job.communicate()
    return job.returncode, said, why


def rows(out):
    made = pd.concat([pd.read_csv(path) for path in sorted(Path(out).glob("toy/*/rows.csv"))])[SAME]
    return made[~made.metric.isin(["training seconds", "samples a second"])].reset_index(drop=True)  # these depend on the day


def here(out):
    return dict(out=out, device="cpu", overrides=dict(TINY))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    code, said, why = reproduce(out, "toy")
    assert code == 0, why
    assert said.startswith("11 jobs: 11 done")
    return out


@pytest.fixture
def unscored(undisturbed, tmp_path):
    "All but score networks and rows is there."
    out = tmp_path / "runs"
    shutil.copytree(undisturbed, out, ignore=shutil.ignore_patterns("score-*", "rows*", "samples-*", "logs"))
    return out


def wait_for(pattern, out, job):
    deadline = time.monotonic() + 120
    while not (found := list(Path(out).glob(pattern))):
        assert job.poll() is None, job.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(.02)
    return found


def children(pid):
    return [int(p.parent.name) for p in Path("/proc").glob("[0-9]*/stat") if p.exists() and p.read_text().rpartition(")")[2].split()[1] == str(pid)]


def workers(job):
    return [pid for pid in children(job.pid) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_a_plan_has_each_job_once_after_what_it_needs(tmp_path):
    jobs = plan(["toy", "toy_too"], ["MLD", "MLD-Uni", "MLD again"], seeds=[0, 1], **here(tmp_path / "runs"))
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    kinds = [job.kind for job in jobs]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"autoencoder": 3, "classifier": 3, "latents": 1, "score": 4, "rows": 6}
    for i, job in enumerate(jobs):
        assert set(job.needs) <= set(names[:i])
    first, again = "rows-toy-polydigits-MLD-smoke", "rows-toy_too-polydigits-MLD_again-smoke"  # the same rows, under another name
    needs = {job.name: job.needs for job in jobs}
    assert all(any(n.startswith(first) for n in needs[name]) for name in names if name.startswith(again))
    assert not list(tmp_path.iterdir()), "planning made something"
    assert from_json(as_json(jobs)) == {job.name: job for job in jobs}


def test_what_is_done_is_known_by_its_files(undisturbed):
    jobs = plan(["toy"], seeds=[0, 1], **here(undisturbed))
    assert [job.name for job in jobs if not job.done] == [job.name for job in jobs if job.kind in ("score", "rows") and job not in plan(["toy"], **here(undisturbed))]
    assert all(job.seconds is not None and job.size > 0 for job in jobs), "another seed takes what the first took"
    other = plan(["toy"], **here(undisturbed) | {"overrides": TINY | {"steps": 21}})
    assert {job.kind for job in other if job.seconds is None} == {"score"} and {job.kind for job in other if not job.done} == {"score", "rows"}


def test_rows_older_than_their_stage_are_written_again(undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "runs")
    job = plan(["toy"], **here(tmp_path / "runs"))[-1]
    os.utime(job.file, (1, 1))
    assert not job.done
    make(job, "cpu")
    assert job.done
    pd.testing.assert_frame_equal(rows(tmp_path / "runs"), rows(undisturbed))


def test_what_is_done_is_not_done_again(undisturbed):
    before = {p: p.stat().st_mtime for p in undisturbed.rglob("*") if p.is_file()}
    batch = mld.batch.reproduce(["toy"], jobs=1, **here(undisturbed))
    assert summary(batch) == "11 jobs: 11 done" and not batch.workers
    assert {p: p.stat().st_mtime for p in undisturbed.rglob("*") if p.is_file()} == before


def ends(pid):
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(.05)


def test_a_killed_worker_is_tried_again_and_a_stopped_batch_goes_on(unscored, undisturbed):
    job = start("reproduce", "toy", "--out", unscored, "--jobs", 1, *OPTIONS, slow=.2)
    wait_for("stages/score-*/checkpoints/0000000*.pt", unscored, job)
    pid, = workers(job)
    os.kill(pid, signal.SIGKILL)
    wait_for("stages/score-*/checkpoints/00000001[2-9]*.pt", unscored, job)  # it has gone on
    pid, = workers(job)
    job.send_signal(signal.SIGTERM)
    _, why = job.communicate()
    assert job.returncode == 130 and "its process ended with -9" in why and "the same command goes on" in why, why
    ends(pid)
    assert not list(unscored.rglob("*.part")) and not list(unscored.rglob("rows.csv"))
    assert reproduce(unscored, "toy")[0] == 0
    pd.testing.assert_frame_equal(rows(unscored), rows(undisturbed))


def test_workers_end_with_their_parent(unscored):
    job = start("reproduce", "toy", "--out", unscored, "--jobs", 1, *OPTIONS, slow=.2)
    wait_for("stages/score-*/checkpoints/0000000*.pt", unscored, job)
    pid, = workers(job)
    job.kill()
    ends(pid)
    assert not list(unscored.rglob("*.part"))


def test_two_at_once_do_each_job_once(unscored, undisturbed):
    both = [start("reproduce", "toy", "--out", unscored, "--jobs", 1, *OPTIONS, slow=.01) for _ in range(2)]
    ends = [job.communicate() for job in both]
    assert [job.returncode for job in both] == [0, 0], ends
    pd.testing.assert_frame_equal(rows(unscored), rows(undisturbed))
    for log in (unscored / "logs").glob("score-*.log"):
        assert log.read_text().count("score network: 100%") in (1, 2)  # drawn again when the bar closes
        assert log.read_text().count("score network:   0%") == 1, "trained twice"


def test_a_failure_takes_nothing_else_with_it(unscored):
    code, said, why = reproduce(unscored, "toy_too")
    assert code == 1 and "1 failed" in said and "1 given up" in said
    log = re.search(r"\S+/logs/score-\w+\.log", said)[0]
    assert "num_channels" in Path(log).read_text() and "num_channels" in said
    assert [p.parent.name.split("-")[1] for p in unscored.glob("toy_too/*/rows.csv")] == ["MLD_again"]


def test_a_failed_notebook_is_named(tmp_path):
    code, said, _ = reproduce(tmp_path, "polydigits", "--set", "groups=5")
    notebook = Path(re.search(r"\S+/notebook\.ipynb", said)[0])
    assert code == 1 and "num_channels" in notebook.read_text() and not notebook.with_suffix(".html").exists()


def test_a_full_disk_is_said_and_leaves_nothing_half_written(undisturbed, tmp_path):
    out = tmp_path / "small"
    out.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", out], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        code, said, why = reproduce(out, "toy")
        assert code == 1 and "the disk is full" in why and "Traceback" not in why
        assert not list(out.rglob("rows.csv")) and not list(out.rglob("*.part"))
        subprocess.run(["mount", "-o", "remount,size=100m", out], check=True)
        assert reproduce(out, "toy")[0] == 0
        pd.testing.assert_frame_equal(rows(out), rows(undisturbed))
    finally:
        subprocess.run(["umount", "-l", out], check=True)


@pytest.mark.parametrize("args, why", [
    (["toyy"], "unknown table 'toyy'"),
    (["toy", "--models", "MDL"], "unknown model 'MDL'; known: MLD, MLD-Uni"),
    (["toy", "--preset", "labtop"], "unknown preset 'labtop'"),
    (["toy", "--seeds", "few"], "--seeds wants numbers"),
    (["toy", "--set", "step=5"], "unknown setting 'step'"),
    (["toy", "--source", "open"], "unknown source of polydigits 'open'"),
])
def test_mistakes_are_refused_before_anything_runs(args, why, tmp_path):
    from typer.testing import CliRunner
    from mld.cli import app
    done = CliRunner().invoke(app, ["reproduce", *args, "--out", str(tmp_path / "runs"), "--device", "cpu"])
    assert done.exit_code == 2 and why in done.stderr
    assert not list(tmp_path.iterdir())


def test_data_that_is_not_prepared_comes_first(tmp_path, monkeypatch):
    monkeypatch.setenv("MLD_PREPARED", str(tmp_path / "prepared"))
    jobs = plan(["variants"], ["MLD"], datasets=["mhd"], **here(tmp_path / "runs") | {"overrides": {}, "data": str(tmp_path)})
    assert [job.kind for job in jobs] == ["data", "rows", "notebook"] and jobs[1].needs == (jobs[0].name,)
    with pytest.raises(FileNotFoundError, match="is not there"):
        make(jobs[0], "cpu")


def test_two_processes_train_the_score_network_that_one_does(unscored, tmp_path):
    pytest.importorskip("lightning_fabric")
    from mld.training import load_weights
    precise = {"precision": "fp32", "ema": .9}
    job, = (job for job in plan(["toy"], ["MLD"], **here(unscored) | {"overrides": TINY | precise}) if job.kind == "score")
    path, other = tmp_path / "plan.json", tmp_path / "other"
    path.write_text(as_json([job]))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, TOY, "job", job.name, "--plan", path, "--device", "cpu"], env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    together, config = load_weights(job.file)
    Path(job.file).rename(other)
    shutil.rmtree(Path(job.file).parent)
    make(job, "cpu")
    alone, same = load_weights(job.file)
    assert together.keys() == alone.keys() and config["settings"] == same["settings"]
    for name in alone:
        assert (together[name].float() - alone[name].float()).abs().max() < 1e-4, name
    last, want = config["info"]["history"][-1], same["info"]["history"][-1]
    assert all(last[k] == pytest.approx(want[k], rel=1e-4) for k in want if k != "seconds")


def test_several_processes_only_train_score_networks(unscored, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="only score networks are trained by several processes"):
        make(plan(["toy"], **here(unscored))[0], "cpu")


def snakemake(root, plan_file, *args):
    command = shutil.which("snakemake", path=os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]))
    if not command:
        pytest.skip("snakemake is not installed: pip install -e '.[cluster]'")
    return subprocess.run([command, "--snakefile", root / "workflow" / "Snakefile", "--profile", root / "workflow" / "profiles" / "local", "--cores", "1", *args,
                           "--config", f"plan={plan_file}", f"mld={sys.executable} {TOY}", "device=cpu"],
                          cwd=Path(plan_file).parent, env=ENV, capture_output=True, text=True)


def test_the_workflow_makes_the_same_rows(unscored, undisturbed, root):
    code, said, why = reproduce(unscored, "toy", "--dry-run", "--json")
    assert code == 0, why
    path = unscored.parent / "plan.json"
    path.write_text(said)
    todo = [job["name"] for job in json.loads(said)["jobs"] if not job["done"]]
    dry = snakemake(root, path, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert set(re.findall(r"^(?:local)?rule (\S+):", dry.stdout + dry.stderr, re.M)) == {"all", *todo} and not list(unscored.rglob("rows.csv"))
    done = snakemake(root, path)
    assert done.returncode == 0, done.stderr
    pd.testing.assert_frame_equal(rows(unscored), rows(undisturbed))
    assert "Nothing to be done" in (again := snakemake(root, path)).stdout + again.stderr
