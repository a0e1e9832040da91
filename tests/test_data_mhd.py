"MHD from its authors' files and from the open stand-in: what is read, what is refused, how it sounds."
import os

import numpy as np
import pytest
import torch

from mld.data import mhd
from mld.data.dataset import load_dataset
from mld.data.files import RECIPES, check, data_folder, load_prepared, prepare
from mld.nets import n_params
from mld.training import CorruptFile

soundfile = pytest.importorskip("soundfile")
PAPER, OPEN = RECIPES["mhd"]["paper"], RECIPES["mhd"]["open"]


@pytest.fixture(autouse=True)
def no_other_folder(monkeypatch):
    for name in ("MLD_DATA", "MLD_PREPARED"):
        monkeypatch.delenv(name, raising=False)


def parts(n, seed):
    "What a file of the authors holds; row i has the label i % 10, and i is written into each modality."
    g = torch.Generator().manual_seed(seed)
    row = (torch.arange(n) / 255).view(-1, 1, 1, 1)
    image, trajectory, sound = torch.rand(n, 1, 28, 28, generator=g), torch.rand(n, 200, generator=g), torch.rand(n, 4, 32, 32, generator=g)
    image[:, :, :1, :1], trajectory[:, :1], sound[:, 2:3, 5:6, 7:8] = row, row.flatten(1), row
    return [torch.arange(n) % 10, image, trajectory, sound,
            {"max": 2.4120986461639404, "min": -2.7722983360290527}, {"max": np.float32(-47.563736), "min": np.float32(-200)}]


@pytest.fixture
def paper(tmp_path):
    (tmp_path / "mhd").mkdir()
    for seed, (split, n) in enumerate({"train": 100, "test": 30}.items()):
        torch.save(tuple(parts(n, seed)), tmp_path / "mhd" / f"mhd_{split}.pt")
    return tmp_path


def test_the_authors_files(paper):
    assert {s: len(getattr(load_prepared(PAPER, paper), s)) for s in ("train", "val", "test")} == check(PAPER, paper) == {"train": 90, "val": 10, "test": 30}
    data = load_dataset("mhd", "paper", data=paper, autoencoders="paper")
    assert [(m.name, m.shape, m.latent, m.architecture) for m in data.modalities] == [
        ("image", (1, 28, 28), 64, "mhd_image_paper"), ("sound", (1, 32, 128), 128, "mhd_sound_paper"), ("trajectory", (200,), 16, "mhd_trajectory_paper")]
    seen = []
    for split in (data.train, data.val, data.test):
        rows = split.rows()
        number = (rows["image"][:, 0, 0, 0] * 255).round().long()
        assert torch.equal(number, (rows["trajectory"][:, 0] * 255).round().long())
        assert torch.equal(number, (rows["sound"][:, 0, 7, 2 * 32 + 5] * 255).round().long())  # block 2, row 5 is band 69; column 7 is moment 7
        assert torch.equal(split.labels, number % 10)
        seen.append(number)
    assert torch.cat(seen[:2]).unique().numel() == 100 and torch.equal(seen[2], torch.arange(30))  # nothing lost; the test part as it is


def test_bands_and_moments_of_the_authors_sound(paper):
    stored = parts(30, 1)[3]
    sound = mhd.read_mhd(paper / "mhd" / "mhd_test.pt")["sound"]
    np.testing.assert_array_equal(sound[:, 0].transpose(0, 2, 1).reshape(30, 4, 32, 32), stored)


def test_a_missing_file_says_what_to_do(paper):
    (paper / "mhd" / "mhd_test.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"mhd_test\.pt is not there.*nexus_pytorch"):
        prepare(PAPER, paper)
    with pytest.raises(FileNotFoundError, match="pendigits_orig.npz is not there.*pack_strokes"):
        prepare(OPEN, paper)
    assert not PAPER.folder(paper).exists() and not OPEN.folder(paper).exists()


@pytest.mark.parametrize("keep", [0, 100, 30_000, -40])
def test_a_truncated_file(paper, keep):
    path = paper / "mhd" / "mhd_train.pt"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CorruptFile, match=r"mhd_train\.pt is truncated"):
        prepare(PAPER, paper)
    assert not PAPER.folder(paper).exists()


def test_a_foreign_file(paper):
    path = paper / "mhd" / "mhd_train.pt"
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(CorruptFile, match=r"mhd_train\.pt"):
        prepare(PAPER, paper)
    torch.save((*parts(10, 0)[:5], os.getcwd), path)  # asks to import something that is neither tensor nor number
    with pytest.raises(CorruptFile, match=r"mhd_train\.pt"):
        prepare(PAPER, paper)


