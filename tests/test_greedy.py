"""`train()`: the whole job in a few lines, on whatever images are at hand."""

import dataclasses
import json
import os
import signal

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from interruptions import weights

from progressive_vae import ProgressiveVAEPipeline
from progressive_vae.data.args import DataSettings
from progressive_vae.data.source import open_dataset
from progressive_vae.training import train
from progressive_vae.training.args import RunSettings
from progressive_vae.training.phases import LevelPhase, PriorPhase, RefitPhase
from progressive_vae.training.run import Run, make_accelerator

BACKBONE = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16,
            "num_hidden_layers": 1, "num_attention_heads": 2}  # fmt: skip
FEW = {"max_train_steps": 4}
RECIPE = {
    "num_levels": 2,
    "levels": {"hidden_size": 8, "num_layers": 1, "codebook_size": 8, "fit": FEW},
    "prior": {"backbone_config": BACKBONE, "fit": FEW},
    "data": {"eval_fraction": 0.3},
    "run": {"report_to": "none", "num_validation_images": 2},
}


@pytest.fixture(autouse=True)
def fresh_state():
    AcceleratorState._reset_state(reset_partial_state=True)


def pictures(count: int = 12) -> list[PIL.Image.Image]:
    rng = np.random.default_rng(0)
    return [PIL.Image.fromarray(x) for x in rng.integers(0, 256, (count, 8, 8, 3), np.uint8)]


def a_list(folder):
    return pictures()


def a_dataset(folder):
    table = datasets.Dataset.from_dict({"image": pictures(), "label": [0, 1] * 6})
    return table.cast_column("image", datasets.Image())


def a_dataset_dict(folder):
    return a_dataset(folder).train_test_split(4, seed=0)


def a_stream(folder):
    return a_dataset(folder).to_iterable_dataset(num_shards=2)


def a_folder(folder):
    for i, picture in enumerate(pictures()):
        picture.save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("kind", [a_list, a_dataset, a_dataset_dict, a_stream, a_folder])
