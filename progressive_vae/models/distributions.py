"""Predictive distributions of the values 0 … V − 1 at n positions of a grid.

Their common interface:

- `log_prob(values)`: int64 (B, n) -> nats, float32 (B, n);
- `logits`: unnormalized log-probabilities of all values, (B, n, V), for samplers that modify them;
- `probs()`: probabilities of all values, for entropy coders: float32 (B, n, V), at least 0, with
  a sum of 1 up to rounding errors;
- `icdf(u)`: the smallest value whose cumulative probability exceeds u, for u in [0, 1): (B, n) ->
  int64 (B, n). With uniform u these are samples;
- `chunks()`: distributions of consecutive positions whose logits fit into little memory.

Mixtures of logistics, and `CopyMixture`s of them, also have `interval_masses(first, step)`: the
probabilities of 16 intervals of `step` values. An entropy coder reaches one of 256 values in two
such steps, at 34 edges instead of 255.

The categorical distributions also have `expected_embedding(table)`: for one vector per value,
(V, D), the expected vector, (B, n, D).
"""

import math
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..configuration.level import MANY_CODES
from .device_constant import cached_constant, device_constant

LOGITS_PER_CHUNK = 2**23  # 32 MB in fp32, which C libraries return to the system at once
LOGITS_IN_CACHE = 2**18  # 1 MB: a processor computes and samples them without its main memory
POSITIONS_PER_CHUNK = 512  # of a mixture's tables, which then fit into a processor's cache
NUM_INTERVALS = 16  # of `interval_masses`
# Of a mixture's 17 edges, which then fit, too. Torch divides them among two threads at most, whose
# parts fill registers.
POSITIONS_OF_INTERVALS = 3840
# Up to so many positions a mixture's quantiles are searched in few rounds. A processor is soon busy
# with arithmetic; on other devices memory is the limit.
MAX_POSITIONS_ON_CPU = 256
MAX_POSITIONS = 2**18
OUTSIDE = 1e6  # an edge far beyond all pixel values
# Where the sigmoid in float32 is 0 and 1, with a margin.
SIGMOID_IS_0 = -106.0
SIGMOID_IS_1 = 18.0
# Whether results of elementwise functions do not depend on places in memory. Torch's kernels
# compute the last numbers, which do not fill a register, in another way.
IS_LAYOUT_INVARIANT = ContextVar("is_layout_invariant", default=False)


@dataclass(frozen=True)
class Categorical:
    """One logit per value, (B, n, V)."""

    logits: Tensor

    def log_prob(self, values: Tensor) -> Tensor:
        logits = self.logits.flatten(0, -2).float()
        return -F.cross_entropy(logits, values.flatten(), reduction="none").view(values.shape)

    def chunks(self) -> "list[Categorical]":
        return [self]

    def probs(self) -> Tensor:
        return self.logits.float().softmax(-1)

    def expected_embedding(self, table: Tensor) -> Tensor:
        return self.probs() @ table.float()

    def icdf(self, u: Tensor) -> Tensor:
        cumulative = self.probs().cumsum(-1)
        # A threshold rounded up to the total would return the last value, whatever its probability.
        zero = cached_constant((0.0,), cumulative.device)
        threshold = u * torch.nextafter(cumulative[..., -1], zero)
        return torch.searchsorted(cumulative, threshold[..., None], right=True)[..., 0]


