"""The attack, small each time; at size when asked for (`pytest -m slow`)."""

import pytest

from helpers import attacks as attack

SIZES = {"images": 10_000, "streams": 10_000, "flags": 500, "pipelines": 200, "kills": 40}
SIZES |= {"archives": 2000, "archive_kills": 40}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), SIZES.items())
def test_at_size(name, count):
    assert [words for kind, words in attack.ATTACKS[name][1](count) if kind == attack.WRONG] == []


@pytest.mark.parametrize(
    ("name", "count"),
    {"images": 100, "streams": 100, "archives": 60, "flags": 3, "pipelines": 24}.items(),
)
def test_small(name, count):
    outcomes = attack.ATTACKS[name][1](count)
    assert [words for kind, words in outcomes if kind == attack.WRONG] == []
    assert len({kind for kind, _ in outcomes}) > 1 and len(outcomes) == count
