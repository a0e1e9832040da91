"The whole family: the paper's recipe as one member of it, other draws, processes and networks, and training on incomplete tuples."
import math

import pytest
import torch

from mld.denoiser import BALANCES, DRAWS, PREDICTIONS, Denoiser, hide_missing
from mld.modality import Modality, register_architecture, subsets
from mld.model import MLD
from mld.nets import NETS, MLPUNet, TokenTransformer, n_params
from mld.samplers import SAMPLERS, jump_schedule
from mld.sde import PROCESSES, TIMES, FlowPath, Process, VPProcess, importance, importance_norm, log_snr, time_at_log_snr, uniform
from mld.toy import ExactEps, Mixture, coherence, energy_distance
from mld.training import Training, load_weights, save_weights

SIZES = (4, 8, 16)
register_architecture("line", lambda m: torch.nn.Linear(m.shape[0], m.latent), lambda m: torch.nn.Linear(m.latent, m.shape[0]))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def diffused(t):
    return (t > 0) & (t < 1)


def shaken(net, std=.1):
    "All parameters random, so that nothing is zero by construction."
    g = seeded(9)
    with torch.no_grad():
        for p in net.parameters(): p.copy_(std * torch.randn(p.shape, generator=g))
    return net


# the paper is still the paper

@pytest.mark.parametrize("given", [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_a_zero_head_starts_at_D_for_every_subset(given):
    denoiser, g = Denoiser(MLPUNet(28, 3, width=32), SIZES, predict="eps"), seeded()
    t = torch.where(torch.tensor([m in given for m in range(3)]), 0., uniform(10_000, g)[:, None])
    z, eps = torch.randn(2, 10_000, 28, generator=g)
    assert denoiser.loss(z, t, eps).sum().item() == pytest.approx(28, abs=.4)


def test_the_loss_without_weights_is_the_published_formula_bit_for_bit():
    denoiser, g = Denoiser(shaken(MLPUNet(28, 3, width=32)), SIZES, predict="eps"), seeded()
    t, (z, eps) = DRAWS["sample"](64, 3, uniform, .5, g), torch.randn(2, 64, 28, generator=g)
    alpha_t, sigma_t = VPProcess().alpha_sigma(t[:, denoiser.owner])
    keep = (t > 0)[:, denoiser.owner]
    out = denoiser.net(torch.where(keep, alpha_t * z + sigma_t * eps, z), t)
    error = ((out - eps) * keep).square() * 28 / keep.sum(1, keepdim=True)
    assert torch.equal(denoiser.loss(z, t, eps), torch.stack([x.sum(1).mean() for x in error.split(SIZES, 1)]))


def test_the_papers_draw_shares_a_subset_and_takes_uniform_times():
    g, seen = seeded(), set()
    for _ in range(400):
        t = DRAWS["batch"](50, 3, TIMES["uniform"], .3, g)
        assert ((t == 0) == (t[:1] == 0)).all()
        assert (torch.where(t > 0, t, t.amax(1, keepdim=True)) == t.amax(1, keepdim=True)).all()
        seen.add(tuple((t[0] == 0).tolist()))
    assert len(seen) == 7 and (True,) * 3 not in seen
    times = torch.cat([DRAWS["batch"](50, 3, TIMES["uniform"], 1., g)[:, 0] for _ in range(400)])
    assert (times.sort().values - torch.linspace(0, 1, len(times))).abs().max() < .012  # Kolmogorov-Smirnov, 1.6 / sqrt(n)


def test_the_papers_schedule_and_networks():
    walk = torch.tensor(jump_schedule())
    assert (len(walk), (walk.diff() < 0).sum().item(), (walk.diff() > 0).sum().item()) == (4571, 2410, 2160)
    for sizes, width, time_width, groups, count in [((16, 64), 256, 256, 8, 2_352_464), ((16, 64), 512, 256, 8, 8_177_232),
                                                    ((64, 128, 16), 1024, 512, 32, 32_739_024), ((160,) * 5, 1536, 512, 32, 72_029_984)]:
        with torch.device("meta"): assert n_params(NETS["mlp_unet"](sizes, width=width, time_width=time_width, groups=groups)) == count


# draws

@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("n_modalities", [1, 2, 3, 10])
def test_every_draw_diffuses_something_in_every_sample(name, n_modalities):
    for seed in range(5):
        t = DRAWS[name](500, n_modalities, TIMES["logit_normal"], .4, seeded(seed))
        assert t.shape == (500, n_modalities) and t.dtype == torch.float32 and ((0 <= t) & (t <= 1)).all()
        assert diffused(t).any(1).all()


def test_how_often_each_draw_gives_and_leaves_out():
    g = seeded()
    given, absent = {}, {}
    for name, draw in DRAWS.items():
        t = torch.cat([draw(20, 3, uniform, .4, g) for _ in range(2000)])
        given[name], absent[name] = (t == 0).float().mean(0), (t == 1).float().mean(0)
    # a strict subset of three holds a modality in 3 of 6 cases
    assert given["batch"].sub(.6 / 2).abs().max() < .04 and given["sample"].sub(.6 / 2).abs().max() < .01
    assert not given["uni"].any() and not given["inpaint"].any()
    # given, and not in the quarter of the samples where a coin says absent
    assert given["absent"].sub(.6 / 2 * 7 / 8).abs().max() < .01
    # an eighth of what is given, and of what is diffused but not kept: of 3 diffused 2/3, of 2 diffused 1/2
    expected = .125 * (.3 + .4 * 2 / 3 + .3 * 2 / 3 * 1 / 2)
    assert absent["absent"].sub(expected).abs().max() < .01
    # the group of a modality picked at random, of three labels, unless all share it
    assert given["partition"].sub(.6 * (1 / 3 + 2 / 3 / 3 - 1 / 9)).abs().max() < .01
    assert not any(absent[name].any() for name in DRAWS if name != "absent")


@pytest.mark.parametrize("name", DRAWS)
def test_no_draw_prefers_a_modality(name):
    t = torch.cat([DRAWS[name](10, 4, uniform, .4, seeded(s)) for s in range(2000)])
    for state in (t == 0, t == 1, diffused(t)): assert (state.float().mean(0) - state.float().mean()).abs().max() < .03


# processes and predictions

@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_closed_forms_are_the_general_ones(process):
    t = torch.linspace(.01, process.t_last, 50, dtype=torch.float64)
    with torch.no_grad():
        for mine, general in zip(process.drift_diffusion(t), Process.drift_diffusion(process, t)): torch.testing.assert_close(mine, general)
    lam = log_snr(process, t)
    assert (lam.diff() < 0).all()
    torch.testing.assert_close(time_at_log_snr(process, lam), t)
    torch.testing.assert_close(Process.time_at_log_snr(process, lam), t)
    start, end = torch.tensor([0.]), torch.tensor([1.])
    assert [x.item() for x in process.alpha_sigma(start)] == [1., 0.]
    assert all(x.isfinite() for x in (*process.drift_diffusion(end), log_snr(process, end)))


def test_the_straight_path_ends_in_nothing_but_noise():
    assert [x.item() for x in FlowPath().alpha_sigma(torch.tensor(1.))] == [0., 1.]
    f, g = FlowPath().drift_diffusion(torch.tensor(.75))
    assert (f.item(), g.item()) == pytest.approx((-4, math.sqrt(6)))


def test_constants_of_the_importance_law():
    rate, _, norm = importance_norm(VPProcess(), torch.tensor(1e-3, dtype=torch.float64))
    assert (rate.item(), norm.item()) == (pytest.approx(1090.3, abs=.5), pytest.approx(20.255, abs=2e-3))  # published in single precision
    assert importance(200_000, seeded()).median().item() == pytest.approx(.25, abs=.005)


@pytest.mark.parametrize("predict", PREDICTIONS)
@pytest.mark.parametrize("process", PROCESSES)
def test_every_prediction_gives_back_noise_and_latent_under_every_process(process, predict):
    z, eps = torch.randn(2, 99, 3, generator=seeded(), dtype=torch.float64)
    a, s = PROCESSES[process].alpha_sigma(torch.linspace(.01, .99, 99, dtype=torch.float64)[:, None])
    p = PREDICTIONS[predict]
    out = p.target(z, eps, a, s)
    torch.testing.assert_close(p.eps(out, a * z + s * eps, a, s), eps)
    torch.testing.assert_close(p.z0(out, a * z + s * eps, a, s), z)


@pytest.mark.parametrize("sampler, options", [("em", {"steps": 100}), ("dpm", {"steps": 30}), ("repaint", {"steps": 100, "length": 5, "passes": 2})])
def test_samplers_walk_the_straight_path(sampler, options):
    toy, flow = Mixture(), PROCESSES["flow"]
    exact = Denoiser(ExactEps(toy, flow), toy.sizes, flow, predict="eps")
    real, _ = toy.sample(1500, seeded(1))
    made = SAMPLERS[sampler](exact, torch.zeros(1500, 28), torch.tensor([False] * 3), generator=seeded(2), **options)
    assert coherence(toy, made) > coherence(toy, real) - .04
    assert energy_distance(made, real) < .01


# balance

@pytest.mark.parametrize("name", BALANCES)
def test_every_balance_keeps_the_scale_of_every_subset(name):
    weight, g = BALANCES[name](torch.tensor(SIZES).float()), seeded()
    denoiser = Denoiser(MLPUNet(28, 3, width=32), SIZES, predict="eps")
    z, eps = torch.randn(2, 10_000, 28, generator=g)
    for given in [(), *subsets("abc", strict=True)]:
        t = torch.tensor([0. if m in given else .5 for m in "abc"]).expand(10_000, 3)
        parts = denoiser.loss(z, t, eps, weight)
        assert parts.sum().item() == pytest.approx(28, abs=.5)
        if name == "size": assert (parts[t[0] > 0] - 28 / (3 - len(given))).abs().max() < .6


# incomplete tuples

def tiny(**args):
    torch.manual_seed(0)
    modalities = [Modality(name, (d,), d, "line", limits=None) for name, d in zip("abc", SIZES)]
    return MLD(modalities, width=32, time_width=16, **args)


@pytest.mark.parametrize("name", DRAWS)
def test_missing_is_absent_and_no_sample_with_something_is_wasted(name):
    g = seeded()
    present = torch.rand(2000, 3, generator=g) < .5
    drawn = DRAWS[name](2000, 3, uniform, .5, g)
    t = hide_missing(drawn, present)
    assert (t[~present] == 1).all() and t.isfinite().all()
    assert torch.equal(diffused(t).any(1), present.any(1))
    same = (diffused(drawn) & present).any(1, keepdim=True) & present
    assert torch.equal(t[same], drawn[same])
    assert torch.equal(hide_missing(drawn, present | True), drawn)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("predict", PREDICTIONS)
def test_what_is_missing_is_never_read_nor_learnt(net, predict):
    g = seeded()
    denoiser = Denoiser(shaken(NETS[net](SIZES, width=32, time_width=16)), SIZES, predict=predict)
    present = torch.rand(200, 3, generator=g) < .5
    present[0] = False
    t = hide_missing(DRAWS["sample"](200, 3, uniform, .5, g), present)
    z, eps = torch.randn(2, 200, 28, generator=g)
    missing, losses, grads = ~present[:, denoiser.owner], [], []
    for garbage in (0., 1e30, math.nan, math.inf):
        z[missing] = garbage
        losses.append(denoiser.loss(z, t, eps))
        denoiser.zero_grad(), losses[-1].sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in denoiser.parameters()]))
    assert losses[0].isfinite().all() and grads[0].isfinite().all()
    assert all(torch.equal(x, losses[0]) for x in losses) and all(torch.equal(x, grads[0]) for x in grads)
    out = torch.zeros(200, 28, requires_grad=True)
    denoiser.net.forward = lambda z_t, t: out
    denoiser.loss(z, t, eps).sum().backward()
    assert not out.grad[missing].any() and out.grad[diffused(t)[:, denoiser.owner]].all()


