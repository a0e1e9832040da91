"The notebooks of the tables: their parameters, what is refused, and one of each kind from end to end."
import ast
from types import SimpleNamespace

import nbformat
import papermill
import pytest
import torch

from mld import measure
from mld.baselines import recipe
from mld.cli import execute, parameters_of, table_notebook
from mld.data.dataset import DATASETS
from mld.data.files import RECIPES
from mld.experiment import OpenTable, Run, table_folder
from mld.measure import all_rows_of, measurable
from mld.settings import PRESETS, TABLES, TINY, settings_for
from mld.stages import read_row_file

STANDARD = {"source": "", "preset": "smoke", "models": [], "seeds": [0], "out": "runs", "device": "auto", "data": "", "overrides": {}}
PAPERS = [name for name, table in TABLES.items() if table.models]


def parameters(name):
    return papermill.inspect_notebook(str(table_notebook(name)))


def test_every_table_of_the_paper_has_its_notebook(root):
    assert {p.stem for p in (root / "nbs" / "tables").glob("*.ipynb")} == {*PAPERS, "polydigits"}


@pytest.mark.parametrize("name", PAPERS)
def test_parameters_are_the_standard_ones_and_the_defaults_are_smoke(name):
    found = parameters(name)
    own = {k: ast.literal_eval(v["default"]) for k, v in found.items()}
    more = {"datasets"} if len(TABLES[name].datasets) > 1 else set()
    assert {k: own[k] for k in STANDARD} == STANDARD and set(own) - set(STANDARD) == more
    assert set(own.get("datasets", [])) <= set(TABLES[name].datasets)
    assert all(v["help"] for v in found.values())


@pytest.mark.parametrize("name", PAPERS)
def test_a_notebook_shows_its_result_twice_and_opens_its_own_table(name):
    cells = [c.source for c in nbformat.read(table_notebook(name), 4).cells if c.cell_type == "code"]
    assert f'OpenTable("{name}", globals())' in cells[1]
    assert sum("layout.sections(" in source for source in cells) == 2 and "layout.sections(" in cells[-1]
    assert all(len(source.splitlines()) <= 12 for source in cells[:1] + cells[3:])


@pytest.mark.parametrize("table, asked, settings, why", [
    ("mnist_svhn", {"seed": 1}, [], "has no parameter seed; known: source, preset, models, seeds"),
    ("polydigits", {"seeds": [1]}, [], "has no parameter seeds; known: preset, seed"),
    ("mnist_svhn", {"models": ["MDL"]}, [], "unknown model of this table 'MDL'; known: MLD"),
    ("mnist_svhn", {"source": "opne"}, [], "unknown source 'opne'; known: paper, open"),
    ("mnist_svhn", {"preset": "labtop"}, [], "unknown preset 'labtop'"),
    ("mnist_svhn", {}, ["step=5"], "unknown setting 'step'"),
    ("variants", {}, ["datasets=['cub']"], "unknown data set of this table 'cub'; known: mnist_svhn")])
def test_mistakes_are_refused_before_anything_runs(table, asked, settings, why):
    with pytest.raises(ValueError, match=why):
        parameters_of(table, asked, settings)


@pytest.mark.parametrize("name", PAPERS)
def test_every_model_is_known_in_every_preset(name):
    for dataset in TABLES[name].datasets:
        for preset in PRESETS[dataset]:
            for vary in TABLES[name].models.values():
                if settings_for(dataset, preset, vary).model != "mld": assert recipe(dataset, preset, vary["model"]).how.steps > 0


def test_what_differs_has_a_folder_of_its_own(tmp_path):
    cases = [{}, {"seeds": [1]}, {"seeds": [0, 1]}, {"source": "open"}, {"models": ["MLD"]}, {"models": ["MLD-Uni"]}, {"overrides": {"steps": 5}}, {"preset": "laptop"}]
    folders = [table_folder(tmp_path, "mnist_svhn", **case) for case in cases]
    assert len(set(folders)) == len(cases)
    table = OpenTable("mnist_svhn", {**STANDARD, "out": str(tmp_path), "models": ["MLD"], "source": "open"})
    assert table.folder not in {run.folder for run in table.runs} and table.folder.parent == table.runs[0].folder.parent


