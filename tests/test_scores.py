"Scores of samples: reconstruction, sound, captions, and conditionals that fit together."
import hashlib
import math
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score
from torch import nn

from mld.data.cub import caption_modalities, caption_of, make_vocabulary, tokens_of
from mld.data.mhd import log_mel
from mld.denoiser import Denoiser
from mld.metrics import audio, consistency, text
from mld.metrics.frechet import frechet_distance
from mld.metrics.reconstruction import f1, measures_of
from mld.modality import Column, Modality, register_architecture, split, subsets
from mld.model import MLD
from mld.toy import ExactEps, Mixture, energy_distance
from mld.training import CorruptFile


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- reconstruction

@pytest.mark.parametrize("rate", [.02, .3, .9])
@pytest.mark.parametrize("zero_division", [0, 1])
def test_f1_is_the_samples_average_of_scikit_learn(rate, zero_division):
    truth, found = torch.rand(300, 18, generator=gen(1)) < rate, torch.rand(300, 18, generator=gen(2)) < rate
    ours = f1(truth.float().view(300, 1, 3, 6), found.float().view(300, 1, 3, 6))
    if zero_division == 0: ours = ours.masked_fill(~(truth | found).any(1), 0)  # ours says 1 where nothing is on in both
    theirs = f1_score(truth.numpy(), found.numpy(), average="samples", zero_division=zero_division)
    assert abs(ours.mean().item() - theirs) < 1e-6


def test_a_half_is_off_as_in_rounding():
    truth, soft = torch.tensor([[.5, .51, 1.]]), torch.tensor([[.49, .5, .9]])
    assert f1(truth, soft).item() == pytest.approx(2 / 3)
    assert f1_score(truth.round().numpy(), soft.round().numpy(), average="samples") == pytest.approx(2 / 3)


@pytest.mark.parametrize("m, names", [
    (Modality("words", (4, 5), 2, "none", "categorical", kind="caption"), ["token_accuracy"]),
    (Modality("bits", (1, 8, 8), 2, "none", "bernoulli", kind="mask"), ["f1"]),
    (Modality("path", (8,), 2, "none", kind="trajectory"), ["path_error"]),
    (Modality("mask", (1, 8, 8), 2, "none", kind="mask"), ["f1"]),
    (Modality("sound", (1, 32, 128), 2, "none", kind="sound"), ["rmse"]),
    (Modality("grey", (1, 16, 16), 2, "none"), ["psnr", "ssim"])])
def test_every_kind_of_modality_has_its_measures(m, names):
    assert [*measures_of(m)] == names


def test_logits_of_bits_are_cut_at_zero_and_masks_at_a_half():
    on = torch.tensor([[1., 0, 0, 1]])
    bits, mask = (measures_of(Modality("m", (4,), 2, "none", likelihood, kind="mask"))["f1"] for likelihood in ("bernoulli", "gaussian"))
    assert bits(on, torch.tensor([[.2, -.2, -3, .3]])) == 1 and mask(on, torch.tensor([[.2, .1, 0, .3]])) == 0


# ---- sound

def heard_by_hand(sound):
    "The published description of VGGish's input, a window at a time, in numpy."
    mel = lambda hz: 1127 * np.log(1 + hz / 700)
    edges, bins = np.linspace(mel(125), mel(7500), 66), mel(np.arange(257) * 16000 / 512)
    bands = np.array([[max(0, min((b - lo) / (mid - lo), (hi - b) / (hi - mid))) for b in bins] for lo, mid, hi in zip(edges, edges[1:], edges[2:])])
    window = .5 - .5 * np.cos(2 * np.pi * np.arange(400) / 400)
    return np.array([np.log(bands @ np.abs(np.fft.rfft(sound[k * 160:k * 160 + 400] * window, 512)) + .01) for k in range(96)])


def test_examples_are_the_published_ones():
    sound = torch.randn(2, 16000, generator=gen()) * torch.linspace(0, .5, 16000)
    found = audio.examples(sound)
    assert found.shape == (2, 1, 96, 64)
    for mine, s in zip(found[:, 0], sound): np.testing.assert_allclose(mine.numpy(), heard_by_hand(s.double().numpy()), atol=2e-4)


