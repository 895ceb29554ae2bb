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

from ..saved import read_json, write_json

LOCK, OWNER = ".lock", ".lock.json"
WAIT_FOR_ORPHANS = 10.0  # seconds: the workers of a killed run hold its lock until they notice


@contextmanager
def locked(folder: Path, state: Accelerator | PartialState) -> Iterator[None]:
    """While it lasts no other run writes to the folder, on this machine or, where its file system
    has locks, on others. The lock goes with the process, however that ends.

    Raises:
        ValueError: another process has it; the error names it.
    """
    lock, owner = FileLock(folder / LOCK), folder / OWNER
    if state.is_main_process:
        try:
            lock.acquire(timeout=0 if _is_alive(owner) else WAIT_FOR_ORPHANS)
        except Timeout as error:
            raise ValueError(
                f"expected an output_dir that no other run writes to, got {folder}, which "
                f"{_shown(owner)} is at: wait for it, stop it, or choose another output_dir"
            ) from error
        except (OSError, NotImplementedError) as error:  # by a file system without locks
            warnings.warn(f"two runs in {folder} would not see each other: {error}", stacklevel=3)
        me = {"pid": os.getpid(), "host": socket.gethostname(), "command": " ".join(sys.argv)}
        write_json(owner, me)
    try:
        yield
    finally:
        if state.is_main_process:
            owner.unlink(missing_ok=True)
            lock.release()


def _owner(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, "delete it")
    except ValueError:  # not written yet, or not any more
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
