"Networks of images: what they give where, and that a saved model finds them again."
import pytest
import torch
from safetensors import safe_open

from mld import autoencoders  # registers conv_bn and conv_bn_flat
from mld.modality import Modality
from mld.model import MLD


@pytest.mark.parametrize("architecture", ["conv_bn", "conv_bn_flat"])
def test_a_saved_model_finds_its_networks_in_the_module_that_registers_them(architecture, tmp_path):
    torch.manual_seed(0)
    view = Modality("view", (3, 8, 8), 4, architecture)
    model = MLD([view], width=32, groups=4)
    model.save(tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as f:
        assert autoencoders.__name__ in f.metadata()["config"]
    again, x = MLD.load(tmp_path / "model.safetensors"), torch.rand(3, 3, 8, 8)
    assert torch.equal(again.autoencoders["view"](x), model.autoencoders["view"](x))


@pytest.mark.parametrize("architecture", ["conv_bn", "conv_bn_flat"])
@pytest.mark.parametrize("likelihood, limits, last", [
    ("gaussian", (0., 1.), torch.nn.Sigmoid), ("laplace", (0., 1.), torch.nn.Sigmoid), ("gaussian", (-1., 1.), torch.nn.Identity),
    ("gaussian", None, torch.nn.Identity), ("bernoulli", (0., 1.), torch.nn.Identity)])
def test_only_what_is_compared_with_data_in_0_1_ends_in_a_sigmoid(architecture, likelihood, limits, last):
    decoder = Modality("view", (1, 8, 8), 4, architecture, likelihood, limits).decoder()
    assert type(list(decoder)[-1]) is last


def test_a_mask_of_bits_can_be_learnt():
    "With a sigmoid in front of the likelihood, a bit that is off could never be surer than one half: .35 a bit would be left at least."
    g = torch.Generator().manual_seed(0)
    bits = (torch.rand(64, 1, 8, 8, generator=g) < .5).float()
    mask = Modality("mask", (1, 8, 8), 64, "conv_bn", "bernoulli")
    how = autoencoders.Training(steps=200, batch_size=64, lr=1e-2)
    model, _ = autoencoders.fit_autoencoder(mask, bits, how, progress=False)
    assert mask.loss(bits, model(bits)).mean() < .1 * 64