@pytest.fixture(scope="module")
def vggish():
    torch.manual_seed(0)
    return audio.VGGish().eval().requires_grad_(False)


def test_the_network_is_the_published_one(vggish):
    "The same forward pass, written out over the names of the published state dict."
    w, x = vggish.state_dict(), torch.randn(1, 1, 96, 64, generator=gen())
    y = x
    for k in (0, 3, 6, 8, 11, 13):
        y = F.conv2d(y, w[f"features.{k}.weight"], w[f"features.{k}.bias"], padding=1).relu()
        if k not in (6, 11): y = F.max_pool2d(y, 2)
    y = y.numpy().transpose(0, 2, 3, 1).reshape(1, -1)  # channels last
    for k in (0, 2, 4):
        y = y @ w[f"embeddings.{k}.weight"].numpy().T + w[f"embeddings.{k}.bias"].numpy()
        if k < 4: y = y.clip(0)
    np.testing.assert_allclose(vggish(x).numpy(), y, atol=1e-5)
    assert len(w) == 18 and (y < 0).any()


def write_weights(folder, tensors):
    torch.save(tensors, part := folder / "part")
    return part.rename(folder / f"vggish-{hashlib.sha256(part.read_bytes()).hexdigest()[:8]}.pth")


def small(vggish):
    "Published names and shapes; the rows of large layers are one row repeated, so that the file is small."
    return {k: x[:1].clone().expand_as(x) if k.startswith("embeddings") else x for k, x in vggish.state_dict().items()}


def test_absent_weights_say_how_to_get_them_and_are_not_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    for fetch in ("load_state_dict_from_url", "download_url_to_file"): monkeypatch.setattr(torch.hub, fetch, lambda *a, **k: pytest.fail("fetched"))
    with pytest.raises(FileNotFoundError) as e: audio.load_vggish()
    path = tmp_path / "hub" / "checkpoints" / "vggish-10086976.pth"
    assert f"curl -L --create-dirs -o {path} {audio.WEIGHTS}" in str(e.value)
    path.parent.mkdir(parents=True), path.write_bytes(b"not the weights")
    with pytest.raises(CorruptFile, match="expected 10086976"): audio.load_vggish()


def test_weights_of_the_published_form_are_loaded_and_others_refused(tmp_path, vggish):
    tensors = small(vggish)
    path = write_weights(tmp_path, tensors)
    loaded = audio.load_vggish(path)
    assert all(torch.equal(x, tensors[k]) for k, x in loaded.state_dict().items())
    assert not loaded.training and not any(p.requires_grad or p.is_meta for p in loaded.parameters())
    assert loaded(torch.zeros(1, 1, 96, 64)).shape == (1, 128)
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(CorruptFile, match="SHA-256"): audio.load_vggish(path)
    for change in ({"features.0.weight": torch.zeros(64, 3, 3, 3)}, {"pca_means": torch.zeros(128)}, {"features.0.bias": "a word"}):
        with pytest.raises(CorruptFile, match="does not hold"): audio.load_vggish(write_weights(tmp_path, tensors | change))
    with pytest.raises(CorruptFile, match="does not hold"): audio.load_vggish(write_weights(tmp_path, [1, 2]))


def tones(hz, loud=1.):
    return loud * torch.sin(2 * math.pi * torch.tensor(hz)[:, None] * torch.arange(16000) / 16000)


def test_loudness_does_not_matter_and_silence_is_silence():
    loud, quiet = (log_mel(tones([500.], a), (-60., 60.)) for a in (1., .03))
    a, b = (audio.waveforms(x, (-60., 60.)) for x in (loud, quiet))
    assert a.shape == (1, 16000) and a.max() == pytest.approx(1, abs=1e-5) and b.max() == pytest.approx(1, abs=1e-5)
    assert (torch.fft.rfft(a).abs().argmax() - torch.fft.rfft(b).abs().argmax()).abs() <= 2
    silence = audio.waveforms(torch.zeros(2, 1, 32, 128), (-200., -47.))
    assert silence.isfinite().all() and silence.abs().max() < .1
    assert audio.examples(silence).isfinite().all()


