from contextlib import nullcontext

import pytest
import torch

from progressive_vae.codec.fixed_point import fixed_point_arithmetic
from progressive_vae.configuration.level import MANY_CODES
from progressive_vae.evaluation.op_count import count_ops
from progressive_vae.models import distributions
from progressive_vae.models.distributions import (
    Categorical,
    CopyMixture,
    DiscretizedLogisticMixture,
    LowRankCategorical,
    categorical_from_features,
)
from progressive_vae.models.sampling import Sampler
from progressive_vae.models.walk import WalkStep


def single_logistic(mean: float, precision: float, floor: float = 0.01):
    """A mixture of one logistic and the uniform distribution with weight `floor`."""
    weights = torch.tensor([1 - floor, floor]).view(2, 1, 1)
    return DiscretizedLogisticMixture(
        weights, torch.full((1, 1, 1), mean), torch.full((1, 1, 1), precision), 256
    )


def random_mixture(batch_size: int, n: int) -> DiscretizedLogisticMixture:
    generator = torch.Generator().manual_seed(0)
    means = torch.rand(8, batch_size, n, generator=generator) * 300 - 20
    precisions = torch.rand(8, batch_size, n, generator=generator) * 3
    weights = torch.randn(9, batch_size, n, generator=generator).softmax(0)
    return DiscretizedLogisticMixture(weights, means, precisions, 256)


@pytest.mark.parametrize("mean", [-300.0, 0.0, 100.3, 255.0, 600.0])
@pytest.mark.parametrize("precision", [0.005, 1.0, 20.0])
def test_probabilities_of_a_logistic_sum_to_one(mean, precision):
    distribution = single_logistic(mean, precision)
    log_prob = torch.cat([distribution.log_prob(v.view(1, 1)) for v in torch.arange(256)])[:, 0]
    assert torch.allclose(distribution.logits[0, 0].exp(), log_prob.exp(), atol=1e-6)
    assert log_prob.exp().sum().item() == pytest.approx(1, abs=1e-5)
    if precision >= 1:  # wide logistics have most of their mass in the tails, at 0 and 255
        assert log_prob.argmax() == min(max(round(mean), 0), 255)


def test_a_narrow_logistic_is_almost_certain_and_no_value_impossible():
    log_prob = single_logistic(100.0, 20.0, floor=1e-4).log_prob(torch.tensor([[100, 101, 0]]))
    assert log_prob[0, 0] > -1e-3
    assert torch.isfinite(log_prob).all()


def test_both_tails_of_a_logistic_have_the_same_precision():
    distribution = single_logistic(128.0, 1.0, floor=1e-12)
    values = torch.tensor([[128 - 20, 128 - 15, 128 + 15, 128 + 20]])
    for log_prob in (
        distribution.log_prob(values.T)[:, 0],
        distribution.logits[0, 0, values[0]],
    ):
        assert torch.allclose(log_prob, log_prob.flip(0), atol=1e-4)
        assert log_prob[0] == pytest.approx(-20 + 0.0414, abs=1e-2)  # log 2 sinh(1/2)


def test_icdf_of_a_mixture_inverts_the_cumulative_distribution():
    distribution = random_mixture(5, 40)
    u = torch.rand(5, 40, generator=torch.Generator().manual_seed(0))
    cumulative = distribution.logits.exp().cumsum(-1)
    expected = torch.searchsorted(cumulative, u[..., None], right=True)[..., 0]
    assert torch.equal(distribution.icdf(u), expected)
    ends = distribution.icdf(torch.tensor([0.0, 1 - 2**-24]).expand(5, 2).repeat(1, 20))
    assert ends.min() >= 0 and ends.max() <= 255


def plain_icdf(distribution, u):
    """Binary search, one midpoint after the other."""
    values = torch.zeros(u.shape, dtype=torch.long)
    for power in reversed(range(8)):
        midpoints = values + 2**power
        edges = midpoints.float() - 0.5
        logistics = ((edges - distribution.means) * distribution.precisions).sigmoid()
        mass_below = (distribution.weights[:-1] * logistics).sum(0)
        mass_below = mass_below + distribution.weights[-1] / 256 * midpoints
        values = torch.where(mass_below > u, values, midpoints)
    return values


