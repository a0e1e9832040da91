"Judges, protocols and rows, on runs as small as they can be; and coherence beside another implementation of it."
from types import SimpleNamespace

import pytest
import torch

from mld.experiment import BaselineRun, ExactRun, Run, make_run, reopen
from mld.measure import Judge, clip_look, measure_bounds, rows_of
from mld.metrics.coherence import coherence_by_class, joint_coherence, read
from mld.stages import ROW


@pytest.fixture
def run(tiny, tmp_path):
    return Run("polydigits", out=tmp_path, overrides={**tiny, "n_test": 200, "n_given": 150, "n_joint": 140}, device="cpu", progress=False)


def test_a_model_that_returns_one_perfect_tuple_is_coherent_and_fails_recall(run):
    judge, real = Judge(run, ["coherence", "fmd", "diversity"]), run.data.test.rows()
    seen = read(run.classifiers, real)
    agreed = (torch.stack(list(seen.values())) == next(iter(seen.values()))).all(0).nonzero()
    if not len(agreed):
        pytest.skip("classifiers of so few steps agree on nothing")
    same = {name: x[agreed[0]].expand(140, -1, -1, -1) for name, x in real.items()}
    values = {(r["metric"], r["target"]): r["value"] for r in judge(same)}
    assert values["coherence", "joint"] == 1
    assert all(values["recall", name] < .05 and values["coverage", name] < .2 for name in run.data.names)


def test_the_test_split_against_itself_is_at_no_distance(run):
    values = {(r["metric"], r["target"]): r["value"] for r in Judge(run, ["fmd", "diversity"])(run.data.test.rows())}
    for name in run.data.names:
        assert abs(values["fmd", name]) < 1e-6 and values["precision", name] == values["recall", name] == 1


def test_a_metric_is_blind_to_how_data_is_stored(run):
    judge, index = Judge(run), slice(0, 140)
    floats, stored = run.data.test.rows(index), {k: x[index] for k, x in run.data.test.batch.items()}
    assert [r["value"] for r in judge(floats)] == pytest.approx([r["value"] for r in judge(stored)], abs=1e-5)


def test_the_protocols_differ_in_what_is_conditioned_on_and_compared_with(tiny, tmp_path):
    ours, paper = (Run("polydigits", out=tmp_path, overrides={**tiny, "protocol": name}, device="cpu", progress=False) for name in ("held_out", "paper"))
    assert paper.held_out.tolist() == list(range(tiny["n_given"])) != ours.held_out.tolist()
    assert ours.held_out.tolist() == Run("polydigits", out=tmp_path, overrides=tiny, device="cpu", seed=7).held_out.tolist()
    assert len(ours.reference["view0"]) == tiny["n_test"] and torch.equal(paper.reference["view0"], paper.conditions()["view0"])
    with pytest.raises(ValueError, match="known: held_out, paper"):
        Run("polydigits", out=tmp_path, overrides={**tiny, "protocol": "papper"})


def test_validation_data_is_compared_with_test_data(tmp_path):
    "What real data reaches is no distance of a split to itself."
    run = ExactRun("toy", out=tmp_path, overrides={"protocol": "validation", "n_joint": 30, "n_given": 20}, device="cpu", progress=False)
    seen = []
    measure_bounds(run, lambda batch, given=False: seen.append(batch) or [])
    assert torch.equal(seen[0]["z0"], run.conditions()["z0"]) and torch.equal(seen[1]["z0"], run.data.test.batch["z0"][:30])


@pytest.mark.parametrize("protocol, split", [("held_out", "n_test"), ("validation", "n_val")])
def test_other_held_out_tuples_are_other_samples(tmp_path, protocol, split):
    "of a baseline, too, whose training knows nothing of them."
    for model in ("mld", "mopoe"):
        one, other = (make_run("polydigits", out=tmp_path, overrides={"model": model, "n_train": 64, "n_val": 20, "n_test": 20, split: n, "protocol": protocol}, device="cpu")
                      for n in (30, 31))
        assert one.request_key(("view0",)) != other.request_key(("view0",)) and one.request_key(()) == other.request_key(())


def test_clip_sees_bytes_as_it_sees_floats(monkeypatch, tmp_path):
    run = Run("cub", source="embedded", out=tmp_path, overrides={"n_train": 64, "n_val": 10, "n_test": 10}, device="cpu")
    seen = []
    clip = SimpleNamespace(model=torch.nn.Identity(), encode_image=lambda x: seen.append(x), encode_text=len)
    monkeypatch.setattr("mld.measure.load_clip", lambda: clip)
    stored = run.data.test.batch["image"][range(4)]
    assert stored.dtype == torch.uint8
    look = clip_look(run)["image"]
    look(stored), look(run.data.test.rows(range(4), ["image"])["image"])
    assert torch.equal(*seen) and 0 < seen[0].mean() < 1


