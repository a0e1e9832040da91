"Faster ways to the same numbers: compiled, in 16 bits; and what happens where they are not to be had."
import os
import resource
import subprocess
import sys
import warnings
from functools import partial

import pytest
import torch
from torch import nn

from mld.bench import Machine, bench_rows, count_calls, floor_ms, precisions_on, step_table, step_work, take_turns
from mld.experiment import Setup, make_run
from mld.guidance import Guidance
from mld.modality import Modality, register_architecture
from mld.model import MLD, fit_together
from mld.nets import NETS, compiled, compiling_pays
from mld.samplers import SAMPLERS
from mld.stages import ROW
from mld.training import PRECISIONS, Diverged, Trainer, Training, autocast, has_bf16


class Small(nn.Module):
    "A score network that is compiled in a few seconds."
    def __init__(self, sizes):
        super().__init__()
        self.inp, self.out = nn.Linear(sum(sizes) + len(sizes), 16), nn.Linear(16, sum(sizes))

    def forward(self, z_t, t): return self.out(nn.functional.silu(self.inp(torch.cat([z_t, t], 1))))


@pytest.fixture(scope="module", autouse=True)
def small():
    NETS["small"] = Small
    register_architecture("linear", lambda m: nn.Linear(*m.shape, m.latent), lambda m: nn.Linear(m.latent, *m.shape))
    yield
    del NETS["small"]


def new_model(net="small", **args):
    torch.manual_seed(0)
    return MLD([Modality(name, (6,), d, "linear", limits=None) for name, d in (("a", 3), ("b", 4), ("c", 5))], net=net, **args)


def latents(n=400):
    return torch.randn(n, 12, generator=torch.Generator().manual_seed(1)).cumsum(1) / 3


def losses(history):
    return torch.tensor([[h[name] for name in "abc"] for h in history])


@pytest.fixture(scope="module")
def plain():
    model = new_model()
    return model, losses(model.fit(latents(), HOW, compile=False, progress=False))


HOW = Training(40, 32, lr=1e-2, clip=1., ema=.9)


@pytest.mark.parametrize("said, dtype", [("1", torch.bfloat16), ("0", torch.float32)])
def test_16_bits_are_32_where_a_device_has_no_units_for_them(said, dtype, monkeypatch):
    monkeypatch.setenv("MLD_BF16", said)
    x, how = torch.randn(8, 8), Training(1, precision="bf16")
    with autocast("bf16", x.device): assert (x @ x).dtype == dtype
    with autocast("fp32", x.device): assert (x @ x).dtype == torch.float32
    assert Trainer(nn.Linear(1, 1), None, {"x": x}, how).config["precision"] == {"1": "bf16", "0": "fp32"}[said]


@pytest.mark.skipif(not has_bf16(torch.device("cpu")), reason="needs units for bfloat16")
def test_16_bits_do_not_take_twice_as_long():
    "By much, on a product that is large enough for conversions not to matter."
    x = torch.randn(1024, 1024)

    def product(precision):
        with autocast(precision, x.device), torch.no_grad(): x @ x
    ms = take_turns({p: partial(product, p) for p in PRECISIONS}, 15, x.device)
    assert ms["bf16"] < 2 * ms["fp32"]


