"MNIST with SVHN, from small files in the format of the originals, and its stand-in."
import gzip
import io
import os
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from mld.data.dataset import load_dataset
from mld.data.files import RECIPES, check, load_prepared, prepare
from mld.data.mnist_svhn import MNIST, PHOTOS, SVHN, build_open, build_paper, hold_out, pair, read_mnist
from mld.training import CorruptFile

TRAIN, TEST, VAL = 12, 4, 3  # MNIST digits of each class in the files, and how many are held out
COLOURS = {"train": (200, 30, 30), "val": (30, 200, 30), "test": (30, 30, 200)}  # of the photos of each split


def idx(array):
    return b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def numbered(labels, shape, first):
    "Images that differ: their item and digit stand in two corners."
    images = np.zeros((len(labels), *shape), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1], images[:, 0, -1, -1] = np.arange(len(labels)), first, 20 * labels
    return images


@pytest.fixture
def raw(tmp_path, monkeypatch):
    monkeypatch.setenv("MLD_PREPARED", str(tmp_path / "prepared"))
    rng, folder = np.random.default_rng(0), tmp_path / "raw"
    for sub in ("mnist", "svhn", "bsds500"):
        (folder / sub).mkdir(parents=True)
    for k, (split, n) in enumerate({"train": TRAIN, "test": TEST}.items()):
        labels = rng.permutation(np.repeat(np.arange(10), n)).astype(np.uint8)
        for file, array in zip(MNIST[split], (numbered(labels, (1, 28, 28), k)[:, 0], labels)):
            (folder / file.path).write_bytes(gzip.compress(idx(array)))
        labels = rng.permutation(np.repeat(np.arange(10), n + np.arange(-2, 8) // 2)).astype(np.uint8)  # one less to three more of each
        houses = {"X": numbered(labels, (3, 32, 32), k).transpose(2, 3, 1, 0), "y": np.where(labels, labels, 10)[:, None]}
        savemat(folder / SVHN[split].path, houses, do_compression=True)
    jpegs, names = [], []
    for split, colour in COLOURS.items():
        for k in range(2):
            Image.new("RGB", (40, 30), colour).save(out := io.BytesIO(), "jpeg", quality=95)
            jpegs.append(out.getvalue()), names.append(f"{'test' if split == 'test' else 'trainval'}/{split}/{k}.jpg")
    np.savez(folder / PHOTOS.path, jpeg=np.frombuffer(b"".join(jpegs), np.uint8), off=np.cumsum([0, *map(len, jpegs)]), name=names)
    return folder


def small(source, **options):
    build = {"paper": build_paper, "open": build_open}[source]
    return replace(RECIPES["mnist_svhn"][source], build=partial(build, **{"val_each": VAL, "times": 5, "md5": {}} | options))


def test_pairs_of_the_originals(raw):
    data = load_prepared(small("paper"), raw)
    n = np.minimum(TRAIN, TRAIN + np.arange(-2, 8) // 2) - VAL
    assert (len(data.train), len(data.val), len(data.test)) == (5 * n.sum(), 10 * VAL, np.minimum(TEST, TEST + np.arange(-2, 8) // 2).sum())
    assert [(m.name, m.shape) for m in data.modalities] == [("mnist", (1, 28, 28)), ("svhn", (3, 32, 32))]
    for split, part in (("train", 0), ("val", 0), ("test", 1)):
        made = getattr(data, split)
        rows = made.rows()
        for m in data.modalities:
            x = m.check(rows[m.name])
            assert x.shape == (len(made), *m.shape) and x.max() <= 1
            assert torch.equal((255 * x[:, 0, -1, -1] / 20).round().long(), made.labels)  # both show the digit of the tuple
            assert (x[:, 0, 0, 1] * 255 == part).all()                                    # of the right file
            uses = torch.bincount(made.batch[m.name].index)
            assert (uses == (5 if split == "train" else 1)).all()                         # each image as often
    assert check(small("paper"), raw) == {"train": len(data.train), "val": len(data.val), "test": len(data.test)}


def test_validation_is_the_end_of_each_digit_and_test_is_the_beginning(raw):
    data = load_prepared(small("paper"), raw)
    item = lambda split, name: (255 * getattr(data, split).batch[name].stored.float() / 255)[:, 0, 0, 0].long().numpy()
    labels = read_mnist(raw, "train", {}).labels
    for c in range(10):
        rows = np.flatnonzero(labels == c)
        assert set(rows[-VAL:]) == set(item("val", "mnist")) & set(rows)
        n = min(TRAIN, TRAIN + (c - 2) // 2) - VAL
        assert set(rows[:n]) == set(item("train", "mnist")) & set(rows)


def test_the_first_rows_are_of_all_digits(raw):
    data = load_prepared(small("paper"), raw)
    assert len(data.train.labels[:60].unique()) == 10 and len(data.val.labels[:15].unique()) > 5


def test_pairing_is_the_same_every_time_and_depends_on_the_seed():
    a, b = np.arange(200) % 10, np.arange(300) % 10
    assert (pair(a, b, 20, 0) == pair(a, b, 20, 0)).all()
    assert (pair(a, b, 20, 0) != pair(a, b, 20, 1)).any()
    drawn = pair(a, b, 20, 0)
    assert len(np.unique(drawn[:, 1])) == 200 and drawn[:, 1].max() < 200  # the first n of the longer one
    partners = [set(drawn[drawn[:, 0] == i, 1]) for i in range(200)]
    assert np.mean([len(p) for p in partners]) > 10                        # drawn anew each time


def test_the_number_of_pairs_in_the_paper():
    mnist = np.repeat(np.arange(10), [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949])
    svhn = np.repeat(np.arange(10), [4948, 13861, 10585, 8497, 7458, 6882, 5727, 5595, 5045, 4659])
    assert len(pair(mnist, svhn, 20, 0)) == 1_121_360
    assert len(pair(mnist[hold_out(mnist, 500)[0]], svhn[hold_out(svhn, 500)[0]], 20, 0)) == 1_021_360


def test_the_stand_in_blends_digits_over_the_photos_of_their_split(raw):
    data = load_prepared(small("open"), raw)
    assert (len(data.train), len(data.val), len(data.test)) == (50 * (TRAIN - VAL), 10 * VAL, 10 * TEST)
    for split, colour in COLOURS.items():
        made = getattr(data, split)
        ground = torch.tensor(colour)[:, None, None]
        stored = made.batch["svhn"].stored.long()
        assert stored.shape[1:] == (3, 32, 32) and made.batch["svhn"].stored.dtype == torch.uint8
        rim = stored.clone()
        rim[:, :, 2:30, 2:30] = ground
        assert ((rim - ground).abs() < 6).all()                                                  # a jpeg is not exact
        rows = made.rows()
        digit = (20 * made.labels)[:, None]                                                      # ink at the last corner of the digit
        assert (((255 * rows["svhn"][:, :, 29, 29]).round() - (ground[:, 0, 0] - digit).abs()).abs() < 6).all()
    assert check(small("open"), raw) == {"train": 450, "val": 30, "test": 40}


def test_the_paper_s_networks_are_had_by_name(raw):
    data = load_prepared(small("open"), raw, autoencoders="paper")
    count = lambda net: sum(p.numel() for p in net.parameters())
    assert [(count(m.encoder()), count(m.decoder()), m.likelihood) for m in data.modalities] == [(320_416, 321_184, "laplace"), (296_736, 296_675, "laplace")]
    for m in data.modalities:
        assert m.decoder()(m.encoder()(data.test.rows([0])[m.name])).shape == (1, *m.shape)


def test_our_networks_keep_more_of_images_in_colour(raw):
    data = load_prepared(small("open"), raw)
    assert [(m.architecture, m.latent, m.likelihood) for m in data.modalities] == [("conv_bn", 16, "gaussian"), ("conv_bn_flat", 256, "gaussian")]
    for m in data.modalities:
        assert m.decoder()(m.encoder()(data.test.rows([0, 1])[m.name])).shape == (2, *m.shape)


@pytest.mark.parametrize("source, path, keep", [("paper", MNIST["train"][0].path, .5), ("paper", MNIST["test"][1].path, .9), ("paper", SVHN["train"].path, .5),
                                                ("paper", SVHN["test"].path, .05), ("open", PHOTOS.path, .9), ("open", PHOTOS.path, .1)])
def test_a_truncated_file_is_named_and_leaves_nothing(raw, source, path, keep):
    whole = (raw / path).read_bytes()
    (raw / path).write_bytes(whole[:int(keep * len(whole))])
    with pytest.raises(CorruptFile, match=path.split("/")[1]):
        prepare(small(source), raw)
    assert not [p for p in (raw.parent / "prepared").iterdir() if p.is_dir()]
    (raw / path).write_bytes(whole)
    assert prepare(small(source), raw).exists()


def test_an_idx_file_that_lost_its_end_before_it_was_packed(raw):
    path = raw / MNIST["train"][0].path
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1]))
    with pytest.raises(CorruptFile, match="train-images-idx3-ubyte.gz is cut off"):
        prepare(small("paper"), raw)


@pytest.mark.parametrize("path", [MNIST["train"][0].path, SVHN["train"].path])
def test_what_was_not_published_is_refused(raw, path):
    md5 = {path: "0" * 32}
    with pytest.raises(CorruptFile, match=f"{path.split('/')[1]} does not hold what was published"):
        prepare(small("paper", md5=md5), raw)


def test_the_header_of_a_gzip_file_does_not_matter(raw):
    import hashlib
    file = MNIST["train"][0]
    inside = gzip.decompress((raw / file.path).read_bytes())
    (raw / file.path).write_bytes(gzip.compress(inside, mtime=12345))
    assert len(read_mnist(raw, "train", {file.path: hashlib.md5(inside).hexdigest()}).images) == 10 * TRAIN


@pytest.mark.parametrize("source, path", [("paper", MNIST["test"][0].path), ("paper", SVHN["test"].path), ("open", MNIST["train"][1].path), ("open", PHOTOS.path)])
def test_a_missing_file_is_named_with_what_to_do(raw, source, path):
    (raw / path).unlink()
    with pytest.raises(FileNotFoundError, match=f"{path} is not there; (get it from http|mld.data.mnist_svhn.pack_photos)"):
        load_dataset("mnist_svhn", source, data=raw)


def test_labels_that_do_not_fit(raw):
    path = raw / MNIST["train"][1].path
    labels = np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=8)
    for wrong, why in ((labels[:-1], "120 images but 119 labels"), (labels + 1, r"expected labels 0 to 9, got also \[10\]")):
        path.write_bytes(gzip.compress(idx(wrong)))
        with pytest.raises(ValueError, match=why):
            prepare(small("open"), raw)
    path.write_bytes(gzip.compress(idx(np.where(labels == 3, 4, labels).astype(np.uint8))))
    with pytest.raises(ValueError, match=r"got \[3\] in one of them only"):
        prepare(small("paper"), raw)


@pytest.mark.parametrize("change, why", [(lambda x, y: (x, y % 10), r"expected labels 1 to 10, got also \[0\]"), (lambda x, y: (x, y[1:]), "images but"),
                                         (lambda x, y: (x[:28], y), r"expected bytes \(N, \(3, 32, 32\)\)"), (lambda x, y: (x / 255, y), "float64")])
def test_a_file_of_another_kind_in_the_place_of_svhn(raw, change, why):
    from scipy.io import loadmat
    stored = loadmat(raw / SVHN["test"].path)
    x, y = change(stored["X"], stored["y"])
    savemat(raw / SVHN["test"].path, {"X": x, "y": y})
    with pytest.raises(ValueError, match=why):
        prepare(small("paper"), raw)


@pytest.mark.skipif(not os.environ.get("MLD_DATA"), reason="MLD_DATA is not set: the open stand-in needs its raw files")
def test_the_real_stand_in(tmp_path, monkeypatch):
    monkeypatch.setenv("MLD_PREPARED", str(tmp_path))
    data = load_dataset("mnist_svhn", "open")
    assert check(RECIPES["mnist_svhn"]["open"]) == {"train": 1_100_000, "val": 5000, "test": 10_000}
    assert len(data.train.batch["svhn"].stored) == 55_000
    assert (torch.bincount(data.test.labels) == torch.tensor([980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009])).all()
    rows = data.train.rows(torch.randperm(1_100_000)[:2000])
    assert .2 < rows["svhn"].mean() < .6 and .1 < rows["mnist"].mean() < .2