@pytest.mark.parametrize(("is_small", "max_num_ops"), [(True, 21), (False, 90)])
def test_searches_in_two_and_in_eight_rounds_agree(is_small, max_num_ops, monkeypatch):
    monkeypatch.setattr(distributions, "MAX_POSITIONS_ON_CPU", 10**6 if is_small else 0)
    distribution = random_mixture(20, 1000)
    u = torch.rand(20, 1000, generator=torch.Generator().manual_seed(1))
    values = distribution.icdf(u)
    differing = (values != plain_icdf(distribution, u)).float().mean()
    assert differing <= 5e-4  # after a rounding
    count = count_ops(lambda: distribution.icdf(u))
    assert sum(count.ops.values()) <= max_num_ops and not count.waits


@pytest.mark.parametrize("kind", ["categorical", "mixture"])
def test_icdf_of_evenly_spaced_numbers_has_the_frequencies_of_the_distribution(kind):
    u = (torch.arange(20_000) + 0.5).expand(1, -1) / 20_000
    if kind == "categorical":
        logits = torch.randn(1, 1, 256, generator=torch.Generator().manual_seed(0)) * 3
        distribution = Categorical(logits)
        repeated = Categorical(logits.expand(1, 20_000, -1))
    else:
        distribution = random_mixture(1, 1)
        repeated = distribution  # its parameters broadcast over positions
    samples = repeated.icdf(u)
    assert samples.shape == u.shape and samples.dtype == torch.long
    assert (samples.diff() >= 0).all()
    frequencies = torch.bincount(samples.flatten(), minlength=256) / 20_000
    assert torch.allclose(frequencies, distribution.logits.softmax(-1)[0, 0], atol=2e-4)
    assert repeated.icdf(torch.full((1, 20_000), 1 - 2**-24)).max() <= 255


def test_icdf_returns_no_impossible_value():
    logits = torch.tensor([float("-inf"), 0.0, 2.0, float("-inf"), -1.0, float("-inf")])
    u = torch.tensor([[0.0, 0.1, 0.5, 1 - 2**-24, 1.0]])
    samples = Categorical(logits.expand(1, 5, -1)).icdf(u)
    assert set(samples.flatten().tolist()) <= {1, 2, 4} and samples[0, -1] == 4


def test_categorical_log_prob_is_the_log_softmax():
    logits = torch.randn(2, 3, 5)
    values = torch.randint(5, (2, 3))
    expected = logits.log_softmax(-1).gather(-1, values[..., None])[..., 0]
    assert torch.allclose(Categorical(logits).log_prob(values), expected)


@pytest.mark.parametrize("num_values", [2, 3, 17, 256])
@pytest.mark.parametrize("is_small", [True, False])
def test_the_search_reaches_every_value(num_values, is_small, monkeypatch):
    monkeypatch.setattr(distributions, "MAX_POSITIONS_ON_CPU", 10**6 if is_small else 0)
    weights = torch.tensor([0.0, 1.0]).view(2, 1, 1).expand(2, 1, num_values)
    ones = torch.ones(1, 1, num_values)
    uniform = DiscretizedLogisticMixture(weights, ones, ones, num_values)
    u = (torch.arange(num_values) + 0.5)[None] / num_values
    assert uniform.icdf(u).tolist() == [[*range(num_values)]]


