"Measures against other people's implementations, closed forms and answers that are known beforehand."
import math
import os
import time
import warnings
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from PIL import Image
from scipy.spatial.distance import cdist
from sklearn.metrics import accuracy_score, recall_score
from torch import nn

from mld.data.files import sha256_of
from mld.metrics import inception
from mld.metrics.coherence import (Classifier, by_n_given, coherence_by_class, conditional_coherence, fit_classifier, joint_coherence, read, wilson)
from mld.metrics.diversity import prdc, radii
from mld.metrics.frechet import (Moments, classifier_features, classifier_moments, features_of, frechet_at_infinity, frechet_by_size,
                                 frechet_distance, kernel_distance, moments_of)
from mld.modality import Column, Modality
from mld.training import CorruptFile, Training
from mld.vision import torchvision


def draw(n, width=16, scale=1., shift=0., seed=0):
    return shift + scale * torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


class Same(nn.Module):
    "Features that are the data, for metrics that want a network."

    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features

    def forward(self, x):
        return x


# coherence

@pytest.fixture(scope="module")
def world():
    "Three modalities that show one of five classes, the last one badly; their classifiers; 3,000 tuples to test on."
    g = torch.Generator().manual_seed(0)
    modalities = [Modality(name, (8,), 2, "none", limits=None) for name in "abc"]
    means = {m.name: 3 * torch.randn(5, 8, generator=g) for m in modalities}

    def tuples(n):
        labels = torch.randint(5, (n,), generator=g)
        return {m.name: means[m.name][labels] + (4. if m.name == "c" else 1.) * torch.randn(n, 8, generator=g) for m in modalities}, labels

    (train, labels), test = tuples(2000), tuples(3000)
    readers = {m.name: fit_classifier(m, train[m.name], labels, Training(40, 200, lr=1e-2), progress=False) for m in modalities}
    return readers, *test


def test_coherence_of_real_data_is_what_the_classifiers_agree_on(world):
    readers, batch, labels = world
    with torch.no_grad():
        classes = {name: readers[name](x).argmax(1) for name, x in batch.items()}
    seen = read(readers, batch, chunk=700)
    assert all(torch.equal(seen[k], classes[k]) for k in classes)
    agree = np.mean([len({int(classes[k][i]) for k in "abc"}) == 1 for i in range(len(labels))])
    assert joint_coherence(seen) == pytest.approx(agree)
    accuracy = conditional_coherence(seen, labels)
    assert accuracy == pytest.approx({k: accuracy_score(labels, classes[k]) for k in classes})
    assert accuracy["a"] > .95 and .3 < accuracy["c"] < .9
    assert joint_coherence(seen) < min(accuracy.values()) + .05
    for order in ("cab", "bca"):
        assert joint_coherence({k: seen[k] for k in order}) == joint_coherence(seen)


def test_coherence_of_shuffled_modalities_is_chance(world):
    readers, batch, labels = world
    g = torch.Generator().manual_seed(1)
    seen = read(readers, {k: x[torch.randperm(len(x), generator=g)] for k, x in batch.items()})
    shares = torch.stack([c.bincount(minlength=5) / len(c) for c in seen.values()])
    low, high = wilson(joint_coherence(seen), len(labels), confidence=.9999)
    assert low < shares.prod(0).sum().item() < high
    for hit in conditional_coherence(seen, labels).values():
        assert abs(hit - .2) < .04


def test_coherence_by_class_is_recall(world):
    readers, batch, labels = world
    seen = read(readers, batch)
    table = coherence_by_class(seen, labels)
    for name in seen:
        np.testing.assert_allclose(table[name], recall_score(labels, seen[name], average=None))
    assert table["n"].tolist() == labels.bincount().tolist() and list(table.index) == list(range(5))


@pytest.mark.parametrize("change, why", [(lambda b: {**b, "d": b["a"]}, "modality 'd' has no classifier; there is one of: a, b, c"),
                                         (lambda b: {"a": b["a"] / 0}, "modality 'a': samples hold NaN"),
                                         (lambda b: {"b": b["b"][:0]}, "modality 'b': no samples"),
                                         (lambda b: {"b": b["b"][:, 1:]}, r"modality 'b': expected \(N, 8\), got \(2000, 7\)")])
