"Every study runs from end to end, as small as it can be, and leaves rows and figures."
import pytest

from mld.cli import execute, parameters_of, table_notebook
from mld.stages import read_row_file

SMALL = ["steps=20", "warmup=2", "n_train=500", "n_val=60", "n_test=200", "width=32", "n_joint=100", "n_given=50"]
ONE = "samplers={'dpm 3': {'sampler': 'dpm', 'steps': 3}}"
STUDIES = {
    "partitions": [ONE], "scores": ["times=[0.1, 0.5]", "n=100"], "incomplete": [ONE, "shares=[0.0, 0.5]", "tuples=400"],
    "p_joint_and_time": [ONE, "p_joints=[0.2, 0.8]", "processes=['vp_0.5', 'vp']", "modalities=[2, 3]"],
    "one_or_many": [ONE, "budgets=[0.5, 1.0]", "tasks=[[], ['z0']]"],
    "recipe": [ONE, "variants={'paper': {'draw': 'batch', 'predict': 'eps', 'times': 'uniform'}, 'ours': {}}"],
    "guidance": ["weights=[0.0, 1.0]", "intervals=[[0.1, 0.6]]", "auto=[0.5]", "sampler_steps=4", "datasets=['toy']"],
    "samplers": ["samplers={'dpm 3': {'sampler': 'dpm', 'steps': 3}, 'repaint 6': {'sampler': 'repaint', 'steps': 4, 'length': 2, 'passes': 2}}", "datasets=['toy']"],
    "speed": ["datasets=['toy']", "rounds=1", "compile=False"],
    "baselines": ["models=['mopoe']", "baseline={'latent': 8, 'steps': 3}", "clf_steps=5", "ae_steps=3"]}


def test_every_study_is_tested(root):
    assert set(STUDIES) == {p.stem for p in (root / "nbs" / "studies").glob("*.ipynb")}


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_runs_from_end_to_end(name, tmp_path):
    its, folder = parameters_of(name, {"preset": "smoke", "out": str(tmp_path), "device": "cpu"}, [*SMALL, *STUDIES[name]])
    execute(table_notebook(name), folder / "notebook.ipynb", its)
    rows = read_row_file(folder / "rows.csv")
    assert len(rows) and rows.value.notna().all() and set(rows.table) == {name}
    assert list((folder / "figures").glob("*.png")) and (folder / "notebook.html").exists()
