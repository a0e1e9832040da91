"What every sampler promises, with every denoiser around a denoiser, on worlds whose answers are known."
import math
from functools import partial

import pytest
import torch
from torch import nn

from mld import samplers
from mld.denoiser import Denoiser
from mld.guidance import AutoGuidance, Guidance, Renoised, Without
from mld.modality import Modality, register_architecture
from mld.model import MLD, chain
from mld.samplers import GRIDS, SAMPLERS
from mld.sde import VPProcess
from mld.toy import ExactEps, Mixture, class_posterior, classify, coherence, energy_distance, moments

FEW = {"em": {"steps": 12}, "repaint": {"steps": 12, "length": 3, "passes": 2}, "ddim": {"steps": 8}, "heun": {"steps": 5}, "dpm": {"steps": 8},
       "dpm_sde": {"steps": 8}, "langevin": {"steps": 6}}
ENOUGH = {"em": {"steps": 150}, "repaint": {"steps": 80, "length": 4, "passes": 2}, "ddim": {"steps": 100}, "heun": {"steps": 30},
          "dpm": {"steps": 30}, "dpm_sde": {"steps": 60}, "langevin": {"steps": 60}}
AROUND = {"nothing": lambda d: d, "guidance": partial(Guidance, weight=.7), "guidance of each": partial(Guidance, weight=(.5, 0., 1.)),
          "autoguidance": lambda d: AutoGuidance(d, denoiser_of(Mixture(**SMALL, std=.6)), .5),
          "without": lambda d: Without(d, torch.tensor([False, False, True])),
          "renoised": lambda d: Renoised(d, torch.Generator().manual_seed(9)),
          "guidance around without": lambda d: Guidance(Without(d, torch.tensor([False, False, True])), .5, (.1, .8)),
          "without around autoguidance": lambda d: Without(AutoGuidance(d, denoiser_of(Mixture(**SMALL, std=.6)), .5), torch.tensor([False, True, False]))}
SMALL = dict(sizes=(2, 4, 3), n_classes=4, n_modes=2, spread=(1.3, 1., 1.))
D = sum(SMALL["sizes"])


def denoiser_of(toy):
    return Denoiser(ExactEps(toy), toy.sizes, predict="eps")


def sample(denoiser, sampler, z, given, seed=2, **options):
    return SAMPLERS[sampler](denoiser, z, torch.as_tensor(given), generator=torch.Generator().manual_seed(seed), **options)


@pytest.fixture(scope="module")
def toy():
    return Mixture(**SMALL)


@pytest.fixture
def exact(toy):
    return denoiser_of(toy)


@pytest.fixture(scope="module")
def real(toy):
    return toy.sample(4000, torch.Generator().manual_seed(1))[0]


class Bell(nn.Module):
    "The exact noise of a Gaussian with mean 2 and standard deviation s, under any process."
    def __init__(self, process, s=.5):
        super().__init__()
        self.process, self.s = process, s

    def forward(self, z_t, t):
        a, s = self.process.alpha_sigma(t)
        return s * (z_t - 2 * a) / (a**2 * self.s**2 + s**2)


class Cosine(VPProcess):
    "Reaches t = 1 with no signal at all: there the drift is infinite."
    def integral(self, t): return -2 * torch.cos(t * math.pi / 2).clamp(min=0).log()
    def time_at(self, integral): return torch.acos((-integral / 2).exp()) * 2 / math.pi
    def drift_diffusion(self, t):
        beta = math.pi * torch.tan(t * math.pi / 2)
        return -beta / 2, beta.sqrt()


