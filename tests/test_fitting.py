import math

import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_level

from progressive_vae.training.codes import GridDataset, Manifest, write_cache
from progressive_vae.training.fitting import FitSettings, fit

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("max_train_steps", [0, -1]),
        ("train_batch_size", [0, -1]),
        ("logging_steps", [0]),
        ("validation_steps", [0]),
        ("learning_rate", [0.0, -1e-3, NAN, INF]),
        ("lr_warmup_steps", [-1]),
        ("adam_beta1", [1.0, -0.1, NAN]),
        ("adam_beta2", [1.0, -0.1, NAN]),
        ("adam_weight_decay", [-0.1, NAN, INF]),
        ("max_grad_norm", [-1.0, NAN]),
        ("ema_decay", [2.0, 1.0, -0.5, NAN]),
        ("dataloader_num_workers", [-1]),
        ("seed", [-1, 2**32]),
        ("optimizer", ["sgd"]),
        ("lr_scheduler", ["coseine", "piecewise_constant"]),
    ],
)
def test_settings_that_would_train_wrongly(name, wrong):
    for value in wrong:
        with pytest.raises(ValueError, match=f"expected {name} .*, got {value!r}"):
            FitSettings(**{name: value})


@pytest.fixture
def data(tmp_path):
    generator = torch.Generator().manual_seed(0)
    grids = torch.randint(256, (16, 1, 4, 4), generator=generator)
    manifest = Manifest("", "noise", "train", (1, 4, 4), 256)
    write_cache(tmp_path / "cache", manifest, [(grids, torch.full((16,), -1))])
    return GridDataset(tmp_path / "cache")


def fitted(data, **settings):
    level = tiny_level(num_channels=1)
    settings = FitSettings(max_train_steps=4, train_batch_size=8, lr_warmup_steps=0, **settings)

    def to_inputs(batch):
        return {"finer": batch["grid"] / 127.5 - 1}

    for _ in fit(level, data, to_inputs, Accelerator(cpu=True), settings, {"phase": "x"}):
        pass
    return level.state_dict()


def test_a_gradient_norm_of_zero_is_no_clipping(data):
    before = tiny_level(num_channels=1).state_dict()
    unclipped, at_most = (fitted(data, max_grad_norm=norm) for norm in (0.0, 1e9))
    assert all(torch.equal(unclipped[name], at_most[name]) for name in before)
    assert not torch.equal(unclipped["decoder.stem.weight"], before["decoder.stem.weight"])
    clipped = fitted(data, max_grad_norm=1e-4, optimizer="adamw", adam_weight_decay=0.0)
    assert math.isfinite(sum(value.double().sum().item() for value in clipped.values()))
