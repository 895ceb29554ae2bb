"""Kill a training run at random moments, resume it each time, and compare its weights with those of
an undisturbed run.

A moment is a random time after a run has written a file, or before it has written any: while it
parses flags, reads the data set, encodes, trains, validates, saves a checkpoint or a level, and
between phases.
"""

import hashlib
import random
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from helpers import processes

# Level 2 has more steps than the other parts: time for a signal.
FLAGS = (
    "--levels.hidden_size 8 --levels.encoder_hidden_size 8 --levels.num_layers 1 "
    "--levels.codebook_size 8 --report_to none --levels.fit.max_train_steps 12 "
    "--level_2.fit.max_train_steps 24 --prior.fit.max_train_steps 12 "
    "--level_2.refit.fit.max_train_steps 12 "
    "--level_2.refit.code_noise 0.2 --level_1.quantizer gumbel --level_1.class_conditional false "
    "--validation_steps 5 --num_validation_images 2 --checkpointing_steps 3 "
    "--max_train_samples 150 --max_eval_samples 20 --prior.backbone_config "
    '{"model_type":"llama","hidden_size":16,"intermediate_size":16,'
    '"num_hidden_layers":1,"num_attention_heads":2}'
).split()


def start(output_dir: Path, *flags: str) -> BaseProcess:
    """Start a run, which prints into `{output_dir}.log`."""
    flags = (*FLAGS, *flags, "--output_dir", str(output_dir))
    return processes.start(processes.TRAIN, *flags, log=f"{output_dir}.log")


def finish(process: BaseProcess, output_dir: Path):
    process.join()
    if process.exitcode:
        log = Path(f"{output_dir}.log").read_text(encoding="utf-8")
        raise RuntimeError(f"expected exit code 0, got {process.exitcode}: {log[-3000:]}")


def weights(output_dir: Path) -> dict[str, str]:
    files = sorted(output_dir.glob("*/model.safetensors"))
    names = [path for path in files if path.parent.name in ("prior", "level_1", "level_2")]
    return {path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in names}


# Files of a run in their order.
WRITTEN = ["cache/pixels/train", "cache/pixels/test"]
for _phase in ("level_2", "level_1", "prior", "refit_level_2"):
    WRITTEN += [f"checkpoint-{_phase}-{step:08d}.incomplete" for step in (3, 9)]
    WRITTEN += [f"checkpoint-{_phase}-{step:08d}" for step in (3, 6, 9)]
    WRITTEN += [f"{_phase.removeprefix('refit_')}.incomplete", _phase]
    WRITTEN += [f"cache/{_phase}/{split}" for split in ("train.incomplete", "train", "test")]


def disturb(output_dir: Path, kills: int, seed: int = 0) -> int:
    """Kill a run up to `kills` times, then let it end; return the number of kills."""
    rng = random.Random(seed)
    for kill in range(kills):
        process = start(output_dir, "--resume_from_checkpoint", "latest")
        left = [name for name in WRITTEN if not (output_dir / name).exists()]
        awaited = output_dir / rng.choice(["", *left])  # "" is the folder itself
        delay = rng.uniform(0, 3) if awaited == output_dir else rng.uniform(0, 0.2)
        while process.is_alive() and not awaited.exists():
            time.sleep(0.002)
        process.join(delay)
        if not process.is_alive():
            finish(process, output_dir)
            return kill
        process.kill()
        process.join()
    finish(start(output_dir, "--resume_from_checkpoint", "latest"), output_dir)
    return kills
