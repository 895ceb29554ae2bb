import numpy as np
import pytest
import torch

from progressive_vae.models import sampling
from progressive_vae.models.sampling import Sampler, as_generators, per_factor, uniform


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_draws_follow_the_distribution_and_never_take_what_cannot_be():
    logits = torch.tensor([float("-inf"), 0.0, 2.0, float("-inf"), -1.0, float("-inf")])
    drawn = Sampler(200_000, generator())(logits.expand(200_000, -1))
    frequency_table = torch.bincount(drawn, minlength=6) / 200_000
    assert (frequency_table - logits.softmax(-1)).abs().sum() / 2 < 0.005
    assert frequency_table[[0, 3, 5]].tolist() == [0, 0, 0]


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


def test_generators_in_a_tuple_or_one():
    one, several = generator(), (generator(1), generator(2))
    assert as_generators(one, 5) is one and as_generators(None) is None
    assert as_generators(several, 2) == list(several)


@pytest.mark.parametrize(
    "wrong", [42, True, "cpu", np.random.default_rng(0), [1, 2], [None], {1: 2}, range(2)]
)
def test_what_is_no_generator(wrong):
    calls = [as_generators, lambda g: uniform(torch.Size((2, 3)), g, torch.device("cpu")),
             lambda g: Sampler(2, g)]  # fmt: skip
    for call in calls:
        with pytest.raises(
            ValueError, match="expected generator to be a torch.Generator or a list"
        ):
            call(wrong)
    with pytest.raises(ValueError, match="generator to be one or a list of 3, got 2"):
        as_generators([generator()] * 2, 3)


def test_controls_of_numpy_and_torch():
    for controls in ([0.5, 1.0], (0.5, 1.0), np.array([0.5, 1.0]), torch.tensor([0.5, 1.0])):
        rows = per_factor(["prior", "level_1"], temperature=controls)
        assert rows == [{"temperature": 0.5}, {"temperature": 1.0}]
    logits = torch.randn(4, 9, generator=generator())
    plain = Sampler(4, generator(), temperature=0.5, top_k=3, top_p=0.5)(logits)
    of_numpy = Sampler(np.int64(4), generator(), temperature=np.float32(0.5), top_k=np.int64(3),
                       top_p=np.array(0.5), guidance_scale=np.float16(1))  # fmt: skip
    assert torch.equal(of_numpy(logits), plain)


@pytest.mark.parametrize(
    "wrong",
    [dict(temperature="hot"), dict(temperature=True), dict(temperature=None), dict(top_k=2.5),
     dict(top_k="all"), dict(top_p=0), dict(top_p=True), dict(guidance_scale=[1.0]),
     dict(guidance_scale=float("nan"))],
)  # fmt: skip
def test_controls_that_are_no_numbers(wrong):
    with pytest.raises(ValueError, match=f"expected {[*wrong][0]} "):
        Sampler(4, **wrong)
