"CUB image-captions and its stand-in, on small files in the format of the originals."
import os
from dataclasses import replace
from functools import partial
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from mld.data.cub import (END, EXCLUDED, PAD, attributes_of, build_birds, build_faces, caption_modalities, caption_of, make_vocabulary, tokens_of,
                          words_in, words_of)
from mld.data.files import RECIPES, check, load_prepared, prepare
from mld.data.pictures import ATTRIBUTES, FACES
from mld.modality import Modality
from mld.training import CorruptFile

NUMBERS = "zero one two three four five six seven eight nine ten eleven".split()
BIRDS = replace(RECIPES["cub"]["paper"], build=partial(build_birds, n_val=2))
WRITTEN = replace(RECIPES["cub"]["open"], build=partial(build_faces, n_train=12, n_val=4))


@pytest.fixture(autouse=True)
def prepared(tmp_path, monkeypatch):
    monkeypatch.setenv("MLD_PREPARED", str(tmp_path / "prepared"))
    return tmp_path / "prepared"


@pytest.fixture
def birds(tmp_path):
    "Photo k of a part has the grey level 20 k (a little blue in test), and its captions name k; folders and files are written out of order."
    for part, text, species in (("train", "trainval", ("002.Auk", "010.Wren", "001.Gull")), ("test", "test", ("009.Lark", "003.Tern"))):
        names = [(s, f) for s in sorted(species) for f in ("a.jpg", "b.jpg", "c.jpg", "d.jpg")]
        for k, (s, f) in reversed(list(enumerate(names))):
            (tmp_path / "cub" / part / s).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (90, 50 + k), (20 * k, 20 * k, 20 * k + 9 * (part == "test"))).save(tmp_path / "cub" / part / s / f, quality=95)
        lines = [f"this {s[4:].lower()} is {NUMBERS[k]}, and caption {NUMBERS[c]} says it isn't {NUMBERS[11 - k]}." for k, (s, f) in enumerate(names) for c in range(10)]
        (tmp_path / "cub" / f"text_{text}classes.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def write_faces(path, n=20, **changes):
    rng = np.random.default_rng(0)
    faces = []
    for k in range(n):
        Image.new("RGB", (89, 109), (10 * k, 255 - 10 * k, 128)).save(face := BytesIO(), "JPEG", quality=95)
        faces.append(face.getvalue())
    attr = (rng.random((n, 18)) < .25).astype(np.uint8)
    arrays = dict(jpeg=np.frombuffer(b"".join(faces), np.uint8), off=np.cumsum([0, *map(len, faces)]),
                  attr=np.hstack([np.ones((n, 1), np.uint8), attr]), attr_names=np.array(("Young", *ATTRIBUTES)))
    path.parent.mkdir(exist_ok=True)
    np.savez(path, **{**arrays, **changes})
    return attr


def test_every_photo_meets_its_ten_captions(birds):
    data = load_prepared(BIRDS, birds)
    assert {s: len(getattr(data, s)) for s in ("train", "val", "test")} == {"train": 100, "val": 20, "test": 80}
    image, sentence = data.modalities
    for split in (data.train, data.val, data.test):
        rows = split.rows()
        assert image.check(rows["image"]).shape[1:] == (3, 64, 64) and sentence.check(rows["sentence"]).shape[1:] == (32, len(sentence.names))
        assert (rows["sentence"].sum(-1) == 1).all()
        for x, words in zip(rows["image"], rows["sentence"].argmax(-1)):
            k = round(float(x.mean()) * 255 / 20)
            assert f"is {NUMBERS[k]}," in words_of(words, sentence.names)
        said = [words_of(words, sentence.names) for words in rows["sentence"].argmax(-1)]
        assert all("caption zero" in said[i] and "caption nine" in said[i + 9] for i in range(0, len(said), 10))


def test_labels_are_species_and_those_of_the_test_set_are_new(birds):
    splits, facts = BIRDS.build(birds)
    assert facts["species"] == ["001.Gull", "002.Auk", "003.Tern", "009.Lark", "010.Wren"]
    for columns in (splits["train"], splits["val"]):
        assert {facts["species"][k] for k in columns["labels"]} <= {"001.Gull", "002.Auk", "010.Wren"}
        for tokens, k in zip(columns["sentence"], columns["labels"]):
            assert words_of(tokens, facts["vocabulary"]).startswith(f"this {facts['species'][k][4:].lower()} is")
    assert {facts["species"][k] for k in splits["test"]["labels"]} == {"003.Tern", "009.Lark"}
    assert not {"tern", "lark"} & set(facts["vocabulary"])


def test_a_prepared_copy_passes_its_check(birds):
    prepare(BIRDS, birds)
    assert check(replace(BIRDS, modalities=lambda facts, autoencoders: caption_modalities(facts)[:1]), birds) == {"train": 100, "val": 20, "test": 80}


def test_the_validation_photos_are_the_same_every_time_and_not_trained_on(birds):
    first, again = BIRDS.build(birds)[0], BIRDS.build(birds)[0]
    assert all((first[s][c] == again[s][c]).all() for s in first for c in first[s])
    rows = {s: {x.tobytes() for x in first[s]["image"]} for s in first}
    assert not rows["train"] & rows["val"] and len(rows["train"]) == 10


def test_a_missing_caption_is_refused_with_both_counts(birds, prepared):
    path = birds / "cub" / "text_testclasses.txt"
    path.write_text(path.read_text()[:-100])
    with pytest.raises(ValueError, match=r"text_testclasses.txt has (78|79) captions for 8 images, expected 10 for each: 80"):
        prepare(BIRDS, birds)
    assert not list(prepared.glob("cub*/"))


def test_a_species_in_both_parts_is_refused(birds):
    (birds / "cub" / "test" / "009.Lark").rename(birds / "cub" / "test" / "002.Auk")
    with pytest.raises(ValueError, match="002.Auk both in train and in test"):
        prepare(BIRDS, birds)


@pytest.mark.parametrize("damage", [lambda b: b[:len(b) // 2], lambda b: b"<html>not found</html>", lambda b: b""])
def test_a_damaged_photo_is_named(birds, damage):
    path = birds / "cub" / "train" / "010.Wren" / "c.jpg"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CorruptFile, match="010.Wren/c.jpg is not a whole picture"):
        prepare(BIRDS, birds)


def test_captions_that_are_no_text_are_named(birds):
    (birds / "cub" / "text_trainvalclasses.txt").write_bytes(bytes(range(128, 256)) * 40)
    with pytest.raises(CorruptFile, match="text_trainvalclasses.txt is not a text"):
        prepare(BIRDS, birds)


@pytest.mark.parametrize("name", ["train", "test", "text_trainvalclasses.txt", "text_testclasses.txt"])
def test_what_is_missing_is_named_with_what_to_do(birds, name):
    (birds / "cub" / name).rename(birds / "elsewhere")
    with pytest.raises(FileNotFoundError, match=f"cub/{name} is not there; download http.*cub.zip"):
        prepare(BIRDS, birds)


def test_words_are_cut_as_a_tokeniser_would():
    assert words_in("this bird's bill isn't black-tipped, it's red/brown (mostly); 2.5 inches.") == [
        "this", "bird", "'s", "bill", "is", "n't", "black-tipped", ",", "it", "'s", "red/brown", "(", "mostly", ")", ";", "2.5", "inches", "."]


def test_rare_words_are_excluded_and_long_captions_cut():
    vocabulary = make_vocabulary(["red blue."] * 3 + ["red."])
    assert vocabulary == ["<exc>", "<pad>", "<eos>", "red", "."]
    short, full, long = tokens_of(["red blue.", "red " * 31, "red " * 40], vocabulary)
    assert short.tolist() == [3, EXCLUDED, 4, END] + [PAD] * 28
    assert full.tolist() == long.tolist() == [3] * 31 + [END]


def test_sentences_come_back_and_end_where_they_end():
    caption = "the bird's beak isn't red; it's blue, right?"
    vocabulary = make_vocabulary([caption] * 4)
    assert words_of(tokens_of([caption], vocabulary)[0], vocabulary) == caption
    assert words_of([3, PAD, EXCLUDED, 4, END, 5], vocabulary) == "the bird"
    assert words_of([END, 3, 4], vocabulary) == ""
    assert words_of([3] * 32, vocabulary) == " ".join(["the"] * 32)


def test_every_set_of_attributes_can_be_read_back_from_its_captions():
    rng = np.random.default_rng(0)
    sets = [np.zeros(18), np.ones(18), *np.eye(18), *(rng.random((300, 18)) < rng.random((300, 1)))]
    for k, values in enumerate(sets):
        for number in (k, 1000 + k):
            assert (attributes_of(caption_of(values, number)) == values).all()


def test_captions_depend_on_attributes_seed_and_number_alone():
    values = np.random.default_rng(1).random(18) < .3
    assert caption_of(values, 5, seed=2) == caption_of(values.astype(int).tolist(), 5, seed=2)
    assert len({caption_of(values, number) for number in range(10)}) > 5
    assert caption_of(values, 5, seed=2) != caption_of(values, 5, seed=3)


def test_faces_meet_captions_that_say_what_they_have(tmp_path):
    attr = write_faces(tmp_path / FACES.path)
    data = load_prepared(WRITTEN, tmp_path)
    words = data.modalities[1].names
    assert list(words) == make_vocabulary(caption_of(attr[k], 10 * k + c) for k in range(12) for c in range(10))
    assert {s: len(getattr(data, s)) for s in ("train", "val", "test")} == {"train": 120, "val": 40, "test": 40}
    for split, first in ((data.train, 0), (data.val, 12), (data.test, 16)):
        rows = split.rows()
        for i, (x, tokens, label) in enumerate(zip(rows["image"], rows["sentence"].argmax(-1), split.labels)):
            face = first + i // 10
            assert abs(float(x[0].mean()) * 255 - 10 * face) < 5
            assert (label.numpy() == attr[face]).all()
            if EXCLUDED not in tokens: assert (attributes_of(words_of(tokens, words)) == attr[face]).all()


def test_a_truncated_file_of_faces_is_refused(tmp_path):
    path = tmp_path / FACES.path
    write_faces(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CorruptFile, match="not a whole file of faces"):
        prepare(WRITTEN, tmp_path)


def test_a_face_that_breaks_off_is_named(tmp_path):
    write_faces(tmp_path / FACES.path, jpeg=np.zeros(9000, np.uint8))
    with pytest.raises(CorruptFile, match="face 0 of .*npz is not a whole picture"):
        prepare(WRITTEN, tmp_path)


@pytest.mark.parametrize("changes, why", [
    ({"attr": np.zeros((19, 19), np.uint8)}, "20 faces and 19 rows"),
    ({"attr_names": np.array(["Young"] * 19)}, "has no attribute Bald, Bangs"),
    ({"n": 16}, "16 items; expected more than 12 to train on and 4 to validate")])
def test_faces_that_do_not_match_are_refused(tmp_path, changes, why):
    write_faces(tmp_path / FACES.path, **changes)
    with pytest.raises(ValueError, match=why):
        prepare(WRITTEN, tmp_path)


def test_a_missing_file_of_faces_says_how_to_make_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="pack_faces"):
        prepare(WRITTEN, tmp_path)


@pytest.mark.parametrize("autoencoders", ["paper", "ours"])
def test_every_parameter_learns(autoencoders):
    torch.manual_seed(0)
    for m in caption_modalities({"vocabulary": [str(k) for k in range(50)]}, autoencoders):
        encoder, decoder = m.encoder(), m.decoder()
        x = torch.rand(3, *m.shape) if m.name == "image" else torch.nn.functional.one_hot(torch.randint(50, (3, 32)), 50).float()
        z = encoder(x)
        assert z.shape == (3, m.latent)
        m.loss(x, decoder(z)).mean().backward()
        for name, p in [*encoder.named_parameters(), *decoder.named_parameters()]:
            assert p.grad is not None and p.grad.isfinite().all(), f"{m.architecture}: {name}"
        assert decoder.eval()(encoder.eval()(x[:1])).shape == (1, *m.shape)


def test_our_latents_are_standardised_and_the_papers_are_not():
    torch.manual_seed(0)
    for autoencoders, standard in (("ours", True), ("paper", False)):
        m = caption_modalities({"vocabulary": [str(k) for k in range(50)]}, autoencoders)[1]
        z = m.encoder()(torch.nn.functional.one_hot(torch.randint(50, (64, 32)), 50).float())
        assert torch.allclose(z.mean(0), torch.zeros(32), atol=1e-3) == standard
        assert torch.allclose(z.var(0, correction=0), torch.ones(32), atol=.05) == standard
        assert (not list(m.encoder()[-1].parameters())) == standard


def test_a_caption_is_drawn_whether_it_is_data_or_logits():
    caption = "a bald man with a hat."
    vocabulary = tuple(make_vocabulary([caption] * 4))
    m = Modality("sentence", (32, len(vocabulary)), 32, "words", "categorical", kind="caption", names=vocabulary)
    x = torch.nn.functional.one_hot(torch.tensor(tokens_of([caption], vocabulary)[0]).long(), len(vocabulary)).float()
    for drawn in (x, 9 * x - 20):
        assert m.show(drawn).texts[0].get_text().replace("\n", " ") == caption


@pytest.mark.skipif(not os.environ.get("MLD_DATA"), reason="MLD_DATA is not set: the open stand-in needs its raw files")
def test_the_real_stand_in():
    recipe = RECIPES["cub"]["open"]
    prepare(recipe)
    # captions of different faces may have the same words, so only the images must be apart
    assert check(replace(recipe, modalities=lambda facts, autoencoders: caption_modalities(facts)[:1])) == {"train": 50_000, "val": 5000, "test": 5000}
    data = load_prepared(recipe)
    words, batch = data.modalities[1].names, data.test.rows(slice(0, 5000, 7))
    assert len(words) < 100 and len(data.train.batch["image"].stored) == 5000
    assert (batch["sentence"].argmax(-1) == END).any(-1).all() and not (batch["sentence"].argmax(-1) == EXCLUDED).any()
    for tokens, label in zip(batch["sentence"].argmax(-1), data.test.labels[::7]):
        assert (attributes_of(words_of(tokens, words)) == label.numpy()).all()
    assert .2 < float(batch["image"].mean()) < .7
