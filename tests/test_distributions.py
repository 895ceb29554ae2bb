import pytest
import torch

from progressive_vae.codec.fixed_point import fixed_point_arithmetic
from progressive_vae.configuration.level import MANY_SYMBOLS
from progressive_vae.models import distributions
from progressive_vae.models.distributions import (
    Categorical,
    DiscretizedLogisticMixture,
    LowRankCategorical,
    categorical_from_features,
)


def mixture(mean: float, precision: float, floor: float = 0.01) -> DiscretizedLogisticMixture:
    """One component, as good as all the mass."""
    weights = torch.tensor([1 - floor, floor]).view(2, 1, 1)
    return DiscretizedLogisticMixture(
        weights, torch.full((1, 1, 1), mean), torch.full((1, 1, 1), precision), 256
    )


@pytest.mark.parametrize("mean", [-300.0, 0.0, 100.3, 255.0, 600.0])
@pytest.mark.parametrize("precision", [0.005, 1.0, 20.0])
def test_the_mass_of_all_pixel_values_is_one(mean, precision):
    distribution = mixture(mean, precision)
    values = torch.arange(256)
    one_by_one = torch.cat([distribution.log_prob(value.view(1, 1)) for value in values])[:, 0]
    assert torch.allclose(distribution.logits[0, 0].exp(), one_by_one.exp(), atol=1e-6)
    assert one_by_one.exp().sum().item() == pytest.approx(1, abs=1e-5)
    if precision >= 1:  # wide ones have much beyond the ends, which take it
        assert one_by_one.argmax() == min(max(round(mean), 0), 255)


def test_a_sharp_component_is_all_but_certain_and_no_value_impossible():
    log_prob = mixture(100.0, 20.0, floor=1e-4).log_prob(torch.tensor([[100, 101, 0]]))
    assert log_prob[0, 0] > -1e-3
    assert torch.isfinite(log_prob).all()


def test_both_tails_of_a_component_are_alike():
    distribution = mixture(128.0, 1.0, floor=1e-12)
    values = torch.tensor([[128 - 20, 128 - 15, 128 + 15, 128 + 20]])
    for log_prob in (
        distribution.log_prob(values.T)[:, 0],
        distribution.logits[0, 0, values[0]],
    ):
        assert torch.allclose(log_prob, log_prob.flip(0), atol=1e-4)
        assert log_prob[0] == pytest.approx(-20 + 0.0414, abs=1e-2)  # log 2 sinh(1/2)


def test_quantiles_are_where_the_mass_exceeds_the_share():
    generator = torch.Generator().manual_seed(0)
    means = torch.rand(8, 5, 40, generator=generator) * 300 - 20
    precisions = torch.rand(8, 5, 40, generator=generator) * 3
    weights = torch.randn(9, 5, 40, generator=generator).softmax(0)
    distribution = DiscretizedLogisticMixture(weights, means, precisions, 256)
    shares = torch.rand(5, 40, generator=generator)
    cumulative = distribution.logits.exp().cumsum(-1)
    expected = torch.searchsorted(cumulative, shares[..., None], right=True)[..., 0]
    assert torch.equal(distribution.icdf(shares), expected)
    ends = distribution.icdf(torch.tensor([0.0, 1 - 2**-24]).expand(5, 2).repeat(1, 20))
    assert ends.min() >= 0 and ends.max() <= 255


@pytest.mark.parametrize("kind", ["categorical", "mixture"])
def test_quantiles_agree_with_logits(kind):
    """With shares spread evenly over [0, 1) each value comes as often as its probability says."""
    generator = torch.Generator().manual_seed(0)
    shares, count = (torch.arange(20_000) + 0.5).expand(1, -1) / 20_000, (1, 1)
    if kind == "categorical":
        distribution = Categorical(torch.randn(*count, 256, generator=generator) * 3)
        many = Categorical(distribution.logits.expand(1, 20_000, -1))
    else:
        weights = torch.randn(9, *count, generator=generator).softmax(0)
        means = torch.rand(8, *count, generator=generator) * 300 - 20
        precisions = torch.rand(8, *count, generator=generator)
        distribution = DiscretizedLogisticMixture(weights, means, precisions, 256)
        many = distribution  # its numbers are those of all places
    drawn = many.icdf(shares)
    assert drawn.shape == shares.shape and drawn.dtype == torch.long
    assert (drawn.diff() >= 0).all()
    frequency_table = torch.bincount(drawn.flatten(), minlength=256) / 20_000
    assert torch.allclose(frequency_table, distribution.logits.softmax(-1)[0, 0], atol=2e-4)
    last = torch.full((1, 20_000), 1 - 2**-24)
    assert many.icdf(last).max() <= 255


