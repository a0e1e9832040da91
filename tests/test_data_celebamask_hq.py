"CelebAMask-HQ and its stand-in, on small files in the format of the originals."
import os
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from mld.data.celebamask_hq import PARTS, build_masked, build_plain, face_modalities, read_mask
from mld.data.files import RECIPES, check, load_prepared, prepare
from mld.data.pictures import ATTRIBUTES, FACES, pack_faces
from mld.metrics.reconstruction import f1, measures_of
from mld.training import CorruptFile

NAMES = """5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose Black_Hair Blond_Hair Blurry Brown_Hair Bushy_Eyebrows
Chubby Double_Chin Eyeglasses Goatee Gray_Hair Heavy_Makeup High_Cheekbones Male Mouth_Slightly_Open Mustache Narrow_Eyes No_Beard Oval_Face Pale_Skin
Pointy_Nose Receding_Hairline Rosy_Cheeks Sideburns Smiling Straight_Hair Wavy_Hair Wearing_Earrings Wearing_Hat Wearing_Lipstick Wearing_Necklace
Wearing_Necktie Young""".split()
TAKEN = [4, 5, 8, 9, 11, 12, 15, 17, 18, 20, 21, 22, 26, 28, 31, 32, 33, 35]
MASKED = replace(RECIPES["celebamask_hq64"]["paper"], build=partial(build_masked, size=64, n_val=3, n_test=4))
PLAIN = replace(RECIPES["celebamask_hq"]["open"], build=partial(build_plain, n_train=10, n_val=3))


@pytest.fixture(autouse=True)
def prepared(tmp_path, monkeypatch):
    monkeypatch.setenv("MLD_PREPARED", str(tmp_path / "prepared"))
    return tmp_path / "prepared"


def write_list(path, values, name="{}.jpg"):
    rows = [name.format(i) + "  " + " ".join(str(2 * int(v) - 1) for v in row) for i, row in enumerate(values)]
    path.write_text("\n".join([str(len(values)), " ".join(NAMES) + " ", *rows]) + "\n")


@pytest.fixture
def faces(tmp_path):
    "Face i is grey, its level 15 i; its hair reaches down to row 20 i, a nose stands apart, and skin is everywhere. Attributes are random."
    root, values = tmp_path / "celebamask_hq", np.random.default_rng(0).random((14, 40)) < .4
    (root / "CelebA-HQ-img").mkdir(parents=True), (root / "CelebAMask-HQ-mask-anno" / "0").mkdir(parents=True)
    for i in range(14):
        Image.new("RGB", (256, 256), (15 * i,) * 3).save(root / "CelebA-HQ-img" / f"{i}.jpg", quality=95)
        for part, box in (("skin", (0, 0, 511, 511)), ("hair", (0, 0, 511, 20 * i)), ("nose", (400, 480, 420, 500))):
            ImageDraw.Draw(drawn := Image.new("RGB", (512, 512))).rectangle(box, fill="white")
            drawn.save(root / "CelebAMask-HQ-mask-anno" / "0" / f"{i:05}_{part}.png")
    write_list(root / "CelebAMask-HQ-attribute-anno.txt", values)
    return values


@pytest.fixture
def plain(tmp_path):
    "Made from files as CelebA has them."
    folder, values = tmp_path / "img_align_celeba", np.random.default_rng(1).random((16, 40)) < .4
    folder.mkdir()
    for i in range(16): Image.new("RGB", (178, 218), (15 * i,) * 3).save(folder / f"{i:06}.jpg", quality=95)
    write_list(tmp_path / "list_attr_celeba.txt", values, "{:06}.jpg")
    pack_faces(folder, tmp_path / "list_attr_celeba.txt", tmp_path / FACES.path)
    return values


def test_images_masks_and_attributes_are_of_the_same_face(faces, tmp_path):
    data = load_prepared(MASKED, tmp_path)
    assert (data.names, len(data.train), len(data.val), len(data.test)) == (["image", "mask", "attributes"], 7, 3, 4)
    found = []
    for split in (data.train, data.val, data.test):
        rows = split.rows()
        for m in data.modalities: m.check(rows[m.name])
        for image, mask, attributes, label in zip(*rows.values(), split.labels):
            i = round(float(image.mean()) * 255 / 15)
            assert abs(float(mask[0, :, 0].mean()) - (20 * i + 1) / 512) < .01
            assert (attributes.numpy() == faces[i, TAKEN]).all() and (label == attributes).all()
            found.append(i)
    assert sorted(found) == list(range(14))
    assert found[-4:] == [6, 7, 8, 9], "the last of 0, 1, 10, 11, 12, 13, 2, ..., 9"