def trained(z, present, **options):
    model = tiny()
    model.fit(z, Training(12, 32, lr=1e-3), present=present, progress=False, **options)
    return torch.cat([p.flatten() for p in model.denoiser.parameters()])


@pytest.mark.parametrize("draw", ["batch", "sample", "absent"])
def test_fit_is_the_same_without_a_mask_and_with_nothing_missing(draw):
    z = torch.randn(200, 28, generator=seeded())
    assert torch.equal(trained(z, None, draw=draw), trained(z, torch.ones(200, 3, dtype=torch.bool), draw=draw))


def test_fit_reads_only_what_is_present():
    z, present = torch.randn(200, 28, generator=seeded()), torch.rand(200, 3, generator=seeded(1)) < .6
    missing = ~present[:, tiny().denoiser.owner]
    zeros, nans = trained(z.masked_fill(missing, 0.), present), trained(z.masked_fill(missing, math.nan), present)
    assert torch.equal(zeros, nans) and zeros.isfinite().all()
    assert not torch.equal(zeros, trained(z, None))


def test_fit_refuses_a_wrong_mask_and_unknown_names():
    model, z, how = tiny(), torch.randn(50, 28, generator=seeded()), Training(1)
    with pytest.raises(ValueError, match=r"expected present as bool \(50, 3\), got torch.bool \(50, 2\)"):
        model.fit(z, how, present=torch.ones(50, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="expected present as bool"): model.fit(z, how, present=torch.ones(50, 3))
    z[3, 5] = math.nan
    with pytest.raises(ValueError, match="NaN"): model.fit(z, how, present=torch.ones(50, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="known: none, sqrt, size"): model.fit(z.nan_to_num(), how, balance="dims")
    with pytest.raises(ValueError, match="known: vp, flow"): tiny(process="ve")


@pytest.mark.parametrize("options", [{"draw": "uni"}, {"draw": "inpaint"}, {"draw": "partition"}, {"balance": "size"}, {"times": "importance"}])
def test_fit_takes_every_member_of_the_family(options):
    assert trained(torch.randn(200, 28, generator=seeded()), None, **options).isfinite().all()


def test_a_model_is_saved_with_its_process_and_older_files_still_load(tmp_path):
    model = tiny(process="flow", predict="flow")
    model.save(tmp_path / "flow.safetensors")
    again = MLD.load(tmp_path / "flow.safetensors")
    assert again.denoiser.process == PROCESSES["flow"]
    z = model.sample(4, steps=5)
    assert torch.equal(again.sample(4, steps=5), z) and z.isfinite().all()
    tiny().save(tmp_path / "now.safetensors")
    tensors, config = load_weights(tmp_path / "now.safetensors")
    del config["process"]
    save_weights(tmp_path / "old.safetensors", tensors, config)
    assert MLD.load(tmp_path / "old.safetensors").denoiser.process == VPProcess()


# the transformer

def tokens(sizes, **args):
    return shaken(TokenTransformer(sizes, **{"width": 32, "heads": 4, "time_width": 16, **args}))


@pytest.mark.parametrize("chunk", [None, 5])
def test_what_is_absent_has_no_influence(chunk):
    net, g = tokens(SIZES, chunk=chunk), seeded()
    z_t, t = torch.randn(40, 28, generator=g), DRAWS["absent"](40, 3, uniform, .5, g)
    owner = torch.arange(3).repeat_interleave(torch.tensor(SIZES))
    absent = (t == 1)[:, owner]
    assert absent.any()
    other = torch.where(absent, 10 * torch.randn(z_t.shape, generator=g), z_t)
    torch.testing.assert_close(net(other, t)[~absent], net(z_t, t)[~absent], atol=1e-6, rtol=1e-6)
    seen = torch.where(~absent, torch.randn(z_t.shape, generator=g), z_t)
    assert (net(seen, t)[diffused(t)[:, owner]] != net(z_t, t)[diffused(t)[:, owner]]).all()


def test_absent_is_as_if_the_modality_did_not_exist():
    net, smaller, g = tokens([6] * 4), tokens([6] * 3), seeded()
    smaller.load_state_dict({k: v[[0, 1, 3]] if len(v) == 4 else v for k, v in net.state_dict().items()})
    z_t, t = torch.randn(30, 24, generator=g), torch.rand(30, 4, generator=g)
    t[:, 2] = 1.
    keep = [*range(12), *range(18, 24)]
    torch.testing.assert_close(net(z_t, t)[:, keep], smaller(z_t[:, keep], t[:, [0, 1, 3]]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk", [6, 4])
def test_permuting_modalities_permutes_the_transformer(chunk):
    net, permuted, g, order = tokens([6] * 3, chunk=chunk), tokens([6] * 3, chunk=chunk), seeded(), [2, 0, 1]
    n, each = len(net.owner), len(net.owner) // 3
    rows = torch.arange(n).view(3, each)[order].flatten()
    permuted.load_state_dict({k: v[rows] if v.ndim == 3 else v for k, v in net.state_dict().items()})
    z_t, t = torch.randn(20, 18, generator=g), torch.rand(20, 3, generator=g)
    coordinates = torch.arange(18).view(3, 6)[order].flatten()
    torch.testing.assert_close(permuted(z_t[:, coordinates], t[:, order]), net(z_t, t)[:, coordinates], atol=1e-5, rtol=1e-5)


def test_a_new_transformer_is_zero_and_all_of_it_learns():
    net = TokenTransformer(SIZES, width=32, chunk=5)
    z_t, t = torch.randn(6, 28, generator=seeded()), torch.rand(6, 3, generator=seeded())
    t[0] = 1.
    assert not net(z_t, t).any()
    shaken(net)(z_t, t).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in net.parameters())


def test_the_transformer_in_16_bits_and_by_halves():
    net = tokens(SIZES)
    z_t, t = torch.randn(64, 28, generator=seeded()), DRAWS["absent"](64, 3, uniform, .5, seeded())
    with torch.autocast("cpu", torch.bfloat16): coarse = net(z_t, t)
    torch.testing.assert_close(coarse.float(), net(z_t, t), atol=.05, rtol=.05)
    torch.testing.assert_close(torch.cat([net(z_t[:20], t[:20]), net(z_t[20:], t[20:])]), net(z_t, t), atol=1e-5, rtol=1e-5)


def test_both_networks_have_as_many_parameters():
    with torch.device("meta"):
        for sizes, mlp, transformer in [([16] * 3, {}, {}), ([160] * 5, dict(width=1536, time_width=512, groups=32),
                                                           dict(width=512, depth=4, heads=8, time_width=128))]:
            assert n_params(NETS["token_transformer"](sizes, **transformer)) == pytest.approx(n_params(NETS["mlp_unet"](sizes, **mlp)), rel=.02)
        assert n_params(NETS["token_transformer"]([160] * 10, width=384, depth=4, heads=8, time_width=64)) < 85_000_000


def test_a_model_with_a_transformer_trains_on_holes_and_generates(tmp_path, in_16_bits):
    model = tiny(net="token_transformer")
    z, present = torch.randn(300, 28, generator=seeded()), torch.rand(300, 3, generator=seeded(1)) < .7
    history = model.fit(z, Training(60, 64, lr=3e-3, precision="bf16"), draw="absent", present=present, progress=False)
    assert all(math.isfinite(v) for v in history[-1].values())
    assert model.sample(5, steps=4).isfinite().all()
    model.save(tmp_path / "m.safetensors")
    assert torch.equal(MLD.load(tmp_path / "m.safetensors").sample(5, steps=4), model.sample(5, steps=4))
