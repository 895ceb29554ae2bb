"""`train()` on images of all kinds, and the order of its phases."""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import datasets
import PIL.Image
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from helpers.images import random_images
from helpers.interruptions import weights
from helpers.recipes import FEW, RECIPE
from progressive_vae import ProgressiveVAEPipeline
from progressive_vae.data.args import DataSettings
from progressive_vae.data.source import open_dataset
from progressive_vae.training import train
from progressive_vae.training.args import RunSettings
from progressive_vae.training.phases import LevelPhase, PriorPhase, RefitPhase
from progressive_vae.training.run import Run, make_accelerator

pytestmark = pytest.mark.usefixtures("fresh_state")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    AcceleratorState._reset_state(reset_partial_state=True)
    output_dir = tmp_path_factory.mktemp("trained")
    train(RECIPE, random_images(), output_dir)
    return output_dir


@pytest.fixture
def copied(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "run"))


def a_list(folder):
    return random_images()


def a_dataset(folder):
    table = datasets.Dataset.from_dict({"image": random_images(), "label": [0, 1] * 6})
    return table.cast_column("image", datasets.Image())


def a_dataset_dict(folder):
    return a_dataset(folder).train_test_split(4, seed=0)


def a_stream(folder):
    return a_dataset(folder).to_iterable_dataset(num_shards=2)


def a_folder(folder):
    for i, image in enumerate(random_images()):
        image.save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("kind", [a_list, a_dataset, a_dataset_dict, a_stream])
def test_images_of_every_kind_are_read_alike(kind):
    source = open_dataset(DataSettings(eval_fraction=0.3, streaming=kind is a_stream), kind(None))
    assert source.manifests["train"].shape == (3, 8, 8)
    assert len(source.class_names) == (2 if kind in (a_dataset, a_dataset_dict) else 0)


