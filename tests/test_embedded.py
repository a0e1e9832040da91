"The embedded sources: what they hold, that they are the same everywhere, that no split knows another, and that experiments run on them."
import pytest
import torch

import mld.experiment  # registers the data sets
from mld.data.dataset import DATASETS, load_dataset
from mld.data.files import RECIPES, check
from mld.data.mhd import band_of, ROWS, COLUMNS
from mld.data.mnist_svhn import embedded_photos
from mld.measure import rows_of
from mld.settings import PRESETS, TINY, settings_for
from mld.experiment import Run

VIEW = (3, 28, 28)
WANTED = {  # data set -> shapes of its modalities, whole sizes, fingerprints of its splits
    "mnist_svhn": ({"mnist": (1, 28, 28), "svhn": (3, 32, 32)}, (2000, 250, 250), ()),
    "mhd": ({"image": (1, 28, 28), "sound": (1, 32, 128), "trajectory": (200,)}, (2000, 200, 200), ()),
    "polymnist": ({f"m{v}": VIEW for v in range(5)}, (2000, 250, 250), ()),
    "polymnist10": ({f"m{v}": VIEW for v in range(10)}, (2000, 250, 250), ()),
    "cub": ({"image": (3, 64, 64), "sentence": (32, 66)}, (5000, 500, 500), ()),
    "celebamask_hq": ({"image": (3, 64, 64), "mask": (1, 64, 64), "attributes": (18,)}, (2000, 200, 200), ()),
}
for name in WANTED:
    d = load_dataset(name, "embedded")
    print(name, [s.fingerprint() for s in (d.train, d.val, d.test)], [m.shape for m in d.modalities], check(RECIPES[name]["embedded"]))
