"""Two processes (gloo) do what one does with the joined batch."""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers.captions import images_with_captions
from helpers.documents import commands
from helpers.models import tiny_level
from helpers.processes import ROOT, TRAIN, launch
from helpers.recipes import SMALL
from progressive_vae import ProgressiveVAEPipeline
from progressive_vae.data.code_cache import GridDataset

FEW = [*SMALL, "--max_train_samples", "100", "--max_eval_samples", "20"]
WITHOUT_LOGS = [*FEW, "--report_to", "none"]
WORKER = """
import sys

import torch
from accelerate import Accelerator
from helpers.models import tiny_level

accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
rank = accelerator.process_index
level, pixels = tiny_level(num_channels=1), torch.load(sys.argv[1])
level.quantizer.codebook[2] = 1e3  # dead, so that it is restarted
for _ in range(3):
    level.after_step(level(pixels[4 * rank : 4 * rank + 4]), accelerator.gather)
torch.save(level.quantizer.state_dict(), f"{sys.argv[2]}/{rank}.pt")
accelerator.end_training()
"""

STOPS = """
import runpy
import sys

from progressive_vae.training.checkpoints import Checkpoints

save = Checkpoints.save


def save_and_stop(self, identity, progress, *arguments):
    save(self, identity, progress, *arguments)
    if progress.step == 4:
        raise SystemExit(0)


Checkpoints.save = save_and_stop
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

SIGNAL = """
import runpy
import sys

from progressive_vae.training.checkpoints import Checkpoints

is_due = Checkpoints.is_due


def signal_at_three(self, step, accelerator, logging_steps):
    if step == 3 and accelerator.process_index == 1:
        self.stop()
    return is_due(self, step, accelerator, logging_steps)


Checkpoints.is_due = signal_at_three
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def losses(folder):
    """Of every phase, by step, as TensorBoard has them."""
    reader = EventAccumulator(str(folder / "logs" / "progressive_vae")).Reload()
    tags = [tag for tag in reader.Tags()["scalars"] if tag.endswith("/loss")]
    return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in tags}


def test_the_codebook_of_two_processes_is_that_of_one(tmp_path):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(8, 1, 8, 8, generator=generator) * 2 - 1
    torch.save(pixels, tmp_path / "pixels.pt")
    (tmp_path / "worker.py").write_text(WORKER)
    launch(tmp_path / "worker.py", tmp_path / "pixels.pt", tmp_path)
    level = tiny_level(num_channels=1)
    level.quantizer.codebook[2] = 1e3
    for _ in range(3):
        level.after_step(level(pixels), lambda tensor: tensor)
    assert level.quantizer.codebook.abs().max() < 100
    for rank in (0, 1):
        for name, value in torch.load(tmp_path / f"{rank}.pt").items():
            assert torch.allclose(value, level.quantizer.state_dict()[name], atol=1e-4), name