def test_fad_tells_other_sounds_from_more_of_the_same(vggish):
    decibels = (-40., 40.)
    draw = lambda low, high, seed: log_mel(tones((low + (high - low) * torch.rand(8, generator=gen(seed))).tolist()), decibels)
    real, same, other = (audio.sound_moments(vggish, x, decibels, chunk=8) for x in (draw(200, 800, 0), draw(200, 800, 1), draw(2000, 4000, 2)))
    again = audio.sound_moments(vggish, Column(draw(200, 800, 0)), decibels, chunk=8)
    assert real.n == 8 and abs(frechet_distance(real, again)) < 1e-6
    assert frechet_distance(real, other) > 3 * frechet_distance(real, same)


# ---- captions

@pytest.fixture(scope="module")
def captions():
    "Attributes, sentences that say them, their modality, and the sentences one-hot."
    truth = torch.from_numpy(np.random.default_rng(0).random((60, 18)) < .2).long()
    told = [caption_of(v, k) for k, v in enumerate(truth.tolist())]
    _, m = caption_modalities({"vocabulary": make_vocabulary(told)})
    return truth, told, m, F.one_hot(torch.from_numpy(tokens_of(told, m.names)).long(), len(m.names)).float()


def test_captions_say_what_they_say_from_logits_and_from_columns(captions):
    truth, told, m, x = captions
    words = set(m.names)
    sayable = [k for k, caption in enumerate(told) if set(caption.replace(",", " ,").replace(".", " .").split()) <= words]
    assert len(sayable) > 10
    said = text.sentences(m, 3 * x + torch.rand(x.shape, generator=gen()), chunk=7)
    assert [said[k] for k in sayable] == [told[k] for k in sayable]
    assert text.sentences(m, Column(x.argmax(-1), classes=len(words))) == said
    assert torch.equal(text.named(m, x)[sayable], truth[sayable].byte())


def test_caption_f1_is_scikit_learns_of_what_is_named(captions):
    truth, _, m, x = captions
    score = text.caption_f1(m, x.roll(1, 0), truth)
    assert score.shape == (60,)
    assert score.mean().item() == pytest.approx(f1_score(truth, text.named(m, x.roll(1, 0)), average="samples", zero_division=1), abs=1e-6)
    noise = text.caption_f1(m, torch.randn(x.shape, generator=gen()), truth)
    assert max(noise.mean(), score.mean()) < text.caption_f1(m, x, truth).mean() / 2
    with pytest.raises(ValueError, match="birds have none"): text.caption_f1(m, x, truth[:, 0])


def test_attributes_are_scored_one_by_one():
    truth = torch.tensor([[1, 0], [1, 0], [0, 0], [1, 1]])
    table = text.by_attribute(truth, torch.tensor([[2., -1], [-1, -1], [3., -1], [.1, -.1]]), ("hat", "smile"))
    assert table.loc["hat"].tolist() == pytest.approx([2 / 3, 2 / 3, 2 / 3, .75]) and table.loc["smile"].tolist() == [0, 0, 0, .25]


class Stand:
    "Features by hand, and a note of every call."
    def __init__(self, seen, said):
        self.seen, self.said, self.calls = seen, said, []

    def encode_image(self, images):
        assert images.min() >= 0 and images.max() <= 1 and images.is_floating_point()
        self.calls.append(len(images))
        return self.seen[images[:, 0, 0, 0].mul(255).round().long()]

    def encode_text(self, captions):
        assert isinstance(captions, list)
        return torch.stack([self.said[int(c)] for c in captions])


def test_clip_score_is_two_and_a_half_times_the_cosine_that_is_not_negative():
    seen, said = torch.randn(2, 11, 6, generator=gen()).double()
    images, names = torch.arange(11, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2), [str(k) for k in range(11)]
    expected = [2.5 * max(0, float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))) for a, b in zip(seen.numpy(), said.numpy())]
    assert min(expected) == 0 < max(expected)
    for chunk, calls in ((4, [4, 4, 3]), (200, [11])):
        stand = Stand(seen, said)
        np.testing.assert_allclose(text.clip_score(stand, images, names, chunk), expected, atol=1e-6)
        assert stand.calls == calls
    column = Column(images, torch.tensor([3, 3, 5]))
    np.testing.assert_allclose(text.clip_score(stand, column, ["3", "4", "5"], 2)[[0, 2]], np.array(expected)[[3, 5]], atol=1e-6)
    with pytest.raises(ValueError, match="11 images and 10 captions"): text.clip_score(stand, images, names[1:])


