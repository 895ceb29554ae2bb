"""One run at a time writes to a folder."""

import os
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState
from filelock import FileLock, Timeout

from ..serialization import read_json, write_json

LOCK = ".lock"
OWNER = ".lock.json"
MOMENT = ".moment"
WAIT_FOR_ORPHANS = 10.0  # seconds: the workers of a killed run hold its lock until they notice


@contextmanager
def locked(
    folder: Path, state: Accelerator | PartialState, part: str | None = None
) -> Iterator[None]:
    """Lock the folder: no other run writes to it meanwhile.

    The lock holds on this machine, and on others if the file system has locks. It ends with the
    process.

    Args:
        part: the only part of the pipeline that the run writes: other runs may write other parts.

    Raises:
        ValueError: another process has the lock; the error names it.
    """
    path = folder / (LOCK if part is None else f"{LOCK}-{part}")
    lock = FileLock(path)
    if state.is_main_process:
        _acquire(lock, path, WAIT_FOR_ORPHANS)
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "command": " ".join(sys.argv)}
        write_json(_owner_file(path), owner)
    try:
        if state.is_main_process:
            # Locks of parts exclude that of the folder. This run has its own lock before it tries
            # the others: of two that start at once, both may fail, but never neither.
            conflicts = folder.glob(f"{LOCK}-*") if part is None else [folder / LOCK]
            for other in list(conflicts):
                if other.exists() and other.suffix != ".json":
                    other_lock = FileLock(other)
                    _acquire(other_lock, other, WAIT_FOR_ORPHANS)
                    other_lock.release()
        yield
    finally:
        if state.is_main_process:
            _owner_file(path).unlink(missing_ok=True)
            lock.release()


def _acquire(lock: FileLock, path: Path, patience: float):
    try:
        lock.acquire(timeout=0 if _is_alive(_owner_file(path)) else patience)
    except Timeout as error:
        raise ValueError(
            f"expected an output_dir that no other run writes to, got {path.parent}, which "
            f"{_describe(_owner_file(path))} uses: wait for it, stop it, or choose another "
            "output_dir"
        ) from error
    except (OSError, NotImplementedError) as error:  # the file system has no locks
        warnings.warn(
            f"two runs in {path.parent} would not notice each other: {error}", stacklevel=4
        )


@contextmanager
def exclusive(folder: Path, state: Accelerator | PartialState) -> Iterator[None]:
    """Exclude other runs for a moment, to write files that runs share; all processes call it."""
    lock = FileLock(folder / MOMENT)
    if state.is_main_process:
        lock.acquire()
    state.wait_for_everyone()
    try:
        yield
    finally:
        if state.is_main_process:
            lock.release()


def _owner_file(lock: Path) -> Path:
    return lock.with_name(f"{lock.name}.json")


def _owner(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, "delete it")
    except (OSError, ValueError):  # not written yet, or deleted already
        return {}


def _is_alive(path: Path) -> bool:
    """Return whether the owner of the lock runs; of another host that is assumed."""
    owner = _owner(path)
    if owner.get("host") != socket.gethostname():
        return bool(owner)
    try:
        os.kill(int(owner["pid"]), 0)
    except (OSError, KeyError, TypeError, ValueError, OverflowError):
        return False
    return True


def _describe(path: Path) -> str:
    owner = _owner(path)
    if not owner:
        return "another process"
    return f"process {owner.get('pid')} on {owner.get('host')} ({owner.get('command')})"
