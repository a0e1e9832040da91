"PolyMNIST, from small files in the format of the original, and the recipe run again."
import gzip
import os
import shutil
import zipfile
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from mld.data.dataset import load_dataset
from mld.data.files import RECIPES, check, load_prepared, prepare
from mld.data.mnist_svhn import MNIST, Digits
from mld.data.polymnist import ARCHIVE, PHOTOS, build_open, build_paper, ground, tuples
from mld.training import CorruptFile

TRAIN, TEST, VAL = 12, 4, 3  # tuples of each digit in the files, and how many are held out
N = {"train": TRAIN, "test": TEST}


@pytest.fixture
def raw(tmp_path, monkeypatch):
    monkeypatch.setenv("MLD_PREPARED", str(tmp_path / "prepared"))
    (tmp_path / "raw" / "polymnist").mkdir(parents=True)
    return tmp_path / "raw"


@pytest.fixture
def folder(raw):
    "The tree of the original: an image says of which view, number and digit it is, and of which split."
    for split, n in N.items():
        for view in range(5):
            (folder := raw / "polymnist" / "MMNIST" / split / f"m{view}").mkdir(parents=True)
            for number in range(n):
                for digit in range(10):
                    pixels = np.full((28, 28, 3), 100, np.uint8)
                    pixels[0, :4, 0], pixels[1, 0] = (view, number, digit, split == "test"), (10, 20, 30)
                    Image.fromarray(pixels).save(folder / f"{number}.{digit}.png")
    return raw / "polymnist" / "MMNIST"


@pytest.fixture
def archive(folder):
    "The same, zipped, and the tree gone."
    shutil.make_archive(folder, "zip", folder.parent, "MMNIST")
    shutil.rmtree(folder)
    return folder.with_suffix(".zip")