def test_images_become_what_clip_takes():
    x = torch.rand(2, 3, 64, 64, generator=gen())
    made = text.clip_input(x)
    back = made * torch.tensor(text.STD)[:, None, None] + torch.tensor(text.MEAN)[:, None, None]
    assert made.shape == (2, 3, 224, 224) and back.min() > -1e-6 and back.max() < 1 + 1e-6
    torch.testing.assert_close(back.mean((2, 3)), x.mean((2, 3)), atol=.01, rtol=0)
    assert text.clip_input(torch.rand(1, 1, 20, 40), 10).shape == (1, 3, 10, 20)


class Tokens(dict):
    def to(self, device): return self


def words_as_numbers(captions, **how):
    assert how == {"padding": True, "truncation": True, "return_tensors": "pt"}
    ids = nn.utils.rnn.pad_sequence([torch.tensor([len(w) for w in c.split()]) for c in captions], batch_first=True)
    return Tokens(input_ids=ids, attention_mask=(ids > 0).long())


class Pretend(nn.Module):
    "The four parts of a CLIP of transformers that are used."
    def __init__(self):
        super().__init__()
        self.visual_projection, self.text_projection = nn.Linear(3, 2, bias=False), nn.Linear(1, 2, bias=False)

    def vision_model(self, pixel_values): return SimpleNamespace(pooler_output=pixel_values.mean((2, 3)))

    def text_model(self, input_ids, attention_mask):
        return SimpleNamespace(pooler_output=(input_ids * attention_mask).sum(1, keepdim=True).float())


def test_the_judge_asks_a_clip_as_transformers_has_it():
    torch.manual_seed(0)
    clip = text.CLIP(Pretend(), words_as_numbers, size=8)
    x, told = torch.rand(5, 3, 4, 4, generator=gen()), ["a red bird", "a", "two birds", "no", "an owl"]
    seen = clip.model.visual_projection(text.clip_input(x, 8).mean((2, 3)))
    said = clip.model.text_projection(torch.tensor([[8.], [1], [8], [2], [5]]))
    torch.testing.assert_close(text.clip_score(clip, x, told, 2), 2.5 * F.cosine_similarity(seen, said).clamp(min=0).detach())


def fake_transformers(monkeypatch, read):
    "A library whose networks and tokenizers are read by the given function."
    library, constants = ModuleType("transformers"), ModuleType("huggingface_hub.constants")
    library.CLIPModel = library.CLIPTokenizerFast = SimpleNamespace(from_pretrained=read)
    constants.HF_HUB_CACHE = "/cache"
    for name, module in {"transformers": library, "huggingface_hub": ModuleType("huggingface_hub"), "huggingface_hub.constants": constants}.items():
        monkeypatch.setitem(sys.modules, name, module)


def test_clip_that_cannot_be_had_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r'pip install -e ".\[clip\]"'): text.load_clip()

    def absent(name, local_files_only): raise OSError("not in the cache")
    fake_transformers(monkeypatch, absent)
    with pytest.raises(FileNotFoundError, match="in /cache.*hf download openai/clip-vit-base-patch32"): text.load_clip()

    def broken(name, local_files_only): raise RuntimeError("header too large")
    fake_transformers(monkeypatch, broken)
    with pytest.raises(CorruptFile, match="header too large"): text.load_clip()


def test_clip_of_transformers_gives_its_own_features():
    transformers = pytest.importorskip("transformers")
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, projection_dim=8)
    config = transformers.CLIPConfig(projection_dim=8, text_config=dict(small, vocab_size=50, max_position_embeddings=12, eos_token_id=49),
                                     vision_config=dict(small, image_size=32, patch_size=8))
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    ids = torch.tensor([[1, 5, 7, 49], [1, 9, 49, 49]])
    clip = text.CLIP(model, lambda captions, **how: Tokens(input_ids=ids, attention_mask=torch.ones_like(ids)), size=32)
    x = torch.rand(2, 3, 32, 32, generator=gen())
    with torch.no_grad(): whole = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=text.clip_input(x, 32))
    expected = 2.5 * (whole.image_embeds * whole.text_embeds).sum(1).clamp(min=0)
    torch.testing.assert_close(text.clip_score(clip, x, ["a", "b"]), expected, atol=1e-5, rtol=1e-5)