def joined_batch(processes: int) -> list[str]:
    """Noise of all kinds: Gumbel noise, dropped classes, noise on codes; 32 images in a batch."""
    flags = ["--level_1.quantizer", "gumbel", "--level_1.class_conditional", "false"]
    flags += ["--level_2.refit.fit.max_train_steps", "6", "--level_2.refit.code_noise", "0.3"]
    for fit in ("levels.fit", "level_2.refit.fit", "prior.fit"):
        flags += [f"--{fit}.train_batch_size", str(32 // processes)]
    return flags


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of a run of two processes, and what they have printed."""
    output_dir = tmp_path_factory.mktemp("two")
    return output_dir, launch(TRAIN, *FEW, *joined_batch(2), "--output_dir", output_dir)


def test_the_main_job_in_two_processes(two):
    output_dir, printed = two
    assert printed.count("| total |") == 1  # one process evaluates
    assert (output_dir / "metrics.json").is_file()
    assert not list(output_dir.rglob("*.incomplete"))
    # Each has encoded its share, and together they have the codes of the saved pipeline.
    cache = output_dir / "cache"
    contents = json.loads((cache / "level_1" / "train" / "manifest.json").read_text())
    assert len(contents["shards"]) == 2 and contents["num_examples"] == 100
    pixels = GridDataset(cache / "pixels" / "train").batch(slice(None))[0]
    pipe = ProgressiveVAEPipeline.from_pretrained(output_dir)
    for i, codes in enumerate(pipe.encode(pixels.to(torch.uint8)), 1):
        assert torch.equal(codes, GridDataset(cache / f"level_{i}" / "train").batch(slice(None))[0])


def test_two_processes_train_as_one_does_with_the_joined_batch(two, tmp_path):
    """Losses, codebooks and weights."""
    launch(TRAIN, *FEW, *joined_batch(1), "--output_dir", tmp_path, processes=1)
    ours, theirs = losses(tmp_path), losses(two[0])
    assert set(ours) == {f"{p}/loss" for p in ("level_2", "level_1", "prior", "refit_level_2")}
    for phase, curve in ours.items():
        assert len(curve) == 3
        assert torch.allclose(torch.tensor(curve), torch.tensor(theirs[phase]), atol=2e-3), phase
    for part in ("level_2", "level_1", "prior"):
        one, other = (load_file(f / part / "model.safetensors") for f in (tmp_path, two[0]))
        for name, value in one.items():
            assert torch.allclose(value, other[name], atol=2e-3), (part, name)


def test_two_processes_condition_on_captions_as_one_does(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    images_with_captions(60).to_parquet(data / "train.parquet")
    flags = [*SMALL, "--num_levels", "1", "--levels.text_conditional", "true"]
    # Encoder and decoder are trained together.
    flags += ["--levels.auxiliary_hidden_size", "null", "--levels.encoder_fit", "null"]
    flags += ["--dataset_name", data, "--caption_column", "text", "--eval_fraction", "0.3"]
    runs = [tmp_path / "runs" / n for n in "12"]
    for folder in runs:
        processes = int(folder.name)
        for fit in ("levels.fit", "prior.fit"):
            flags += [f"--{fit}.train_batch_size", str(16 // processes)]
        launch(TRAIN, *flags, "--output_dir", folder, processes=processes)
    one, two = (torch.tensor(losses(folder)["level_1/loss"]) for folder in runs)
    assert len(one) == 3 and torch.allclose(one, two, atol=2e-3)
    pipe = ProgressiveVAEPipeline.from_pretrained(runs[1])
    assert pipe.text_encoder is not None and pipe.level_1.config.condition_dim == 128


def test_two_processes_go_on_from_their_checkpoint(tmp_path):
    flags = [*WITHOUT_LOGS, "--checkpointing_steps", "2", "--phase", "level_2"]
    folders = (tmp_path / "undisturbed", tmp_path / "resumed")
    launch(TRAIN, *flags, "--output_dir", folders[0])
    (tmp_path / "stops.py").write_text(STOPS)
    launch(tmp_path / "stops.py", TRAIN, *flags, "--output_dir", folders[1])
    assert (folders[1] / "checkpoint-level_2-00000004").is_dir()
    resume = ["--resume_from_checkpoint", "latest"]
    launch(TRAIN, *flags, "--output_dir", folders[1], *resume)
    ours, theirs = ((f / "level_2" / "model.safetensors").read_bytes() for f in folders)
    assert ours == theirs


def test_a_signal_to_one_process_stops_all(tmp_path):
    """All processes stop at the next step that is logged."""
    (tmp_path / "signal_at_three.py").write_text(SIGNAL)
    flags = [*WITHOUT_LOGS, "--phase", "level_2", "--checkpointing_steps", "null"]
    printed = launch(
        tmp_path / "signal_at_three.py", TRAIN, *flags, "--output_dir", tmp_path / "run"
    )
    assert "stopped in level_2 at step 4" in printed
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == [
        "checkpoint-level_2-00000004"
    ]


def test_two_processes_learn_the_encoders_of_one(tmp_path):
    """Their codebooks, whose statistics weigh as one batch of all processes at first."""
    flags = ["--levels.auxiliary_hidden_size", "8", "--levels.encoder_fit.max_train_steps", "6"]
    flags += ["--phase", "encoder_2"]
    for processes in (1, 2):
        size = ["--levels.encoder_fit.train_batch_size", str(32 // processes)]
        folder = ["--output_dir", tmp_path / str(processes)]
        launch(TRAIN, *WITHOUT_LOGS, *flags, *size, *folder, processes=processes)
    one, two = (load_file(tmp_path / n / "level_2" / "model.safetensors") for n in "12")
    for name, value in one.items():
        assert torch.allclose(value, two[name], atol=2e-3), name


def test_two_processes_agree_on_when_time_is_up(tmp_path):
    """Only one of them validates, and both have to leave time for it."""
    flags = ["--validation_steps", "20", "--logging_steps", "5", "--max_train_minutes", "0.03"]
    launch(TRAIN, *WITHOUT_LOGS, *flags, "--output_dir", tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_text())["bits_per_dim"]["total"] > 0


STREAM_READER = """
import sys
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
from accelerate import Accelerator
from progressive_vae.data.code_cache import Manifest
from progressive_vae.data.streaming import PixelStream
from progressive_vae.training.args import RunSettings
from progressive_vae.training.fit import _make_loader

accelerator = Accelerator(cpu=True)
images = [PIL.Image.fromarray(np.full((2, 2), i, np.uint8)) for i in range(8)]
table = datasets.Dataset.from_dict({"image": images}).to_iterable_dataset(num_shards=2)
manifest = Manifest("", "eight images", "train", (1, 2, 2), 256)
stream = PixelStream(table, manifest, image_column="image", label_column=None)
loader, _ = _make_loader(stream, accelerator, 2, RunSettings())
values = [int(grid[0, 0, 0]) for batch in islice(loader, 2) for grid in batch["grid"]]
Path(sys.argv[1], str(accelerator.process_index)).write_text(" ".join(map(str, sorted(values))))
accelerator.end_training()
"""


def test_each_process_trains_on_its_part_of_a_stream(tmp_path):
    script = tmp_path / "reader.py"
    script.write_text(STREAM_READER)
    launch(script, tmp_path)
    parts = [(tmp_path / rank).read_text().split() for rank in "01"]
    assert sorted(parts[0] + parts[1]) == [*"01234567"] and len(parts[0]) == 4


def test_a_stream_in_two_processes(tmp_path):
    flags = ["--streaming", "--max_train_samples", "101", "--output_dir", tmp_path]
    launch(TRAIN, *WITHOUT_LOGS, *flags)
    assert len(GridDataset(tmp_path / "cache" / "level_1" / "train")) == 101
    assert json.loads((tmp_path / "metrics.json").read_text())["num_images"] == 20


def launch_lines():
    page = ROOT / "examples" / "docs" / "training.md"
    return [line for line in commands(page) if "--num_processes" in line]


def run(line: str, output_dir: Path):
    """Run a command line in new Python processes."""
    command = [*shlex.split(line), *WITHOUT_LOGS, "--output_dir", str(output_dir)]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow  # Accelerate's launcher and two processes import the libraries
@pytest.mark.parametrize("line", [line for line in launch_lines() if "fsdp" not in line])
def test_launch_lines_of_the_documents(line, tmp_path):
    """They start as many processes as they say."""
    run(line, tmp_path)
    expected = int(re.search(r"--num_processes (\d+)", line)[1])
    assert json.loads((tmp_path / "metrics.json").read_text())["machine"][:3] == f"{expected} ×"
    for part in ("level_2", "level_1", "prior"):
        (identity,) = json.loads((tmp_path / part / "history.json").read_text())
        assert identity["num_processes"] == expected
    assert expected > 1 and launch_lines()


def test_a_sharded_prior_is_that_of_two_copies(two, tmp_path):
    """FSDP2 on two CPUs, interrupted and not, against DDP."""
    output_dir = tmp_path / "run"
    shutil.copytree(two[0], output_dir)
    sharded, weights = ROOT / "tests/helpers/sharded.py", output_dir / "prior" / "model.safetensors"
    wanted = weights.read_bytes()
    flags = [*WITHOUT_LOGS, *joined_batch(2), "--output_dir", output_dir, "--phase", "prior"]
    flags += ["--checkpointing_steps", "3"]
    launch(sharded, TRAIN, *flags)
    assert weights.read_bytes() == wanted
    (tmp_path / "stops.py").write_text(STOPS.replace("== 4", "== 3"))
    shutil.rmtree(output_dir / "prior")
    launch(tmp_path / "stops.py", sharded, TRAIN, *flags)
    (checkpoint,) = output_dir.glob("checkpoint-prior-*")
    assert (checkpoint / "fit.pt").is_file() and (checkpoint / "fit_1.pt").is_file()
    launch(sharded, TRAIN, *flags, "--resume_from_checkpoint", "latest")
    assert weights.read_bytes() == wanted
    with pytest.raises(RuntimeError, match="expected FSDP .*, got it for level_1"):
        launch(sharded, TRAIN, *flags, "--phase", "level_1")


def test_a_sharded_transformer_is_that_of_two_copies(two, tmp_path):
    """A refit with 24 layers and gradient checkpointing: FSDP2 on two CPUs against DDP."""
    refit = "decoder_type transformer num_layers 24 fit.max_train_steps 2".split()
    flags = [*WITHOUT_LOGS, *joined_batch(2), "--phase", "refit_level_1"]
    for name, value in zip(refit[::2], refit[1::2], strict=True):
        flags += [f"--level_1.refit.{name}", value]
    flags += ["--gradient_checkpointing", "true"]
    weights = []
    for scripts in ([TRAIN], [ROOT / "tests/helpers/sharded.py", TRAIN]):
        output_dir = tmp_path / str(len(scripts))
        shutil.copytree(two[0], output_dir)
        launch(*scripts, *flags, "--output_dir", output_dir)
        weights.append(load_file(output_dir / "level_1" / "model.safetensors"))
    assert weights[0]["decoder.layers.23.down.weight"].any()  # which was zero
    for name, value in weights[0].items():
        assert torch.allclose(value, weights[1][name], atol=1e-6), name


@pytest.mark.gpu
@pytest.mark.parametrize("line", [line for line in launch_lines() if "fsdp" in line])
def test_the_launch_line_of_a_sharded_prior(line, tmp_path):
    needed = int(re.search(r"--num_processes (\d+)", line)[1])
    if torch.cuda.device_count() < needed:
        pytest.skip(f"needs {needed} GPUs, found {torch.cuda.device_count()}")
    run("accelerate launch --num_processes 2 examples/train.py", tmp_path)
    run(line, tmp_path)
    assert ProgressiveVAEPipeline.from_pretrained(tmp_path).prior is not None
