"The embedded sources: what they hold, that every machine has the same, that no split knows another, and that experiments run on them."
from itertools import combinations

import pytest
import torch

from mld.data.dataset import load_dataset, shared_items
from mld.data.files import RECIPES, check, prepare
from mld.data.mhd import COLUMNS, ROWS, band_of
from mld.data.mnist_svhn import embedded_digits, embedded_photos
from mld.data.pictures import ATTRIBUTES
from mld.experiment import Run
from mld.measure import rows_of
from mld.settings import TINY, settings_for

VIEW = (3, 28, 28)
WANTED = {  # data set -> shapes of its modalities, sizes and fingerprints of its splits
    "mnist_svhn": ({"mnist": (1, 28, 28), "svhn": (3, 32, 32)}, (2000, 250, 250), ("c9513cddbee48f47", "524b82461371e448", "a3e5498458a9c934")),
    "mhd": ({"image": (1, 28, 28), "sound": (1, 32, 128), "trajectory": (200,)}, (2000, 200, 200),
            ("c0fbe2f2466f0f81", "051764ba46d09feb", "39525a34b1910685")),
    "polymnist": ({f"m{v}": VIEW for v in range(5)}, (2000, 250, 250), ("682c692bceb7f833", "280c5aa7fe93ae92", "8d06053ac823f097")),
    "polymnist10": ({f"m{v}": VIEW for v in range(10)}, (2000, 250, 250), ("3a33dd8fffa1d250", "7ccf246d9ca1ce9c", "8c316e1a7381163f")),
    "cub": ({"image": (3, 64, 64), "sentence": (32, 66)}, (5000, 500, 500), ("5debfb50eb6779a2", "5fbcb5daff0db246", "6424ec2a01096838")),
    "celebamask_hq": ({"image": (3, 64, 64), "mask": (1, 64, 64), "attributes": (18,)}, (2000, 200, 200),
                      ("8750b42a1458a6b0", "47f8ec8b4c3806f8", "b725d3bf06ed3836"))}
FACES = ("cub", "celebamask_hq")


@pytest.fixture(autouse=True)
def nothing_there(tmp_path, monkeypatch):
    "No raw data, nothing prepared; and nothing may be left behind."
    monkeypatch.setenv("MLD_DATA", str(tmp_path / "raw"))
    monkeypatch.setenv("MLD_PREPARED", str(tmp_path / "prepared"))
    yield
    assert not (tmp_path / "raw").exists() and not (tmp_path / "prepared").exists()


@pytest.fixture(scope="module")
def made():
    return {name: load_dataset(name, "embedded") for name in WANTED}


def splits(data): return data.train, data.val, data.test