def source_here(name):
    if "embedded" in DATASETS[name]: return "embedded"
    if not RECIPES[name]["open"].folder(None).exists(): pytest.skip(f"no data of {name} here; MLD_DATA names its folder")
    return "open"


def run_tiny(table, dataset, tmp_path, models, **more):
    source = source_here(dataset)
    overrides = {k: v for k, v in TINY.items() if not k.startswith(("ae_", "clf_"))}
    asked = {"models": models, "source": source, "out": str(tmp_path), "device": "cpu", **more}
    its, folder = parameters_of(table, asked, [f"{k}={v}" for k, v in overrides.items()])
    execute(table_notebook(table), folder / "notebook.ipynb", its)
    rows = read_row_file(folder / "rows.csv")
    assert set(rows.dataset) == {dataset} and set(rows.source) == {source} and rows.value.notna().all()
    assert list((folder / "figures").glob("*.png"))
    told = "\n".join(out.data.get("text/markdown", "") for c in nbformat.read(folder / "notebook.ipynb", 4).cells for out in c.get("outputs", []) if "data" in out)
    return rows, told, folder


def test_a_table_of_classes_runs_from_end_to_end(tmp_path):
    pytest.importorskip("multivae")
    rows, told, folder = run_tiny("mnist_svhn", "mnist_svhn", tmp_path, ["MLD", "MOPOE"])
    assert set(rows.model) == {"real", "reconstruction", "MLD", "MOPOE"} and {"coherence", "fmd", "samples a second"} <= set(rows.metric)
    assert "coherence: mnist_svhn, " in told and "published" in told and "beside the paper" not in told
    assert {"joint_mnist_svhn_MLD.png", "given_svhn_mnist_svhn_MOPOE.png", "failures_mnist_svhn_MLD.png"} <= {p.name for p in (folder / "figures").iterdir()}


def test_a_table_of_captions_runs_from_end_to_end(tmp_path):
    rows, told, _ = run_tiny("cub", "cub", tmp_path, ["MLD"])
    assert {"f1"} == set(rows.metric) - {"training seconds", "samples a second", "fid", "clip"} and "coherence: cub, " in told


def test_a_table_of_several_data_sets_runs_from_end_to_end(tmp_path):
    rows, told, _ = run_tiny("cost", "mhd", tmp_path, ["MLD"], datasets=["mhd"])
    assert set(rows.table) == {"cost"} and "cost: mhd, " in told


@pytest.fixture
def run(tmp_path):
    return Run("polydigits", out=tmp_path, overrides=TINY, device="cpu", progress=False)


def test_without_weights_the_rest_is_measured(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "nothing"))
    here, missing = measurable(run, ["coherence", "fid", "fad", "f1"])
    assert here == ["coherence"] and len(missing) == 1 and missing[0].startswith("fid, not run here") and "pt_inception" in missing[0]


def test_with_weights_their_metrics_have_a_file_of_their_own(run, monkeypatch):
    without = all_rows_of(run) if not measurable(run)[0] else None
    monkeypatch.setitem(measure.LOOKS, "inception", lambda run: dict.fromkeys(run.data.names, lambda x: x.flatten(1)[:, :4]))
    rows = all_rows_of(run)
    assert "fid" in set(rows.metric) and "fid" in set(read_row_file(run.folder / "rows-fid.csv").metric)
    assert without is None or "fid" not in set(read_row_file(run.folder / "rows.csv").metric)
    assert not rows.duplicated(["model", "metric", "given", "target", "sampler"]).any()


def test_a_caption_is_compared_with_what_it_was_made_of():
    held = torch.tensor([2, 0])
    images = torch.eye(4)
    run = SimpleNamespace(held_out=held, protocol=SimpleNamespace(paired=False))
    score = lambda made, given: measure.caption_fit(run, made, {"image": images, "sentence": torch.zeros(4, 4)}, given)
    assert score({"sentence": images[held]}, True) == {("clip", "sentence"): 2.5}
    assert score({"sentence": images[[2, 1]]}, True) == {("clip", "sentence"): 1.25}
    assert score({"image": images, "sentence": 3 * images}, False) == {("clip", "joint"): 2.5}