@pytest.fixture
def mnist_and_photos(raw):
    "MNIST whose images are strokes at a place of their own, and grounds of one colour."
    (raw / "mnist").mkdir()
    for k, (split, n) in enumerate(N.items()):
        labels = np.random.default_rng(k).permutation(np.repeat(np.arange(10), n)).astype(np.uint8)
        images = np.zeros((len(labels), 28, 28), np.uint8)
        for i, c in enumerate(labels): images[i, 2 * k, i % 28], images[i, 10 + i // 28, 0], images[i, 27, c], images[i, 5] = 255, 129, 200, 128
        for file, array in zip(MNIST[split], (images, labels)):
            (raw / file.path).write_bytes(gzip.compress(b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()))
    for k, file in enumerate(PHOTOS): Image.new("RGB", (40, 60), (40 * k, 50, 90)).save(raw / file.path, quality=100)
    return raw


paper = replace(RECIPES["polymnist"]["paper"], build=partial(build_paper, val_each=VAL))


def again(name="polymnist", views=5): return replace(RECIPES[name]["open"], build=partial(build_open, views=views, val_each=VAL, md5={}))


@pytest.mark.parametrize("form", ["folder", "archive"])
def test_tuples_of_the_original(raw, form, request):
    request.getfixturevalue(form)
    data = load_prepared(paper, raw)
    assert check(paper, raw) == {"train": 10 * (TRAIN - VAL), "val": 10 * VAL, "test": 10 * TEST}
    assert [(m.name, m.shape) for m in data.modalities] == [(f"m{v}", (3, 28, 28)) for v in range(5)]
    numbers = {}
    for split in ("train", "val", "test"):
        made = getattr(data, split)
        marks = torch.stack([made.batch[f"m{v}"][:, 0, 0, :4] for v in range(5)]).long()              # (views, N, 4)
        assert (marks[:, :, 0] == torch.arange(5)[:, None]).all()                                     # each view is itself
        assert (marks[:, :, 1:] == marks[0, :, 1:]).all()                                             # of the same number in all
        assert torch.equal(marks[0, :, 2], made.labels)
        assert (marks[0, :, 3] == (split == "test")).all()
        assert made.batch["m2"][0, :, 1, 0].tolist() == [10, 20, 30]                                  # channels in their order
        numbers[split] = set(marks[0, :, 1].tolist())
        assert (marks[0, :, 1].diff() < 0).any() and len(made.labels[:15].unique()) > 5               # shuffled
        assert (torch.bincount(made.labels) == len(made) // 10).all()
    assert numbers["val"] == set(range(TRAIN - VAL, TRAIN)) and numbers["train"] == set(range(TRAIN - VAL))
    assert data.test.rows([0])["m0"].dtype == torch.float32
    assert torch.equal(data.train.labels, torch.from_numpy(paper.build(raw)[0]["train"]["labels"]))   # in the same order every time


def test_numbers_are_numbers(folder):
    "10.0.png comes after 9.0.png, and a file that is not of the data set is not read."
    from mld.data.polymnist import in_step, original
    (folder / "train" / "m0" / "thumbnail.png").write_bytes(b"")
    views, labels = in_step(original(folder.parents[1])[1], "train", folder)
    assert [name.split("/")[-1] for name in views[3][-21::10]] == ["9.9.png", "10.9.png", "11.9.png"]
    assert labels.tolist() == [*range(10)] * TRAIN


def test_a_label_that_differs_between_views_is_named(raw, folder):
    (folder / "train" / "m3" / "4.5.png").rename(folder / "train" / "m3" / "4.6.old")
    with pytest.raises(ValueError, match="1 files of m0 and m3 have no partner.*train/m0/4.5.png"):
        prepare(paper, raw)
    (folder / "train" / "m3" / "4.6.old").rename(folder / "train" / "m3" / "99.6.png")
    with pytest.raises(ValueError, match="2 files of m0 and m3 .*train/m0/4.5.png, train/m3/99.6.png"):
        prepare(paper, raw)


def test_a_view_that_was_not_unpacked(raw, folder):
    shutil.rmtree(folder / "test" / "m4")
    with pytest.raises(ValueError, match="40 files of m0 and m4"):
        prepare(paper, raw)
    shutil.rmtree(folder / "train")
    with pytest.raises(ValueError, match="expected files train/m0/<number>.<digit>.png, got none"):
        prepare(paper, raw)


@pytest.mark.parametrize("keep", [0, 60, 90])
def test_a_truncated_picture_is_named(raw, folder, keep):
    path = folder / "test" / "m1" / "2.7.png"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CorruptFile, match="test/m1/2.7.png in .* is damaged"):
        prepare(paper, raw)
    assert not [p for p in (raw.parent / "prepared").iterdir() if p.is_dir()]


def test_a_picture_of_another_size_is_named(raw, folder):
    Image.new("RGB", (32, 28)).save(folder / "test" / "m1" / "2.7.png")
    with pytest.raises(ValueError, match="test/m1/2.7.png in .*: expected 28x28 pixels, got 32x28"):
        prepare(paper, raw)


def test_a_truncated_archive(raw, archive):
    whole = archive.read_bytes()
    archive.write_bytes(whole[:-50])
    with pytest.raises(CorruptFile, match="MMNIST.zip is truncated"):
        prepare(paper, raw)
    archive.write_bytes(whole)
    with zipfile.ZipFile(archive) as z: at = z.getinfo("MMNIST/train/m0/3.0.png").header_offset + 80
    archive.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1:])
    with pytest.raises(CorruptFile, match="train/m0/3.0.png in .*MMNIST.zip is damaged"):
        prepare(paper, raw)


def test_nothing_there(raw):
    with pytest.raises(FileNotFoundError, match=f"{ARCHIVE.path} is not there; .*thomassutter/MoPoE.*unpack it"):
        load_dataset("polymnist", "paper", data=raw)