def test_every_sampler_is_tested():
    assert set(FEW) == set(ENOUGH) == set(SAMPLERS)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_exact_score_gives_exact_moments_and_classes_whatever_is_given_in_a_row(toy, exact, real, sampler):
    masks, n = torch.tensor([[False] * 3, [True, False, False], [False, True, True]]), 2000
    made = sample(exact, sampler, real[7:8].expand(3 * n, -1), masks.repeat_interleave(n, 0), **ENOUGH[sampler]).split(n)
    for given, z, read in zip(masks, made, (0, 1, 0)):  # the class is read in a latent that is not given
        p = class_posterior(toy, real[7:8], given[None])[0]
        mean, cov = moments(toy, p)
        new = ~given[exact.owner]
        error = (z.mean(0) - mean)[new] / cov.diagonal()[new].sqrt()
        assert error.abs().max() < .1, "mean"
        assert ((z.T.cov() - cov)[new][:, new] / cov.diagonal()[new].max()).abs().max() < .12, "covariance"
        if not given.any(): assert (torch.bincount(classify(toy, z)[:, 0], minlength=4) / n - p_read(toy, real, 0)).abs().max() < .05, "classes"


def p_read(toy, real, m):
    "How often the Bayes classifier reads each class in latent m of real data."
    return torch.bincount(classify(toy, real)[:, m], minlength=4) / len(real)


@pytest.mark.parametrize("process", [VPProcess(), VPProcess(.1, 30.), Cosine()], ids=["vp", "steeper", "cosine"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_any_process_brings_a_gaussian_back(sampler, process):
    bell = Denoiser(Bell(process), (1,), process, predict="eps")
    made = sample(bell, sampler, torch.zeros(4000, 1), [False], **{**ENOUGH[sampler], "steps": 200})
    assert made.mean() == pytest.approx(2, abs=.04) and made.std() == pytest.approx(.5, abs=.03)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if s != "repaint"])
def test_every_grid_serves_every_solver(sampler, grid):
    bell = Denoiser(Bell(VPProcess()), (1,), predict="eps")
    made = sample(bell, sampler, torch.zeros(4000, 1), [False], **{**ENOUGH[sampler], "steps": 100}, grid=grid)
    assert made.mean() == pytest.approx(2, abs=.05) and made.std() == pytest.approx(.5, abs=.04)


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("grid", GRIDS)
def test_a_grid_has_that_many_steps_and_goes_down_to_0(grid, steps):
    for process in VPProcess(), Cosine():
        times = GRIDS[grid](process, steps)
        assert len(times) == steps + 1 and times[-1] == 0 and times == sorted(times, reverse=True) and .99 < times[0] <= 1


@pytest.mark.parametrize("sampler, order", [("ddim", 1), ("heun", 2), ("dpm", 2)])
def test_ode_solvers_converge_at_their_order(toy, sampler, order):
    exact = denoiser_of(Mixture(**SMALL))
    exact.net.toy.means = [mu.double() for mu in exact.net.toy.means]
    z, given = torch.zeros(200, D, dtype=torch.float64), [False] * 3
    fine = sample(exact, "heun", z, given, steps=320, grid="log_snr")
    errors = [(sample(exact, sampler, z, given, steps=k, grid="log_snr") - fine).norm(dim=1).median().item() for k in (40, 80, 160)]
    slopes = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert all(order - .35 < slope < order + .6 for slope in slopes), slopes


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_given_modalities_come_back_bit_for_bit(exact, real, sampler, around):
    given = torch.rand(64, 3, generator=torch.Generator().manual_seed(6)) < .5  # a subset for every sample
    made = sample(AROUND[around](exact), sampler, real[:64], given, **FEW[sampler])
    keep = given[:, exact.owner]
    assert torch.equal(made[keep], real[:64][keep]) and (made[~keep] != real[:64][~keep]).all() and made.isfinite().all()