def test_what_cannot_be_read_is_refused(world, change, why):
    readers, batch, _ = world
    with pytest.raises(ValueError, match=why):
        read(readers, change(batch))


def test_readings_and_labels_must_match(world):
    _, _, labels = world
    with pytest.raises(ValueError, match="modality 'b'"):
        joint_coherence({"a": labels, "b": labels[:1]})
    with pytest.raises(ValueError, match="no modality"):
        joint_coherence({})
    with pytest.raises(ValueError, match="modality 'a'"):
        coherence_by_class({"a": labels}, labels[:, None].expand(-1, 3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_readings_come_back_to_the_cpu(world):
    readers, batch, labels = world
    on_gpu = {k: Classifier(r.modality, 5).to("cuda").eval() for k, r in readers.items()}
    for k, r in readers.items():
        on_gpu[k].load_state_dict(r.state_dict())
    seen = read(on_gpu, batch)
    assert all(c.device.type == "cpu" for c in seen.values())
    assert conditional_coherence(seen, labels.cuda()) == pytest.approx(conditional_coherence(read(readers, batch), labels), abs=.01)


@pytest.mark.parametrize("hits, n", [(0, 1), (0, 40), (7, 7), (3, 11), (450, 1000), (999, 1000)])
@pytest.mark.parametrize("confidence", [.8, .95, .99])
def test_wilson_is_scipys(hits, n, confidence):
    theirs = scipy.stats.binomtest(hits, n).proportion_ci(confidence, method="wilson")
    assert wilson(hits / n, n, confidence) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_wilson_is_statsmodels_on_whole_columns():
    confint = pytest.importorskip("statsmodels.stats.proportion").proportion_confint
    hits, n = np.array([0, 12, 80, 100]), np.array([50, 50, 100, 100])
    np.testing.assert_allclose(wilson(hits / n, n), confint(hits, n, method="wilson"), atol=1e-12)
    for bad in [(-.1, 5), (1.1, 5), (math.nan, 5), (.5, 0)]:
        with pytest.raises(ValueError, match="expected a fraction"):
            wilson(*bad)


def test_means_by_number_given_count_subsets_alike():
    table = by_n_given({("a",): {"b": .2, "c": .4}, ("b",): {"a": .6, "c": .8}, ("a", "b"): {"c": 1.}})
    assert table.loc[1].to_dict() == pytest.approx({"a": .6, "b": .2, "c": .6, "mean": 1.4 / 3})
    assert table.loc[2, "c"] == table.loc[2, "mean"] == 1 and table.loc[2].isna().sum() == 2


# the Fréchet family

@pytest.fixture(scope="module")
def pair():
    "Correlated features of two laws."
    g = torch.Generator().manual_seed(3)
    mix = torch.randn(24, 24, generator=g) / 5
    return draw(400, 24, seed=1) @ mix + 2, draw(500, 24, scale=1.3, seed=2) @ mix.T + 1.8


def test_frechet_distance_is_pytorch_fids(pair):
    torchvision()
    theirs = pytest.importorskip("pytorch_fid.fid_score").calculate_frechet_distance
    statistics = [s for x in pair for s in (x.double().mean(0).numpy(), np.cov(x.double().numpy(), rowvar=False))]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wanted = theirs(*statistics)
    except TypeError as e:  # sqrtm(disp=False) is gone in SciPy 1.18
        pytest.skip(f"pytorch-fid's distance cannot be called with SciPy {scipy.__version__}: {e}")
    assert frechet_distance(*(Moments(x.split(64)) for x in pair)) == pytest.approx(wanted, rel=1e-6)


def test_frechet_distance_is_torchmetrics(pair):
    torchvision()
    from torchmetrics.image.fid import FrechetInceptionDistance
    theirs = FrechetInceptionDistance(feature=Same(24))
    theirs.update(pair[0], real=True), theirs.update(pair[1], real=False)
    assert frechet_distance(*(Moments([x]) for x in pair)) == pytest.approx(theirs.compute().item(), rel=1e-6)


def exactly(mean, cov, n=10**6):
    made = Moments()
    made.n, made.mean, made.scatter = n, mean.double(), cov.double() * (n - 1)
    return made


def test_frechet_distance_of_known_gaussians():
    turn = torch.linalg.qr(draw(6, 6).double())[0]
    spread_a, spread_b = torch.linspace(.5, 2, 6).double(), torch.linspace(1, .1, 6).double()
    a, b = (turn * s**2 @ turn.T for s in (spread_a, spread_b))  # they commute: the distance is that of the spreads
    shift = torch.arange(6.)
    wanted = shift.square().sum().item() + (spread_a - spread_b).square().sum().item()
    assert frechet_distance(exactly(0 * shift, a), exactly(shift, b)) == pytest.approx(wanted, rel=1e-9)
    assert frechet_distance(exactly(shift, b), exactly(0 * shift, a)) == pytest.approx(wanted, rel=1e-9)
    n, root = 200_000, turn * spread_a
    x, y = draw(n, 6, seed=5).double() @ root.T, shift + draw(n, 6, seed=6).double() @ (turn * spread_b).T
    assert frechet_distance(Moments(x.split(5000)), Moments(y.split(5000))) == pytest.approx(wanted, abs=5 * wanted / n**.5)


def test_same_law_shrinks_as_one_over_n():
    distance = lambda n, s: frechet_distance(Moments([draw(n, seed=2 * s)]), Moments([draw(n, seed=2 * s + 1)]))
    mean = {n: np.mean([distance(n, s) for s in range(20)]) for n in (200, 800, 3200)}
    assert mean[200] / mean[800] == pytest.approx(4, rel=.15) and mean[800] / mean[3200] == pytest.approx(4, rel=.15)


def test_extrapolation_removes_the_bias():
    truth = 16 * .3**2
    gaps = [(frechet_distance(Moments([a]), Moments([b])) - truth, frechet_at_infinity(a, b) - truth)
            for a, b in [(draw(300, seed=2 * s), draw(300, scale=1.3, seed=2 * s + 1)) for s in range(20)]]
    plain, far = np.mean(gaps, axis=0)
    assert plain > .1 and abs(far) < .15 * plain
    a, b = draw(100), draw(230, seed=1)
    sizes = frechet_by_size(a, b, parts=(1, 2))
    assert list(sizes) == [100, 50] and sizes == frechet_by_size(a, b, parts=(1, 2)) != frechet_by_size(a, b, parts=(1, 2), seed=1)


def test_few_samples_warn_and_constant_features_are_finite():
    few = Moments([draw(16, 16)])
    with pytest.warns(UserWarning, match="16 features needs at least 17 samples, got 16"):
        assert math.isfinite(frechet_distance(few, Moments([draw(900, 16)])))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_distance(Moments([draw(17, 16)]), Moments([draw(17, 16, seed=1)]))
        flat = Moments([torch.ones(40, 16)])
        assert frechet_distance(flat, flat) == 0
        half = torch.cat([draw(40, 8), torch.ones(40, 8)], 1)
        assert frechet_distance(Moments([half]), Moments([half])) == pytest.approx(0, abs=1e-8)
        assert frechet_distance(flat, Moments([draw(5000, 16)])) == pytest.approx(32, rel=.05)


@pytest.mark.parametrize("bad, why", [(torch.full((3, 4), torch.nan), "NaN"), (torch.zeros(0, 4), "at least one"),
                                      (torch.zeros(4), "expected features"), (torch.zeros(3, 5), "expected 4 features a sample, got 5")])
def test_bad_features_are_refused(bad, why):
    good = draw(30, 4)
    for measure in (lambda x: Moments([good, x]), lambda x: kernel_distance(good, x), lambda x: prdc(good, x)):
        with pytest.raises(ValueError, match=why):
            measure(bad)


def test_kernel_distance_is_torchmetrics(pair):
    torchvision()
    from torchmetrics.image.kid import KernelInceptionDistance
    a, b = (x[:400].double() for x in pair)
    theirs = KernelInceptionDistance(feature=Same(24), subsets=1, subset_size=400).set_dtype(torch.float64)
    theirs.update(a, real=True), theirs.update(b, real=False)
    assert kernel_distance(a, b, chunk=64) == pytest.approx(theirs.compute()[0].item(), rel=1e-6)


def test_kernel_distance_takes_sets_of_different_size_and_has_no_bias():
    a, b = draw(7, 3).double(), draw(5, 3, shift=.5, seed=1).double()
    k = lambda x, y: (float(x @ y) / 3 + 1)**3
    within = lambda s: np.mean([k(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j])
    assert kernel_distance(a, b, chunk=2) == pytest.approx(within(a) + within(b) - 2 * np.mean([k(x, y) for x in a for y in b]), rel=1e-9)
    same = [kernel_distance(draw(20, 3, seed=2 * s), draw(20, 3, seed=2 * s + 1)) for s in range(300)]
    assert abs(np.mean(same)) < 4 * np.std(same) / 300**.5 and min(same) < 0


def test_features_come_in_chunks():
    sizes = []

    def net(x):
        sizes.append(len(x))
        return x[:, :2] * torch.ones(1, 1, requires_grad=True)

    pictures = Column(draw(5, 4).reshape(5, 2, 2), torch.arange(103) % 5)
    kept, streamed = features_of(net, pictures, chunk=20), moments_of(net, pictures, chunk=20)
    assert max(sizes) == 20 and kept.shape == (103, 4) and not kept.requires_grad
    torch.testing.assert_close(streamed.cov, kept.double().T.cov())


def test_classifier_moments_are_moments_of_its_features(world):
    readers, batch, _ = world
    net, x = classifier_features(readers["a"]), batch["a"]
    torch.testing.assert_close(classifier_moments(readers["a"], x, chunk=99).cov, Moments([features_of(net, x)]).cov, rtol=1e-4, atol=1e-6)
    assert torch.equal(net(x), readers["a"].features(x))


def test_frechet_distance_is_fast():
    from threadpoolctl import threadpool_limits
    threads = torch.get_num_threads()
    a, b = (Moments(draw(2200, 2048, scale=s, seed=k).split(1100)) for k, s in enumerate((1., 1.1)))

    def timed(f):
        start = time.process_time()
        value = f()
        return value, time.process_time() - start

    def general_root():
        root = scipy.linalg.sqrtm(a.cov.numpy() @ b.cov.numpy())
        return ((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace()).item() - 2 * np.trace(root).real

    try:
        torch.set_num_threads(1)
        with threadpool_limits(1):
            (ours, fast), (theirs, slow) = timed(lambda: frechet_distance(a, b)), timed(general_root)
    finally:
        torch.set_num_threads(threads)
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert slow > 2 * fast, f"{fast:.1f} s against {slow:.1f} s"


# diversity

def by_hand(real, made, k):
    "The four fractions from the whole matrix of distances."
    real, made = real.double().numpy(), made.double().numpy()
    ball = lambda x: np.sort(cdist(x, x), axis=1)[:, k]
    hit = cdist(real, made) < ball(real)[:, None]
    return {"precision": hit.any(0).mean(), "recall": (cdist(real, made) < ball(made)).any(1).mean(), "density": hit.sum() / k / len(made),
            "coverage": hit.any(1).mean()}


@pytest.mark.parametrize("k", [1, 3, 5])
def test_fractions_are_those_of_the_whole_matrix(pair, k):
    wanted = by_hand(*pair, k)
    assert prdc(*pair, k=k, chunk=33) == pytest.approx(wanted, abs=1e-12)
    assert all(0 < v < 1 for key, v in wanted.items() if key != "density")


def test_fractions_of_points_on_a_line():
    real, made = torch.tensor([[0.], [1.], [3.], [7.]]), torch.tensor([[.5], [4.], [12.], [2.]])
    assert radii(real, 1).tolist() == [1, 1, 2, 4]
    assert prdc(real, made, k=1) == {"precision": .75, "recall": 1, "density": 1.25, "coverage": 1}
    with pytest.raises(ValueError, match="1 to 3 neighbours among 4 samples, got 5"):
        prdc(real, made)


def test_a_set_against_itself_is_perfect_and_turning_changes_nothing():
    x = draw(600, 32) + 5
    assert prdc(x, x, chunk=250) == {"precision": 1, "recall": 1, "density": 1, "coverage": 1}
    turn = torch.linalg.qr(draw(32, 32, seed=9))[0]
    y = draw(600, 32, seed=1)
    assert prdc(3 * x.double() @ turn.double() + 1, 3 * y.double() @ turn.double() + 1) == pytest.approx(prdc(x, y), abs=1e-2)


@pytest.mark.parametrize("width", [2, 40])
def test_perfect_models_cover_what_the_law_says(width):
    n, m, k = 150, 100, 3
    wanted = 1 - math.prod((n - i) / (n + m - i) for i in range(1, k + 1))
    runs = [prdc(draw(n, width, seed=2 * s), draw(m, width, seed=2 * s + 1), k=k) for s in range(60)]
    assert np.mean([r["coverage"] for r in runs]) == pytest.approx(wanted, abs=.015)
    assert np.mean([r["density"] for r in runs]) == pytest.approx(1, abs=.1)


def test_one_perfect_sample_again_and_again_fails_recall_and_coverage():
    real = draw(1000, 16)
    one = real[real.norm(dim=1).argmin()].expand(1000, 16)
    collapsed, others = prdc(real, one), prdc(real, draw(1000, 16, seed=1))
    assert collapsed["precision"] == 1 and collapsed["recall"] == 0 and collapsed["coverage"] < .2
    assert others["recall"] > .7 and others["coverage"] > .9


# Inception

@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    "A file in pytorch-fid's format, with random weights."
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    net = torchvision().models.inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    for p in net.parameters():
        if p.ndim == 4:
            nn.init.kaiming_normal_(p)  # so that the features are not the same for all images
    torch.save(net.state_dict(), path)
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    "An empty TORCH_HOME, and no way to fetch anything."
    def refuse(*args, **kwargs):
        raise AssertionError("tried to download")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    monkeypatch.setattr("requests.get", refuse)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def put(stand_in, cache, monkeypatch):
    os.link(stand_in, cache / inception.WEIGHTS.path)
    monkeypatch.setattr(inception, "WEIGHTS", replace(inception.WEIGHTS, sha256=sha256_of(stand_in)))


def test_weights_are_where_pytorch_fid_looks_and_never_fetched(cache):
    torchvision()
    published = pytest.importorskip("pytorch_fid.inception").FID_WEIGHTS_URL
    assert inception.WEIGHTS.url == published and published.endswith("/" + inception.WEIGHTS.path)
    assert inception.WEIGHTS.path == f"pt_inception-2015-12-05-{inception.WEIGHTS.sha256[:8]}.pth"
    with pytest.raises(FileNotFoundError) as e:
        inception.Inception()
    assert str(cache / inception.WEIGHTS.path) in str(e.value) and published in str(e.value) and "get_weights()" in str(e.value)


def test_other_weights_are_refused(cache, stand_in):
    os.link(stand_in, cache / inception.WEIGHTS.path)
    with pytest.raises(CorruptFile, match="expected 6726825d"):
        inception.Inception()


def test_features_are_pytorch_fids_from_files(cache, stand_in, monkeypatch, tmp_path):
    put(stand_in, cache, monkeypatch)
    net = inception.Inception()
    theirs = pytest.importorskip("pytorch_fid.fid_score").get_activations
    images = torch.randint(256, (3, 3, 40, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[2] = images[2, :1]
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, x in zip(paths, images):
        Image.fromarray(x.permute(1, 2, 0).numpy()).save(path)
    wanted = torch.from_numpy(theirs(paths, net.net, batch_size=3, num_workers=0)).float()
    assert wanted.std(0).mean() > 1e-3
    torch.testing.assert_close(features_of(net, images, chunk=2), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net(images[2:, :1].float() / 255), wanted[2:], rtol=1e-4, atol=1e-5)
    over = images[:1] / 255. * 3 - 1
    torch.testing.assert_close(net(over), net(over.clamp(0, 1)))
    assert (net(over) - wanted[:1]).abs().mean() > 1e-3
    with pytest.raises(ValueError, match="expected images"):
        net(images[:, :2])
