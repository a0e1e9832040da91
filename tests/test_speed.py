"Faster ways to the same numbers: compiled, in 16 bits; and what happens where they are not to be had."
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn

from mld.guidance import Guidance
from mld.modality import Modality, register_architecture
from mld.model import MLD
from mld.nets import NETS, compiled, compiling_pays
from mld.samplers import SAMPLERS
from mld.training import Training


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


def test_a_compiled_training_is_the_same_training(plain):
    model = new_model()
    history = losses(model.fit(latents(), HOW, compile=True, progress=False))
    torch.testing.assert_close(history, plain[1], rtol=1e-4, atol=1e-4)
    assert list(model.state_dict()) == list(plain[0].state_dict()) and model.denoiser.run is None
    for a, b in zip(model.parameters(), plain[0].parameters()): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_training_in_16_bits_is_nearly_the_same(plain):
    rough = [losses(new_model().fit(latents(), Training(**{**vars(HOW), "precision": "bf16"}), compile=c, progress=False)) for c in (False, True)]
    for history in rough:
        torch.testing.assert_close(history, plain[1], rtol=.03, atol=.05)
        assert not torch.equal(history, plain[1])


def test_a_compiled_training_can_be_killed_and_goes_on(plain, tmp_path):
    from mld.training import Trainer
    model, step = new_model(), Trainer.one_step

    def killed(self, index):
        if self.step == 20: self.save()
        if self.step == 20: raise RuntimeError("power cut")
        step(self, index)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "one_step", killed)
        with pytest.raises(RuntimeError, match="power cut"): model.fit(latents(), HOW, compile=True, folder=tmp_path, progress=False)
    assert model.denoiser.run is None
    resumed = new_model()
    torch.testing.assert_close(losses(resumed.fit(latents(), HOW, compile=True, folder=tmp_path, progress=False)), plain[1], rtol=1e-4, atol=1e-4)


def test_compiled_samples_are_the_same_and_any_number_of_them_is_compiled_once(plain):
    ask = partial(plain[0].sample, sampler="dpm", steps=4)
    torch.testing.assert_close(ask(20, compile=True), ask(20, compile=False), rtol=1e-4, atol=1e-4)
    with torch.compiler.set_stance("fail_on_recompile"):
        for n in (7, 33): torch.testing.assert_close(ask(n, compile=True), ask(n, compile=False), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("around", [None, partial(Guidance, weight=1.)])
@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_what_is_given_comes_back_bit_for_bit_from_16_bits(plain, sampler, around):
    given = {"b": torch.randn(9, 6, generator=torch.Generator().manual_seed(2))}
    options = {"steps": 12, **({"length": 3, "passes": 2} if sampler == "repaint" else {})}
    exact, rough = (plain[0].sample(given=given, sampler=sampler, around=around, precision=p, **options) for p in ("fp32", "bf16"))
    assert torch.equal(rough[:, 3:7], plain[0].encode(given)[:, 3:7]) and rough.dtype == torch.float32
    assert not torch.equal(rough, exact) and (rough - exact).abs().max() < .1 * exact.abs().max()


def test_only_what_the_network_does_is_in_16_bits(plain):
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
    assert done.stdout.count("the network is not compiled") >= 1, done.stdout


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
    with pytest.warns(UserWarning, match="not compiled"): assert isinstance(compiled(Full(), torch.zeros(2, 3), torch.zeros(2, 1)), Full)