@pytest.mark.parametrize("broken, says", [
    ((0, torch.arange(99) % 10), r"image is \(100, 1, 28, 28\), expected \(99, 1, 28, 28\)"),
    ((0, torch.arange(100)), "100 labels from 0 to 9"),
    ((1, torch.rand(100, 28, 28)), r"image is \(100, 28, 28\)"),
    ((2, torch.rand(100, 2, 100)), r"trajectory is \(100, 2, 100\)"),
    ((3, torch.rand(100, 4, 32, 32) * 2), r"sound is in \[.*\], expected \[0, 1\]"),
    ((3, torch.full((100, 4, 32, 32), float("nan"))), "sound is in")])
def test_parts_that_do_not_fit(paper, broken, says):
    held = parts(100, 0)
    held[broken[0]] = broken[1]
    torch.save(tuple(held), paper / "mhd" / "mhd_train.pt")
    with pytest.raises(ValueError, match=says):
        prepare(PAPER, paper)


def test_an_altered_array_fails_its_checksum(paper):
    array = prepare(PAPER, paper) / "val.sound.npy"
    array.write_bytes(array.read_bytes()[:-1] + b"?")
    with pytest.raises(CorruptFile, match="val.sound.npy has changed"):
        check(PAPER, paper)


# The open stand-in: packed files as they are published, drawn and sung by a seeded generator.

def draw(writers, rng):
    "Arrays of a split: every writer draws each digit as two strokes, a zigzag of 3 + digit points and a bar below it."
    xy, stroke, off, label, writer = [], [], [0], [], []
    for w in range(1, writers + 1):
        for digit in range(10):
            zigzag = np.stack([np.arange(3 + digit) % 2 * 60, 300 - 20 * np.arange(3 + digit)], 1) + rng.integers(-9, 10, (3 + digit, 2))
            bar = np.array([[0, 40], [60, 40]]) + rng.integers(-9, 10, (2, 2))
            xy += [zigzag, bar]
            stroke += [np.zeros(len(zigzag)), np.ones(2)]
            off.append(off[-1] + len(zigzag) + 2)
            label.append(digit), writer.append(w)
    return {"xy": np.concatenate(xy).astype(np.int16), "stroke": np.concatenate(stroke).astype(np.uint8), "off": np.array(off, np.int32),
            "label": np.array(label, np.uint8), "writer": np.array(writer, np.uint8)}


@pytest.fixture
def raw(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "pendigits").mkdir(), (tmp_path / "fsdd").mkdir()
    np.savez(tmp_path / "pendigits" / "pendigits_orig.npz", **{f"{s}_{k}": v for s, n in (("train", 11), ("test", 3)) for k, v in draw(n, rng).items()})
    digit, index = (x.ravel().astype(np.uint8) for x in np.meshgrid(np.arange(10), np.arange(19), indexing="ij"))
    clips = [.3 * np.sin(2 * np.pi * (400 + 200 * d + 4 * i) * np.arange(rng.integers(1500, 2500)) / 8000) for d, i in zip(digit.tolist(), index.tolist())]
    soundfile.write(tmp_path / "fsdd" / "fsdd_8k_concat.flac", np.concatenate(clips), 8000)
    np.savez(tmp_path / "fsdd" / "fsdd_index.npz", off=np.cumsum([0, *map(len, clips)]), digit=digit, speaker=np.zeros(190, np.uint8), index=index,
             speakers=np.array(["one"]), sr=np.int32(8000))
    return tmp_path