def test_no_quantile_is_a_value_that_cannot_be():
    logits = torch.tensor([float("-inf"), 0.0, 2.0, float("-inf"), -1.0, float("-inf")])
    shares = torch.tensor([[0.0, 0.1, 0.5, 1 - 2**-24, 1.0]])
    drawn = Categorical(logits.expand(1, 5, -1)).icdf(shares)
    assert set(drawn.flatten().tolist()) <= {1, 2, 4} and drawn[0, -1] == 4


def test_free_probabilities_are_those_of_the_softmax():
    logits = torch.randn(2, 3, 5)
    values = torch.randint(5, (2, 3))
    expected = logits.log_softmax(-1).gather(-1, values[..., None])[..., 0]
    assert torch.allclose(Categorical(logits).log_prob(values), expected)


@pytest.mark.parametrize("num_values", [2, 3, 17, 256])
def test_every_value_of_a_mixture_can_be_drawn(num_values):
    """Whatever their number: values are found by halving, which must not stop short of one."""
    weights = torch.tensor([0.0, 1.0]).view(2, 1, 1).expand(2, 1, num_values)
    ones = torch.ones(1, 1, num_values)
    mixture = DiscretizedLogisticMixture(weights, ones, ones, num_values)
    shares = (torch.arange(num_values) + 0.5)[None] / num_values
    assert mixture.icdf(shares).tolist() == [[*range(num_values)]]


def factored(num_values: int = 40) -> tuple[LowRankCategorical, list[torch.Tensor]]:
    """Of 2×7 positions, and the three tensors that it is made of."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 7, 5), (num_values, 5), (num_values,)
    made = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    return LowRankCategorical(*made), made


@pytest.mark.parametrize("positions_at_a_time", [0, 1, 3, 7, 100])
def test_many_values_a_few_positions_at_a_time(positions_at_a_time, monkeypatch):
    """Values, draws, means and gradients are those of all logits at once."""
    monkeypatch.setattr(distributions, "LOGITS_AT_A_TIME", 2 * 40 * positions_at_a_time)
    few, made = factored()
    whole, vectors = Categorical(few.logits), torch.randn(40, 3)
    assert torch.allclose(few.probs().sum(-1), torch.ones(2, 7), atol=1e-5)
    assert torch.allclose(few.probs(), whole.probs(), atol=1e-6)
    parts = few.parts()
    assert torch.equal(torch.cat([part.features for part in parts], 1), few.features)
    assert len(parts) == {0: 7, 1: 7, 3: 3}.get(positions_at_a_time, 1)
    values, shares = torch.randint(40, (2, 7)), torch.rand(2, 7)
    for asked in (lambda x: x.log_prob(values), lambda x: x.mean(vectors)):
        ours, theirs = asked(few), asked(whole)
        assert torch.allclose(ours, theirs, atol=1e-5)
        weight = torch.rand_like(ours)
        gradients = torch.autograd.grad((ours * weight).sum(), made, allow_unused=True)
        expected = torch.autograd.grad((theirs * weight).sum(), made, retain_graph=True)
        for one, other in zip(gradients, expected, strict=True):
            assert torch.allclose(one, other, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(few.icdf(shares), whole.icdf(shares))
        assert torch.allclose(few.log_prob(values), whole.log_prob(values), atol=1e-5)
    with fixed_point_arithmetic():
        ours = few.probs(), few.mean(vectors)
    assert torch.allclose(ours[0], whole.probs(), atol=1e-4)
    assert torch.allclose(ours[1], whole.mean(vectors), atol=1e-3)


def test_many_values_in_half_precision():
    """The products are, the softmax of them is not."""
    few, made = factored()
    values = torch.randint(40, (2, 7))
    with torch.autocast("cpu", torch.bfloat16):
        assert few.logits.dtype == torch.bfloat16
        nats = few.log_prob(values)
    assert nats.dtype == torch.float32 and few.mean(torch.randn(40, 3)).dtype == torch.float32
    assert torch.allclose(nats, few.log_prob(values), atol=0.1)
    nats.sum().backward()  # made again as they were made
    assert all(tensor.grad.dtype == torch.float32 for tensor in made)


def test_only_many_values_are_looked_at_in_parts():
    for num_values, kind in ((MANY_SYMBOLS, Categorical), (MANY_SYMBOLS + 1, LowRankCategorical)):
        table = torch.randn(num_values, 2)
        assert (
            type(categorical_from_features(torch.randn(1, 3, 2), table, torch.zeros(num_values)))
            is kind
        )
