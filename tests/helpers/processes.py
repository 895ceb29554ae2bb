"""Processes that start with the libraries imported.

A new Python process takes six CPU seconds to import torch, transformers and diffusers. Here a fork
server imports them once, and each process is a fork of it.
"""

import gc
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "examples" / "train.py"
# New processes and the fork server import the package and the tests from this checkout.
os.environ["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
os.environ["OMP_NUM_THREADS"] = "1"
SERVER = multiprocessing.get_context("forkserver")
# What a run of examples/train.py imports.
SERVER.set_forkserver_preload(
    "progressive_vae.training jsonargparse sklearn.datasets torchmetrics datasets.fingerprint "
    "transformers.models.llama.modeling_llama torch.utils.tensorboard".split()
)


def start(script: Path, *arguments: object, log: str | Path, **environment: str) -> BaseProcess:
    """Start a script as `python script arguments` does; its output goes to the file `log`.

    The process leads a process group, for signals to all its processes.
    """
    process = SERVER.Process(
        target=_run, args=(str(script), [*map(str, arguments)], str(log), environment)
    )
    process.start()
    return process


def _run(script: str, arguments: list[str], log: str, environment: dict[str, str]):
    os.setsid()
    with open(log, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # of its own processes: the default
    torch.set_num_threads(1)
    gc.freeze()  # what the server has imported: no collection has to visit it
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        code = end.code
    else:
        code = 0
    sys.exit(code)  # outside `except`, where the traceback would keep loaders of batches alive


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def launch(script: Path, *arguments: object, processes: int = 2) -> str:
    """Run a script as `torchrun` does, and return what its processes have printed."""
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / str(rank) for rank in range(processes)]
        group = [
            start(script, *arguments, log=log, RANK=log.name, LOCAL_RANK=log.name, **environment)
            for log in logs
        ]
        running = group
        while running:
            wait([process.sentinel for process in running])
            if any(process.exitcode for process in group):
                for process in running:  # they would wait for the one that failed
                    process.kill()
            running = [process for process in running if process.exitcode is None]
        output = "".join(log.read_text(encoding="utf-8") for log in logs)
    if any(process.exitcode for process in group):
        raise RuntimeError(f"expected exit codes 0, got {[p.exitcode for p in group]}: {output}")
    return output
