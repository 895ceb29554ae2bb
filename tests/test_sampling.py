import pytest
import torch

from progressive_vae import sampling
from progressive_vae.sampling import Sampler, per_factor


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_draws_follow_the_distribution_and_never_take_what_cannot_be():
    logits = torch.tensor([float("-inf"), 0.0, 2.0, float("-inf"), -1.0, float("-inf")])
    drawn = Sampler(200_000, generator())(logits.expand(200_000, -1))
    frequencies = torch.bincount(drawn, minlength=6) / 200_000
    assert (frequencies - logits.softmax(-1)).abs().sum() / 2 < 0.005
    assert frequencies[[0, 3, 5]].tolist() == [0, 0, 0]


def test_the_last_number_below_one_takes_a_possible_value(monkeypatch):
    """Noise that rounds to the whole mass must not fall on the impossible values at the end."""
    logits = torch.randn(1000, 300, generator=generator())
    logits[:, 250:] = float("-inf")
    last = torch.nextafter(torch.ones(1000), torch.zeros(1000))
    sampler = Sampler(1000)
    monkeypatch.setattr(sampling, "uniform", lambda *arguments: last)
    assert (sampler(logits) < 250).all()


@pytest.mark.parametrize("shape", [(4, 7), (4, 3, 7), (4, 0, 7)])
def test_shapes_and_one_generator_for_each_example(shape):
    logits = torch.randn(shape)
    drawn = Sampler(4, [generator(i) for i in range(4)])(logits)
    assert drawn.shape == shape[:-1] and drawn.dtype == torch.long
    alone = Sampler(1, [generator(2)])(logits[2:3])
    assert torch.equal(drawn[2:3], alone)


def test_guided_draws_come_twice():
    given, null = torch.randn(5, 9), torch.randn(5, 9)
    drawn = Sampler(5, generator(), guidance_scale=2.0)(torch.cat([given, null]))
    expected = Sampler(5, generator())(2 * given - null)
    assert torch.equal(drawn, torch.cat([expected, expected]))


def test_controls_of_each_factor():
    rows = per_factor(["prior", "level_1"], temperature=0.5, top_k=[None, 3])
    assert rows == [{"temperature": 0.5, "top_k": None}, {"temperature": 0.5, "top_k": 3}]
    with pytest.raises(ValueError, match=r"top_k to be one or a list for \['prior', 'level_1'\]"):
        per_factor(["prior", "level_1"], top_k=[1, 2, 3])
