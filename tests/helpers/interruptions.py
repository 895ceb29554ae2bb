"""Kill a training run at random moments, resume it each time, and compare its weights with those of
an undisturbed run.

A moment is a random time after a run has written a file, or before it has written any: while it
imports, reads the data set, encodes, trains, validates, saves a checkpoint or a level, and between
phases.
"""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
FLAGS = (
    "--levels.hidden_size 8 --levels.encoder_hidden_size 8 --levels.num_layers 1 "
    "--levels.codebook_size 8 --report_to none --levels.fit.max_train_steps 40 "
    "--prior.fit.max_train_steps 40 --level_2.refit.fit.max_train_steps 40 "
    "--level_2.refit.code_noise 0.2 --level_1.quantizer gumbel --level_1.class_conditional false "
    "--validation_steps 15 --num_validation_images 2 --checkpointing_steps 5 "
    "--max_train_samples 400 --max_eval_samples 40"
).split()


def start(output_dir: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "examples" / "train.py"), *FLAGS, *flags]
    # A pipe without a reader would fill up.
    with open(f"{output_dir}.log", "w", encoding="utf-8") as log:
        return subprocess.Popen(
            [*command, "--output_dir", str(output_dir)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
            start_new_session=True,  # a process group, for signals to all its processes
        )


def finish(process: subprocess.Popen, output_dir: Path):
    if process.wait():
        log = Path(f"{output_dir}.log").read_text(encoding="utf-8")
        raise RuntimeError(f"expected exit code 0, got {process.returncode}: {log[-3000:]}")


def weights(output_dir: Path) -> dict[str, str]:
    files = sorted(output_dir.glob("*/model.safetensors"))
    names = [path for path in files if path.parent.name in ("prior", "level_1", "level_2")]
    return {path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in names}


# Files of a run in their order.
WRITTEN = ["cache/pixels/train", "cache/pixels/test"]
for _phase in ("level_2", "level_1", "prior", "refit_level_2"):
    WRITTEN += [f"checkpoint-{_phase}-{step:08d}.incomplete" for step in (5, 20, 35)]
    WRITTEN += [f"checkpoint-{_phase}-{step:08d}" for step in (5, 10, 15, 20, 25, 30, 35)]
    WRITTEN += [f"{_phase.removeprefix('refit_')}.incomplete", _phase]
    WRITTEN += [f"cache/{_phase}/{split}" for split in ("train.incomplete", "train", "test")]


def disturb(output_dir: Path, kills: int, seed: int = 0) -> int:
    """Kill a run up to `kills` times, then let it end; return the number of kills."""
    rng = random.Random(seed)
    for kill in range(kills):
        process = start(output_dir, "--resume_from_checkpoint", "latest")
        left = [name for name in WRITTEN if not (output_dir / name).exists()]
        awaited = output_dir / rng.choice(["", *left])  # "" is the folder itself
        delay = rng.uniform(0, 6) if awaited == output_dir else rng.uniform(0, 0.2)
        while process.poll() is None and not awaited.exists():
            time.sleep(0.002)
        try:
            process.wait(timeout=delay)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            continue
        finish(process, output_dir)
        return kill
    finish(start(output_dir, "--resume_from_checkpoint", "latest"), output_dir)
    return kills