def test_masks_have_every_part_but_skin_and_soft_edges(faces, tmp_path):
    mask = read_mask(tmp_path / "celebamask_hq" / "CelebAMask-HQ-mask-anno", 7, 64)[0]
    assert mask[:17].min() == 255 and mask[19:59].max() == 0 and mask[60:62, 51].min() > 100
    assert 0 < mask[17, 0] < 255
    assert len(PARTS) == 17 and "skin" not in PARTS


def test_faces_from_2000_on_are_in_the_next_folder(faces, tmp_path):
    folder = tmp_path / "celebamask_hq" / "CelebAMask-HQ-mask-anno"
    with pytest.raises(FileNotFoundError, match="mask-anno/1/02003_skin.png"): read_mask(folder, 2003, 64)
    (folder / "1").mkdir(), (folder / "0" / "00003_hair.png").rename(folder / "1" / "02003_hair.png")
    assert read_mask(folder, 2003, 64).max() == 255


def test_a_face_of_skin_alone_has_an_empty_mask(faces, tmp_path):
    folder = tmp_path / "celebamask_hq" / "CelebAMask-HQ-mask-anno"
    for part in ("hair", "nose"): (folder / "0" / f"00005_{part}.png").unlink()
    assert read_mask(folder, 5, 64).max() == 0
    (folder / "0" / "00005_skin.png").unlink()
    with pytest.raises(FileNotFoundError, match="no part of face 5"): prepare(MASKED, tmp_path)


def test_sizes_are_recipes(faces, tmp_path):
    for size in (64, 128, 256):
        recipe = RECIPES["celebamask_hq" if size == 128 else f"celebamask_hq{size}"]["paper"]
        assert recipe.build.keywords == {"size": size}
        assert [m.shape for m in face_modalities({"size": size, "modalities": ["image", "mask"]})] == [(3, size, size), (1, size, size)]
    splits, facts = build_masked(tmp_path, 128, n_val=3, n_test=4)
    assert splits["val"]["image"].shape == (3, 3, 128, 128) and facts["size"] == 128


def test_images_without_attributes_are_refused(faces, tmp_path, prepared):
    root = tmp_path / "celebamask_hq"
    (root / "CelebA-HQ-img" / "9.jpg").rename(root / "CelebA-HQ-img" / "99.jpg")
    with pytest.raises(ValueError, match="14 images and the attributes of 14; 9.jpg is in one of them only"): prepare(MASKED, tmp_path)
    assert not list(prepared.glob("celebamask*/"))


def test_a_list_of_attributes_that_breaks_off_is_refused(faces, tmp_path):
    path = tmp_path / "celebamask_hq" / "CelebAMask-HQ-attribute-anno.txt"
    text = path.read_text()
    for cut in (text[:-60], text[:text.rindex("13.jpg")], text[:300], ""):
        path.write_text(cut)
        with pytest.raises(CorruptFile, match="not a whole list of attributes"): prepare(MASKED, tmp_path)


def test_a_list_of_other_attributes_is_refused(faces, tmp_path):
    path = tmp_path / "celebamask_hq" / "CelebAMask-HQ-attribute-anno.txt"
    path.write_text(path.read_text().replace("Wavy_Hair", "Ondulated"))
    with pytest.raises(ValueError, match="has no attribute Wavy_Hair"): prepare(MASKED, tmp_path)


@pytest.mark.parametrize("name", ["CelebA-HQ-img/4.jpg", "CelebAMask-HQ-mask-anno/0/00004_hair.png"])
def test_a_damaged_picture_is_named(faces, tmp_path, name):
    path = tmp_path / "celebamask_hq" / name
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(CorruptFile, match=f"{path.name} is not a whole picture"): prepare(MASKED, tmp_path)


@pytest.mark.parametrize("name", ["CelebA-HQ-img", "CelebAMask-HQ-mask-anno", "CelebAMask-HQ-attribute-anno.txt"])
def test_what_is_missing_is_named_with_what_to_do(faces, tmp_path, name):
    (tmp_path / "celebamask_hq" / name).rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=f"celebamask_hq/{name} is not there; ask for CelebAMask-HQ"): prepare(MASKED, tmp_path)


