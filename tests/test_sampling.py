import numpy as np
import pytest
import torch

from progressive_vae.models import sampling
from progressive_vae.models.distributions import Categorical, LowRankCategorical
from progressive_vae.models.sampling import Sampler, as_generators, per_factor, uniform
from progressive_vae.models.walk import WalkStep


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_samples_follow_the_distribution_and_skip_impossible_values():
    logits = torch.tensor([float("-inf"), 0.0, 2.0, float("-inf"), -1.0, float("-inf")])
    samples = Sampler(200_000, generator())(logits.expand(200_000, -1))
    frequencies = torch.bincount(samples, minlength=6) / 200_000
    assert (frequencies - logits.softmax(-1)).abs().sum() / 2 < 0.005
    assert frequencies[[0, 3, 5]].tolist() == [0, 0, 0]


def test_the_largest_uniform_number_samples_a_possible_value(monkeypatch):
    """It may round to the total mass, which must not select the impossible values at the end."""
    logits = torch.randn(1000, 300, generator=generator())
    logits[:, 250:] = float("-inf")
    largest = torch.nextafter(torch.ones(1000), torch.zeros(1000))
    sampler = Sampler(1000)
    monkeypatch.setattr(sampling, "uniform", lambda *arguments: largest)
    assert (sampler(logits) < 250).all()


@pytest.mark.parametrize("shape", [(4, 7), (4, 3, 7), (4, 0, 7)])
def test_an_example_depends_on_its_own_generator_only(shape):
    logits = torch.randn(shape)
    samples = Sampler(4, [generator(i) for i in range(4)])(logits)
    assert samples.shape == shape[:-1] and samples.dtype == torch.long
    single = Sampler(1, [generator(2)])(logits[2:3])
    assert torch.equal(samples[2:3], single)


def test_classifier_free_guidance_returns_samples_for_both_halves():
    conditional = torch.randn(5, 9)
    null = torch.randn(5, 9)
    samples = Sampler(5, generator(), guidance_scale=2.0)(torch.cat([conditional, null]))
    expected = Sampler(5, generator())(2 * conditional - null)
    assert torch.equal(samples, torch.cat([expected, expected]))


def test_a_step_is_sampled_as_its_logits_are():
    """By inversion of the distribution itself, or of its modified logits, chunk by chunk."""
    distribution = LowRankCategorical(torch.randn(2, 7, 3), torch.randn(40, 3), torch.randn(40))
    step = WalkStep(0, 0, torch.arange(7))
    for kwargs in ({}, {"temperature": 0.5, "top_k": 5}, {"temperature": 0}):
        samples = Sampler(2, generator(), **kwargs).step(distribution, step)
        expected = Sampler(2, generator(), **kwargs)(distribution.logits)
        assert torch.equal(samples, expected)


def numbers_of_steps(sizes, generator, is_preloaded):
    """The uniform numbers that the steps of a sampler use."""
    sampler = Sampler(3, generator)
    if is_preloaded:
        sampler.preload([0, *sizes, 0], torch.device("cpu"))
    numbers = [sampler._noise(torch.Size((3, size)), torch.device("cpu")) for size in sizes]
    return torch.cat(numbers, 1)


@pytest.mark.parametrize("is_list", [True, False])
@pytest.mark.parametrize("sizes", [[1] * 49, [1, 5, 16, 17, 300], [7]])
def test_preloaded_noise_is_that_of_single_steps(sizes, is_list):
    def make_generators():
        return [generator(i) for i in range(3)] if is_list else generator()

    expected_generators = make_generators()
    expected = numbers_of_steps(sizes, expected_generators, is_preloaded=False)
    generators = make_generators()
    assert torch.equal(numbers_of_steps(sizes, generators, is_preloaded=True), expected)
    states, expected_states = (
        [g.get_state() for g in (made if is_list else [made])]
        for made in (generators, expected_generators)
    )
    assert torch.equal(torch.stack(states), torch.stack(expected_states))


def test_preloaded_noise_of_torchs_own_generator():
    torch.manual_seed(0)
    expected = numbers_of_steps([2, 30], None, is_preloaded=False)
    torch.manual_seed(0)
    assert torch.equal(numbers_of_steps([2, 30], None, is_preloaded=True), expected)


def test_preloaded_steps():
    sampler = Sampler(2, generator(), guidance_scale=2.0)
    sampler.preload([1, 2], torch.device("cpu"))
    expected = Sampler(2, generator(), guidance_scale=2.0)
    for positions in (torch.arange(1), torch.arange(2)):
        distribution = Categorical(torch.randn(4, len(positions), 5))
        step = WalkStep(0, 0, positions)
        assert torch.equal(sampler.step(distribution, step), expected.step(distribution, step))
    sampler.preload([1], torch.device("cpu"))
    with pytest.raises(ValueError, match=r"step_sizes .*\(2, 1\) for a step of \(2, 2\)"):
        sampler.step(distribution, step)
    greedy = Sampler(2, temperature=0)
    greedy.preload([2], torch.device("cpu"))
    assert not greedy.step_noise


def test_per_factor_arguments():
    rows = per_factor(["prior", "level_1"], temperature=0.5, top_k=[None, 3])
    assert rows == [{"temperature": 0.5, "top_k": None}, {"temperature": 0.5, "top_k": 3}]
    with pytest.raises(ValueError, match=r"top_k to be one or a list for \['prior', 'level_1'\]"):
        per_factor(["prior", "level_1"], top_k=[1, 2, 3])


def test_one_generator_or_a_tuple():
    single = generator()
    assert as_generators(single, 5) is single and as_generators(None) is None
    several = (generator(1), generator(2))
    assert as_generators(several, 2) == list(several)


@pytest.mark.parametrize(
    "wrong", [42, True, "cpu", np.random.default_rng(0), [1, 2], [None], {1: 2}, range(2)]
)
def test_other_types_of_generator_are_refused(wrong):
    calls = [
        as_generators,
        lambda g: uniform(torch.Size((2, 3)), g, torch.device("cpu")),
        lambda g: Sampler(2, g),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="generator .*torch.Generator"):
            call(wrong)


def test_the_number_of_generators_is_the_batch_size():
    with pytest.raises(ValueError, match="generator .*3, got 2"):
        as_generators([generator()] * 2, 3)


def test_arguments_from_numpy_and_torch():
    for values in ([0.5, 1.0], (0.5, 1.0), np.array([0.5, 1.0]), torch.tensor([0.5, 1.0])):
        rows = per_factor(["prior", "level_1"], temperature=values)
        assert rows == [{"temperature": 0.5}, {"temperature": 1.0}]
    logits = torch.randn(4, 9, generator=generator())
    expected = Sampler(4, generator(), temperature=0.5, top_k=3, top_p=0.5)(logits)
    sampler = Sampler(
        np.int64(4),
        generator(),
        temperature=np.float32(0.5),
        top_k=np.int64(3),
        top_p=np.array(0.5),
        guidance_scale=np.float16(1),
    )
    assert torch.equal(sampler(logits), expected)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(temperature="hot"),
        dict(temperature=True),
        dict(temperature=None),
        dict(top_k=2.5),
        dict(top_k="all"),
        dict(top_p=0),
        dict(top_p=True),
        dict(guidance_scale=[1.0]),
        dict(guidance_scale=float("nan")),
    ],
)
def test_invalid_sampling_arguments_are_refused(wrong):
    with pytest.raises(ValueError, match=f"expected {[*wrong][0]} "):
        Sampler(4, **wrong)
