"The command line and papermill, as a newcomer would use and misuse them."
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest

from mld.cli import execute, table_notebook
from mld.stages import read_row_file

MLD = str(Path(sys.executable).with_name("mld"))


def mld(*args, cwd, **kw):
    return subprocess.run([MLD, *map(str, args)], cwd=cwd, capture_output=True, text=True, **kw)


def sets(tiny):
    return [a for k, v in tiny.items() for a in ("--set", f"{k}={v}")]


def test_run_from_any_folder_leaves_everything_in_out(tiny, tmp_path, root):
    before = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True).stdout
    done = mld("run", "polydigits", "--seed", 3, "--out", "there", *sets(tiny), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "score network: 100%" in done.stderr, "no progress was shown"
    folder, = (tmp_path / "there" / "polydigits").iterdir()
    assert folder.name.endswith("-seed3")
    assert {"notebook.ipynb", "notebook.html", "rows.csv", "config.json", "figures"} <= {p.name for p in folder.iterdir()}
    rows = read_row_file(folder / "rows.csv")
    assert (rows.seed == 3).all() and rows.value.notna().all() and set(rows.sampler) == {"", "dpm", "em"}
    assert "coherence" in done.stdout and "coherence" in mld("report", "there", cwd=tmp_path).stdout
    nb = nbformat.read(folder / "notebook.ipynb", 4)
    assert not any("\r" in o.get("text", "")[:-1] for c in nb.cells for o in c.get("outputs", [])), "progress bars were not settled"
    assert subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True).stdout == before
    assert [p.name for p in tmp_path.iterdir()] == ["there"]
    kept = mld("publish", folder, "--results", "kept", "--figures", "joint*", cwd=tmp_path)
    assert kept.returncode == 0 and (tmp_path / "kept" / "RESULTS.md").exists(), kept.stderr
    table = tmp_path / "kept" / "polydigits"
    assert len(read_row_file(next(table.glob("*.csv")))) == len(rows) and any((table / "figures").glob("joint*.png"))
    text = next(table.glob("*.ipynb")).read_text()
    assert str(tmp_path) not in text and str(root) not in text, "the published notebook names folders of this machine"


@pytest.mark.parametrize("args, why", [
    (["run", "polydigit"], "unknown table 'polydigit'; known: ablation_p_joint"),
    (["run", "polydigits", "--preset", "labtop"], "unknown preset 'labtop'; known: smoke, laptop, best, paper"),
    (["run", "polydigits", "--set", "step=5"], "unknown setting 'step'; known: dataset, source"),
    (["run", "polydigits", "--set", "steps=many"], "setting 'steps' is int"),
    (["run", "polydigits", "--sede", "5"], "No such option"),
    (["run", "polydigits", "--set", "steps=-5"], "setting 'steps' must be at least 1, got -5"),
    (["run", "polydigits", "--source", "open"], "unknown source of polydigits 'open'; known: embedded"),
    (["run", "mhd", "--source", "open", "--data", "nowhere"], "nowhere; `mld data get mhd --source open` says where from"),
])
def test_mistakes_are_refused_before_anything_runs(args, why, tmp_path):
    done = mld(*args, cwd=tmp_path)
    assert done.returncode == 2 and why in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_raw_data_is_looked_for_beside_the_command(tmp_path, monkeypatch):
    "and not beside the notebook, which runs elsewhere."
    monkeypatch.delenv("MLD_DATA", raising=False)
    assert f"in {tmp_path / 'data'};" in mld("run", "mhd", "--source", "open", cwd=tmp_path).stderr


def test_plain_papermill_with_a_mistyped_parameter_fails(tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match="unknown parameter 'sede'; known: preset, seed"):
        papermill.execute_notebook(str(table_notebook("polydigits")), str(tmp_path / "out.ipynb"), {"sede": 3, "out": str(tmp_path)},
                                   kernel_name="python3", progress_bar=False)


def test_papermill_documents_the_parameters():
    known = papermill.inspect_notebook(str(table_notebook("polydigits")))
    assert {k: v["inferred_type_name"] for k, v in known.items()} == {
        "preset": "str", "seed": "int", "source": "str", "out": "str", "device": "str", "data": "str", "overrides": "dict"}
    assert all(v["help"] for v in known.values())


def test_a_failed_run_keeps_its_notebook_and_exits_with_its_error(tiny, tmp_path):
    done = mld("run", "polydigits", "--out", "runs", *sets(tiny | {"groups": 5}), cwd=tmp_path)
    assert done.returncode == 1 and "num_channels" in done.stderr
    notebook, = tmp_path.rglob("notebook.ipynb")
    assert "num_channels" in notebook.read_text() and str(notebook) in done.stderr
    assert not list(tmp_path.rglob("rows.csv"))


def test_a_notebook_without_parameters_cell_is_refused(tmp_path):
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("seed = 0")]), tmp_path / "nb.ipynb")
    with pytest.raises(ValueError, match="no cell tagged 'parameters'"):
        execute(tmp_path / "nb.ipynb", tmp_path / "out.ipynb", {"seed": 1})
