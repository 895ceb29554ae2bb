"""A search for the sampling settings of a pipeline whose samples are nearest to real images."""

from collections.abc import Callable

from ..pipeline import ProgressiveVAEPipeline
from ..pipeline_inputs import Sampling

MIN_STEP = 0.5  # of the first steps; smaller ones are below the noise of a distance
FIRST_STEPS = {"temperature": -0.1, "guidance_scale": 1.0}


def search_sampling(
    pipe: ProgressiveVAEPipeline,
    distance: Callable[[], float],
    num_evaluations: int,
) -> tuple[Sampling, list[tuple[Sampling, float]]]:
    """Return the best settings, which are also those of `pipe.config` then, and all trials.

    It is a coordinate search: it starts at the exact distribution and moves one setting of one
    factor at a time, as long as that helps, first towards lower temperatures and more guidance,
    else in the other direction. If no move of any factor helps, steps are halved, once.

    Args:
        distance: of samples by `config.sampling`; with the same noise at each call.
        num_evaluations: the most calls of `distance`.
    """
    names = pipe.factor_names
    best: Sampling = {name: [1.0] * len(names) for name in _coordinates(pipe)}
    trials: list[tuple[Sampling, float]] = []

    def evaluate(settings: Sampling) -> float:
        pipe.register_to_config(sampling=settings)
        trials.append((pipe.config["sampling"], distance()))
        return trials[-1][1]

    lowest = evaluate(best)
    visited = [best]
    directions: dict[tuple[str, int], float] = {}  # in which each coordinate was moved last
    step = 1.0
    while step >= MIN_STEP and len(trials) < num_evaluations:
        has_moved = False
        for field, factors in _coordinates(pipe).items():
            for factor in factors:
                first = directions.get((field, factor), 1.0)
                for direction in (first, -first):
                    change = direction * step * FIRST_STEPS[field]
                    start = best
                    while len(trials) < num_evaluations:
                        candidate = _moved(best, field, factor, change)
                        if candidate in visited:
                            break
                        visited.append(candidate)
                        value = evaluate(candidate)
                        if value >= lowest:
                            break
                        best = candidate
                        lowest = value
                    if best is not start:
                        directions[field, factor] = direction
                        has_moved = True
                        break
        if not has_moved:
            step /= 2
    pipe.register_to_config(sampling=best)
    return pipe.config["sampling"], trials


def _coordinates(pipe: ProgressiveVAEPipeline) -> dict[str, list[int]]:
    """Return the factors that each setting has an effect on, the most effective ones first: most
    values are pixels, and coarse codes decide the class."""
    configs = [pipe.stack.require_prior().config, *pipe.stack.configs]
    conditional = [i for i, config in enumerate(configs) if config.num_classes]
    coordinates = {"temperature": [*reversed(range(len(configs)))]}
    return coordinates | ({"guidance_scale": conditional} if conditional else {})


def _moved(settings: Sampling, field: str, factor: int, change: float) -> Sampling:
    values = settings[field]
    assert isinstance(values, list)
    value = max(0.0, round(values[factor] + change, 4))
    return settings | {field: [*values[:factor], value, *values[factor + 1 :]]}
