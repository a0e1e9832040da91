"The VAE baselines behind the face of an MLD: each of them trains, generates, is saved, resumes, and says what is wrong."
import builtins
import json
import signal
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch

pytest.importorskip("multivae")

from mld import baselines
from mld.baselines import BASELINES, RECIPES, Baseline, aggregate, log_likelihood, recipe
from mld.data.polydigits import polydigits
from mld.modality import Modality, subsets
from mld.training import CorruptFile, Training, save_weights

SMALL = {"nexus": dict(latent=4, message=8, hidden=[8, 8]), **dict.fromkeys(("mmvae_plus", "mmvae_plus_10", "cmvae"), dict(latent=4, private=3))}
HOW = Training(steps=2, batch_size=16, lr=1e-3)


@pytest.fixture(scope="module")
def data():
    return polydigits(n_train=64, n_val=8, n_test=8)


def make(data, name, seed=0):
    torch.manual_seed(seed)
    return Baseline(data.modalities, name, components=2, **SMALL.get(name, dict(latent=6)))


def equal(a, b):
    return all(torch.equal(a[k], b[k]) for k in a) and a.keys() == b.keys()


@pytest.mark.parametrize("name", BASELINES)
def test_trains_generates_and_is_saved(name, data, tmp_path):
    model = make(data, name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    history = model.fit(data.train.batch, HOW, progress=False)
    assert history[-1]["step"] == 2 and torch.isfinite(torch.tensor(history[-1][name])) and not model.training
    learned = [k for k, p in model.named_parameters() if p.requires_grad]
    assert learned and all(not torch.equal(before[k], model.state_dict()[k]) for k in learned)
    model.fit_prior(data.train.batch)
    cases = [dict(n=5), dict(n=5, prior="mixture"), dict(n=1)]
    cases += [dict(n=2, given=data.test.rows(slice(0, 3), known)) for known in subsets(data.names, strict=True)]
    cases += [dict(n=2, given=data.test.rows(slice(0, 3)), want=["view1"])]
    made = [model.generate(**case, seed=3) for case in cases]
    for case, out in zip(cases, made):
        rows = case["n"] * (3 if "given" in case else 1)
        want = case.get("want") or [n for n in data.names if n not in case.get("given", {})]
        assert {k: tuple(x.shape) for k, x in out.items()} == {k: (rows, 3, 28, 28) for k in want}
        assert all(x.isfinite().all() and x.dtype == torch.float32 for x in out.values())
    assert not equal(made[0], made[1])
    model.save(tmp_path / "model.safetensors")
    again = Baseline.load(tmp_path / "model.safetensors")
    assert (again.name, again.names, again.modalities) == (name, data.names, data.modalities)
    assert all(equal(again.generate(**case, seed=3), out) for case, out in zip(cases, made))
    assert not equal(again.generate(5, seed=4), made[0])


def test_several_samples_of_a_condition_lie_side_by_side(data):
    model, given, encoded = make(data, "mopoe"), data.test.rows(slice(0, 3), ["view0"]), []
    posterior = model.posterior
    model.posterior = lambda given: (encoded.append(given["view0"]), posterior(given))[1]
    model.generate(2, given, chunk=4)
    assert [len(x) for x in encoded] == [4, 2]
    assert torch.equal(torch.cat(encoded), given["view0"].repeat_interleave(2, 0))


def test_given_several_a_mixture_believes_each_about_as_often(data):
    "And a private latent of a given modality is always its own."
    model, given = make(data, "mmvae_plus"), data.test.rows(slice(0, 1), ["view0", "view2"])
    given = {k: x.expand(400, -1, -1, -1) for k, x in given.items()}
    with torch.no_grad():
        for k, name in enumerate(given):  # no spread, and means far apart
            last = [m for m in model.vae.encoders[name].modules() if isinstance(m, torch.nn.Linear)][-1]
            last.weight.zero_(), last.bias.zero_()
            last.bias[:4], last.bias[8:11] = 100. * (k + 1), 1000. * (k + 1)
    torch.manual_seed(0)
    z, private = model.posterior(given)
    assert ((z - 100).abs().max(1).values < 50).float().mean() == pytest.approx(.5, abs=.1)
    assert [private[name].mean().round(decimals=-2).item() for name in data.names] == [1000., 0., 2000.]


@pytest.mark.parametrize("name", ["mvae", "nexus", "mopoe", "mmvae_plus"])
def test_resumes_to_the_same_weights(name, data, tmp_path):
    how = Training(steps=6, batch_size=16, lr=1e-3, cooldown=.5)
    straight = make(data, name)
    straight.fit(data.train.batch, how, seed=1, progress=False)
    broken = make(data, name)
    loss = broken.loss
    def interrupted(batch, generator, calls=[]):
        calls.append(1)
        if len(calls) == 3: signal.raise_signal(signal.SIGTERM)
        return loss(batch, generator)
    broken.loss = interrupted
    with pytest.raises(KeyboardInterrupt, match="step 3"):
        broken.fit(data.train.batch, how, seed=1, folder=tmp_path, progress=False)
    resumed = make(data, name, seed=9)
    resumed.fit(data.train.batch, how, seed=1, folder=tmp_path, progress=False)
    assert int(resumed.step) == 6 and equal(straight.state_dict(), resumed.state_dict())


def test_global_random_state_is_left_alone(data):
    model = make(data, "mopoe")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model.fit(data.train.batch, HOW, progress=False)
    model.fit_prior(data.train.batch), model.generate(3, prior="mixture")
    assert torch.equal(before, torch.get_rng_state())


def test_divergences_come_in_over_the_warm_up(data):
    torch.manual_seed(0)
    model = Baseline(data.modalities, "nexus", latent=4, message=8, hidden=[8], warmup=4, beta=1000., bottom_beta=1000.)
    inputs = model.inputs(data.train.rows(slice(0, 16)))
    losses = []
    for epoch in (1, 2, 4, 8):
        torch.manual_seed(0)
        losses.append(model.vae(inputs, epoch=epoch).loss.item())
    assert losses[0] < losses[1] < losses[2] == losses[3]
    assert losses[2] - losses[1] == pytest.approx(2 * (losses[1] - losses[0]), rel=1e-2)


def test_mmvae_is_the_mean_over_experts(data):
    "Reconstruction from each expert's share of the batch, and the mean of the analytic divergences."
    model = make(data, "mmvae").eval()
    model.vae.model_config.beta = 3.
    batch = {k: x.float() / 255 for k, x in data.train.rows(slice(0, 15)).items()}
    torch.manual_seed(0)
    out = model.vae(model.inputs(batch))
    torch.manual_seed(0)
    heads = {name: model.vae.encoders[name](x) for name, x in batch.items()}
    mean = torch.cat([heads[name].embedding[5 * i:5 * i + 5] for i, name in enumerate(data.names)])
    log_var = torch.cat([heads[name].log_covariance[5 * i:5 * i + 5] for i, name in enumerate(data.names)])
    z = torch.distributions.Normal(mean, (log_var / 2).exp()).rsample()
    error = sum(m.loss(batch[m.name], model.vae.decoders[m.name](z).reconstruction).mean() for m in data.modalities)
    divergence = sum((h.embedding ** 2 + h.log_covariance.exp() - h.log_covariance - 1).sum(1).mean() / 2 for h in heads.values()) / 3
    torch.testing.assert_close(out.loss, error + 3 * divergence)


def test_weights_scale_the_likelihood_of_a_modality(data):
    batch = data.train.rows(slice(0, 16))
    def loss(**weights):
        torch.manual_seed(0)
        model = Baseline(data.modalities, "mopoe", latent=6, beta=0., weights=weights).eval()
        torch.manual_seed(0)
        return model.loss(batch)["mopoe"].item()
    base, double, triple = loss(), loss(view1=2.), loss(view1=3.)
    assert double - base > 1 and triple - base == pytest.approx(2 * (double - base), rel=1e-3)


@pytest.mark.parametrize("likelihood", ["gaussian", "laplace", "bernoulli", "categorical"])
def test_likelihoods_are_those_of_the_modality(likelihood):
    m = Modality("x", (4, 3), 2, "linear", likelihood)
    x = torch.rand(5, 4, 3)  # soft targets too
    x_hat = torch.randn(7, 5, 4, 3)
    together = log_likelihood(m, x_hat, x)
    assert together.shape == (7, 5)
    torch.testing.assert_close(together, torch.stack([-m.loss(x, one) for one in x_hat]))


def test_log_variance_is_free_of_the_encoders_last_normalisation(data):
    net = baselines.body(data.modalities[0], 8)
    with torch.no_grad(): net[-1].weight.mul_(10)
    assert net(torch.rand(64, 3, 28, 28)).std(0).mean() > 1.5


def test_messages_are_dropped_as_often_as_asked():
    torch.manual_seed(0)
    messages = {name: torch.full((2000, 3), float(10 ** k)) for k, name in enumerate("abcd")}
    everything = (1 + 10 + 100 + 1000) / 4
    full = (aggregate(.3, None, messages)[:, 0] == everything).float().mean()
    assert full == pytest.approx(.7, abs=.04)
    assert (aggregate(0., None, messages) == everything).all()
    means = torch.tensor([sum(10. ** k for k in s) / len(s) for s in subsets(range(4), strict=True)])
    dropped = aggregate(1., None, messages)[:, 0]
    assert (dropped[:, None] - means).abs().min(1).values.max() < 1e-3 and len(dropped.round(decimals=2).unique()) == len(means)


def test_a_nan_is_reported_like_everywhere_else(data):
    from mld.training import Diverged
    broken = {**data.train.batch, "view1": torch.full((64, 3, 28, 28), float("inf"))}
    for name in ("mopoe", "mvtcae"):
        model = make(data, name)
        with pytest.raises(Diverged, match=name):
            baselines.train(model, model.loss, broken, Training(10, 16), progress=False)


def test_fitting_again_starts_the_warm_up_again_and_forgets_the_mixture(data):
    model = make(data, "mopoe")
    model.fit(data.train.batch, HOW, progress=False)
    model.fit_prior(data.train.batch)
    model.fit(data.train.batch, HOW, progress=False)
    assert int(model.step) == HOW.steps
    with pytest.raises(ValueError, match="fit_prior"): model.generate(2, prior="mixture")


def test_unknown_names_list_the_known_ones(data):
    model = make(data, "mopoe")
    for call, why in [(lambda: Baseline(data.modalities, "mvea"), "unknown baseline 'mvea'; known: mvae, mmvae, mopoe, nexus"),
                      (lambda: model.generate(prior="flow"), "unknown prior 'flow'; known: own, mixture"),
                      (lambda: model.generate(given={"view9": data.test.rows(slice(0, 2))["view0"]}), "unknown modality 'view9'"),
                      (lambda: model.generate(want=["view9"]), "unknown modality 'view9'"),
                      (lambda: model.generate(n=0), "at least 1"),
                      (lambda: model.fit({"view0": data.train.batch["view0"]}, HOW), "missing modality 'view1', 'view2'"),
                      (lambda: recipe("polydigits", "papre", "mvae"), "unknown preset 'papre'; known: smoke, laptop, best, paper"),
                      (lambda: recipe("mnist", "paper", "mvae"), "unknown data set of baselines 'mnist'"),
                      (lambda: recipe("mhd", "paper", "mvea"), "unknown baseline 'mvea'")]:
        with pytest.raises(ValueError) as e: call()
        assert why in str(e.value)
    with pytest.raises(TypeError, match="bta"): Baseline(data.modalities, "mvae", bta=2.)


def test_damaged_and_foreign_files_are_refused(data, tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(FileNotFoundError): Baseline.load(path)
    make(data, "mopoe").save(path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CorruptFile): Baseline.load(path)
    save_weights(path, {"x": torch.zeros(1)}, {"kind": "MLD"})
    with pytest.raises(CorruptFile, match="no Baseline"): Baseline.load(path)


@pytest.mark.parametrize("preset", RECIPES)
def test_every_recipe_fits_its_model_and_data_set(preset):
    import inspect
    for dataset in RECIPES[preset]:
        for name in BASELINES:
            made = recipe(dataset, preset, name)
            takes = {*inspect.signature(BASELINES[name]).parameters, "likelihoods", "components"}
            assert set(made.hyper) <= takes, (dataset, name)
            json.dumps([made.hyper, asdict(made.how)])


def test_paper_models_can_be_built():
    views = [Modality(f"m{v}", (3, 28, 28), 160, "polymnist", "laplace") for v in range(2)]
    for name in ("mvae", "nexus", "mmvae_plus"): Baseline(views, name, components=1, **recipe("polymnist", "paper", name).hyper)


def test_without_multivae_it_says_what_to_install(data, monkeypatch):
    baselines.multivae.cache_clear(), baselines.coders.cache_clear()
    find = builtins.__import__
    def missing(name, *args, **kwargs):
        if name.split(".")[0] == "multivae": raise ModuleNotFoundError("No module named 'multivae'", name="multivae")
        return find(name, *args, **kwargs)
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ModuleNotFoundError, match=r'pip install -e ".\[baselines\]"'): Baseline(data.modalities, "mvae")


def test_importing_the_kit_does_not_import_multivae():
    code = "import sys, mld.baselines; assert 'multivae' not in sys.modules and 'torchvision' not in sys.modules; print(*mld.baselines.BASELINES)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "mmvae_plus_10" in done.stdout
