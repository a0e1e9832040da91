"The method on exact data: what training reaches, and what samplers promise."
import pytest
import torch

from mld.denoiser import Denoiser, draw_per_sample
from mld.nets import MLPUNet
from mld.samplers import SAMPLERS, dpm_solver
from mld.sde import logit_normal, uniform
from mld.toy import ExactEps, Mixture, coherence, energy_distance
from mld.training import Training, train


@pytest.fixture(scope="module")
def toy():
    return Mixture()


@pytest.fixture(scope="module")
def trained(toy):
    "A network trained on the toy for about a minute on two cores."
    torch.manual_seed(0)
    denoiser = Denoiser(MLPUNet(28, 3, width=128, time_width=64), toy.sizes, predict="v")
    z, _ = toy.sample(100_000, torch.Generator().manual_seed(1))

    def loss(batch, generator):
        t = draw_per_sample(len(batch["z"]), 3, logit_normal, .5, generator)
        return dict(zip("abc", denoiser.loss(batch["z"], t, torch.randn(batch["z"].shape, generator=generator))))
    train(denoiser, loss, {"z": z}, Training(2400, 512, lr=2.5e-3, warmup=100, cooldown=.5, clip=1., ema=.997), progress=False)
    return denoiser


def sample(denoiser, sampler, n=2000, given=(False,) * 3, z=None, **options):
    z = torch.zeros(n, 28) if z is None else z
    return SAMPLERS[sampler](denoiser, z, torch.tensor(given), generator=torch.Generator().manual_seed(2), **options)


def test_a_minute_of_training_reaches_three_quarters_of_the_ceiling_and_stays_close_to_the_data(toy, trained):
    real, _ = toy.sample(20_000, torch.Generator().manual_seed(3))
    made = sample(trained, "em", n=4000, steps=250)
    assert coherence(toy, made) >= .75 * coherence(toy, real)  # chance is .01
    assert energy_distance(made, real[:4000]) < .02


def test_the_exact_loss_is_the_floor(toy, trained):
    exact, g = Denoiser(ExactEps(toy), toy.sizes, predict="eps"), torch.Generator().manual_seed(4)
    z, _ = toy.sample(4000, g)
    t, eps = draw_per_sample(4000, 3, uniform, .5, g), torch.randn(4000, 28, generator=g)
    with torch.no_grad():
        error = [(d.eps(d.noise(z, t, eps), t) - eps)[(t > 0)[:, d.owner]].square().mean() for d in (exact, trained)]
    assert error[0] < error[1] < 1.5 * error[0]


def test_permuting_modalities_permutes_the_exact_answer():
    toy = Mixture(sizes=(4, 4), spread=(1., 1.))
    swapped = Mixture(sizes=(4, 4), spread=(1., 1.))
    swapped.means = toy.means[::-1]
    g = torch.Generator().manual_seed(0)
    z_t, t = torch.randn(50, 8, generator=g), torch.rand(50, 2, generator=g)
    there = Denoiser(ExactEps(swapped), (4, 4), predict="eps").eps(z_t[:, [4, 5, 6, 7, 0, 1, 2, 3]], t.flip(1))
    here = Denoiser(ExactEps(toy), (4, 4), predict="eps").eps(z_t, t)
    torch.testing.assert_close(there[:, [4, 5, 6, 7, 0, 1, 2, 3]], here, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sampler, options", [("em", {"steps": 20}), ("dpm", {"steps": 8}), ("repaint", {"steps": 20, "length": 4, "passes": 2})])
def test_given_modalities_come_back_bit_for_bit(toy, trained, sampler, options):
    real, _ = toy.sample(64, torch.Generator().manual_seed(5))
    given = torch.rand(64, 3, generator=torch.Generator().manual_seed(6)) < .5  # a subset for every sample
    made = SAMPLERS[sampler](trained, real, given, generator=torch.Generator().manual_seed(7), **options)
    keep = given[:, trained.owner]
    assert torch.equal(made[keep], real[keep]) and (made[~keep] != real[~keep]).all() and made.isfinite().all()


def test_memory_running_out_changes_no_value(toy, trained):
    whole = sample(trained, "em", n=64, steps=10)
    net = trained.net

    class Small(torch.nn.Module):
        def forward(self, z_t, t):
            if len(z_t) > 20: raise torch.OutOfMemoryError("pretend")
            return net(z_t, t)
    trained.net = Small()
    try: halved = sample(trained, "em", n=64, steps=10)
    finally: trained.net = net
    torch.testing.assert_close(halved, whole, atol=1e-4, rtol=1e-4)


def test_dpm_solver_converges_at_second_order(toy):
    exact = Denoiser(ExactEps(toy), toy.sizes, predict="eps").double()
    toy64 = exact.net.toy
    toy64.means = [m.double() for m in toy64.means]
    z = torch.zeros(200, 28, dtype=torch.float64)
    start = torch.randn(200, 28, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    made = {}
    for steps in (20, 40, 80, 640):
        g = torch.Generator().manual_seed(2)
        made[steps] = dpm_solver(exact, z, torch.tensor([False] * 3), steps=steps, generator=g)
    errors = [(made[k] - made[640]).norm(dim=1).median().item() for k in (20, 40, 80)]
    toy64.means = [m.float() for m in toy64.means]
    assert errors[0] / errors[1] > 2.5 and errors[1] / errors[2] > 2.5, errors
