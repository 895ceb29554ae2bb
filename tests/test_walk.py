"""The autoregressive loop, for each ordering, type of value and size of the grid."""

import pytest
import torch

from helpers.models import (
    CODE_ORDERS,
    GUIDED,
    LOGISTICS,
    ORDER_NAMES,
    PALETTE,
    PIXEL_ORDERS,
    decoder_fields,
    level_of,
    tiny_level,
    tiny_prior,
)
from progressive_vae.models.sampling import Sampler
from progressive_vae.models.walk import TeacherForcing

SIZES = [(1, 1), (5, 6), (3, 1)]


def lattice_index(y: int, x: int, num_groups: int) -> int:
    """The index of the lattice that contains a position."""
    stride = 2 ** (num_groups // 3)
    if y % stride == 0 and x % stride == 0:
        return 0
    last_index = 0
    while True:
        stride //= 2
        last_index += 3  # each halving of the stride adds three lattices
        if y % stride == 0 and x % stride == 0:
            parity = (y // stride % 2, x // stride % 2)
            return last_index - 2 + [(1, 1), (0, 1), (1, 0)].index(parity)


def check_walk(walk, size, channels, group_indices):
    """Run a walk with samples, and check its steps and distributions.

    Each channel of each position has exactly one step, in the sequence of groups, channels and
    positions. `group_indices` are the expected groups of all H·W positions, or `None`.

    Returns:
        the output of the walk, the values of its steps, int64 (2, C, H, W), and their nats, (2,).
    """
    num_positions = size[0] * size[1]
    visits = []  # (group, channel, position)
    values = torch.full((2, channels, num_positions), -1)
    nats = torch.zeros(2)

    def step_fn(distribution, step):
        assert step.positions.dtype == torch.long and len(step.positions)
        visits.extend((step.group, step.channel, p) for p in step.positions.tolist())
        logits = distribution.logits
        samples = torch.distributions.Categorical(logits=logits).sample()
        log_prob = distribution.log_prob(samples)
        expected = logits.log_softmax(-1).gather(-1, samples[..., None])[..., 0]
        assert torch.allclose(log_prob, expected, atol=1e-4)
        nats.add_(log_prob.sum(1))
        values[:, step.channel, step.positions] = samples
        return samples

    with torch.no_grad():
        output = walk(step_fn)
    assert visits == sorted(visits)
    entries = [(channel, position) for _, channel, position in visits]
    assert sorted(entries) == [(c, p) for c in range(channels) for p in range(num_positions)]
    group_of = {(channel, position): group for group, channel, position in visits}
    assert all(group_of[c, p] == group_of[0, p] for c, p in entries)
    if group_indices is not None:
        assert [group_of[0, p] for p in range(num_positions)] == group_indices
    return output, values.view(2, channels, *size), nats


@pytest.mark.parametrize(
    "kind",
    [
        dict(num_channels=1),
        dict(num_channels=3),
        dict(num_channels=1, **LOGISTICS),
        dict(num_channels=3, **LOGISTICS),
        dict(num_channels=3, **GUIDED),
        dict(num_channels=3, **PALETTE),
        dict(num_symbols=5),
        dict(num_symbols=5, decoder_type="transformer"),
    ],
)
@pytest.mark.parametrize(ORDER_NAMES, CODE_ORDERS)
def test_a_level_has_one_step_for_each_entry(order, downsample, num_groups, kind):
    """Its log-probabilities add up to `log_prob`, and it returns the values of its steps."""
    is_of_codes = order in ("raster", "diagonal")
    if "num_channels" in kind and (is_of_codes or order != "lattice" and len(kind) > 1):
        return
    level = level_of(order, downsample, num_groups, **kind)
    for height, width in SIZES:
        codes = torch.randint(3, (2, *level.codes_size((height, width))))
        positions = [(y, x) for y in range(height) for x in range(width)]
        side = (num_groups + 1) // 2 if num_groups else max(height, width)
        group_indices = {
            "raster": list(range(len(positions))),
            "diagonal": [y % side + x % side for y, x in positions],
            "factorized": [0] * len(positions),
            "lattice": [lattice_index(y, x, level.config.num_groups or 0) for y, x in positions],
        }.get(order)
        finer, values, nats = check_walk(
            lambda step_fn, z=codes, size=(height, width): level.walk(z, step_fn, finer_size=size),
            (height, width),
            level.config.value_channels,
            group_indices,
        )
        with torch.no_grad():
            assert torch.allclose(nats, level.log_prob(finer, codes), rtol=1e-4, atol=1e-4)
        assert torch.equal(level.value_type.to_indices(finer), values)


@pytest.mark.parametrize("size", SIZES)
def test_a_prior_has_one_step_for_each_code(size):
    prior = tiny_prior(grid_size=list(size), num_classes=2)
    labels = torch.tensor([0, 1])
    codes, values, nats = check_walk(
        lambda step_fn: prior.walk(2, step_fn, labels), size, 1, list(range(size[0] * size[1]))
    )
    assert torch.equal(codes, values[:, 0])
    with torch.no_grad():
        assert torch.allclose(nats, prior.log_prob(codes, labels), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", ["lattice", "raster", "transformer"])
def test_sampling_is_a_walk(order):
    level = tiny_level(num_symbols=5, num_classes=2, code_noise=0.2, **decoder_fields(order))
    codes = torch.randint(3, (3, 3, 4))
    labels = torch.tensor([0, 1, 1])

    def generator():
        return torch.Generator().manual_seed(0)

    kwargs = dict(class_labels=labels, code_noise=0.1, finer_size=(5, 7))
    expected = level.sample(codes, generator=generator(), temperature=0.9, **kwargs)
    sampler = Sampler(3, generator(), temperature=0.9)
    with torch.no_grad():
        assert torch.equal(level.walk(codes, sampler.step, **kwargs), expected)
    prior = tiny_prior(num_classes=2)
    samples = prior.walk(3, Sampler(3, generator()).step, labels)
    assert torch.equal(samples, prior.sample(3, labels, generator=generator()))


@pytest.mark.parametrize("order", ["lattice", "transformer"])
def test_a_walk_has_the_gradients_of_log_prob(order):
    level = tiny_level(num_symbols=5, **decoder_fields(order))
    finer = torch.randint(5, (2, 4, 4))
    codes = level.encode(finer)
    teacher = TeacherForcing(finer[:, None])
    level.walk(codes, teacher)
    parameters = [*level.decoder.parameters()]
    gradients = torch.autograd.grad(teacher.log_prob().sum(), parameters)
    expected = torch.autograd.grad(level.log_prob(finer, codes).sum(), parameters)
    torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.zeros(2, 3).long(), r"step_fn .*int64 of shape \(2, 1\), got .*\(2, 3\)"),
        (torch.zeros(1, 1).long(), r"of shape \(2, 1\), got .*\(1, 1\)"),
        (torch.zeros(2, 1), r"int64 of shape \(2, 1\), got torch.float32"),
    ],
)
def test_values_of_another_shape_or_dtype_are_refused(values, message):
    codes = torch.zeros(2, 1, 1, dtype=torch.long)
    for walk in (
        lambda step_fn: tiny_level(num_symbols=5).walk(codes, step_fn),
        lambda step_fn: tiny_level(num_channels=1).walk(codes, step_fn),
        lambda step_fn: tiny_level(num_symbols=5, decoder_type="causal_lm").walk(codes, step_fn),
        lambda step_fn: tiny_level(num_symbols=5, decoder_type="transformer").walk(codes, step_fn),
        lambda step_fn: tiny_prior().walk(2, step_fn),
    ):
        with pytest.raises(ValueError, match=message):
            walk(lambda distribution, step: values)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.walk(torch.full((1, 2, 2), -1), None), "codes in 0 … 2, got values in -1"),
        (lambda m: m.walk(torch.zeros(1, 2).long(), None), r"codes of shape \(B, H, W\)"),
        (lambda m: m.walk(torch.zeros(1, 2, 2), None), "codes of dtype torch.int64"),
        (
            lambda m: m.walk(torch.zeros(1, 2, 2).long(), None, finer_size=(9, 9)),
            "finer_size whose grid",
        ),
        (
            lambda m: m.walk(torch.zeros(1, 2, 2).long(), None, code_noise=0.1),
            r"code_noise in \[0, 0.0\]",
        ),
        (lambda m: m.walk(torch.zeros(1, 2, 2).long(), None, [0]), "class_labels=None, as there"),
        (lambda m: tiny_prior().walk(0, None), "batch_size >= 1, got 0"),
        (lambda m: tiny_prior(num_classes=2).walk(2, None, [0]), "expected 2 class_labels, got 1"),
    ],
)
def test_invalid_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny_level(num_symbols=5))


