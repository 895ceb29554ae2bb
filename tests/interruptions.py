"""Kill a training run at random moments, start it again each time, and compare its weights with
those of a run that nobody disturbed.

    python tests/interruptions.py --kills 20

A moment is a random time after the first sight of something that a run writes, or before it has
written anything: while it imports, reads the data set, encodes, trains, validates, saves a
checkpoint or a level, and between phases.
"""

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
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
    # A pipe that nobody reads would fill up.
    with open(f"{output_dir}.log", "w", encoding="utf-8") as log:
        return subprocess.Popen(
            [*command, "--output_dir", str(output_dir)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
            start_new_session=True,  # a group of its own, for signals to all its processes
        )


def finish(process: subprocess.Popen, output_dir: Path):
    if process.wait():
        said = Path(f"{output_dir}.log").read_text(encoding="utf-8")
        raise RuntimeError(f"expected training to end well, got {said[-3000:]}")


def weights(output_dir: Path) -> dict[str, str]:
    files = sorted(output_dir.glob("*/model.safetensors"))
    names = [path for path in files if path.parent.name in ("prior", "level_1", "level_2")]
    return {path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in names}


# What a run writes, in this order; the names of a checkpoint say its step.
WRITTEN = ["cache/pixels/train", "cache/pixels/test"]
for _phase in ("level_2", "level_1", "prior", "refit_level_2"):
    WRITTEN += [f"checkpoint-{_phase}-{step:08d}.incomplete" for step in (5, 20, 35)]
    WRITTEN += [f"checkpoint-{_phase}-{step:08d}" for step in (5, 10, 15, 20, 25, 30, 35)]
    WRITTEN += [f"{_phase.removeprefix('refit_')}.incomplete", _phase]
    WRITTEN += [f"cache/{_phase}/{split}" for split in ("train.incomplete", "train", "test")]


def disturb(output_dir: Path, kills: int, seed: int = 0) -> int:
    """Kill a run so many times, or as often as it can be before it ends; the kills done."""
    draws = random.Random(seed)
    for kill in range(kills):
        process = start(output_dir, "--resume_from_checkpoint", "latest")
        left = [name for name in WRITTEN if not (output_dir / name).exists()]
        awaited = output_dir / draws.choice(["", *left])  # the folder itself: at once
        delay = draws.uniform(0, 6) if awaited == output_dir else draws.uniform(0, 0.2)
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


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    total = 0
    with tempfile.TemporaryDirectory() as folder:
        output_dir = Path(folder) / "undisturbed"
        finish(start(output_dir), output_dir)
        expected = weights(output_dir)
        for run in range(arguments.kills):
            output_dir = Path(folder) / f"run-{run}"
            total += disturb(output_dir, min(5, arguments.kills - total), arguments.seed + run)
            assert weights(output_dir) == expected, (run, weights(output_dir), expected)
            print(f"run {run}: the same weights, {total} kills so far", flush=True)
            if total >= arguments.kills:
                break


if __name__ == "__main__":
    main()