def test_the_recipe_run_again(mnist_and_photos):
    raw = mnist_and_photos
    data = load_prepared(again(), raw)
    assert check(again(), raw) == {"train": 10 * (TRAIN - VAL), "val": 10 * VAL, "test": 10 * TEST}
    items = {}
    for split in ("train", "val", "test"):
        made, seen = getattr(data, split), []
        for v in range(5):
            x = made.batch[f"m{v}"]
            colour = torch.tensor([40 * v, 50, 90])[None, :, None, None]
            ink = ((x.long() - (255 - colour)).abs() < 4).all(1)                        # inverted, within what a jpeg loses
            plain = ((x.long() - colour).abs() < 4).all(1)
            assert (ink ^ plain).all() and not ink[:, 5].any()                          # 128 is no ink, 129 is
            assert torch.equal(ink[:, 27].long().argmax(1), made.labels)
            assert ink[:, 10:18, 0].any(1).all()
            assert (ink[:, 0].any(1) != ink[:, 2].any(1)).all() and ink[:, 2].any() == (split == "test")
            at = ink[:, 2 if split == "test" else 0].long().argmax(1) + 28 * ink[:, 10:18, 0].long().argmax(1)
            assert len(at.unique()) == len(made)                                        # each digit once
            seen.append(at)
        assert all((seen[0] != s).any() for s in seen[1:])                              # each view in an order of its own
        items[split] = set(seen[0].tolist())
    assert not items["train"] & items["val"]


def test_ten_views_and_networks(mnist_and_photos):
    data = load_prepared(again("polymnist10", 10), mnist_and_photos, autoencoders="paper")
    assert data.names == [f"m{v}" for v in range(10)] and data.name == "polymnist10"
    assert data.modalities[9].latent == 160 and data.modalities[9].decoder()(data.modalities[9].encoder()(data.test.rows([0])["m9"])).shape == (1, 3, 28, 28)
    ours = load_prepared(again("polymnist10", 10), mnist_and_photos)
    assert {(m.architecture, m.likelihood) for m in ours.modalities} == {("conv_bn", "gaussian")}


def test_grounds_differ():
    photos = list(np.random.default_rng(0).integers(0, 256, (5, 40, 50, 3), dtype=np.uint8))
    assert len({ground(photos, v).tobytes() for v in range(30)}) == 30
    assert (ground(photos, 7) == photos[2][:, ::-1, [2, 0, 1]]).all()


def test_the_same_seed_the_same_tuples():
    few = Digits(np.random.default_rng(0).integers(0, 256, (50, 1, 28, 28), dtype=np.uint8), np.arange(50) % 10)
    photos = list(np.random.default_rng(0).integers(0, 256, (5, 40, 50, 3), dtype=np.uint8))
    one, same, other = (tuples(few, photos, 3, seed) for seed in (0, 0, 1))
    for column in one: assert (one[column] == same[column]).all() and (one[column] != other[column]).any()


@pytest.mark.parametrize("path", [PHOTOS[3].path, MNIST["train"][0].path])
def test_files_of_the_recipe_truncated_or_missing(mnist_and_photos, path):
    file = mnist_and_photos / path
    file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])
    with pytest.raises(CorruptFile, match=f"{file.name} is truncated"):
        prepare(again(), mnist_and_photos)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"{path} is not there; (get it from|it is photo 174276)"):
        load_dataset("polymnist", "open", data=mnist_and_photos)


def test_digits_that_were_not_published_are_refused(mnist_and_photos):
    with pytest.raises(CorruptFile, match="train-images-idx3-ubyte.gz does not hold what was published"):
        load_dataset("polymnist10", "open", data=mnist_and_photos)


@pytest.mark.skipif(not os.environ.get("MLD_DATA"), reason="MLD_DATA is not set: the open stand-in needs its raw files")
def test_the_real_stand_in(tmp_path, monkeypatch):
    monkeypatch.setenv("MLD_PREPARED", str(tmp_path / "prepared"))
    try:
        data = load_dataset("polymnist", "open")
        assert check(RECIPES["polymnist"]["open"]) == {"train": 55_000, "val": 5000, "test": 10_000}
        assert (torch.bincount(data.test.labels) == torch.tensor([980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009])).all()
        x = data.train.rows(slice(0, 1000))
        night, poppies = x["m2"].mean((0, 2, 3)), x["m3"].mean((0, 2, 3))
        assert night[2] > night[0] and poppies[0] > poppies[2]  # the night sky is blue, the poppies are not
    finally: shutil.rmtree(tmp_path / "prepared", ignore_errors=True)  # .8 GB