def test_the_open_stand_in(raw):
    assert [m.name for m in load_prepared(OPEN, raw).modalities] == ["image", "sound", "trajectory"]
    assert check(OPEN, raw) == {"train": 9 * 10 * 8, "val": 20, "test": 30}
    data = load_dataset("mhd", "open", data=raw)
    frequency = mhd.mel_filters().argmax(1) * mhd.RATE / mhd.WINDOW
    for split, numbers in (("train", range(10, 19)), ("val", range(5, 10)), ("test", range(5))):
        tuples = getattr(data, split)
        rows = tuples.rows(slice(0, 64))
        heard = frequency[rows["sound"][:, 0, 4].argmax(1)]
        sung = 400 + 200 * tuples.labels[:64] + 4 * np.mean(numbers)
        assert (heard - sung).abs().max() < 90  # the sound is of the digit
        turns = (rows["trajectory"][:, :100].diff(dim=1).sign().diff(dim=1) != 0).sum(1)
        assert torch.corrcoef(torch.stack([turns, tuples.labels[:64]]).float())[0, 1] > .9  # the path of a higher digit turns more often
        clips = tuples.batch["sound"].stored
        assert len(clips) == 10 * len(numbers)
        assert torch.equal(tuples.batch["image"].index, tuples.batch["trajectory"].index)
        both = torch.stack([tuples.batch["image"].index, tuples.batch["sound"].index])
        assert both.unique(dim=1).shape[1] == len(tuples)  # no tuple twice
        uses = tuples.batch["sound"].index.bincount(minlength=len(clips))
        assert uses.max() - uses.min() <= mhd.PAIRINGS[split]  # all clips about equally often


def test_pairs_are_the_same_each_time(raw):
    first, _ = mhd.build_open(raw)
    again, _ = mhd.build_open(raw)
    assert all(np.array_equal(first[s][c], again[s][c]) for s in first for c in first[s])
    assert first["train"]["image"].dtype == np.uint8 and first["train"]["sound"].dtype == np.float32 == first["train"]["trajectory"].dtype


def test_writers_and_clips_of_the_splits_are_apart(raw):
    splits, facts = mhd.build_open(raw)
    pen = raw / "pendigits" / "pendigits_orig.npz"
    train, (audio, _, number) = mhd.drawings(pen, "train"), mhd.read_clips(raw / "fsdd")
    kept = np.isin(train["writer"], facts["val_writers"])
    assert len(facts["val_writers"]) == 2 and facts["decibels"] == (-40, 40)
    np.testing.assert_array_equal(splits["val"]["trajectory"], train["trajectory"][kept])
    np.testing.assert_array_equal(splits["train"]["trajectory"], train["trajectory"][~kept])
    np.testing.assert_array_equal(splits["test"]["image"], mhd.drawings(pen, "test")["image"])
    np.testing.assert_array_equal(splits["test"]["sound"], mhd.log_mel(audio[number < 5]).numpy())


@pytest.mark.parametrize("name", ["pendigits/pendigits_orig.npz", "fsdd/fsdd_index.npz", "fsdd/fsdd_8k_concat.flac"])
@pytest.mark.parametrize("keep", [0, 1000, -100])
def test_truncated_open_files(raw, name, keep):
    (raw / name).write_bytes((raw / name).read_bytes()[:keep])
    with pytest.raises(CorruptFile, match=name.split("/")[1]):
        prepare(OPEN, raw)


@pytest.mark.parametrize("name, key, change, says", [
    ("pendigits/pendigits_orig.npz", "train_label", lambda x: x[:-1], "110 writers of 109 drawings"),
    ("pendigits/pendigits_orig.npz", "test_label", lambda x: x + 1, r"30 labels from 0 to 9"),
    ("pendigits/pendigits_orig.npz", "test_xy", lambda x: x[:-1], "points of test"),
    ("fsdd/fsdd_index.npz", "off", lambda x: x + 5 * (x == x[-1]), "samples, expected"),
    ("fsdd/fsdd_index.npz", "digit", lambda x: x[:-1], "190 labels from 0 to 9, got 189"),
    ("fsdd/fsdd_index.npz", "digit", lambda x: np.minimum(x, 8), "digit 9 is spoken in 0 clips, expected at least 8")])
def test_open_parts_that_do_not_fit(raw, name, key, change, says):
    with np.load(raw / name) as f:
        arrays = dict(f)
    np.savez(raw / name, **(arrays | {key: change(arrays[key])}))
    with pytest.raises(ValueError, match=says):
        prepare(OPEN, raw)


def test_drawings_are_packed_from_the_publishers_text(tmp_path):
    text = ('.COMMENT  pen digits\n.SEGMENT DIGIT 0-1 ? "4"\n.COMMENT  4 12 1\n.PEN_DOWN\n 267  333\n 268  300\n.PEN_UP\n.DT 100\n.PEN_DOWN\n 280  340\n'
            '.PEN_UP\n.DT 100\n\n.SEGMENT DIGIT 2 ? "1"\n.COMMENT  1 30 2\n.PEN_DOWN\n 100  400\n 100  -3\n 101  20\n.PEN_UP\n.DT 100\n')
    (tmp_path / "pendigits-orig.tra").write_text(text), (tmp_path / "pendigits-orig.tes").write_text(text.replace("\n", "\r\n"))
    path = mhd.pack_strokes(tmp_path)
    for split in ("train", "test"):
        points, strokes, labels, writers = mhd.read_strokes(path, split)
        assert [p.tolist() for p in points] == [[[267, 333], [268, 300], [280, 340]], [[100, 400], [100, -3], [101, 20]]]
        assert ([s.tolist() for s in strokes], labels.tolist(), writers.tolist()) == ([[0, 0, 1], [0, 0, 0]], [4, 1], [12, 30])
    (tmp_path / "pendigits-orig.tra").write_text("<html>moved</html>")
    with pytest.raises(CorruptFile, match="pendigits-orig.tra"):
        mhd.pack_strokes(tmp_path)