@pytest.mark.parametrize("name", WANTED)
def test_shapes_ranges_and_labels(made, name):
    data, (shapes, sizes, _) = made[name], WANTED[name]
    assert data.source == "embedded" and {m.name: m.shape for m in data.modalities} == shapes
    assert tuple(map(len, splits(data))) == sizes
    for split in splits(data):
        rows = split.rows(slice(0, 100))
        for m in data.modalities:
            m.check(rows[m.name])
            assert rows[m.name].std() > .05
        assert (split.labels.shape[1:] == (18,) and set(split.labels.unique().tolist()) == {0, 1}) if name in FACES else \
            (torch.bincount(split.labels) == len(split) // 10).all()


@pytest.mark.parametrize("name", WANTED)
def test_the_same_on_every_machine(made, name):
    assert tuple(split.fingerprint() for split in splits(made[name])) == WANTED[name][2]


@pytest.mark.parametrize("name", ["mhd", "celebamask_hq"])  # what is drawn, drawn again
def test_the_same_when_it_is_built_again(made, name):
    again = load_dataset(name, "embedded", n_train=300, n_val=20, n_test=30)
    assert tuple(map(len, splits(again))) == (300, 20, 30)
    for m in again.modalities: assert torch.equal(again.train.batch[m.name], made[name].train.batch[m.name][:300])


@pytest.mark.parametrize("name", WANTED)
def test_no_item_is_in_two_splits(made, name):
    for m in made[name].modalities:
        for a, b in combinations(splits(made[name]), 2) if not m.names else ():
            assert shared_items(a.batch[m.name], b.batch[m.name]) == 0, m.name


def test_no_digit_and_no_piece_of_a_photo_is_in_two_splits():
    digits = [image.tobytes() for part in embedded_digits().values() for image in part.images]
    assert len(set(digits)) == len(digits) == 2500
    across = {split: {column.tobytes() for piece in pieces for column in piece.swapaxes(0, 1)} for split, pieces in embedded_photos().items()}
    assert sum(map(len, across.values())) == len(set().union(*across.values())) == 1280  # columns of pixels


@pytest.mark.parametrize("name", WANTED)
@pytest.mark.parametrize("autoencoders", ["ours", "paper"])
def test_architectures_are_those_of_the_other_sources(name, autoencoders):
    recipe = RECIPES[name]
    facts = {"size": 64, "modalities": ["image", "mask", "attributes"], "vocabulary": ("a",), "views": len(WANTED[name][0])}
    assert len({recipe[source].modalities(facts, autoencoders) for source in recipe}) == 1


def test_there_is_nothing_to_prepare_and_something_to_check():
    with pytest.raises(ValueError, match="cub .embedded. needs no files"):
        prepare(RECIPES["cub"]["embedded"])
    assert check(RECIPES["polymnist"]["embedded"]) == {"train": 2000, "val": 250, "test": 250}


def test_tones_are_those_of_the_digit(made):
    rows, labels = made["mhd"].test.rows()["sound"], made["mhd"].test.labels
    for digit, keys in {1: (0, 0), 6: (1, 2), 0: (3, 1)}.items():
        loud = rows[labels == digit][:, 0, 12]  # a moment at which every digit sounds
        bands = torch.from_numpy(band_of(torch.tensor([ROWS[keys[0]], COLUMNS[keys[1]]], dtype=torch.double).numpy()))
        assert (loud[:, bands.round().long()] > .4).all() and (loud[:, :20] == 0).all()


def test_a_face_shows_its_attributes(made):
    rows, labels = made["celebamask_hq"].test.rows(), made["celebamask_hq"].test.labels.bool()
    has = lambda name: labels[:, ATTRIBUTES.index(name)]
    assert rows["image"][has("Pale_Skin"), 2, 38, 26].mean() > rows["image"][~has("Pale_Skin"), 2, 38, 26].mean() + .2  # a cheek's blue
    assert rows["mask"][has("Bald") & ~has("Wearing_Hat")].mean() < rows["mask"][~has("Bald")].mean() - .1


@pytest.mark.parametrize("name", [name for name in WANTED if name != "polymnist10"])  # which has 1,022 subsets to be given
def test_a_tiny_experiment(tmp_path, name):
    base = settings_for(name, "smoke", {"source": "embedded"})
    few = {"n_train": 200, "n_val": 40, "n_test": 40, "n_joint": 10, "n_given": 10, "batch_size": 64, "steps": 5, "warmup": 1}
    own = {kind: {m: {"steps": 2, "batch_size": 16, "lr": 1e-3} for m in getattr(base, kind)} for kind in ("ae", "clf")}
    sizes = {k: v for k, v in TINY.items() if k not in ("ae_steps", "ae_batch", "clf_steps", "clf_batch")}
    run = Run(name, "smoke", out=tmp_path / "runs", device="cpu", progress=False,
              overrides={"source": "embedded", **sizes, **few, **own, "samplers": {"dpm": {"steps": 2}}})
    rows = rows_of(run)
    assert set(rows.source) == {"embedded"} and {"real", "reconstruction", "MLD"} <= set(rows.model) and not rows.value.isna().any()
    assert ({"f1"} if name in FACES else {"coherence", "fmd", "precision"}) <= set(rows.metric)
    assert run.has_classes == (name not in FACES)