def test_more_metrics_of_a_finished_run_leave_its_rows_alone(tiny, tmp_path):
    run = Run("polydigits", out=tmp_path, overrides=tiny, device="cpu", progress=False)
    rows_of(run)
    before = (run.folder / "rows.csv").read_text()
    more = rows_of(reopen(run.folder, device="cpu", progress=False), ["fmd_infinity"])
    assert "fmd_infinity" in set(more.metric) and (run.folder / "rows.csv").read_text() == before
    assert (run.folder / "rows-fmd_infinity.csv").exists() and list(more) == ROW


def test_a_moved_run_is_reopened_where_it_is(tiny, tmp_path):
    run = Run("polydigits", out=tmp_path / "here", overrides=tiny, device="cpu", progress=False)
    run.classifier_stages
    (tmp_path / "here").rename(tmp_path / "there")
    again = reopen(tmp_path / "there" / run.folder.relative_to(tmp_path / "here"), progress=False)
    assert again.stages == tmp_path / "there" / "stages" and not (tmp_path / "here").exists()


def test_missing_weights_stop_before_anything_is_measured(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="pt_inception"):
        Judge(run, ["fid"])


def test_a_baseline_makes_rows_of_the_same_kind(tiny, tmp_path):
    pytest.importorskip("multivae")
    vary = {"model": "mopoe", "baseline": {"latent": 8, "steps": 3}}
    rows = rows_of(make_run("polydigits", table="comparison", variant="mopoe", vary=vary, out=tmp_path, overrides=tiny, device="cpu", progress=False))
    assert set(rows.model) == {"real", "reconstruction", "MOPOE"} and set(rows.sampler) == {"", "own", "mixture"}
    assert {"training seconds", "samples a second"} <= set(rows.metric) and rows.value.notna().all()
    assert (rows[rows.sampler == "mixture"].given == "").all()


def test_two_baselines_of_one_recipe_are_two_models(tiny, tmp_path):
    pytest.importorskip("multivae")
    mopoe, mmvae = (make_run("polydigits", vary={"model": name, "baseline": {"latent": 8, "steps": 3}}, out=tmp_path, overrides=tiny,
                             device="cpu", progress=False) for name in ("mopoe", "mmvae"))
    assert mopoe.fitted.key != mmvae.fitted.key and mopoe.samples("own").key != mmvae.samples("own").key


def test_coherence_is_that_of_multivae(tmp_path):
    pytest.importorskip("multivae")
    overrides = dict(n_train=2000, n_val=60, n_test=2000, clf_steps=250, clf_batch=64, n_joint=2000, n_given=2000, model="mopoe",
                     baseline={"latent": 16, "steps": 150, "batch_size": 64, "precision": "fp32"})
    run = BaselineRun("polydigits", out=tmp_path, overrides=overrides, device="cpu", progress=False)
    model = run.model
    from multivae.data.datasets.base import MultimodalBaseDataset
    from multivae.metrics import CoherenceEvaluator, CoherenceEvaluatorConfig
    order = {name: run.conditions([name])[name] for name in model.names}
    theirs = CoherenceEvaluator(model.vae, run.classifiers, MultimodalBaseDataset(order, run.labels),
                                eval_config=CoherenceEvaluatorConfig(batch_size=500, num_classes=10, nb_samples_for_joint=2000))
    torch.manual_seed(0)
    joint, (each, mean, _) = theirs.joint_coherence().item(), theirs.coherence_from_subset(["view0"], return_accuracies_per_labels=True)
    seen = read(run.classifiers, run.generated("own"))
    assert joint_coherence(seen) == pytest.approx(joint, abs=.04)
    by_class = coherence_by_class(read(run.classifiers, run.generated("own", ("view0",))), run.labels)
    assert mean > .15, "nothing was learnt that could be compared"
    for name in ("view1", "view2"):  # MultiVae takes the mean over classes
        assert by_class[name].mean() == pytest.approx(each[f"view0_to_{name}"].item(), abs=.04)


def test_the_weaker_network_of_a_joint_one_sees_what_is_given_as_noisy_as_the_rest(tmp_path):
    small = dict(n_train=300, n_val=60, n_test=60, width=32, groups=4, time_width=16, steps=10, warmup=2, batch_size=64, n_joint=20, n_given=20, weaker_steps=5)
    run = make_run("toy", out=tmp_path, device="cpu", progress=False, vary={"draw": "inpaint", "condition": "renoise"},
                   overrides=small | {"samplers": {"auto": {"sampler": "dpm", "steps": 4, "autoguidance": .5}}})
    seen, weaker = [], run.weaker.model.denoiser
    weaker.run = lambda z_t, t: (seen.append(t), torch.zeros_like(z_t))[1]
    run.samples("auto", ("z0",))
    assert len(seen) == 4 and all((t == t[:, :1]).all() and (t > 0).all() for t in seen)