# ---- conditionals that fit together

def same(m):
    layer = nn.Linear(m.latent, m.latent, bias=False)
    nn.init.eye_(layer.weight)
    return layer


register_architecture("same for scores", same, same)
register_architecture("linear per score", lambda m: nn.Sequential(nn.Flatten(), nn.Linear(math.prod(m.shape), m.latent)),
                      lambda m: nn.Sequential(nn.Linear(m.latent, math.prod(m.shape)), nn.Unflatten(1, m.shape)))
TOY = Mixture((2, 2, 4), n_classes=6, n_modes=2, spread=(1.2, .5, .8))
HOW = dict(n=24, sampler="dpm", steps=14)


class Blind(nn.Module):
    "The exact network, but that modality 0 is absent to it when it is given together with so many in all."
    def __init__(self, *counts):
        super().__init__()
        self.net, self.counts = ExactEps(TOY), torch.tensor(counts)

    def forward(self, z_t, t):
        blind = (t[:, 0] == 0) & torch.isin((t == 0).sum(1), self.counts)
        z_t, t = z_t.clone(), t.clone()
        z_t[blind, :2], t[blind, 0] = 0., 1.
        return self.net(z_t, t)


def model_of(net):
    modalities = [Modality(name, (size,), size, "same for scores", limits=None) for name, size in zip("abc", TOY.sizes)]
    model = MLD(modalities, width=16, time_width=8, groups=2)
    model.denoiser = Denoiser(net, TOY.sizes, predict="eps")
    return model


@pytest.fixture(scope="module")
def exact():
    return model_of(ExactEps(TOY))


@pytest.fixture(scope="module")
def conditions(exact):
    return split(TOY.sample(80, gen())[0], exact.modalities)


def errors(model, conditions, route, **how):
    table = consistency.consistency(model, {k: conditions[k] for k in route[0]}, route[1], route[2], **(HOW | how)).set_index("chain")
    return (table.distance - table.floor) / table.error


@pytest.mark.parametrize("route", [("a", "b", "c"), ("b", "a", "c"), ("c", "b", "a")])
def test_the_exact_model_does_not_contradict_itself(exact, conditions, route):
    assert abs(errors(exact, conditions, route)["remembers"]) < 4


def test_forgetting_costs_what_the_middle_does_not_carry(exact, conditions):
    assert errors(exact, conditions, ("a", "b", "c"))["forgets"] > 5


@pytest.mark.parametrize("counts, found", [((1,), True), ((2,), True), ((1, 2), False)])
def test_a_model_that_sees_a_modality_only_now_and_then_contradicts_itself(conditions, counts, found):
    off = errors(model_of(Blind(*counts)), conditions, ("a", "b", "c"))["remembers"]
    assert off > 5 if found else abs(off) < 4


def test_energy_is_taken_within_each_condition():
    x, y = torch.randn(2, 7, 40, 3, generator=gen())
    torch.testing.assert_close(consistency.energy(x, y), torch.tensor([energy_distance(a, b) for a, b in zip(x, y)]), atol=1e-3, rtol=1e-3)
    apart = x + 5 * torch.arange(7.)[:, None, None]
    assert consistency.energy(apart, apart.flip(0)).mean() > 5 > abs(consistency.pooled_frechet(apart, apart.flip(0)))


def test_classes_differ_by_their_frequencies(exact):
    class Half(nn.Module):
        "Reads class 1 in the given fraction of samples."
        def __init__(self):
            super().__init__()
            self.modality, self.head = exact.modalities[0], nn.Linear(2, 2)

        def forward(self, x): return torch.stack([x[:, 0], -x[:, 0]], 1)
    view = consistency.classes_by({"a": Half()})
    z = torch.tensor([[1., 0], [1, 0], [1, 0], [-1, 0]]).repeat(50, 1)
    z = torch.cat([z, torch.zeros(200, 6)], 1)
    assert torch.equal(view(exact, z, ["a"])[:4], torch.tensor([[1., 0], [1, 0], [1, 0], [0, 1]]))
    other = z * torch.tensor([-1.] + 7 * [1.])
    distance = consistency.energy(*(view(exact, x, ["a"])[None] for x in (z, other))).item()
    assert distance == pytest.approx(2**.5 * 2 * .5**2, abs=.02)  # frequencies (.75, .25) and (.25, .75)