@pytest.mark.parametrize("arithmetic", [nullcontext, fixed_point_arithmetic])
@pytest.mark.parametrize("kind", ["mixture", "copies"])
def test_two_digits_have_the_probabilities_of_all_values(kind, arithmetic, monkeypatch):
    monkeypatch.setattr(distributions, "POSITIONS_OF_INTERVALS", 7)
    distribution = random_mixture(2, 9)
    if kind == "copies":
        generator = torch.Generator().manual_seed(1)
        log_weights = torch.randn(2, 9, 6, generator=generator)
        log_weights[:, 0, :2] = -torch.inf
        log_weights = log_weights.log_softmax(-1)
        copies = torch.randint(256, (2, 9, 5), generator=generator)
        copies[0, :, 0] = copies[0, :, 1]
        copies[1, 1, :2] = torch.tensor([0, 255])
        distribution = CopyMixture(log_weights, copies, distribution)
    with arithmetic():
        probs = distribution.probs()
        blocks = distribution.interval_masses(None, 16)
        firsts = [torch.full((2, 9), 16 * digit) for digit in range(16)]
        masses = [distribution.interval_masses(first, 1) for first in firsts]
    assert blocks.shape == (2, 9, 16) and blocks.dtype == torch.float32
    assert torch.allclose(blocks.sum(-1), torch.ones(2, 9), atol=1e-5)
    assert torch.allclose(blocks, probs.unflatten(-1, (16, 16)).sum(-1), atol=1e-5)
    assert torch.allclose(torch.cat(masses, -1), probs, atol=1e-5)
    conditional = [block / block.sum(-1, keepdim=True) for block in masses]
    products = torch.stack(conditional, -2) * blocks[..., None]
    assert torch.allclose(products.flatten(-2), probs, atol=1e-5)
    # Positions in different blocks.
    first = 16 * torch.arange(18).view(2, 9).remainder(16)
    places = first[..., None] + torch.arange(16)
    assert torch.allclose(
        distribution.interval_masses(first, 1), probs.gather(-1, places), atol=1e-5
    )