@pytest.mark.parametrize("downsample", [8, 64])
@pytest.mark.parametrize(
    "kind",
    [
        dict(num_channels=3),
        dict(num_channels=1, **LOGISTICS),
        dict(num_channels=1, **GUIDED),
        dict(num_channels=1, ordering="factorized"),
        dict(num_channels=1, ordering="masked"),
        dict(num_symbols=5),
        dict(num_symbols=5, decoder_type="causal_lm"),
        dict(num_symbols=5, decoder_type="transformer"),
    ],
)
def test_a_level_with_a_large_downsampling_factor(kind, downsample):
    level = tiny_level(downsample=downsample, **kind)
    has_small_grids = level.config.decoder_type in ("causal_lm", "transformer")
    size = (11, 13) if has_small_grids else (65, 70)
    codes_size = tuple(-(-n // downsample) for n in size)
    if level.config.is_finest:
        finer = torch.randint(256, (2, kind["num_channels"], *size)) / 127.5 - 1
    else:
        finer = torch.randint(5, (2, *size))
    codes = level.encode(finer)
    assert codes.shape == (2, *codes_size)
    output, _, nats = check_walk(
        lambda step_fn: level.walk(codes, step_fn, finer_size=size),
        size,
        level.config.value_channels,
        None,
    )
    with torch.no_grad():
        assert torch.allclose(nats, level.log_prob(output, codes), rtol=1e-4)
    samples = level.sample(codes, finer_size=size)
    assert samples.shape == finer.shape and samples.dtype == finer.dtype
    if level.config.ordering == "lattice":
        assert level.config.num_groups == 1 + 3 * (downsample.bit_length() - 1)


@pytest.mark.parametrize(ORDER_NAMES, PIXEL_ORDERS)
def test_a_gray_image_has_one_step_for_each_group(order, downsample, num_groups):
    level = level_of(order, downsample, num_groups, num_channels=1)
    groups = []

    def step_fn(distribution, step):
        groups.append(step.group)
        return distribution.logits.argmax(-1)

    with torch.no_grad():
        level.walk(torch.zeros(1, 4, 4).long(), step_fn)
    assert groups == list(range(level.config.num_groups))


ALL_GROUPS_KINDS = [
    dict(num_symbols=6),
    dict(num_symbols=6, symbol_logit_rank=2),
    dict(num_channels=3),
    dict(num_channels=2, pixel_logit_rank=0),
    dict(num_channels=3, **LOGISTICS),
    dict(num_channels=1, **GUIDED),
    dict(num_channels=3, **PALETTE),
    dict(num_channels=2, **PALETTE, **LOGISTICS),
]


@pytest.mark.parametrize("kind", ALL_GROUPS_KINDS)
@pytest.mark.parametrize(ORDER_NAMES, PIXEL_ORDERS)
def test_one_pass_for_all_groups_is_the_walk_with_teacher_forcing(
    order, downsample, num_groups, kind
):
    if {"pixel_distribution", "palette_size"} & {*kind} and order != "lattice":
        return  # the config refuses it
    level = level_of(order, downsample, num_groups, **kind)
    decoder = level.decoder

    def walk_log_prob(condition, finer):
        teacher = TeacherForcing(finer)
        decoder.walk(condition, finer.shape[-2:], teacher)
        return teacher.log_prob()

    parameters = [*decoder.parameters()]
    torch.manual_seed(0)
    for size in ((6, 8), (1, 3)):
        shape = (2, level.config.value_channels, *size)
        num_values = 2 if "palette_size" in kind else level.config.num_values  # equal colors
        finer = torch.randint(num_values, shape)
        codes = torch.randint(3, (2, *level.codes_size(size)))
        results = []
        for log_prob in (walk_log_prob, decoder.log_prob_of_all_groups):
            condition = level._condition(level.quantizer.lookup(codes), size, None)
            decoder.zero_grad()
            nats = log_prob(condition, finer)
            nats.sum().backward()
            # A grid can be too small for some groups, whose weights then have no gradients.
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            results.append((nats, torch.cat([x.flatten() for x in gradients])))
        (nats, gradient), (other_nats, other_gradient) = results
        assert torch.allclose(nats, other_nats, rtol=1e-6, atol=1e-4)
        assert (gradient - other_gradient).norm() < 1e-3 * gradient.norm()