def test_every_set_of_samples_has_noise_of_its_own(exact, conditions, monkeypatch):
    seeds, sample = [], MLD.sample
    monkeypatch.setattr(MLD, "sample", lambda self, *a, seed, **k: seeds.append(seed) or sample(self, *a, seed=seed, **k))
    for seed in (0, 1): errors(exact, conditions, ("a", "b", "c"), seed=seed, n=2, steps=2)
    direct, again, first, *second = seeds[:5]
    assert len({direct, again, first, *second}) == 4 and second[0] == second[1] and not {*seeds[:5]} & {*seeds[5:]}


def test_rows_are_tidy_and_repeatable(exact, conditions):
    table = consistency.consistency(exact, {"a": conditions["a"]}, ["b"], ["c"], n=3, seed=5, sampler="em", steps=4)
    assert table.columns.tolist() == ["given", "through", "want", "chain", "measure", "distance", "floor", "error",
                                      "n", "conditions", "seed", "sampler", "nfe"]
    assert table.nfe.tolist() == [8, 8] and table.conditions.tolist() == [80, 80] and table.chain.tolist() == ["remembers", "forgets"]
    again = consistency.consistency(exact, {"a": conditions["a"]}, ["b"], ["c"], n=3, seed=5, sampler="em", steps=4)
    assert table.equals(again)


def test_nothing_given_is_a_single_condition(exact):
    table = consistency.consistency(exact, {}, ["b"], ["a", "c"], n=300, sampler="dpm", steps=8)
    assert table.conditions.tolist() == [1, 1] and table.error.isna().all() and table.distance.abs().max() < .1


def test_words_and_bits_can_be_gone_through():
    modalities = [Modality("words", (3, 4), 2, "linear per score", "categorical"), Modality("bits", (5,), 2, "linear per score", "bernoulli"),
                  Modality("picture", (1, 2, 2), 2, "linear per score")]
    torch.manual_seed(0)
    model, g = MLD(modalities, width=16, time_width=8, groups=2), gen()
    batch = {"words": F.one_hot(torch.randint(4, (6, 3), generator=g), 4).float(), "bits": (torch.rand(6, 5, generator=g) < .5).float(),
             "picture": torch.rand(6, 1, 2, 2, generator=g)}
    ways = consistency.routes(model.names)
    assert len(ways) == 6
    for given, through, want in ways:
        known = consistency.first_leg(model, {k: batch[k] for k in given}, through, 2, sampler="dpm", steps=2)
        for m in modalities:
            if m.name in known: m.check(known[m.name])
        assert all(torch.equal(known[k][::2], batch[k]) for k in given)
        assert consistency.consistency(model, {k: batch[k] for k in given}, through, want, n=2, sampler="dpm", steps=2).distance.notna().all()


@pytest.mark.parametrize("n", [2, 3, 4])
def test_routes_share_out_all_modalities(n):
    found = consistency.routes("abcd"[:n])
    assert len(found) == len(set(found)) == 3**n - 3 * 2**n + 3
    assert all(sorted(a + b + c) == list("abcd"[:n]) for a, b, c in found)
    assert {a for a, _, _ in found} <= set(subsets("abcd"[:n]))


def test_routes_that_are_none_are_refused(exact, conditions):
    known = {"a": conditions["a"]}
    for through, want, n, why in [(["a"], ["c"], 4, "'a' is in two places"), (["b"], ["b"], 4, "'b' is in two places"), ([], ["c"], 4, "got none"),
                                  (["b"], ["d"], 4, "unknown modality 'd'"), (["b"], ["c"], 1, "at least 2")]:
        with pytest.raises(ValueError, match=why): consistency.consistency(exact, known, through, want, n=n)
