"""A phase that was interrupted goes on where it was, and ends with the same weights to the bit.

A checkpoint is what Accelerate saves (weights, optimizer, random states of every process) and
`fit.pt`, with the averaged weights, the schedule and the place in the data; `checksums.json` has
the CRC-32 of each file. It is written under a temporary name and renamed: complete or invisible.
"""

import json
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

IDENTITY, STATE, CHECKSUMS = "identity.json", "fit.pt", "checksums.json"

# What only the phases before a phase settle: all else of its identity are settings.
_OF_OTHER_PHASES = ("config.finer_fingerprint", "data.weights", "data.num_examples")


class Stateful(Protocol):
    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict): ...


@dataclass
class Progress:
    """Where a fit stands.

    Args:
        step: optimization steps done.
        epoch, batch: passes over the data set done, and batches of the next one.
        seconds: spent so far, validations left out.
        waited: seconds of these in which the model waited for data.
        elapsed: seconds since the phase began, of one that has a time to keep.
        validating: seconds that the last validation took, 0 where there was none.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    elapsed: float = 0.0
    validating: float = 0.0


@dataclass
class Checkpoints:
    """The checkpoints `checkpoint-{phase}-{step}` in a folder.

    Args:
        every: optimization steps from one to the next; `None` for none but that of a stop.
        total_limit: the number of a phase's checkpoints that are kept; `None` for all.
        resume: start phases from their checkpoints; "latest", or the path of one. `None`: start
            anew, and delete what is there.
        overwrite: what other settings made is deleted, and that phase starts anew, where it would
            be an error.
    """

    folder: Path
    every: int | None = None
    total_limit: int | None = None
    resume: str | None = None
    overwrite: bool = False
    is_told: bool = field(default=False, init=False)  # this process, to stop
    is_stopping: bool = field(default=False, init=False)  # all processes, at this step
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
        """A signal's handler: a fit saves after the step it is at, and ends the program; between
        fits there is nothing to save, as what is written is complete or invisible."""
        self.is_told = True
        if not self.is_fitting:
            raise SystemExit(0)

    def end_of_fit(self, accelerator: Accelerator):
        """End the program if it was told to, when nothing was left to save but the result."""
        told = torch.tensor(float(self.is_told), device=accelerator.device)
        if bool(accelerator.reduce(told, "sum")):
            raise SystemExit(0)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While it lasts SIGTERM and Ctrl-C call `stop`; only a main thread can handle signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
        # A shell starts background jobs with SIGINT ignored, which is to stay so. None: a handler
        # that was not set from Python, and cannot be set again.
        handlers = {k: v for k, v in handlers.items() if v not in (signal.SIG_IGN, None)}
        for number in handlers:
            signal.signal(number, self.stop)
        try:
            yield
        except SystemExit:
            if self.is_told and not self.is_fitting and PartialState().is_local_main_process:
                print(f"stopped between two fits; the phases that are done are in {self.folder}")
            raise
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def of(self, phase: str) -> list[Path]:
        """The complete checkpoints of a phase, oldest first."""
        return self.all(f"{phase}-*")

    def all(self, pattern: str = "*") -> list[Path]:
        found = self.folder.glob(f"checkpoint-{pattern}")
        return sorted(path for path in found if path.suffix != ".incomplete")

    def remove(self, phase: str, accelerator: Accelerator):
        accelerator.wait_for_everyone()  # all have read what they want to
        if accelerator.is_main_process:
            for path in self.folder.glob(f"checkpoint-{phase}-*"):
                _discard(path)
        accelerator.wait_for_everyone()

    def is_due(self, step: int, accelerator: Accelerator, logging_steps: int) -> bool:
        """Whether to save after this step; alike on all processes."""
        is_due = self.every is not None and step % self.every == 0
        if accelerator.num_processes == 1 or step % logging_steps == 0:
            # Processes hear of a signal at different steps, and agree here.
            told = torch.tensor(float(self.is_told), device=accelerator.device)
            self.is_stopping = bool(accelerator.reduce(told, "sum"))
        return is_due or self.is_stopping

    def save(
        self,
        identity: Mapping[str, Any],
        progress: Progress,
        states: Mapping[str, Stateful],
        accelerator: Accelerator,
    ):
        """Write the checkpoint of `identity["phase"]`; older ones beyond `total_limit` go."""
        phase = identity["phase"]
        path = self.folder / f"checkpoint-{phase}-{progress.step:08d}"
        if path.exists():
            return  # a stop right after it was written
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

    def named(self) -> list[Path]:
        """The checkpoint that `resume` is the path of, if it is one."""
        return [] if self.resume in (None, "latest") else [Path(str(self.resume)).resolve()]

    def _found(self, phase: str) -> Path | None:
        """The checkpoint to start a phase from."""
        found = self.of(phase) if self.resume == "latest" else self.named()
        found = [path for path in found if path.name.startswith(f"checkpoint-{phase}-")]
        return found[-1] if found else None

    def check_named(self, phases: list[str]):
        """Raise a `ValueError` if `resume` is the path of a checkpoint of none of these phases."""
        for path in self.named():
            if not any(path.name.startswith(f"checkpoint-{phase}-") for phase in phases):
                raise ValueError(
                    f"expected resume_from_checkpoint of a phase among {phases}, got {self.resume}"
                )

    def check(self, identity: Mapping[str, Any]):
        """Raise a `ValueError` if the checkpoint to start a phase from is of other settings."""
        if self.resume is not None and (path := self._found(identity["phase"])) is not None:
            theirs = read_json(path / IDENTITY, _advice(path))
            check_identity(identity, theirs, str(path), of_settings=True)

    def load(
        self, identity: Mapping[str, Any], states: Mapping[str, Stateful], accelerator: Accelerator
    ) -> Progress:
        """Bring everything that Accelerate prepared, and `states`, to where the checkpoint was.

        Raises:
            ValueError: it belongs to another fit, or cannot be read.
        """
        phase = identity["phase"]
        if self.resume is None:
            self.remove(phase, accelerator)
            return Progress()
        path = self._found(phase)
        if path is None:
            return Progress()
        theirs = read_json(path / IDENTITY, _advice(path))
        if self.overwrite and differences(identity, theirs):
            self.remove(phase, accelerator)
            return Progress()
        check_identity(identity, theirs, str(path))
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
    """Raise an `OSError` that names the path where safetensors and `torch.save` raise others, as
    for a full disk."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        is_of_torch = "inline_container" in str(error)  # the file of torch that writes
        if not isinstance(error, SafetensorError) and not is_of_torch:
            raise
        free = shutil.disk_usage(path.parent).free
        raise OSError(f"expected to write {path}, got {error}; {free} bytes are free") from error


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether the processes hold parts of one model (FSDP) in place of copies."""
    return accelerator.distributed_type == DistributedType.FSDP


def _state_name(accelerator: Accelerator) -> str:
    """One file for all processes, unless each has averaged its own part of the weights."""
    is_alone = accelerator.is_main_process or not is_sharded(accelerator)
    return STATE if is_alone else f"fit_{accelerator.process_index}.pt"


def _discard(path: Path):
    """Delete a checkpoint, which a kill in between leaves invisible."""
    if path.suffix != ".incomplete":
        path = path.rename(path.with_name(path.name + ".incomplete"))
    shutil.rmtree(path)


def differences(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], of_settings: bool = False
) -> list[tuple[str, Any, Any]]:
    """(name, ours, theirs) of what differs among what `ours` says; names of what lies in another
    are dotted.

    Args:
        of_settings: leave out what is settled by other phases.
    """
    flat_ours, flat_theirs = flat(ours), flat(theirs)
    return [
        (name, value, flat_theirs.get(name))
        for name, value in flat_ours.items()
        if not (of_settings and name in _OF_OTHER_PHASES) and value != flat_theirs.get(name)
    ]


def flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted names."""
    values: dict[str, Any] = {}
    for name, value in fields.items():
        is_nested = isinstance(value, Mapping) and value
        values |= flat(value, f"{prefix}{name}.") if is_nested else {prefix + name: value}
    return values


