import math

import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_level

from progressive_vae.data.code_cache import GridDataset, Manifest, write_cache
from progressive_vae.training import fit as fitting
from progressive_vae.training.args import FitSettings, RunSettings
from progressive_vae.training.checkpoints import Checkpoints
from progressive_vae.training.fit import Fit

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("max_train_steps", [0, -1]),
        ("time_share", [0.0, -1.0, NAN, INF]),
        ("train_batch_size", [0, -1]),
        ("learning_rate", [0.0, -1e-3, NAN, INF]),
        ("lr_warmup_steps", [-1]),
        ("lr_warmup_share", [-0.1, 1.5, NAN]),
        ("adam_beta1", [1.0, -0.1, NAN]),
        ("adam_beta2", [1.0, -0.1, NAN]),
        ("adam_weight_decay", [-0.1, NAN, INF]),
        ("max_grad_norm", [0.0, -1.0, NAN]),
        ("ema_decay", [2.0, 1.0, -0.5, NAN]),
        ("optimizer", ["sgd"]),
        ("lr_scheduler", ["coseine", "piecewise_constant"]),
    ],
)
def test_settings_that_would_train_wrongly(name, wrong):
    for value in wrong:
        with pytest.raises(ValueError, match=f"expected {name} .*, got {value!r}"):
            FitSettings(**{name: value})


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("logging_steps", [0]),
        ("validation_steps", [0]),
        ("num_validation_images", [0]),
        ("gradient_accumulation_steps", [0, -1]),
        ("checkpointing_steps", [0, -1]),
        ("checkpoints_total_limit", [0]),
        ("max_train_minutes", [0.0, -1.0, NAN, INF]),
        ("dataloader_num_workers", [-1]),
        ("seed", [-1, 2**32]),
        ("mixed_precision", ["fp4"]),
        ("report_to", ["nobody"]),
    ],
)
def test_settings_of_a_run_that_mean_nothing(name, wrong):
    for value in wrong:
        with pytest.raises(ValueError, match=f"expected {name} .*, got {value!r}"):
            RunSettings(**{name: value})


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

    for _ in Fit(level, data, to_inputs, Accelerator(cpu=True), settings, {"phase": "x"}):
        pass
    return level.state_dict()


def test_no_gradient_norm_is_no_clipping(data):
    before = tiny_level(num_channels=1).state_dict()
    unclipped, at_most = (fitted(data, max_grad_norm=norm) for norm in (None, 1e9))
    assert all(torch.equal(unclipped[name], at_most[name]) for name in before)
    assert not torch.equal(unclipped["decoder.stem.weight"], before["decoder.stem.weight"])
    clipped = fitted(data, max_grad_norm=1e-4, optimizer="adamw", adam_weight_decay=0.0)
    assert math.isfinite(sum(value.double().sum().item() for value in clipped.values()))


class Clock:
    """Time that passes when it is told to."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.mark.parametrize("stop_at", [None, 6])
def test_a_fit_lasts_as_long_as_it_is_told_to(data, tmp_path, monkeypatch, stop_at):
    """With a second a step, two a validation, and a break: its last validation is in its time, and
    the learning rate has come down by then."""
    clock, rates = Clock(), []
    monkeypatch.setattr(fitting, "time", clock)
    settings = FitSettings(max_train_steps=1000, train_batch_size=8)
    run = RunSettings(validation_steps=5, checkpointing_steps=3, logging_steps=1)

    def fitted(resume):
        level = tiny_level(num_channels=1)
        began = clock.now
        clock.now += 1  # for what comes before the first step
        checkpoints = Checkpoints(tmp_path, every=3, resume=resume)
        accelerator = Accelerator(cpu=True)
        accelerator.log = lambda figures, step: rates.append(figures.get("x/lr"))

        def to_inputs(batch):
            clock.now += 1
            if stop_at and resume is None and clock.now - began > stop_at + 2:
                checkpoints.stop()
            return {"finer": batch["grid"] / 127.5 - 1}

        identity = {"phase": "x"}
        told = {"run": run, "checkpoints": checkpoints, "seconds": 30, "start_time": began}
        for _ in Fit(level, data, to_inputs, accelerator, settings, identity, **told):
            clock.now += 2
        return clock.now - began

    if stop_at:
        with pytest.raises(SystemExit):
            fitted(None)
        before, clock.now = clock.now, clock.now + 1000
        assert 28 <= before + fitted("latest") <= 31  # a second to begin anew, and no more
    else:
        assert 28 <= fitted(None) <= 30
    assert 0 < rates.index(max(rates)) < 5 and rates[-1] < 0.1 * max(rates)


@pytest.mark.parametrize("steps", [9, 3])  # the fit ends later, or at once
def test_weights_that_are_not_finite_replace_no_checkpoint(data, tmp_path, steps):
    """Between two steps that are logged, where nobody looks at the loss."""
    level, count = tiny_level(num_channels=1), 0
    settings = FitSettings(max_train_steps=steps, train_batch_size=8)
    run = RunSettings(logging_steps=100, validation_steps=100)

    def to_inputs(batch):
        nonlocal count
        count += 1
        if count == 3:
            torch.nn.init.constant_(level.decoder.stem.weight, NAN)
        return {"finer": batch["grid"] / 127.5 - 1}

    checkpoints = Checkpoints(tmp_path, every=2, total_limit=1)
    options = {"run": run, "checkpoints": checkpoints}
    with pytest.raises(FloatingPointError, match="of x became .* learning_rate .*-x-00000002$"):
        for _ in Fit(level, data, to_inputs, Accelerator(cpu=True), settings, {"phase": "x"},
                     **options):  # fmt: skip
            raise AssertionError("it was validated")
    assert [path.name for path in checkpoints.all()] == ["checkpoint-x-00000002"]
