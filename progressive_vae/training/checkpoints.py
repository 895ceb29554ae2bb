"""Checkpoints: a phase that is interrupted resumes, and ends with bit-identical weights.

A checkpoint is what Accelerate saves (weights, optimizer, random states of every process) and
`fit.pt`, with the averaged weights, the schedule and the position in the data; `checksums.json` has
the CRC-32 of each file. It is written under a temporary name and renamed, so it is complete or
invisible.
"""

import json
import math
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from safetensors import SafetensorError

from ..paths import expand_home
from ..serialization import file_checksum, read_json
from .identity import check_identity, differences

IDENTITY = "identity.json"
STATE = "fit.pt"
CHECKSUMS = "checksums.json"


class Stateful(Protocol):
    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict): ...


@dataclass
class Progress:
    """Position of a fit in its data and its time.

    Args:
        step: number of finished optimization steps.
        epoch: number of finished passes over the data set.
        batch: number of finished batches of the current pass.
        seconds: time spent, without validations.
        waited: seconds of these in which the model waited for data.
        elapsed: seconds since the start of a phase that has a duration.
        validating: duration of the last validation in seconds, 0 before the first.
        validation_loss: of the last validation, set by the caller of the fit for early stopping.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    elapsed: float = 0.0
    validating: float = 0.0
    validation_loss: float = math.nan


@dataclass
class Checkpoints:
    """The checkpoints `checkpoint-{phase}-{step}` in a folder.

    Args:
        every: optimization steps between checkpoints; `None`: only before the program is stopped.
        total_limit: number of retained checkpoints of a phase; `None` for all.
        resume: "latest", or the path of a checkpoint to start its phase from. `None`: start phases
            from step 0 and delete their checkpoints.
        overwrite: delete checkpoints of other settings and start from step 0; else they are an
            error.
    """

    folder: Path
    every: int | None = None
    total_limit: int | None = None
    resume: str | None = None
    overwrite: bool = False
    has_signal: bool = field(default=False, init=False)  # this process got a signal to stop
    is_stopping: bool = field(default=False, init=False)  # all processes stop at this step
    is_fitting: bool = field(default=False, init=False)

    def __post_init__(self):
        for name in ("every", "total_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"expected checkpoints' {name} >= 1 or None, got {value}")
        if self.resume is not None:
            self.resume = expand_home(self.resume, "resume_from_checkpoint")
        if self.resume not in (None, "latest") and not (Path(self.resume) / STATE).is_file():
            raise ValueError(
                f"expected resume_from_checkpoint to be 'latest' or a checkpoint, got {self.resume}"
            )

    def stop(self, *_: Any):
        """Handle a signal: the fit saves after its current step and ends the program.

        Between fits the program ends at once, as all that is written is complete or invisible.
        """
        self.has_signal = True
        if not self.is_fitting:
            raise SystemExit(0)

    def end_of_fit(self, accelerator: Accelerator):
        """End the program if a signal came after the last checkpoint of a fit that is saved now."""
        if self._any_signal(accelerator):
            raise SystemExit(0)

    def _any_signal(self, accelerator: Accelerator) -> bool:
        signals = torch.tensor(float(self.has_signal), device=accelerator.device)
        return bool(accelerator.reduce(signals, "sum"))

    @contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Call `stop` for SIGTERM and Ctrl-C; only a main thread can handle signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # A shell starts background jobs with SIGINT ignored, which has to stay ignored. None is a
        # handler that was not set from Python and cannot be restored.
        handlers = {
            number: handler
            for number in (signal.SIGTERM, signal.SIGINT)
            if (handler := signal.getsignal(number)) not in (signal.SIG_IGN, None)
        }
        for number in handlers:
            signal.signal(number, self.stop)
        try:
            yield
        except SystemExit:
            if self.has_signal and not self.is_fitting and PartialState().is_local_main_process:
                print(f"stopped between two fits; the finished phases are in {self.folder}")
            raise
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def of(self, phase: str) -> list[Path]:
        """Return the complete checkpoints of a phase, oldest first."""
        return self.all(f"{phase}-*")

    def all(self, pattern: str = "*") -> list[Path]:
        paths = self.folder.glob(f"checkpoint-{pattern}")
        return sorted(path for path in paths if path.suffix != ".incomplete")

    def remove(self, phase: str, accelerator: Accelerator):
        accelerator.wait_for_everyone()  # all processes have read the files
        if accelerator.is_main_process:
            for path in self.folder.glob(f"checkpoint-{phase}-*"):
                _discard(path)
        accelerator.wait_for_everyone()

    def is_due(self, step: int, accelerator: Accelerator, logging_steps: int) -> bool:
        """Return whether to save after this step; all processes get the same answer."""
        is_due = self.every is not None and step % self.every == 0
        if accelerator.num_processes == 1 or step % logging_steps == 0:
            # Processes get a signal at different steps, so they have to agree on one.
            self.is_stopping = self._any_signal(accelerator)
        return is_due or self.is_stopping

    def save(
        self,
        identity: Mapping[str, Any],
        progress: Progress,
        states: Mapping[str, Stateful],
        accelerator: Accelerator,
    ):
        """Write a checkpoint of `identity["phase"]` and delete those beyond `total_limit`."""
        phase = identity["phase"]
        path = self.folder / f"checkpoint-{phase}-{progress.step:08d}"
        if path.exists():
            return  # the program is stopped right after it was written
        temporary = path.with_name(path.name + ".incomplete")
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        accelerator.wait_for_everyone()
        with errors_of_writing(temporary):
            accelerator.save_state(str(temporary))
            if accelerator.is_main_process or is_sharded(accelerator):
                contents = {name: state.state_dict() for name, state in states.items()}
                file = temporary / _state_name(accelerator)
                torch.save({"progress": asdict(progress), **contents}, file)
        if accelerator.is_main_process:
            (temporary / IDENTITY).write_text(json.dumps(identity, indent=2))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _write_checksums(temporary)
            temporary.rename(path)
            for old in self.of(phase)[: -self.total_limit] if self.total_limit else []:
                _discard(old)
        accelerator.wait_for_everyone()

    @property
    def explicit_path(self) -> Path | None:
        """The checkpoint that `resume` is the path of."""
        return None if self.resume in (None, "latest") else Path(str(self.resume)).resolve()

    def find(self, phase: str) -> Path | None:
        """Return the checkpoint to start a phase from."""
        if self.resume is None:
            return None
        path = self.explicit_path
        paths = self.of(phase) if path is None else [path]
        paths = [path for path in paths if path.name.startswith(f"checkpoint-{phase}-")]
        return paths[-1] if paths else None

    def identity(self, path: Path) -> dict[str, Any]:
        """Return the identity of the fit that wrote a checkpoint."""
        return read_json(path / IDENTITY, _advice(path))

    def load(
        self, identity: Mapping[str, Any], states: Mapping[str, Stateful], accelerator: Accelerator
    ) -> Progress:
        """Load the checkpoint of a phase into `states` and all that Accelerate has prepared.

        Raises:
            ValueError: the checkpoint has another identity, or cannot be read.
        """
        phase = identity["phase"]
        if self.resume is None:
            self.remove(phase, accelerator)
            return Progress()
        path = self.find(phase)
        if path is None:
            return Progress()
        saved = self.identity(path)
        if self.overwrite and differences(identity, saved):
            self.remove(phase, accelerator)
            return Progress()
        check_identity(identity, saved, str(path))
        _check_files(path)
        try:
            file = path / _state_name(accelerator)
            contents = torch.load(file, map_location="cpu", weights_only=True)
            accelerator.load_state(str(path))
            for name, state in states.items():
                state.load_state_dict(contents[name])
        except Exception as error:
            raise ValueError(_damaged(path, error)) from error
        return Progress(**contents["progress"])


@contextmanager
def errors_of_writing(path: Path) -> Iterator[None]:
    """Raise an `OSError` with the path where the libraries raise others, as for a full disk."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        is_of_torch = "inline_container" in str(error)  # torch's source file of the writer
        if not isinstance(error, SafetensorError) and not is_of_torch:
            raise
        free = shutil.disk_usage(path.parent).free
        raise OSError(f"expected to write {path}, got {error}; {free} bytes are free") from error