def test_images_of_every_kind(kind, tmp_path):
    (tmp_path / "pictures").mkdir()
    dataset, output_dir = kind(tmp_path / "pictures"), tmp_path / "run"
    pipe = train(RECIPE, dataset, output_dir=output_dir)
    assert isinstance(pipe, ProgressiveVAEPipeline) and pipe.image_shape == (3, 8, 8)
    assert len(pipe.labels) == (2 if kind in (a_dataset, a_dataset_dict) else 0)
    before, metrics = weights(output_dir), (output_dir / "metrics.json").read_bytes()
    again = train(RECIPE, dataset, output_dir=output_dir)  # goes on where nothing is left to do
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
        (pictures(1), "expected at least 2 images"),
    ],
)
def test_what_is_no_data_set(dataset, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        train(RECIPE, dataset, output_dir=tmp_path)


def test_a_recipe_that_ran_runs_again(tmp_path):
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
    assert metrics["recipe"]["run"]["output_dir"] == "first"  # of paths the name is shown alone


def test_an_hour_is_divided_by_shares(tmp_path, monkeypatch):
    """The finest level first, then the prior, then decoders again; each with its part."""
    seen = []
    for kind in (LevelPhase, PriorPhase, RefitPhase):
        monkeypatch.setattr(kind, "__call__", lambda phase, run: seen.append(phase))
    recipe = RECIPE | {
        "level_1": {"fit": {"time_share": 0.25}},
        "level_2": {"fit": {"time_share": 0.5}, "refit": {"fit": {"time_share": 0.2}}},
        "prior": {"fit": {"time_share": 0.05}},
    }
    for phase in ("all", "level_1"):
        with pytest.raises(ValueError):  # nothing was trained that could be measured
            train(recipe, pictures(), tmp_path, 60, phase)
            raise ValueError
    assert [phase.name for phase in seen] == [
        "level_2", "level_1", "prior", "refit_level_2", "level_1"
    ]  # fmt: skip
    assert [phase.seconds for phase in seen] == [1800, 900, 180, 720, 900]


def test_later_phases_of_an_extended_run_name_the_missing_flag(tmp_path):
    shallow, deeper = tmp_path / "shallow", tmp_path / "deeper"
    train(RECIPE, pictures(), shallow)
    recipe = {**RECIPE, "run": {**RECIPE["run"], "extend": str(shallow)}}
    del recipe["num_levels"]
    pipe = train(recipe, pictures(), deeper)
    assert pipe.num_levels == 3
    for missing in ("prior", "evaluate", "level_1"):
        with pytest.raises(ValueError, match=f"expected extend='{shallow}'.*pass --extend"):
            train(RECIPE, pictures(), deeper, phase=missing)
    train(recipe, pictures(), deeper, phase="evaluate")


def test_images_without_a_label_are_learned_without_a_class(tmp_path):
    """And a held-out split without labels is measured, but for what takes labels."""
    classes = datasets.ClassLabel(names=["cat", "dog"])
    train_images = datasets.Dataset.from_dict({"image": pictures(), "label": [0, 1, -1] * 4})
    test_images = datasets.Dataset.from_dict({"image": pictures(4), "label": [-1] * 4})
    splits = datasets.DatasetDict(train=train_images, test=test_images)
    splits = splits.cast_column("image", datasets.Image()).cast_column("label", classes)
    with pytest.warns(UserWarning, match="4 of 12 images of the split 'train' have no label"):
        pipe = train(RECIPE, splits, output_dir=tmp_path)
    assert pipe.prior.config.num_classes == 2 and pipe.labels == {"cat": 0, "dog": 1}
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert "label_accuracy" not in metrics and metrics["bits_per_dim"]["total"] > 0
    assert "not_measured" not in metrics


def test_the_pixels_of_a_list_are_those_it_has(tmp_path):
    """Not those of the file that an image was opened from."""
    images = []
    for i, picture in enumerate(pictures(6)):
        picture.resize((16, 16)).save(tmp_path / f"{i}.png")
        images.append(PIL.Image.open(tmp_path / f"{i}.png"))
        images[-1].thumbnail((8, 8))
    source = open_dataset(DataSettings(eval_fraction=0.3), images)
    assert source.manifests["train"].shape == (3, 8, 8)


def test_another_stream_is_told_apart(tmp_path):
    streams = [a_stream(None), a_dataset(None).shuffle(seed=1).to_iterable_dataset()]
    settings = DataSettings(eval_fraction=0.3, streaming=True)
    names = [open_dataset(settings, s).manifests["train"].dataset for s in [*streams, streams[0]]]
    assert names[0] == names[2] != names[1]
    wider = dataclasses.replace(settings, shuffle_buffer_size=2)
    assert open_dataset(wider, streams[0]).manifests["train"].dataset != names[0]


def test_what_ran_is_written_down_whatever_ran(tmp_path):
    """A refit on top stays when the run is gone on with, and goes when its level is trained anew; a
    second one begins where the first ended, which it says."""

    def saved():
        return yaml.safe_load((tmp_path / "recipe.yaml").read_text())

    refit = {**RECIPE, "level_2": {"refit": {"code_noise": 0.2, "fit": FEW}}}
    train(RECIPE, pictures(), tmp_path)
    assert saved()["run"]["mixed_precision"] == "no" and saved()["level_2"]["refit"] is None
    train(refit, pictures(), tmp_path, phase="refit_level_2")
    train(RECIPE, pictures(), tmp_path)
    assert saved()["level_2"]["refit"]["code_noise"] == 0.2
    train(refit, pictures(), tmp_path)  # what is there is what it says
    other = {**RECIPE, "level_2": {"refit": {"fit": {"max_train_steps": 3}}}}
    with pytest.raises(ValueError, match="level_2 .*as its first fit left it.*--phase level_2"):
        train(other, pictures(), tmp_path, overwrite_output_dir=True)
    train(other, pictures(), tmp_path, phase="refit_level_2", resume_from_checkpoint=None)
    history = json.loads((tmp_path / "level_2" / "history.json").read_text())
    assert [each.get("refits_before") for each in history] == [None, 0, 1]
    train(RECIPE, pictures(), tmp_path, phase="level_2", resume_from_checkpoint=None)
    assert saved()["level_2"]["refit"] is None


def test_levels_that_are_given_are_not_as_the_recipe_says(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    train(RECIPE, pictures(), first)
    recipe = {**RECIPE, "level_2": {"hidden_size": 99}}
    recipe["run"] = {**RECIPE["run"], "finest_level": str(first / "level_2")}
    pipe = train(recipe, pictures(), second)
    assert pipe.level_2.config.hidden_size == 8
    level = yaml.safe_load((second / "recipe.yaml").read_text())["level_2"]
    assert sorted(level) == ["fit", "refit"] and level["refit"] is None
    with pytest.raises(ValueError, match="num_levels=3, one more than extend has, got 2"):
        train({**RECIPE, "run": {"extend": str(first)}}, pictures(), tmp_path / "third")


def test_other_images_in_the_same_folder_when_told(tmp_path):
    train(RECIPE, pictures(), tmp_path)
    others = [picture.transpose(PIL.Image.Transpose.ROTATE_90) for picture in pictures()]
    with pytest.raises(ValueError, match="data.dataset="):
        train(RECIPE, others, tmp_path)
    before = weights(tmp_path)
    train(RECIPE, others, tmp_path, overwrite_output_dir=True)
    after = weights(tmp_path)
    assert all(after[name] != before[name] for name in ("level_2", "level_1", "prior"))


def test_sigterm_in_the_last_validation_ends_the_run(tmp_path, monkeypatch):
    show = Run.show

    def show_and_stop(run, *arguments):
        show(run, *arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "show", show_and_stop)
    with pytest.raises(SystemExit) as stopped:
        train(RECIPE, pictures(), tmp_path)
    assert stopped.value.code == 0 and (tmp_path / "level_2").is_dir()
    assert not (tmp_path / "level_1").exists()
    monkeypatch.undo()
    assert train(RECIPE, pictures(), tmp_path) is not None


def test_bf16_is_fp32_where_it_is_slow(tmp_path, monkeypatch, caplog):
    settings = RunSettings(output_dir=str(tmp_path), mixed_precision="bf16", report_to="none")
    monkeypatch.setattr("progressive_vae.training.run.has_bf16", lambda device: False)
    assert make_accelerator(settings, cpu=True).mixed_precision == "no"
    assert "slow on this CPU" in caplog.text
    # Another run of this process, by the same words, is the same run.
    assert make_accelerator(settings, cpu=True).mixed_precision == "no"
    AcceleratorState._reset_state(reset_partial_state=True)
    Accelerator(cpu=True, mixed_precision="bf16")  # who insists gets it
    assert make_accelerator(settings, cpu=True).mixed_precision == "bf16"
