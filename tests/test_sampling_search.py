"""The search for sampling settings, on distances with a known minimum."""

import pytest

from helpers.models import tiny_pipeline
from progressive_vae.evaluation.sampling_search import search_sampling


def settings_of(pipe, field, num_factors=4):
    value = pipe.config.sampling[field]
    return value if isinstance(value, list) else [value] * num_factors


def test_the_search_finds_the_minimum(pipe):
    """Factors 0 and 3 are best at other temperatures; only the prior has classes."""
    best = [0.6, 1.0, 1.0, 0.8]

    def distance():
        temperature = settings_of(pipe, "temperature")
        guidance = settings_of(pipe, "guidance_scale")
        error = sum((t - b) ** 2 for t, b in zip(temperature, best, strict=True))
        return error + (guidance[0] - 2.5) ** 2

    settings, trials = search_sampling(pipe, distance, 100)
    assert settings == pipe.config.sampling
    assert settings["temperature"] == pytest.approx(best, abs=0.051)
    assert settings["guidance_scale"] == [2.5, 1.0, 1.0, 1.0]
    assert trials[0][0] == {"temperature": 1.0, "guidance_scale": 1.0}
    assert min(d for _, d in trials) == distance()
    tried = [str(settings) for settings, _ in trials]
    assert len(set(tried)) == len(tried)


def test_the_search_keeps_its_budget(pipe):
    for budget in (1, 5):
        _, trials = search_sampling(pipe, lambda: settings_of(pipe, "temperature")[3], budget)
        assert len(trials) == budget


def test_where_nothing_helps_the_exact_distribution_stays(pipe):
    distances = iter(range(1000))
    settings, trials = search_sampling(pipe, lambda: next(distances), 200)
    assert settings == {"temperature": 1.0, "guidance_scale": 1.0}
    assert 4 < len(trials) < 200  # all moves, and smaller ones


def test_a_search_needs_a_prior():
    levels = tiny_pipeline().levels
    pipe = type(tiny_pipeline()).from_levels(None, levels, [5, 7])
    with pytest.raises(ValueError, match="a pipeline with a prior"):
        search_sampling(pipe, lambda: 0.0, 3)