def check_identity(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], where: str, of_settings: bool = False
):
    """Raise a `ValueError` that names what differs."""
    different = differences(ours, theirs, of_settings)
    if different:
        more = f" and {len(different) - 8} more" if len(different) > 8 else ""
        expected, got = (
            ", ".join(f"{each[0]}={each[side]!r}" for each in different[:8]) for side in (2, 1)
        )
        raise ValueError(
            f"expected to go on from {where} with {expected}{more}, got {got}{more}: resume with "
            "the same flags and number of processes, choose another --output_dir, or replace what "
            "is there with --overwrite_output_dir"
        )


def _write_checksums(folder: Path):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = {path.relative_to(folder).as_posix(): file_checksum(path) for path in files}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=2))


def _check_files(folder: Path):
    """Raise a `ValueError` unless the files are those that were written."""
    for name, expected in read_json(folder / CHECKSUMS, _advice(folder)).items():
        try:
            found = file_checksum(folder / name)
        except OSError as error:
            raise ValueError(_damaged(folder, error)) from error
        if found != expected:
            raise ValueError(_damaged(folder, f"{name} has another checksum"))


def _damaged(path: Path, error: Exception | str) -> str:
    return (
        f"expected a whole checkpoint, got {path}, which cannot be read ({error}): {_advice(path)}"
    )


def _advice(path: Path) -> str:
    return f"delete {path} to go on from the checkpoint before, or from the start of its phase"