def test_clips_are_packed_from_the_publishers_recordings(tmp_path):
    (tmp_path / "recordings").mkdir()
    with pytest.raises(FileNotFoundError, match="recordings"):
        mhd.pack_clips(tmp_path / "recordings", tmp_path)
    made = {}
    for digit, speaker, number, n in ((7, "theo", 10, 900), (7, "theo", 2, 20_000), (0, "ann", 4, 800)):
        made[digit, number] = np.random.default_rng(number).integers(-3000, 3000, n, np.int16)
        soundfile.write(tmp_path / "recordings" / f"{digit}_{speaker}_{number}.wav", made[digit, number], 8000)
    mhd.pack_clips(tmp_path / "recordings", tmp_path)
    with np.load(tmp_path / "fsdd_index.npz") as f:
        assert (f["speaker"].tolist(), f["speakers"].tolist(), f["off"].tolist()) == ([0, 1, 1], ["ann", "theo"], [0, 800, 1700, 21700])
    audio, digit, number = mhd.read_clips(tmp_path)
    assert (audio.shape, digit.tolist(), number.tolist()) == ((3, 16_000), [0, 7, 7], [4, 10, 2])  # the long one is cut
    assert audio[0, 1700:].abs().max() == 0 and torch.allclose(audio[:2].abs().amax(1), torch.ones(2))
    for row, clip, n in ((1, made[7, 10], 890), (2, made[7, 2], 7990)):  # every other sample is one that was there
        assert np.corrcoef(audio[row, 20:2 * n:2], clip[10:n])[0, 1] > .99


def test_paths_are_upright_equally_spaced_and_never_in_the_air():
    points, stroke = np.array([[0, 400], [0, 0], [100, 200], [300, 200]]), np.array([0, 0, 1, 1])
    square = mhd.unit_square(points)
    assert np.allclose(square, [[.125, 0], [.125, 1], [.375, .5], [.875, .5]])  # y downwards, aspect kept, in the middle
    x, y = mhd.pen_path(square, stroke).reshape(2, 100)
    down, across = np.isclose(x, .125), np.isclose(y, .5) & (x > .37)
    assert (down | across).all() and abs(down.sum() - 67) <= 1  # two thirds of the ink
    assert np.allclose(np.diff(y[down]), 1.5 / 99) and np.allclose(np.diff(x[across]), 1.5 / 99)
    image = mhd.inked(square, stroke)
    assert image[:, 6].min() == 0 and image[5:23, 6].min() > 200 and image[14, 12:21].min() > 100  # lines where they should be
    assert image[17:21, 8:11].max() == 0 == image[:3].max()  # none where the pen was lifted
    assert mhd.inked(square, stroke, width=4).sum() > 1.6 * image.sum()


def test_a_drawing_of_one_point():
    square = mhd.unit_square(np.array([[250, 250]]))
    assert np.allclose(mhd.pen_path(square, np.array([0])), .5) and mhd.inked(square, np.array([0])).sum() > 0


def test_mel_bands_are_those_of_librosa():
    filters = mhd.mel_filters()
    for band, at, peak, total, bins in ((0, 3, .04266643, .12799929, 5), (10, 33, .04166525, .12799929, 6), (42, 129, .0378974, .12749939, 6),
                                        (100, 521, .0099567305, .12789041, 25), (127, 1000, .0052231885, .12796599, 48)):  # librosa 0.11
        assert filters[band].argmax() == at and (filters[band] > 0).sum() == bins
        assert filters[band].max().item() == pytest.approx(peak, abs=1e-6) and filters[band].sum().item() == pytest.approx(total, abs=1e-5)
    tone = .5 * torch.sin(2 * torch.pi * 440 * torch.arange(16_000) / 16_000)[None]
    x = mhd.log_mel(tone, (-100., 50.))[0, 0] * 150 - 100
    assert x.shape == (32, 128)
    for band, moment, decibels in ((18, 0, 31.124016), (18, 5, 35.163513), (18, 31, 32.6501), (25, 5, -51.793957), (100, 31, -36.719166)):
        assert x[moment, band].item() == pytest.approx(decibels, abs=.05)