def test_too_few_faces_are_refused(faces, tmp_path):
    with pytest.raises(ValueError, match="cannot hold out 1000"): build_masked(tmp_path, 64)


def test_the_stand_in_keeps_the_order_of_the_file(plain, tmp_path):
    data = load_prepared(PLAIN, tmp_path)
    assert (data.names, data.source, [len(s) for s in (data.train, data.val, data.test)]) == (["image", "attributes"], "open", [10, 3, 3])
    for split, first in ((data.train, 0), (data.val, 10), (data.test, 13)):
        rows = split.rows()
        for i, (image, attributes, label) in enumerate(zip(rows["image"], rows["attributes"], split.labels)):
            assert abs(float(image.mean()) * 255 - 15 * (first + i)) < 3
            assert (attributes.numpy() == plain[first + i, TAKEN]).all() and (label == attributes).all()


def test_a_face_is_the_middle_of_its_picture(tmp_path):
    picture = Image.new("RGB", (178, 218), "red")
    ImageDraw.Draw(picture).rectangle((15, 35, 162, 182), fill="blue")
    (tmp_path / "images").mkdir()
    for i in range(2): picture.save(tmp_path / "images" / f"{i}.jpg", quality=95)
    write_list(tmp_path / "list.txt", np.zeros((2, 40)))
    pack_faces(tmp_path / "images", tmp_path / "list.txt", tmp_path / FACES.path)
    image = build_plain(tmp_path, n_train=0, n_val=0)[0]["test"]["image"][1]
    assert image.shape == (3, 64, 64) and image[2, 1:-1, 1:-1].min() > 150 and image[0, 2:-2, 2:-2].max() < 60


def test_a_truncated_file_of_faces_is_refused(plain, tmp_path):
    path = tmp_path / FACES.path
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CorruptFile, match="not a whole file of faces"): prepare(PLAIN, tmp_path)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("autoencoders", ["paper", "ours"])
def test_every_parameter_learns(autoencoders, size):
    torch.manual_seed(0)
    for m in face_modalities({"size": size, "modalities": ["image", "mask", "attributes"]}, autoencoders):
        encoder, decoder, x = m.encoder(), m.decoder(), torch.rand(2, *m.shape).round()
        z = encoder(x)
        assert z.shape == (2, m.latent)
        m.loss(x, decoder(z)).mean().backward()
        for name, p in [*encoder.named_parameters(), *decoder.named_parameters()]:
            assert p.grad is not None and p.grad.isfinite().all(), f"{m.architecture}: {name}"
        assert decoder.eval()(encoder.eval()(x[:1])).shape == (1, *m.shape)


def test_a_mask_is_measured_by_what_it_covers_and_drawn_as_an_image():
    image, mask, attributes = face_modalities({"size": 64, "modalities": ["image", "mask", "attributes"]})
    assert measures_of(mask) == {"f1": f1}
    assert list(measures_of(attributes)) == ["f1"] and "f1" not in measures_of(image)
    assert mask.show(torch.rand(1, 64, 64)).images[0].get_array().shape == (64, 64)


def test_attributes_are_drawn_whether_they_are_data_or_logits():
    m = face_modalities({"size": 64, "modalities": ["attributes"]})[0]
    x = torch.zeros(18)
    x[[ATTRIBUTES.index("Wearing_Hat"), ATTRIBUTES.index("Bald")]] = 1
    for drawn in (x, .6 * x - .3): assert m.show(drawn).texts[0].get_text() == "bald, wearing hat"
    assert m.show(-x).texts[0].get_text() == ""


@pytest.mark.skipif(not os.environ.get("MLD_DATA"), reason="MLD_DATA is not set: the open stand-in needs its raw files")
def test_the_real_stand_in():
    recipe = RECIPES["celebamask_hq"]["open"]
    prepare(recipe)
    # different faces may have the same attributes, so only the images must be apart
    assert check(replace(recipe, modalities=lambda facts, autoencoders: face_modalities(facts)[:1])) == {"train": 5000, "val": 500, "test": 500}
    data = load_prepared(recipe)
    for m in data.modalities: m.check(data.test.rows(slice(0, 100), [m.name])[m.name])
    share = dict(zip(ATTRIBUTES, data.train.batch["attributes"].mean(0).tolist()))
    assert .35 < share["Male"] < .5 and .4 < share["Smiling"] < .55 and share["Bald"] < .05
