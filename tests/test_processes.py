"""Two processes (gloo) do what one does with the joined batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from conftest import tiny_level
from test_training import SMALL

from progressive_vae import ProgressiveVAEPipeline
from progressive_vae.codes import GridDataset

ROOT = Path(__file__).parents[1]
WORKER = """
import sys

import torch
from accelerate import Accelerator
from conftest import tiny_level

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

from progressive_vae.checkpoints import Checkpoints

save = Checkpoints.save


def save_and_stop(self, identity, progress, *arguments):
    save(self, identity, progress, *arguments)
    if progress.step == 4:
        raise SystemExit(0)


Checkpoints.save = save_and_stop
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def launch(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_codebook_of_two_processes_is_that_of_one(tmp_path):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(8, 1, 8, 8, generator=generator) * 2 - 1
    torch.save(pixels, tmp_path / "pixels.pt")
    (tmp_path / "worker.py").write_text(WORKER)
    launch(str(tmp_path / "worker.py"), str(tmp_path / "pixels.pt"), str(tmp_path))
    level = tiny_level(num_channels=1)
    level.quantizer.codebook[2] = 1e3
    for _ in range(3):
        level.after_step(level(pixels), lambda tensor: tensor)
    assert level.quantizer.codebook.abs().max() < 100
    for rank in (0, 1):
        for name, value in torch.load(tmp_path / f"{rank}.pt").items():
            assert torch.allclose(value, level.quantizer.state_dict()[name], atol=1e-4), name


def test_the_main_job_in_two_processes(tmp_path):
    flags = (
        "--hidden_size 8 --encoder_hidden_size 8 --num_layers 1 --codebook_size 8 "
        "--max_train_steps 3 --prior_max_train_steps 3 --validation_steps 2 --max_eval_samples 20 "
        "--max_train_samples 200 --decoder_order factorized lattice --report_to none"
    ).split()
    script = str(ROOT / "examples" / "train.py")
    printed = launch(script, *flags, "--output_dir", str(tmp_path / "run"))
    assert printed.count("| total |") == 1  # one process evaluates
    assert (tmp_path / "run" / "metrics.json").is_file()
    assert not list((tmp_path / "run").rglob("*.incomplete"))
    # Each has encoded its share, and together they have the codes of the saved pipeline.
    cache = tmp_path / "run" / "cache"
    contents = json.loads((cache / "level_1" / "train" / "manifest.json").read_text())
    assert len(contents["shards"]) == 2 and contents["num_examples"] == 200
    pixels = GridDataset(cache / "pixels" / "train").batch(slice(None))[0]
    pipe = ProgressiveVAEPipeline.from_pretrained(tmp_path / "run")
    for i, codes in enumerate(pipe.encode(pixels.to(torch.uint8)), 1):
        assert torch.equal(codes, GridDataset(cache / f"level_{i}" / "train").batch(slice(None))[0])


def test_two_processes_go_on_from_their_checkpoint(tmp_path):
    flags = [
        *SMALL,
        "--report_to",
        "none",
        "--max_train_samples",
        "200",
        "--max_eval_samples",
        "20",
    ]
    flags += ["--checkpointing_steps", "2", "--phase", "level_2"]
    script, folders = str(ROOT / "examples" / "train.py"), (tmp_path / "whole", tmp_path / "parts")
    launch(script, *flags, "--output_dir", str(folders[0]))
    (tmp_path / "stops.py").write_text(STOPS)
    launch(str(tmp_path / "stops.py"), script, *flags, "--output_dir", str(folders[1]))
    assert (folders[1] / "checkpoint-level_2-00000004").is_dir()
    resume = ["--resume_from_checkpoint", "latest"]
    launch(script, *flags, "--output_dir", str(folders[1]), *resume)
    ours, theirs = ((f / "level_2" / "model.safetensors").read_bytes() for f in folders)
    assert ours == theirs
