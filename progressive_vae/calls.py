"""What one call of a pipeline is told: a pipeline may draw on many threads at once."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from .hub import HubPipeline


@dataclass
class Call:
    """
    Args:
        guidance_scale: of the factors that follow, one or a list for all; a callback may change it.
        num_timesteps: the factors that the call draws, times its batches.
    """

    guidance_scale: float | list[float] = 1.0
    num_timesteps: int = 0
    is_running: bool = False


class _Calls(threading.local):
    """The call that each pipeline is in, or was in last, on this thread."""

    def __init__(self):
        self.of: WeakKeyDictionary[CallingPipeline, Call] = WeakKeyDictionary()


_CALLS = _Calls()


class CallingPipeline(HubPipeline):
    """A pipeline whose calls keep their state to themselves, with the names that diffusers has."""

    @contextmanager
    def _call(self, guidance_scale: float | list[float], num_timesteps: int) -> Iterator[Call]:
        """The state of a call, while it lasts; one that a callback makes gives way to the outer."""
        outer = _CALLS.of.get(self)
        call = _CALLS.of[self] = Call(guidance_scale, num_timesteps, is_running=True)
        try:
            yield call
        finally:
            call.is_running = False
            if outer is not None and outer.is_running:
                _CALLS.of[self] = outer

    @property
    def guidance_scale(self) -> float | list[float]:
        """Of the call that this thread is in, or was in last."""
        return _CALLS.of.get(self, Call()).guidance_scale

    @property
    def _guidance_scale(self) -> float | list[float]:
        return self.guidance_scale

    @_guidance_scale.setter
    def _guidance_scale(self, scale: float | list[float]):
        _CALLS.of.setdefault(self, Call()).guidance_scale = scale

    @property
    def num_timesteps(self) -> int:
        """Of the call that this thread is in, or was in last."""
        return _CALLS.of.get(self, Call()).num_timesteps