def test_mel_bands_beside_librosa():
    librosa = pytest.importorskip("librosa")
    np.testing.assert_allclose(mhd.mel_filters(), librosa.filters.mel(sr=16_000, n_fft=2048, n_mels=128), atol=1e-7)


@pytest.mark.parametrize("hz", [250, 440, 1000, 3000])
@pytest.mark.parametrize("source", ["open", "paper"])
def test_a_tone_survives(hz, source):
    t = torch.arange(16_000) / 16_000
    loud = 1. if source == "open" else 1e-5
    tones = loud * torch.stack([torch.sin(2 * torch.pi * f * t) for f in (hz, hz * 1.5)])
    sound = mhd.log_mel(tones, mhd.DECIBELS[source])
    assert sound.shape == (2, 1, 32, 128) and 0 <= sound.min() and sound.max() <= 1
    back = mhd.audio_of(sound, mhd.DECIBELS[source])
    assert back.shape == (2, 16_000)
    for audio, f in zip(back, (hz, hz * 1.5)):
        assert torch.fft.rfft(audio).abs().argmax().item() == pytest.approx(f, rel=.04)
    assert (mhd.log_mel(back, mhd.DECIBELS[source]) - sound).abs().mean() < .05
    assert back.norm().item() == pytest.approx(tones.norm().item(), rel=.1)  # as loud as it was
    assert torch.equal(back, mhd.audio_of(sound, mhd.DECIBELS[source]))


def test_sizes_of_the_papers_networks():
    heads = {"image": 129 * 64, "sound": 2049 * 128, "trajectory": 513 * 16}  # counted in the paper's encoders and used by nothing
    counts = {m.name: (n_params(m.encoder()) + heads[m.name], n_params(m.decoder())) for m in mhd.mhd_modalities({}, "paper")}
    assert counts == {"image": (467_840, 462_656), "sound": (738_560, 481_792), "trajectory": (647_712, 639_688)}


@pytest.mark.parametrize("autoencoders", ["paper", "ours"])
def test_networks_go_there_and_back(autoencoders):
    torch.manual_seed(0)
    for m in mhd.mhd_modalities({}, autoencoders):
        x = torch.rand(16, *m.shape)
        encoder, decoder = m.encoder(), m.decoder()
        z = encoder(x)
        assert z.shape == (16, m.latent) and m.check(decoder(z)).shape == x.shape
        if autoencoders == "ours":
            assert torch.allclose(z.mean(0), torch.zeros(m.latent), atol=1e-4) and torch.allclose(z.std(0, correction=0), torch.ones(m.latent), atol=.05)
            assert n_params(torch.nn.ModuleList(encoder[-1:])) == 0


def test_every_modality_can_be_drawn():
    for m in mhd.mhd_modalities({}, "ours"):
        ax = m.show(torch.linspace(0, 1, torch.Size(m.shape).numel()).view(m.shape))
        if m.name == "trajectory":
            assert ax.get_ylim()[0] > ax.get_ylim()[1]  # y downwards
        if m.name == "sound":
            assert ax.images[0].get_array().shape == (128, 32) and ax.images[0].origin == "lower"


@pytest.mark.skipif(not os.environ.get("MLD_DATA"), reason="MLD_DATA is not set: the open stand-in needs its raw files")
def test_the_real_open_stand_in(tmp_path, monkeypatch):
    monkeypatch.setenv("MLD_PREPARED", str(tmp_path))
    data = load_prepared(OPEN, REAL)
    assert check(OPEN, REAL) == {"train": 53_960, "val": 749, "test": 3498}
    assert [len(data.train.batch[m].stored) for m in data.names] == [6745, 2400, 6745]
    rows = data.test.rows(slice(0, 200))
    assert .11 < rows["image"].mean() < .14 and .1 < rows["sound"].mean() < .16
    assert 0 < data.train.batch["sound"].stored.max() < 1  # the range loses no loudness
    assert torch.equal(data.test.labels[:10], torch.tensor([8, 8, 8, 9, 9, 1, 4, 7, 9, 9]))


REAL = data_folder()  # read before the fixture takes the variable away