def random_low_rank() -> tuple[LowRankCategorical, list[torch.Tensor]]:
    """40 values at 2×7 positions, and the three parameters."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 7, 5), (40, 5), (40,))
    params = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    return LowRankCategorical(*params), params


@pytest.mark.parametrize("positions_per_chunk", [0, 1, 3, 7, 100])
def test_chunks_agree_with_full_logits(positions_per_chunk, monkeypatch):
    """Log-probabilities, samples, expected embeddings and gradients."""
    monkeypatch.setattr(distributions, "LOGITS_PER_CHUNK", 2 * 40 * positions_per_chunk)
    low_rank, params = random_low_rank()
    full = Categorical(low_rank.logits)
    table = torch.randn(40, 3)
    assert torch.allclose(low_rank.probs().sum(-1), torch.ones(2, 7), atol=1e-5)
    assert torch.allclose(low_rank.probs(), full.probs(), atol=1e-6)
    chunks = low_rank.chunks()
    assert torch.equal(torch.cat([chunk.features for chunk in chunks], 1), low_rank.features)
    assert len(chunks) == {0: 7, 1: 7, 3: 3}.get(positions_per_chunk, 1)
    values = torch.randint(40, (2, 7))
    u = torch.rand(2, 7)
    for function in (lambda d: d.log_prob(values), lambda d: d.expected_embedding(table)):
        result = function(low_rank)
        expected = function(full)
        assert torch.allclose(result, expected, atol=1e-5)
        weight = torch.rand_like(result)
        gradients = torch.autograd.grad((result * weight).sum(), params, allow_unused=True)
        expected_gradients = torch.autograd.grad(
            (expected * weight).sum(), params, retain_graph=True
        )
        for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
            assert torch.allclose(gradient, expected_gradient, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(low_rank.icdf(u), full.icdf(u))
        assert torch.allclose(low_rank.log_prob(values), full.log_prob(values), atol=1e-5)
    with fixed_point_arithmetic():
        probs = low_rank.probs()
        embedding = low_rank.expected_embedding(table)
    assert torch.allclose(probs, full.probs(), atol=1e-4)
    assert torch.allclose(embedding, full.expected_embedding(table), atol=1e-3)


def test_low_rank_log_prob_under_autocast():
    """Matrix products run in bf16, the softmax in fp32."""
    low_rank, params = random_low_rank()
    values = torch.randint(40, (2, 7))
    with torch.autocast("cpu", torch.bfloat16):
        assert low_rank.logits.dtype == torch.bfloat16
        log_prob = low_rank.log_prob(values)
    assert log_prob.dtype == torch.float32
    assert low_rank.expected_embedding(torch.randn(40, 3)).dtype == torch.float32
    assert torch.allclose(log_prob, low_rank.log_prob(values), atol=0.1)
    log_prob.sum().backward()  # recomputes the chunks in the precision of the forward pass
    assert all(param.grad.dtype == torch.float32 for param in params)


@pytest.mark.parametrize(
    ("num_values", "distribution_type"),
    [(MANY_CODES, Categorical), (MANY_CODES + 1, LowRankCategorical)],
)
def test_only_large_codebooks_have_low_rank_distributions(num_values, distribution_type):
    table = torch.randn(num_values, 2)
    distribution = categorical_from_features(torch.randn(1, 3, 2), table, torch.zeros(num_values))
    assert type(distribution) is distribution_type


# ---- temperature of a mixture --------------------------------------------------------------------


def sharp_and_broad(share: float = 0.5) -> DiscretizedLogisticMixture:
    """A sharp component at white with a share of the mass, and a broad one at dark gray."""
    weights = torch.tensor([share * 0.999, (1 - share) * 0.999, 0.001]).view(3, 1, 1)
    means = torch.tensor([250.0, 60.0]).view(2, 1, 1)
    return DiscretizedLogisticMixture(weights, means, torch.tensor([10.0, 0.1]).view(2, 1, 1), 256)


def mean_of(distribution: DiscretizedLogisticMixture) -> float:
    return (distribution.probs()[0, 0] @ torch.arange(256.0)).item()


@pytest.mark.parametrize("temperature", [0.7, 0.5, 0.2])
def test_a_low_temperature_keeps_the_mean_of_sharp_and_broad_components(temperature):
    """That of the whole distribution does not: it floods images with what is sharp."""
    mixture = sharp_and_broad()
    cold = mixture.with_temperature(temperature)
    assert mean_of(cold) == pytest.approx(mean_of(mixture), abs=1)
    flooded = (mixture.logits[0, 0] / temperature).softmax(-1) @ torch.arange(256.0)
    assert flooded > mean_of(mixture) + 40
    # Broad components become sharper, each by the same factor.
    assert torch.equal(cold.precisions * temperature, mixture.precisions)


def test_a_low_temperature_favors_heavy_components():
    cold = sharp_and_broad(0.4).with_temperature(0.5)
    odds = (cold.weights[0] / cold.weights[1]).item()
    assert odds == pytest.approx((0.4 / 0.6) ** 2, rel=1e-4)


def test_temperature_1_is_the_mixture_itself_and_0_a_single_value():
    mixture = random_mixture(2, 50)
    assert mixture.with_temperature(1.0) is mixture
    value = mixture.most_probable()
    assert value.dtype == torch.long and value.shape == (2, 50)
    heaviest = mixture.weights[:-1].argmax(0)
    clear = mixture.weights.sort(0).values
    is_clear = (clear[-1] > 1.05 * clear[-2]) & (mixture.weights[-1] < clear[-1])
    assert is_clear.float().mean() > 0.5
    for u in (0.01, 0.5, 0.99):
        cold = mixture.with_temperature(1e-4).icdf(torch.full((2, 50), u))
        assert ((cold - value).abs()[is_clear] <= 1).all()
    means = mixture.means.gather(0, heaviest[None])[0]
    assert torch.equal(value, means.round().clamp(0, 255).long())


def test_sampling_a_mixture_by_temperature():
    mixture = random_mixture(3, 40)
    step = WalkStep(0, 0, torch.arange(40))

    def sample(**arguments):
        generator = torch.Generator().manual_seed(0)
        return Sampler(3, generator, **arguments).step(mixture, step)

    u = torch.rand(3, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample(), mixture.icdf(u))
    assert torch.equal(sample(temperature=0.5), mixture.with_temperature(0.5).icdf(u))
    assert torch.equal(sample(temperature=0), mixture.most_probable())
    # Truncation is that of the colder mixture.
    logits = mixture.with_temperature(0.5).logits
    assert torch.equal(sample(temperature=0.5, top_k=1), logits.argmax(-1))
