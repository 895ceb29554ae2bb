import math

import pytest
import torch
from accelerate import Accelerator

from helpers.models import tiny_level
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
        ("early_stopping_patience", [0, -1]),
        ("optimizer", ["sgd"]),
        ("lr_scheduler", ["coseine", "piecewise_constant"]),
    ],
)
def test_invalid_fit_settings(name, wrong):
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
def test_invalid_run_settings(name, wrong):
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


def fit_level(data, **settings):
    level = tiny_level(num_channels=1)
    settings = FitSettings(max_train_steps=4, train_batch_size=8, lr_warmup_steps=0, **settings)

    def to_inputs(batch):
        return {"finer": batch["grid"] / 127.5 - 1}

    for _ in Fit(level, data, to_inputs, Accelerator(cpu=True), settings, {"phase": "x"}):
        pass
    return level.state_dict()


def test_batches_have_bytes_for_the_device_and_indices_for_the_host(data):
    loader, order = fitting._make_loader(data, Accelerator(cpu=True), 6, RunSettings())
    order.begin_at(1, 4)
    (first, second) = loader
    assert first["grid"].dtype == torch.uint8
    indices = first["index"] + second["index"]
    assert all(type(index) is int for index in indices)
    assert indices == [*order]
    assert torch.equal(second["grid"].long(), data.batch(second["index"])[0])
    assert torch.equal(second["label"], torch.full((6,), -1))


def test_without_max_grad_norm_nothing_is_clipped(data):
    before = tiny_level(num_channels=1).state_dict()
    unclipped, loose = (fit_level(data, max_grad_norm=norm) for norm in (None, 1e9))
    assert all(torch.equal(unclipped[name], loose[name]) for name in before)
    assert not torch.equal(unclipped["decoder.stem.weight"], before["decoder.stem.weight"])
    clipped = fit_level(data, max_grad_norm=1e-4, optimizer="adamw", adam_weight_decay=0.0)
    assert math.isfinite(sum(value.double().sum().item() for value in clipped.values()))


@pytest.mark.parametrize("stop_at", [None, 1, 4])
def test_early_stopping_retains_the_best_weights(data, tmp_path, stop_at):
    """Also of a fit that is interrupted before or after its best validation."""
    losses = [3.0, 1.0, 2.0, NAN, 1.0, 0.0]
    settings = FitSettings(max_train_steps=6, train_batch_size=8, early_stopping_patience=3)
    run = RunSettings(validation_steps=1)
    best = []

    def fit_level(resume):
        level = tiny_level(num_channels=1)
        checkpoints = Checkpoints(tmp_path, resume=resume)

        def to_inputs(batch):
            return {"finer": batch["grid"] / 127.5 - 1}

        options = {"run": run, "checkpoints": checkpoints}
        fit = Fit(
            level, data, to_inputs, Accelerator(cpu=True), settings, {"phase": "x"}, **options
        )
        for progress in fit:
            progress.validation_loss = losses[progress.step - 1]
            if progress.step == 2:
                best.append({name: value.clone() for name, value in level.state_dict().items()})
            if resume is None and progress.step == stop_at:
                checkpoints.stop()
        assert progress.step == 5 and fit.early_stopping.best_step == 2
        return level.state_dict()

    if stop_at:
        with pytest.raises(SystemExit):
            fit_level(None)
    weights = fit_level("latest" if stop_at else None)
    assert len(best) == 1
    assert all(torch.equal(weights[name], value) for name, value in best[0].items())


class Clock:
    """A clock that the test sets."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.mark.parametrize("stop_at", [None, 6])
def test_duration_of_a_fit(data, tmp_path, monkeypatch, stop_at):
    """A step takes one second, a validation two; the fit may be interrupted.

    The duration includes the last validation, and the learning rate has decayed by then.
    """
    clock = Clock()
    rates = []
    monkeypatch.setattr(fitting, "time", clock)
    settings = FitSettings(max_train_steps=1000, train_batch_size=8)
    run = RunSettings(validation_steps=5, checkpointing_steps=3, logging_steps=1)

    def fit_level(resume):
        level = tiny_level(num_channels=1)
        start_time = clock.now
        clock.now += 1  # before the first step
        checkpoints = Checkpoints(tmp_path, every=3, resume=resume)
        accelerator = Accelerator(cpu=True)
        accelerator.log = lambda metrics, step: rates.append(metrics.get("x/lr"))

        def to_inputs(batch):
            clock.now += 1
            if stop_at and resume is None and clock.now - start_time > stop_at + 2:
                checkpoints.stop()
            return {"finer": batch["grid"] / 127.5 - 1}

        identity = {"phase": "x"}
        options = {"run": run, "checkpoints": checkpoints, "seconds": 30, "start_time": start_time}
        for _ in Fit(level, data, to_inputs, accelerator, settings, identity, **options):
            clock.now += 2
        return clock.now - start_time

    if stop_at:
        with pytest.raises(SystemExit):
            fit_level(None)
        before = clock.now
        clock.now += 1000
        assert 28 <= before + fit_level("latest") <= 31  # one second to start again
    else:
        assert 28 <= fit_level(None) <= 30
    assert 0 < rates.index(max(rates)) < 5 and rates[-1] < 0.1 * max(rates)


@pytest.mark.parametrize("steps", [9, 3])  # the fit ends later, or at this step
def test_infinite_weights_replace_no_checkpoint(data, tmp_path, steps):
    """Between two logged steps the loss is not checked."""
    level = tiny_level(num_channels=1)
    count = 0
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
        identity = {"phase": "x"}
        for _ in Fit(level, data, to_inputs, Accelerator(cpu=True), settings, identity, **options):
            raise AssertionError("the weights were validated")
    assert [path.name for path in checkpoints.all()] == ["checkpoint-x-00000002"]
