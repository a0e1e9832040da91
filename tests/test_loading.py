"What a batch costs on its way into a training step: data lies decoded in memory and is only indexed."
import time

import pytest
import torch

from mld.autoencoders import Autoencoder
from mld.data.cub import caption_modalities
from mld.data.mnist_svhn import modalities
from mld.modality import Column
from mld.training import Trainer, Training, batches


def cpu_seconds(f, times):
    best = float("inf")
    for _ in range(times):
        started = time.process_time()
        f()
        best = min(best, time.process_time() - started)
    return best


def pictures():
    modality = modalities({}, "ours")[1]
    return modality, Column(torch.randint(256, (20_000, *modality.shape), dtype=torch.uint8), torch.randint(20_000, (200_000,)))


def captions():
    modality = caption_modalities({"vocabulary": [str(i) for i in range(66)]})[1]
    length, words = modality.shape
    return modality, Column(torch.randint(words, (20_000, length), dtype=torch.int16), classes=words)


@pytest.mark.parametrize("make", [pictures, captions])
def test_loading_is_under_a_twentieth_of_a_step(make):
    modality, column = make()
    torch.manual_seed(0)
    model = Autoencoder(modality)
    trainer = Trainer(model, model.loss, {"x": column}, Training(100, 128))
    index = next(batches(len(column), 128, 0))
    trainer.one_step(index)
    step = cpu_seconds(lambda: trainer.one_step(index), 5)
    loading = cpu_seconds(lambda: column[index], 20)
    print(f"{modality.name}: {1e3 * loading:.3f} ms of {1e3 * step:.1f}")
    assert loading < .05 * step