def test_a_compiled_training_is_the_same_training(plain):
    model = new_model()
    history = losses(model.fit(latents(), HOW, compile=True, progress=False))
    torch.testing.assert_close(history, plain[1], rtol=1e-4, atol=1e-4)
    assert list(model.state_dict()) == list(plain[0].state_dict()) and model.denoiser.run_loss is None
    for a, b in zip(model.parameters(), plain[0].parameters()): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_training_in_16_bits_is_nearly_the_same(plain, in_16_bits):
    rough = [losses(new_model().fit(latents(), Training(**{**vars(HOW), "precision": "bf16"}), compile=c, progress=False)) for c in (False, True)]
    for history in rough:
        torch.testing.assert_close(history, plain[1], rtol=.03, atol=.05)
        assert not torch.equal(history, plain[1])


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-3), ("bf16", .03)])
def test_500_steps_of_the_fast_and_of_the_plain_way_lose_the_same(precision, tolerance, in_16_bits):
    how = Training(500, 32, lr=1e-2, clip=1., ema=.9)
    plain, fast = (losses(new_model().fit(latents(), Training(**{**vars(how), "precision": p}), compile=c, progress=False))
                   for p, c in (("fp32", False), (precision, True)))
    assert len(plain) == 50 and plain[-10:].mean() < .8 * plain[0].mean()
    torch.testing.assert_close(fast, plain, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("draw, times, task", [("sample", "logit_normal", None), ("batch", "importance", None), ("absent", "uniform", None), ("sample", "uniform", ["b"])])
def test_a_training_of_graphs_is_the_same_training(draw, times, task, monkeypatch):
    "Captured as a CUDA graph, 500 steps lose what they lose when they are launched piece by piece."
    histories, z = [], latents().cuda()
    for graphs in (True, False):
        monkeypatch.setattr(Trainer, "graphs", graphs)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # that a step cannot be captured is a warning
            histories.append(losses(new_model().cuda().fit(z, Training(500, 32, lr=1e-2, clip=1., ema=.9), draw=draw, times=times, task=task, progress=False)))
    torch.testing.assert_close(*histories, rtol=1e-3, atol=1e-3)


def test_a_replayed_training_is_the_same_training(plain, monkeypatch):
    "Without a GPU: all that a graph reads lies at fixed places, so doing the work again in its place makes the same steps."
    first = Trainer.__init__

    def init(self, *args, **kw):
        first(self, *args, **kw)
        self.rate = torch.tensor(self.how.lr)
        for group in self.opt.param_groups: group["lr"] = self.rate
        self.capture = lambda work, generator: work
    monkeypatch.setattr(Trainer, "__init__", init)
    model = new_model()
    torch.testing.assert_close(losses(model.fit(latents(), HOW, progress=False)), plain[1], rtol=1e-5, atol=1e-5)
    for a, b in zip(model.parameters(), plain[0].parameters()): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_compiled_training_can_be_killed_and_goes_on(plain, tmp_path):
    model, step = new_model(), Trainer.one_step

    def killed(self, index):
        if self.step == 20: self.save()
        if self.step == 20: raise RuntimeError("power cut")
        step(self, index)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "one_step", killed)
        with pytest.raises(RuntimeError, match="power cut"): model.fit(latents(), HOW, compile=True, folder=tmp_path, progress=False)
    assert model.denoiser.run_loss is None
    resumed = new_model()
    torch.testing.assert_close(losses(resumed.fit(latents(), HOW, compile=True, folder=tmp_path, progress=False)), plain[1], rtol=1e-4, atol=1e-4)


def test_training_calls_what_was_compiled(monkeypatch):
    called = []
    monkeypatch.setattr("mld.model.compiled", lambda method, *example: lambda *given: called.append(len(given[0])) or method(*given))
    new_model().fit(latents(), Training(5, 32), compile=True, progress=False)
    assert called == [32] * 5