@pytest.mark.parametrize("kind", [a_dataset_dict, a_stream, a_folder])
def test_training_on_images_of_every_kind(kind, tmp_path):
    (tmp_path / "images").mkdir()
    dataset, output_dir = kind(tmp_path / "images"), tmp_path / "run"
    pipe = train(RECIPE, dataset, output_dir=output_dir)
    assert isinstance(pipe, ProgressiveVAEPipeline) and pipe.image_shape == (3, 8, 8)
    assert len(pipe.labels) == (2 if kind is a_dataset_dict else 0)
    before, metrics = weights(output_dir), (output_dir / "metrics.json").read_bytes()
    again = train(RECIPE, dataset, output_dir=output_dir)  # nothing is left to do
    assert weights(output_dir) == before and (output_dir / "metrics.json").read_bytes() == metrics
    image = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    assert again.bits_per_dim(image) == pipe.bits_per_dim(image)
    with pytest.raises(ValueError, match="level_2 with config.hidden_size=8, got .*=16"):
        train(RECIPE | {"level_2": {"hidden_size": 16}}, dataset, output_dir=output_dir)


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ([], "list of PIL images, got list"),
        ([1, 2], "list of PIL images, got list of .*int"),
        (None, "expected one of dataset_name and train_data_dir, got None and None"),
        ("/nowhere/at/all", "expected dataset_name to be a folder, got '/nowhere/at/all'"),
        (random_images(1), "expected at least 2 images"),
    ],
)
def test_invalid_data_sets(dataset, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        train(RECIPE, dataset, output_dir=tmp_path)


def test_no_step_is_chosen_by_test_images(tmp_path):
    recipe = {**RECIPE, "prior": {"fit": {"early_stopping_patience": 2}}}
    with pytest.raises(ValueError, match="data.validation_fraction > 0 for .*=2 of prior, got 0"):
        train(recipe, random_images(), tmp_path)


def test_the_saved_recipe_reproduces_the_run(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    recipe = RECIPE | {"level_2": {"refit": {"code_noise": 0.2, "fit": {"max_train_steps": 3}}}}
    recipe["data"] = {"dataset_name": "digits", "max_train_samples": 60, "max_eval_samples": 10}
    train(recipe, output_dir=first)
    train(first / "recipe.yaml", output_dir=second)
    assert weights(first) == weights(second)
    one, two = (yaml.safe_load((path / "recipe.yaml").read_text()) for path in (first, second))
    assert one.pop("run") | {"output_dir": str(second)} == two.pop("run") and one == two
    metrics = json.loads((first / "metrics.json").read_text())
    assert metrics["recipe"]["level_2"]["refit"]["code_noise"] == 0.2
    assert metrics["recipe"]["run"]["output_dir"] == "first"  # only the last name of a path


def test_time_is_allocated_by_shares(tmp_path, monkeypatch):
    """The finest level first, then the prior, then refits."""
    phases = []
    for kind in (LevelPhase, PriorPhase, RefitPhase):
        monkeypatch.setattr(kind, "__call__", lambda phase, run: phases.append(phase))
    recipe = RECIPE | {
        "level_1": {"fit": {"time_share": 0.25}},
        "level_2": {"fit": {"time_share": 0.5}, "refit": {"fit": {"time_share": 0.2}}},
        "prior": {"fit": {"time_share": 0.05}},
    }
    for phase in ("all", "level_1"):
        with pytest.raises(ValueError):  # there is no pipeline to measure
            train(recipe, random_images(), tmp_path, 60, phase)
            raise ValueError
    names = ["level_2", "level_1", "prior", "refit_level_2", "level_1"]
    assert [phase.name for phase in phases] == names
    assert [phase.seconds for phase in phases] == [1800, 900, 180, 720, 900]


def test_later_phases_of_an_extended_run_name_the_missing_flag(trained, tmp_path):
    deeper = tmp_path / "deeper"
    recipe = {**RECIPE, "run": {**RECIPE["run"], "extend": str(trained)}}
    del recipe["num_levels"]
    pipe = train(recipe, random_images(), deeper)
    assert pipe.num_levels == 3
    for missing in ("prior", "evaluate", "level_1"):
        with pytest.raises(ValueError, match=f"expected extend='{trained}'.*pass --extend"):
            train(RECIPE, random_images(), deeper, phase=missing)
    train(recipe, random_images(), deeper, phase="evaluate")


def test_unlabeled_images_get_the_null_class(tmp_path):
    """A test split without labels has all metrics that need no labels."""
    classes = datasets.ClassLabel(names=["cat", "dog"])
    train_images = datasets.Dataset.from_dict({"image": random_images(), "label": [0, 1, -1] * 4})
    test_images = datasets.Dataset.from_dict({"image": random_images(4), "label": [-1] * 4})
    splits = datasets.DatasetDict(train=train_images, test=test_images)
    splits = splits.cast_column("image", datasets.Image()).cast_column("label", classes)
    with pytest.warns(UserWarning, match="4 of 12 images of the split 'train' have no label"):
        pipe = train(RECIPE, splits, output_dir=tmp_path)
    assert pipe.prior.config.num_classes == 2 and pipe.labels == {"cat": 0, "dog": 1}
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert "label_accuracy" not in metrics and metrics["bits_per_dim"]["total"] > 0
    assert "not_measured" not in metrics


def test_pixels_of_a_list_of_images(tmp_path):
    """They are those in memory, not those of the file that an image was opened from."""
    images = []
    for i, image in enumerate(random_images(6)):
        image.resize((16, 16)).save(tmp_path / f"{i}.png")
        images.append(PIL.Image.open(tmp_path / f"{i}.png"))
        images[-1].thumbnail((8, 8))
    source = open_dataset(DataSettings(eval_fraction=0.3), images)
    assert source.manifests["train"].shape == (3, 8, 8)


def test_streams_have_different_names(tmp_path):
    streams = [a_stream(None), a_dataset(None).shuffle(seed=1).to_iterable_dataset()]
    settings = DataSettings(eval_fraction=0.3, streaming=True)
    names = [open_dataset(settings, s).manifests["train"].dataset for s in [*streams, streams[0]]]
    assert names[0] == names[2] != names[1]
    wider = dataclasses.replace(settings, shuffle_buffer_size=2)
    assert open_dataset(wider, streams[0]).manifests["train"].dataset != names[0]


def test_the_recipe_in_the_folder_is_that_of_its_parts(copied):
    """A refit of its own stays when the run is resumed, and is removed when its level is trained
    again. A second one starts from the weights of the first."""

    def saved():
        return yaml.safe_load((copied / "recipe.yaml").read_text())

    refit = {**RECIPE, "level_2": {"refit": {"code_noise": 0.2, "fit": FEW}}}
    assert saved()["run"]["mixed_precision"] == "no" and saved()["level_2"]["refit"] is None
    train(refit, random_images(), copied, phase="refit_level_2")
    assert saved()["level_2"]["refit"]["code_noise"] == 0.2
    train(refit, random_images(), copied)  # the recipe of the folder
    other = {**RECIPE, "level_2": {"refit": {"fit": {"max_train_steps": 3}}}}
    with pytest.raises(ValueError, match="level_2 .*as its first fit left it.*--phase level_2"):
        train(other, random_images(), copied, overwrite_output_dir=True)
    train(other, random_images(), copied, phase="refit_level_2", resume_from_checkpoint=None)
    history = json.loads((copied / "level_2" / "history.json").read_text())
    assert [identity.get("refits_before") for identity in history] == [None, 0, 1]
    train(RECIPE, random_images(), copied, phase="level_2", resume_from_checkpoint=None)
    assert saved()["level_2"]["refit"] is None


def test_pretrained_levels_have_their_own_configs(trained, tmp_path):
    second = tmp_path / "second"
    recipe = {**RECIPE, "level_2": {"hidden_size": 99}}
    recipe["run"] = {**RECIPE["run"], "finest_level": str(trained / "level_2")}
    pipe = train(recipe, random_images(), second)
    assert pipe.level_2.config.hidden_size == 8
    level = yaml.safe_load((second / "recipe.yaml").read_text())["level_2"]
    assert sorted(level) == ["fit", "refit"] and level["refit"] is None
    with pytest.raises(ValueError, match="num_levels=3, one more than extend has, got 2"):
        train({**RECIPE, "run": {"extend": str(trained)}}, random_images(), tmp_path / "third")


def test_other_images_need_overwrite_output_dir(copied):
    others = [image.transpose(PIL.Image.Transpose.ROTATE_90) for image in random_images()]
    with pytest.raises(ValueError, match="data.dataset="):
        train(RECIPE, others, copied)
    before = weights(copied)
    train(RECIPE, others, copied, overwrite_output_dir=True)
    after = weights(copied)
    assert all(after[name] != before[name] for name in ("level_2", "level_1", "prior"))


def test_sigterm_in_the_last_validation_ends_the_run(tmp_path, monkeypatch):
    log_validation = Run.log_validation

    def log_and_stop(run, *arguments):
        log_validation(run, *arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "log_validation", log_and_stop)
    with pytest.raises(SystemExit) as stopped:
        train(RECIPE, random_images(), tmp_path)
    assert stopped.value.code == 0 and (tmp_path / "level_2").is_dir()
    assert not (tmp_path / "level_1").exists()
    monkeypatch.undo()
    assert train(RECIPE, random_images(), tmp_path) is not None


def test_bf16_becomes_fp32_on_slow_cpus(tmp_path, monkeypatch, caplog):
    settings = RunSettings(output_dir=str(tmp_path), mixed_precision="bf16", report_to="none")
    monkeypatch.setattr("progressive_vae.training.run.has_bf16", lambda device: False)
    assert make_accelerator(settings, cpu=True).mixed_precision == "no"
    assert "slow on this CPU" in caplog.text
    # A second run of this process with the same settings.
    assert make_accelerator(settings, cpu=True).mixed_precision == "no"
    AcceleratorState._reset_state(reset_partial_state=True)
    Accelerator(cpu=True, mixed_precision="bf16")  # Accelerate's own setting takes precedence
    assert make_accelerator(settings, cpu=True).mixed_precision == "bf16"
