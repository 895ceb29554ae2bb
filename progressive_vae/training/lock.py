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

LOCK, OWNER, MOMENT = ".lock", ".lock.json", ".moment"
WAIT_FOR_ORPHANS = 10.0  # seconds: the workers of a killed run hold its lock until they notice


@contextmanager
def locked(
    folder: Path, state: Accelerator | PartialState, part: str | None = None
) -> Iterator[None]:
    """While it lasts no other run writes to the folder, on this machine or, where its file system
    has locks, on others. The lock goes with the process, however that ends.

    Args:
        part: the only part of the pipeline that the run writes: others may write other parts.

    Raises:
        ValueError: another process has it; the error names it.
    """
    mine = folder / (LOCK if part is None else f"{LOCK}-{part}")
    lock = FileLock(mine)
    if state.is_main_process:
        _acquire(lock, mine, WAIT_FOR_ORPHANS)
        me = {"pid": os.getpid(), "host": socket.gethostname(), "command": " ".join(sys.argv)}
        write_json(_owner_of(mine), me)
    try:
        if state.is_main_process:
            # Of two that begin at once both may be refused, but never neither.
            others = folder.glob(f"{LOCK}-*") if part is None else [folder / LOCK]
            for other in [path for path in others if path.exists() and path.suffix != ".json"]:
                theirs = FileLock(other)
                _acquire(theirs, other, WAIT_FOR_ORPHANS)
                theirs.release()
        yield
    finally:
        if state.is_main_process:
            _owner_of(mine).unlink(missing_ok=True)
            lock.release()


def _acquire(lock: FileLock, path: Path, patience: float):
    try:
        lock.acquire(timeout=0 if _is_alive(_owner_of(path)) else patience)
    except Timeout as error:
        raise ValueError(
            f"expected an output_dir that no other run writes to, got {path.parent}, which "
            f"{_shown(_owner_of(path))} is at: wait for it, stop it, or choose another output_dir"
        ) from error
    except (OSError, NotImplementedError) as error:  # by a file system without locks
        warnings.warn(f"two runs in {path.parent} would not see each other: {error}", stacklevel=4)


@contextmanager
def alone(folder: Path, state: Accelerator | PartialState) -> Iterator[None]:
    """For the moment in which files are written that runs share; all processes call it."""
    lock = FileLock(folder / MOMENT)
    if state.is_main_process:
        lock.acquire()
    state.wait_for_everyone()
    try:
        yield
    finally:
        if state.is_main_process:
            lock.release()


def _owner_of(lock: Path) -> Path:
    return lock.with_name(f"{lock.name}.json")


def _owner(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, "delete it")
    except (OSError, ValueError):  # not written yet, or not any more
        return {}


def _is_alive(path: Path) -> bool:
    """Whether the process that the file names still runs, as far as that can be seen from here."""
    owner = _owner(path)
    if owner.get("host") != socket.gethostname():
        return bool(owner)
    try:
        os.kill(int(owner["pid"]), 0)
    except (OSError, KeyError, TypeError, ValueError, OverflowError):
        return False
    return True


def _shown(path: Path) -> str:
    owner = _owner(path)
    if not owner:
        return "another process"
    return f"process {owner.get('pid')} on {owner.get('host')} ({owner.get('command')})"