@pytest.mark.parametrize("around", ["nothing", "guidance", "guidance of each", "autoguidance", "without"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_row_does_not_depend_on_what_is_given_in_others(exact, real, sampler, around):
    masks = torch.tensor([[False] * 3, [True, False, False], [False, True, True]])
    mixed = masks[torch.arange(30) % 3]
    made = sample(AROUND[around](exact), sampler, real[:30], mixed, **FEW[sampler])
    for given in masks:
        rows = (mixed == given).all(1)
        torch.testing.assert_close(made[rows], sample(AROUND[around](exact), sampler, real[:30], given, **FEW[sampler])[rows], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpm"])
def test_permuting_modalities_permutes_the_samples(toy, exact, real, sampler, monkeypatch):
    order = torch.tensor([2, 3, 4, 5, 6, 7, 8, 0, 1])  # latents 2, 3, 1
    swapped = Mixture(**{**SMALL, "sizes": (4, 3, 2)})
    swapped.means = toy.means[1:] + toy.means[:1]
    there = denoiser_of(swapped)
    here = sample(exact, sampler, real[:20], [False, True, False], **FEW[sampler])

    def begin(denoiser, z, given, generator):  # the same noise, in the other order
        z_1, _, _ = original(exact, real[:20], torch.tensor([False, True, False]), generator)
        return z_1[:, order], given.expand(20, 3), given.expand(20, 3)[:, there.owner]
    original = samplers.begin
    monkeypatch.setattr(samplers, "begin", begin)
    made = sample(there, sampler, real[:20][:, order], [True, False, False], **FEW[sampler])
    torch.testing.assert_close(made, here[:, order], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("sampler, calls", [("em", 12), ("repaint", 12 + 3 * 3), ("ddim", 8), ("heun", 9), ("dpm", 8), ("dpm_sde", 8), ("langevin", 11)])
def test_calls_are_counted_and_guidance_doubles_them_inside_its_interval(exact, real, sampler, calls):
    sample(exact, sampler, real[:4], [True, False, False], **FEW[sampler])
    assert exact.calls == calls
    for weight, given, interval, extra in [(1., [True, False, False], (0., 1.), 1), (1., [True, True, False], (0., 1.), 1), (1., [False] * 3, (0., 1.), 0),
                                           ((1., 2., 0.), [True, True, False], (0., 1.), 2), (1., [True, False, False], (.99999, 1.), 0)]:
        exact.calls = 0
        guided = Guidance(exact, weight, interval)
        sample(guided, sampler, real[:4], given, **FEW[sampler])
        first = 1 if interval[0] > .9 else 0  # the call at t = 1 is in that interval
        assert guided.calls == exact.calls == calls * (1 + extra) + first


def test_names_and_numbers_that_do_not_exist_are_refused_before_any_call(exact, real):
    given = torch.tensor([True, False, False])
    with pytest.raises(ValueError, match="unknown grid 'sigmoid'; known: uniform, log_snr, karras"): sample(exact, "heun", real, given, grid="sigmoid")
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"): sample(exact, "repaint", real, given, steps=0)
    with pytest.raises(ValueError, match=r"expected latents \(B, 9\)"): sample(exact, "langevin", real[:, 1:], given)
    with pytest.raises(ValueError, match="expected given as bool"): sample(exact, "ddim", real, given.float())
    with pytest.raises(ValueError, match="one for each of 3 modalities, got 2"): Guidance(exact, (1., 2.))
    with pytest.raises(ValueError, match="interval of t"): Guidance(exact, 1., (.5, .2))
    with pytest.raises(ValueError, match="expected absent as bool"): Without(exact, torch.tensor([0., 1., 0.]))
    with pytest.raises(ValueError, match="weaker denoiser of latents"): AutoGuidance(exact, denoiser_of(Mixture(sizes=(2, 3, 4))), 1.)
    assert exact.calls == 0


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_changes_nothing_changes_no_bit(exact, real, sampler):
    run = lambda denoiser, given=(True, False, False): sample(denoiser, sampler, real[:32], given, **FEW[sampler])
    plain = run(exact)
    assert torch.equal(run(Guidance(exact, 0.)), plain) and torch.equal(run(Guidance(exact, (0., 3., 3.))), plain)
    assert torch.equal(run(Guidance(exact, 3., (.99990, .99999))), plain)
    assert torch.equal(run(AutoGuidance(exact, exact, 3.)), plain)
    assert torch.equal(run(Without(exact, torch.tensor([True, False, False]))), plain)  # what is given stays
    assert torch.equal(run(Guidance(exact, 3.), [False] * 3), run(exact, [False] * 3))
    assert not torch.equal(run(Guidance(exact, 3.)), plain)


def test_weight_minus_one_forgets_the_condition(exact, real):
    made = sample(Guidance(exact, -1.), "heun", real[:50], [True, False, False])
    alone = sample(Without(exact, torch.tensor([True, False, False])), "heun", real[:50], [False] * 3)
    torch.testing.assert_close(made[:, 2:], alone[:, 2:], atol=1e-3, rtol=1e-3)


def test_guidance_buys_coherence_and_pays_in_distance(exact, toy, real):
    made = {w: sample(Guidance(exact, w) if w else exact, "heun", real[:2000], [True, False, False]) for w in (0., 1., 3.)}
    c, d = {w: coherence(toy, z) for w, z in made.items()}, {w: energy_distance(z, real[2000:]) for w, z in made.items()}
    assert c[0.] + .01 < c[1.] < c[3.] and d[0.] + .002 < d[1.] < d[3.], (c, d)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_without_gives_the_law_that_knows_nothing_of_what_is_absent(toy, exact, real, sampler):
    given, n = torch.tensor([True, False, False]), 2000
    made = sample(Without(exact, torch.tensor([False, False, True])), sampler, real[3:4].expand(n, -1), given, **ENOUGH[sampler])
    mean, cov = moments(toy, class_posterior(toy, real[3:4], given[None])[0])
    new = exact.owner == 1
    assert (made[:, new].mean(0) - mean[new]).abs().max() < .1
    assert (made[:, new].T.cov() - cov[new][:, new]).abs().max() < .12 * cov.diagonal()[new].max()
    assert made[:, exact.owner == 2].abs().max() < .3  # the mean, up to the step of the sampler


def test_the_network_never_sees_what_is_left_out(real):
    seen = []

    def net(z_t, t): seen.append((z_t.clone(), t.clone())); return torch.zeros_like(z_t)
    denoiser = Denoiser(net, SMALL["sizes"], predict="v")
    sample(Guidance(denoiser, 1.), "ddim", real[:200], [True, False, False], steps=4)
    (with_it, t), (without, t_out) = seen[2:4]
    assert torch.equal(with_it[:, :2], real[:200, :2]) and (t[:, 0] == 0).all() and (t_out[:, 0] == 1).all()
    assert torch.equal(with_it[:, 2:], without[:, 2:]) and torch.equal(t[:, 1:], t_out[:, 1:])
    assert without[:, :2].std() == pytest.approx(1, abs=.1) and (without[:, :2] * real[:200, :2]).mean().abs() < .2


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_network_sees_what_is_given_clean_at_every_call(real, sampler):
    seen = []

    def net(z_t, t): seen.append((z_t, t)); return z_t / 2
    given = torch.rand(64, 3, generator=torch.Generator().manual_seed(6)) < .5
    denoiser = Denoiser(net, SMALL["sizes"], predict="v")
    sample(denoiser, sampler, real[:64], given, **FEW[sampler])
    keep = given[:, denoiser.owner]
    for z_t, t in seen: assert torch.equal(z_t[keep], real[:64][keep]) and torch.equal(t == 0, given)


def test_a_joint_network_sees_what_is_given_as_noisy_as_the_rest_and_noised_afresh(real):
    seen = []

    def net(z_t, t): seen.append((z_t, t)); return torch.zeros_like(z_t)
    denoiser = Denoiser(net, SMALL["sizes"], predict="v")
    sample(Renoised(denoiser, torch.Generator().manual_seed(3)), "ddim", real[:2000], [True, True, False], steps=6)
    noises = []
    for z_t, t in seen:
        alpha_t, sigma_t = denoiser.scales(t)
        noises.append(((z_t - alpha_t * real[:2000]) / sigma_t)[:, :6])
        assert (t == t[0, 0]).all() and noises[-1].std() == pytest.approx(1, abs=.03)
    assert (noises[1] * noises[2]).mean().abs() < .03


def test_a_joint_network_is_conditioned_by_noising_what_is_given_and_by_jumps(toy, exact, real):
    def net(z_t, t): assert (t == t[:, :1]).all(); return exact.net(z_t, t)
    inpaint = Renoised(Denoiser(net, toy.sizes, predict="eps"), torch.Generator().manual_seed(3))
    run = lambda denoiser, sampler, **options: coherence(toy, sample(denoiser, sampler, real[:1000], [True, True, False], **options))
    conditional, plain = run(exact, "em", steps=60), run(inpaint, "em", steps=60)
    jumps = run(inpaint, "repaint", steps=60, length=6, passes=8)
    assert plain < jumps - .03 and jumps > conditional - .06, (conditional, plain, jumps)


def test_a_weaker_network_has_its_calls_counted(exact, toy, real):
    weaker = denoiser_of(toy)
    both = AutoGuidance(exact, weaker, 1., (.2, .6))
    sample(both, "em", real[:4], [False] * 3, steps=10)
    assert (exact.calls, weaker.calls, both.calls) == (10, 5, 15)


@pytest.fixture(scope="module")
def model():
    register_architecture("line", lambda m: nn.Linear(3, m.latent), lambda m: nn.Linear(m.latent, 3))
    torch.manual_seed(0)
    made = MLD([Modality(name, (3,), 2, "line") for name in "abc"], width=16, time_width=8, groups=4)
    nn.init.normal_(made.denoiser.net.head[-1].weight, std=.1)  # an untrained head answers 0 to everything
    return made


def test_a_model_leaves_modalities_out_and_takes_anything_around_its_denoiser(model):
    given, how = {"a": torch.rand(4, 3)}, dict(sampler="dpm", steps=4)
    z, along = model.sample(2, given, absent=["c"], **how), model.sample(2, given, **how)
    assert torch.equal(z[:, :2], model.encode(given)[:, :2].repeat_interleave(2, 0)) and (z[:, 4:] == 0).all()
    assert not torch.equal(z[:, 2:4], along[:, 2:4])
    made = model.generate(2, given, ["b"], alone=True, **how)
    assert list(made) == ["b"] and torch.equal(made["b"], model.decode(z)["b"])
    assert torch.equal(model.generate(2, given, ["b"], **how)["b"], model.decode(along)["b"])
    model.denoiser.calls = 0
    assert torch.equal(model.sample(2, given, around=partial(Guidance, weight=0.), **how), along) and model.denoiser.calls == 4  # nothing to ask twice for
    assert not torch.equal(model.sample(2, given, around=partial(Guidance, weight=1.), **how), along) and model.denoiser.calls == 4 + 8
    with pytest.raises(ValueError, match="'a' is both given and absent"): model.sample(2, given, absent=["a"])
    with pytest.raises(ValueError, match="unknown modality 'd'; known: a, b, c"): model.sample(2, given, absent=["d"])


def test_each_link_of_a_chain_knows_only_the_one_before(model):
    asked = []

    class Listening:
        modalities = model.modalities

        def generate(self, given, want, seed, **options):
            asked.append((given, want, seed, options))
            return {want[0]: torch.full((2, 3), 1. + len(asked))}
    links = chain(Listening(), {"a": torch.zeros(2, 3)}, ["b", "c", "a"], seed=5, alone=True)
    assert [list(given) for given, *_ in asked] == [["a"], ["b"], ["c"]] and [want for _, want, *_ in asked] == [["b"], ["c"], ["a"]]
    assert len({seed for *_, seed, _ in asked}) == 3 and all(options == {"alone": True} for *_, options in asked)
    assert torch.equal(asked[1][0]["b"], torch.ones(2, 3)) and [x.max() for x in links] == [1, 1, 1]  # within the limits of what can be given
    assert len(chain(model, {"a": torch.rand(4, 3)}, ["b", "a"], sampler="dpm", steps=3)) == 2


@pytest.mark.parametrize("sampler", list(FEW))
def test_a_weaker_network_misses_what_is_absent_too(model, sampler):
    seen = []

    def net(z_t, t): seen.append(t); return torch.zeros_like(z_t)
    weaker = Denoiser(net, model.denoiser.sizes)
    z = model.sample(2, {"a": torch.rand(4, 3)}, absent=["c"], around=lambda d: AutoGuidance(d, weaker, .5), sampler=sampler, **FEW[sampler])
    assert seen and all((t[:, 0] == 0).all() and (t[:, 2] == 1).all() for t in seen) and (z[:, 4:] == 0).all()