@dataclass(frozen=True)
class LowRankCategorical:
    """A categorical distribution whose logits are computed chunk by chunk.

    The full logits never exist at once; the backward pass computes each chunk again.

    Args:
        features: (B, n, r).
        table: (V, r).
        bias: (V,); the logits are `features @ table.T + bias`.
    """

    features: Tensor
    table: Tensor
    bias: Tensor

    @property
    def logits(self) -> Tensor:
        return F.linear(self.features, self.table, self.bias)

    def chunks(self) -> "list[LowRankCategorical]":
        num_logits = LOGITS_PER_CHUNK
        if _is_processor_bound(self.features):
            num_logits = min(num_logits, LOGITS_IN_CACHE)
        num_positions = num_logits // (len(self.features) * len(self.table))
        chunks = self.features.split(max(1, num_positions), 1)
        return [LowRankCategorical(chunk, self.table, self.bias) for chunk in chunks]

    def log_prob(self, values: Tensor) -> Tensor:
        return self._map_chunks(Categorical.log_prob, values)

    def probs(self) -> Tensor:
        return Categorical(self.logits).probs()

    def expected_embedding(self, table: Tensor) -> Tensor:
        return self._map_chunks(lambda chunk: chunk.expected_embedding(table))

    def icdf(self, u: Tensor) -> Tensor:
        return self._map_chunks(Categorical.icdf, u)

    def _map_chunks(self, function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
        """Concatenate `function(chunk as a Categorical, its positions of the arguments (B, n))`."""

        def apply(features: Tensor, *rows: Tensor) -> Tensor:
            return function(Categorical(F.linear(features, self.table, self.bias)), *rows)

        results = []
        stop = 0
        for chunk in self.chunks():
            start = stop
            stop += chunk.features.shape[1]
            rows = [x[:, start:stop] for x in arguments]
            if torch.is_grad_enabled():
                result = checkpoint(
                    apply, chunk.features, *rows, use_reentrant=False, preserve_rng_state=False
                )
            else:
                result = apply(chunk.features, *rows)
            results.append(result)
        return torch.cat(results, 1)


def categorical_from_features(
    features: Tensor, table: Tensor, bias: Tensor
) -> Categorical | LowRankCategorical:
    """The distribution with logits `features @ table.T + bias`, (B, n, V)."""
    low_rank = LowRankCategorical(features, table, bias)
    num_logits = math.prod(features.shape[:-1]) * len(table)
    exceeds_cache = num_logits > LOGITS_IN_CACHE and _is_processor_bound(features)
    is_chunked = len(table) > MANY_CODES or exceeds_cache
    return low_rank if is_chunked else Categorical(low_rank.logits)


def _is_processor_bound(x: Tensor) -> bool:
    """Whether small chunks are faster: in sampling on a CPU, outside of compiled graphs."""
    is_eager = not torch.compiler.is_compiling()
    return x.device.type == "cpu" and is_eager and not torch.is_grad_enabled()


@dataclass(frozen=True)
class DiscretizedLogisticMixture:
    """A mixture of K discretized logistics and the uniform distribution over pixel values.

    P(x) = Σ_k w_k [σ((x + ½ − μ_k) / s_k) − σ((x − ½ − μ_k) / s_k)] + w_u / V; the values 0 and
    V − 1 also get the tails (Salimans et al. 2017, PixelCNN++).

    Components are the first dimension, so that elementwise operations run over long rows.

    Args:
        weights: w_1 … w_K and w_u, which sum to 1: (K + 1, B, n).
        means: μ in units of pixel values, (K, B, n).
        precisions: 1 / s, (K, B, n).
        num_values: V, a power of two.
    """

    weights: Tensor
    means: Tensor
    precisions: Tensor
    num_values: int

    def log_prob(self, values: Tensor) -> Tensor:
        centers = values.float()  # first: integers minus 0.5 would have torch's default dtype
        lower = (centers - 0.5).masked_fill(values == 0, -OUTSIDE)
        upper = (centers + 0.5).masked_fill(values == self.num_values - 1, OUTSIDE)
        edges = torch.stack([lower, upper])[:, None]  # (2, 1, B, n)
        masses = _logistic_mass((edges - self.means) * self.precisions)[0]  # (K, B, n)
        return ((self.weights[:-1] * masses).sum(0) + self._floor).log()

    def with_temperature(self, temperature: float) -> "DiscretizedLogisticMixture":
        """The mixture with weights ∝ w^(1/T) and scales T·s; T = 1 returns it unchanged.

        A temperature of the whole distribution, P^(1/T), would also weigh components by their
        sharpness: a mass w of scale s becomes one of w^(1/T)·s^(1 − 1/T). Sharp components, which
        are copies of a neighbor, then win over broad ones, and spread over the image: flat white
        would flood it. Here the scale of a component has no effect on its weight.

        Args:
            temperature: T > 0.
        """
        if temperature == 1:
            return self
        weights = (self.weights.log() / temperature).softmax(0)
        precisions = self.precisions / temperature
        return DiscretizedLogisticMixture(weights, self.means, precisions, self.num_values)

    def most_probable(self) -> Tensor:
        """The limit at temperature 0: the mean of the component of the largest weight, int64
        (B, n). The uniform distribution, which has no mean among the values, does not count."""
        component = self.weights[:-1].argmax(0, keepdim=True)
        mean = self.means.gather(0, component)[0]
        return mean.round().clamp(0, self.num_values - 1).long()

    def chunks(self) -> "list[DiscretizedLogisticMixture]":
        return [self]

    @property
    def logits(self) -> Tensor:
        edges = _lower_edges(0, self.num_values + 1, self.means.device)[:, None, None]
        edges[0] = -OUTSIDE
        edges[-1] = OUTSIDE
        probs = self._floor.repeat(self.num_values, 1, 1)  # (V, B, n)
        # The last weight has no mean: it belongs to the uniform distribution, the floor.
        for weight, mean, precision in zip(self.weights, self.means, self.precisions, strict=False):
            probs = probs + weight * _logistic_mass((edges - mean) * precision)
        return probs.log().movedim(0, -1)

    def probs(self) -> Tensor:
        """Differences of the cumulative distribution: less accurate than `logits` in the tails,
        but five times faster."""
        weights = self.weights.flatten(1)[..., None]  # (K + 1, B·n, 1)
        means = self.means.flatten(1)[..., None]
        precisions = self.precisions.flatten(1)[..., None]
        edges = _lower_edges(1, self.num_values, means.device)  # (V − 1,)
        # Column v is the logistics' mass below value v.
        cumulative = torch.zeros(
            means.shape[1], self.num_values + 1, dtype=torch.float32, device=means.device
        )
        cumulative[:, -1] = 1 - weights[-1, :, 0]
        skips_columns = _is_processor_bound(means) and IS_LAYOUT_INVARIANT.get()
        ranges = [(0, len(edges))] * len(means)
        for start in range(0, len(cumulative), POSITIONS_PER_CHUNK):
            chunk = slice(start, start + POSITIONS_PER_CHUNK)
            below = cumulative[chunk, 1:-1]
            if skips_columns:
                ranges = _columns_between_0_and_1(means[:, chunk], precisions[:, chunk], len(edges))
            for weight, mean, precision, (first, last) in zip(
                weights, means, precisions, ranges, strict=False
            ):
                cdf = (edges[first:last] - mean[chunk]).mul_(precision[chunk]).sigmoid_()
                below[:, first:last].addcmul_(cdf, weight[chunk])
                if last < len(edges):
                    below[:, last:].add_(weight[chunk])
        probs = cumulative.diff(dim=1).clamp_(min=0).add_(self._floor.flatten()[:, None])
        return probs.unflatten(0, self.means.shape[1:])

    def interval_masses(self, first: Tensor | None, step: int) -> Tensor:
        """P(first + j·step ≤ x < first + (j + 1)·step) for j = 0 … 15: float32 (B, n, 16), at least
        0. As in `probs`, they are differences of the cumulative distribution.

        Args:
            first: int64 (B, n), `None` for 0; the last interval ends at V or before.
            step: the number of values of an interval, a power of two.
        """
        weights = self.weights.flatten(1)  # (K + 1, B·n)
        means = self.means.flatten(1)
        precisions = self.precisions.flatten(1)
        edges = _interval_edges(step, means.device)  # (17, 1)
        if first is not None:
            edges = edges + first.flatten()
        # Values 0 and V − 1 also get the tails.
        edges = edges.masked_fill(edges < 0, -OUTSIDE)
        edges = edges.masked_fill(edges > self.num_values - 1, OUTSIDE)
        masses = torch.empty(
            means.shape[1], NUM_INTERVALS, dtype=torch.float32, device=means.device
        )
        # Edges are the first dimension, so that elementwise operations run over long rows.
        for start in range(0, len(masses), POSITIONS_OF_INTERVALS):
            chunk = slice(start, start + POSITIONS_OF_INTERVALS)
            chunk_edges = edges.expand(-1, len(masses))[:, chunk]
            mass_below = chunk_edges.new_zeros(chunk_edges.shape)
            # The last weight has no mean: it belongs to the uniform distribution, the floor.
            for weight, mean, precision in zip(weights, means, precisions, strict=False):
                cdf = (chunk_edges - mean[chunk]).mul_(precision[chunk]).sigmoid_()
                mass_below.addcmul_(cdf, weight[chunk])
            masses[chunk] = mass_below.diff(dim=0).clamp_(min=0).T
        masses.add_((step * self._floor).flatten()[:, None])
        return masses.unflatten(0, self.means.shape[1:])

    def icdf(self, u: Tensor) -> Tensor:
        """A search that evaluates the cumulative distribution at several edges in each round.

        At 15 edges, 256 values take two rounds, which are few operations. By halves they take
        eight, which are less arithmetic.
        """
        is_on_cpu = u.device.type == "cpu"
        is_small = u.numel() <= (MAX_POSITIONS_ON_CPU if is_on_cpu else MAX_POSITIONS)
        bits_per_round = 4 if is_small else 1
        values: Tensor | None = None  # as multiples of `step`
        step = num_searched = 2 ** (self.num_values - 1).bit_length()
        while step > 1:
            interval = step
            step = max(1, interval >> bits_per_round)
            points = _search_points(step, interval, u.device)  # (2, E, 1, 1)
            if values is not None:
                points = torch.add(points, values, alpha=interval)  # (2, E, B, n)
            edges, midpoints = points
            # In place: (E, K, B, n) numbers are many.
            logistics = (edges[:, None] - self.means).mul_(self.precisions)
            mass_below = logistics.sigmoid_().mul_(self.weights[:-1]).sum(1)
            mass_below.add_(self.weights[-1] * midpoints, alpha=1 / self.num_values)
            count = (mass_below <= u).sum(0)
            values = count if values is None else count.add(values, alpha=interval // step)
        assert values is not None  # V is at least 2
        if self.num_values == num_searched:
            return values
        return values.clamp(max=self.num_values - 1)

    @property
    def _floor(self) -> Tensor:
        """The uniform distribution's mass of one value, w_u / V: (B, n)."""
        return self.weights[-1] / self.num_values


@device_constant
def _search_points(step: int, interval: int, device: torch.device) -> Tensor:
    """The E multiples of `step` below `interval`, and before them their lower edges: float32
    (2, E, 1, 1)."""
    values = torch.arange(step, interval, step, dtype=torch.float32).view(-1, 1, 1)
    return torch.stack([values - 0.5, values]).to(device)


@device_constant
def _interval_edges(step: int, device: torch.device) -> Tensor:
    """The lower edges of 16 intervals from value 0 on, and the upper one of the last: float32
    (17, 1)."""
    values = torch.arange(0, (NUM_INTERVALS + 1) * step, step, dtype=torch.float32)
    return (values[:, None] - 0.5).to(device)


def _columns_between_0_and_1(
    means: Tensor, precisions: Tensor, count: int
) -> list[tuple[int, int]]:
    """For each component the columns of `_lower_edges(1, count + 1)` at which some logistics are
    neither 0 nor 1: they are 0 before these columns, and 1 behind them.

    Args:
        means, precisions: (K, n, 1).
    """
    lowest = (means + SIGMOID_IS_0 / precisions).amin((1, 2)).tolist()
    highest = (means + SIGMOID_IS_1 / precisions).amax((1, 2)).tolist()
    ranges = []
    for low, high in zip(lowest, highest, strict=True):
        # The order of arguments matters: NaN, which is never less or more, gives all columns.
        first = int(min(count, max(0, low - 1)))
        ranges.append((first, int(max(first, min(count, high + 1)))))
    return ranges


def _lower_edges(start: int, stop: int, device: torch.device) -> Tensor:
    """The lower edges of the values start … stop − 1, float32."""
    return torch.arange(start, stop, dtype=torch.float32, device=device) - 0.5


def _logistic_mass(edges: Tensor) -> Tensor:
    """The standard logistic's mass between consecutive increasing edges, (E, ...) -> (E − 1, ...).

    Both edges above 0 use the upper tail: the difference of two cumulative probabilities near 1
    would lose all digits.
    """
    tails = (-edges.abs()).sigmoid()
    lower = tails[:-1]
    upper = tails[1:]
    contains_zero = (edges[:-1] < 0) & (edges[1:] > 0)
    return torch.where(contains_zero, 1 - lower - upper, (lower - upper).abs())


@dataclass(frozen=True)
class CopyMixture:
    """A mixture of K values that can be copied and a distribution of all values.

    P(x) = Σ_k w_k [x = c_k] + w_0 P_0(x); a pointer sentinel mixture (Merity et al. 2016).

    A pixel copies all channels from one source. Once the value of a channel is known, the
    `posterior` has the weights of the next channel.

    Args:
        log_weights: log w_1 … log w_K and log w_0, normalized, (B, n, K + 1); −∞ for no source.
        copies: c, int64 (B, n, K).
        base: P_0.
    """

    log_weights: Tensor
    copies: Tensor
    base: "Distribution"

    def log_prob(self, values: Tensor) -> Tensor:
        return self._joint(values).logsumexp(-1)

    def posterior(self, values: Tensor) -> Tensor:
        """The log-probability of each source given the value, (B, n, K + 1)."""
        return self._joint(values).log_softmax(-1)

    def _joint(self, values: Tensor) -> Tensor:
        is_copy = self.copies == values[..., None]
        return joint_log_prob(self.log_weights, is_copy, self.base.log_prob(values))

    def chunks(self) -> "list[CopyMixture]":
        return [self]

    @property
    def logits(self) -> Tensor:
        # The difference of two logits of guidance has to be a number.
        return self.probs().clamp(min=torch.finfo(torch.float32).tiny).log()

    def probs(self) -> Tensor:
        weights = self.log_weights.exp()
        base = weights[..., -1:] * self.base.probs()
        return base.scatter_add(-1, self.copies, weights[..., :-1])

    def interval_masses(self, first: Tensor | None, step: int) -> Tensor:
        """Those of a base that has them; see `DiscretizedLogisticMixture.interval_masses`."""
        assert isinstance(self.base, DiscretizedLogisticMixture)
        weights = self.log_weights.exp()
        base = weights[..., -1:] * self.base.interval_masses(first, step)
        offsets = self.copies if first is None else self.copies - first[..., None]
        # Two more intervals are those of copies below and above.
        intervals = (offsets >> (step.bit_length() - 1)).clamp_(-1, NUM_INTERVALS).add_(1)
        copied = base.new_zeros(*base.shape[:-1], NUM_INTERVALS + 2)
        return base + copied.scatter_add(-1, intervals, weights[..., :-1])[..., 1:-1]

    def icdf(self, u: Tensor) -> Tensor:
        return Categorical(self.logits).icdf(u)


def joint_log_prob(log_weights: Tensor, is_copy: Tensor, base_log_prob: Tensor) -> Tensor:
    """log P(source, value) of a `CopyMixture` for each source, (B, n, K + 1).

    Args:
        is_copy: whether the source has the value, bool (B, n, K).
        base_log_prob: nats of the value under the base, (B, n).
    """
    copied = log_weights[..., :-1].masked_fill(~is_copy, -math.inf)
    base = log_weights[..., -1] + base_log_prob
    return torch.cat([copied, base[..., None]], -1)


Distribution = Categorical | LowRankCategorical | DiscretizedLogisticMixture | CopyMixture