def is_sharded(accelerator: Accelerator) -> bool:
    """Return whether the processes hold parts of one model (FSDP) rather than copies."""
    return accelerator.distributed_type == DistributedType.FSDP


def _state_name(accelerator: Accelerator) -> str:
    """Return the name of this process's file: processes of a sharded model have one each."""
    is_common = accelerator.is_main_process or not is_sharded(accelerator)
    return STATE if is_common else f"fit_{accelerator.process_index}.pt"


def _discard(path: Path):
    """Delete a checkpoint; if the process is killed meanwhile, the rest is invisible."""
    if path.suffix != ".incomplete":
        path = path.rename(path.with_name(path.name + ".incomplete"))
    shutil.rmtree(path)


def _write_checksums(folder: Path):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = {path.relative_to(folder).as_posix(): file_checksum(path) for path in files}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=2))


def _check_files(folder: Path):
    """Raise a `ValueError` unless the files have their checksums."""
    for name, expected in read_json(folder / CHECKSUMS, _advice(folder)).items():
        try:
            actual = file_checksum(folder / name)
        except OSError as error:
            raise ValueError(_damaged(folder, error)) from error
        if actual != expected:
            raise ValueError(_damaged(folder, f"{name} has another checksum"))


def _damaged(path: Path, error: Exception | str) -> str:
    return (
        f"expected a complete checkpoint, got {path}, which cannot be read ({error}): "
        f"{_advice(path)}"
    )


def _advice(path: Path) -> str:
    return f"delete {path} to resume from the previous checkpoint, or from the start of its phase"