def test_more_shapes_than_the_compiler_keeps_by_itself_are_compiled():
    from torch._dynamo.utils import counters
    before = counters["stats"]["unique_graphs"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for rows in range(20, 30): new_model().fit(latents(), Training(2, rows), compile=True, progress=False)
    assert counters["stats"]["unique_graphs"] == before + 10


def test_all_networks_of_a_shape_are_compiled_once():
    "A study trains many of them in one process, and no step of any may wait for the compiler again."
    new_model().fit(latents(), Training(2, 32), compile=True, progress=False)
    with torch.compiler.set_stance("fail_on_recompile"), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # that something is not compiled is a warning
        for draw in ("sample", "batch", "inpaint"): new_model().fit(latents(), Training(4, 32, clip=1., ema=.9), draw=draw, compile=True, progress=False)


def test_compiled_samples_are_the_same_and_any_number_of_them_is_compiled_once(plain):
    ask = partial(plain[0].sample, sampler="dpm", steps=4)
    torch.testing.assert_close(ask(20, compile=True), ask(20, compile=False), rtol=1e-4, atol=1e-4)
    with torch.compiler.set_stance("fail_on_recompile"), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # that something is not compiled is a warning
        for n in (7, 33): torch.testing.assert_close(ask(n, compile=True), ask(n, compile=False), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("around", [None, partial(Guidance, weight=1.)])
@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_what_is_given_comes_back_bit_for_bit_from_16_bits(plain, sampler, around, in_16_bits):
    given = {"b": torch.randn(9, 6, generator=torch.Generator().manual_seed(2))}
    options = {"steps": 12, **({"length": 3, "passes": 2} if sampler == "repaint" else {})}
    exact, rough = (plain[0].sample(given=given, sampler=sampler, around=around, precision=p, **options) for p in ("fp32", "bf16"))
    assert torch.equal(rough[:, 3:7], plain[0].encode(given)[:, 3:7]) and rough.dtype == torch.float32
    assert not torch.equal(rough, exact) and (rough - exact).abs().max() < .1 * exact.abs().max()


def test_only_what_the_network_does_is_in_16_bits(plain, in_16_bits):
    "With a network that is exact in either precision, the samples are the same bit for bit."
    model = new_model()
    model.denoiser.net.forward = lambda z_t, t: torch.zeros_like(z_t)
    same = [model.sample(5, sampler="heun", steps=6, precision=p) for p in ("fp32", "bf16")]
    assert torch.equal(*same)


NO_COMPILER = """
import sys, warnings; sys.path.insert(0, sys.argv[1])
import test_speed, torch
from mld.nets import NETS
NETS["small"] = test_speed.Small
test_speed.register_architecture("linear", lambda m: torch.nn.Linear(6, m.latent), lambda m: torch.nn.Linear(m.latent, 6))
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for n in (5, 6): assert torch.equal(*(test_speed.new_model().sample(n, steps=3, compile=c) for c in (True, False)))
    made = [test_speed.new_model() for _ in range(2)]
    for model, c in zip(made, (True, False)): model.fit(test_speed.latents(), test_speed.Training(4, 32), compile=c, progress=False)
    for a, b in zip(*(m.parameters() for m in made)): assert torch.equal(a, b)
print("\\n".join(str(w.message) for w in said if "not compiled" in str(w.message)))
"""


def test_without_a_compiler_everything_goes_on_as_it_is(root, tmp_path):
    env = {**os.environ, "CXX": "/nonexistent/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", NO_COMPILER, str(root / "tests")], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is not compiled, which costs time") >= 1, done.stdout


def test_a_mode_of_compiling_changes_no_number():
    "The mode that makes CUDA graphs on a GPU; elsewhere it makes none, and what comes out is still a copy."
    net, x = nn.Sequential(nn.Linear(3, 4), nn.SiLU()), torch.randn(5, 3)
    with torch.no_grad():
        fast = compiled(net.forward, x, mode="reduce-overhead")
        first, second = fast(x), fast(2 * x)
        torch.testing.assert_close(first, net(x)), torch.testing.assert_close(second, net(2 * x))
    assert fast != net.forward


def test_compiling_is_for_long_work_and_the_environment_may_decide(monkeypatch):
    net = nn.Linear(1000, 1000)
    monkeypatch.delenv("MLD_COMPILE", raising=False)
    assert not compiling_pays(net, 10**5) and compiling_pays(net, 10**7)
    monkeypatch.setenv("MLD_COMPILE", "0")
    assert not compiling_pays(net, 10**7) and compiling_pays(net, 0, ask=True)
    monkeypatch.setenv("MLD_COMPILE", "1")
    assert compiling_pays(net, 0) and not compiling_pays(net, 0, ask=False)
    with torch.device("meta"): unknown = nn.Linear(1000, 1000)
    monkeypatch.delenv("MLD_COMPILE")
    assert not compiling_pays(unknown, 10**12)


def test_memory_that_runs_out_is_no_missing_compiler():
    class Full(nn.Module):
        def forward(self, z_t, t): raise torch.OutOfMemoryError("pretend")
    full = Full()
    with pytest.warns(UserWarning, match="not compiled"): assert compiled(full.forward, torch.zeros(2, 3), torch.zeros(2, 1)) == full.forward


TOY = dict(n_train=500, n_val=60, n_test=60, width=32, groups=4, time_width=16, steps=20, warmup=2, batch_size=64, n_joint=30, n_given=20)


def test_a_run_can_ask_for_samples_in_16_bits(tmp_path, in_16_bits):
    ways = {"dpm": {"steps": 3}, "dpm bf16": {"sampler": "dpm", "steps": 3, "precision": "bf16"}}
    run = make_run("toy", out=tmp_path, overrides=TOY | {"samplers": ways}, device="cpu", progress=False)
    given = run.data.names[:1]
    plain, rough = (run.samples(name, tuple(given)) for name in ways)
    mine = run.model.denoiser.owner == 0
    assert torch.equal(plain.tensors["z"][:, mine], rough.tensors["z"][:, mine]) and not torch.equal(plain.tensors["z"], rough.tensors["z"])
    assert plain.info["nfe"] == rough.info["nfe"] == 3 and plain.key != rough.key


@pytest.mark.parametrize("draw, ema", [("sample", .9), ("batch", None)])
def test_seeds_that_learn_together_end_where_each_ends_alone(draw, ema):
    how, seeds = Training(40, 32, lr=1e-2, warmup=5, cooldown=.5, clip=.5, ema=ema), [3, 4, 7]
    models = [[new_model("mlp_unet", width=16, time_width=8, groups=2) for _ in seeds] for _ in range(2)]
    histories = [model.fit(latents(), how, seed=seed, draw=draw, progress=False) for model, seed in zip(models[0], seeds)]
    losses = fit_together(models[1], latents(), how, seeds, draw=draw, progress=False)
    for alone, together in zip(*models):
        for a, b in zip(alone.parameters(), together.parameters()): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    last = torch.stack([torch.tensor([h[-1][name] for name in "abc"]) for h in histories])  # means of the last ten steps
    torch.testing.assert_close(losses[-10:].mean(0), last, rtol=1e-3, atol=1e-3)


def test_a_seed_that_diverges_among_others_is_named():
    models = [new_model() for _ in range(2)]
    with torch.no_grad(): models[1].denoiser.net.out.weight.fill_(float("nan"))
    with pytest.raises(Diverged, match="a loss of seed 9 is not finite"): fit_together(models, latents(), Training(2, 16), [8, 9], progress=False)


def test_bench_writes_rows_of_the_usual_form(tmp_path):
    run = Setup("toy", out=tmp_path, overrides=TOY, device="cpu", table="speed")
    rows = bench_rows(run, rounds=1, compile=False, n=10, grow={"modalities": (2, 4), "samples": (5, 10)})
    assert list(rows) == ROW and (rows.value > 0).all() and (run.folder / "rows.csv").exists()
    assert set(rows.metric) == {"step ms", "floor ms", "samples a second", "call ms", "Gflop a second", "GB a second", "peak MB"}
    table = step_table(rows)
    assert (table.share < 1).all() and list(table.index.get_level_values("variant")) == [*precisions_on(run.device), "as published",
                                                                                    "as published, latents kept", "fp32, 4 seeds"]


def test_the_floor_is_arithmetic_and_memory():
    "A million weights, 100 samples: 6e8 operations and 12 numbers of 4 bytes a weight."
    assert step_work(10**6, 100) == (6e8, 4.8e7)
    assert floor_ms(Machine(1e9, {"bf16": 1e12}), 10**6, 100, "bf16") == pytest.approx(.6 + 48)


@pytest.mark.parametrize("sampler, options, calls", [("repaint", {"steps": 250, "length": 10, "passes": 10}, 2410), ("heun", {"steps": 5}, 9)])
def test_calls_are_counted_by_walking(sampler, options, calls):
    assert count_calls(new_model(), sampler, options) == calls


def cpu_seconds(*command):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_starting_is_quick():
    "In processor time, since other programs may be running: importing the kit after torch, and the help of the command."
    torch_alone, all_of_it = (cpu_seconds(sys.executable, "-c", f"import {name}") for name in ("torch", "mld.experiment"))
    assert all_of_it - torch_alone < 1.5
    assert cpu_seconds(os.path.join(os.path.dirname(sys.executable), "mld"), "--help") < 1
