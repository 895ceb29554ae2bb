"""The walk over a grid, in every order, whatever the grid is made of and how large it is."""

import pytest
import torch
from conftest import ORDER_NAMES, PIXEL_ORDERS, decoder_fields, level_of, tiny_level, tiny_prior
from test_decoders import GUIDED, LOGISTICS, SYMBOL_ORDERS

from progressive_vae.models.sampling import Sampler

SIZES = [(1, 1), (5, 7), (6, 9), (3, 1)]


def lattice_of(y: int, x: int, num_groups: int) -> int:
    """The number of the lattice that holds a position."""
    stride, number = 2 ** (num_groups // 3), 0
    if y % stride == 0 and x % stride == 0:
        return 0
    while True:
        stride, number = stride // 2, number + 3
        if y % stride == 0 and x % stride == 0:
            odd = (y // stride % 2, x // stride % 2)
            return number - 2 + [(1, 1), (0, 1), (1, 0)].index(odd)


def check_walk(walk, size, channels, groups):
    """Walk with true draws; the grid int64 (B, C, H, W) that was chosen, and its nats (B,).

    Each position of each color has to be asked for once: group after group (`groups` has their
    numbers, (H, W), or `None`), in a group color after color, in a color row by row.
    """
    asked, chosen = [], torch.full((2, channels, size[0] * size[1]), -1)
    nats = torch.zeros(2)

    def choose(distribution, place):
        assert place.positions.dtype == torch.long and len(place.positions)
        asked.extend((place.group, place.color, p) for p in place.positions.tolist())
        logits = distribution.logits
        values = torch.distributions.Categorical(logits=logits).sample()
        by_logits = logits.log_softmax(-1).gather(-1, values[..., None])[..., 0]
        assert torch.allclose(by_logits, distribution.log_prob(values), atol=1e-4)
        nats.add_(distribution.log_prob(values).sum(1))
        chosen[:, place.color, place.positions] = values
        return values

    with torch.no_grad():
        drawn = walk(choose)
    assert asked == sorted(asked)
    places = [(color, position) for _, color, position in asked]
    every = [(c, p) for c in range(channels) for p in range(size[0] * size[1])]
    assert sorted(places) == every
    group_of = {(c, p): g for g, c, p in asked}
    assert all(group_of[c, p] == group_of[0, p] for c, p in every)
    if groups is not None:
        assert [group_of[0, p] for _, p in every[: len(groups)]] == groups
    return drawn, chosen.view(2, channels, *size), nats


@pytest.mark.parametrize(
    "kind",
    [
        dict(num_channels=1), dict(num_channels=3), dict(num_channels=1, **LOGISTICS),
        dict(num_channels=3, **LOGISTICS), dict(num_channels=3, **GUIDED), dict(num_symbols=5),
    ],
)  # fmt: skip
@pytest.mark.parametrize(ORDER_NAMES, SYMBOL_ORDERS)
def test_a_level_is_asked_for_each_true_entry_once(order, downsample, num_groups, kind):
    """Its distributions are those of the likelihood, and the grid is what was chosen."""
    if "num_channels" in kind and (order == "raster" or order != "lattice" and len(kind) > 1):
        return
    level = level_of(order, downsample, num_groups, **kind)
    for height, width in SIZES:
        codes = torch.randint(3, (2, *level.codes_size((height, width))))
        rows = [(y, x) for y in range(height) for x in range(width)]
        groups = {
            "raster": list(range(len(rows))),
            "factorized": [0] * len(rows),
            "lattice": [lattice_of(y, x, level.config.num_groups or 0) for y, x in rows],
        }.get(order)
        drawn, chosen, nats = check_walk(
            lambda choose, z=codes, size=(height, width): level.walk(z, choose, finer_size=size),
            (height, width),
            level.config.value_channels,
            groups,
        )
        with torch.no_grad():
            assert torch.allclose(nats, level.log_prob(drawn, codes), rtol=1e-4, atol=1e-4)
        assert torch.equal(level.entries.to_values(drawn), chosen)


@pytest.mark.parametrize("size", SIZES)
def test_a_prior_is_asked_for_each_code_once(size):
    prior, labels = tiny_prior(grid_size=list(size), num_classes=2), torch.tensor([0, 1])
    drawn, chosen, nats = check_walk(
        lambda choose: prior.walk(2, choose, labels), size, 1, list(range(size[0] * size[1]))
    )
    assert torch.equal(drawn, chosen[:, 0])
    with torch.no_grad():
        assert torch.allclose(nats, prior.log_prob(drawn, labels), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", ["lattice", "raster"])
def test_sampling_is_a_walk(order):
    level = tiny_level(num_symbols=5, num_classes=2, code_noise=0.2, **decoder_fields(order))
    codes, labels = torch.randint(3, (3, 3, 4)), torch.tensor([0, 1, 1])
    generator = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    given = dict(class_labels=labels, code_noise=0.1, finer_size=(5, 7))
    expected = level.sample(codes, generator=generator(), temperature=0.9, **given)
    draw = Sampler(3, generator(), temperature=0.9)
    with torch.no_grad():
        assert torch.equal(level.walk(codes, draw.choose, **given), expected)
    prior = tiny_prior(num_classes=2)
    drawn = prior.walk(3, Sampler(3, generator()).choose, labels)
    assert torch.equal(drawn, prior.sample(3, labels, generator=generator()))


def test_a_walk_carries_gradients():
    level, codes = tiny_level(num_symbols=5), torch.zeros(2, 2, 2, dtype=torch.long)
    nats = []

    def choose(distribution, place):
        nats.append(distribution.log_prob(torch.zeros(2, len(place.positions)).long()).sum())
        return torch.zeros(2, len(place.positions)).long()

    level.walk(codes, choose)
    sum(nats).backward()
    assert all(p.grad is not None for p in level.decoder.parameters())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.zeros(2, 3).long(), r"choose to return int64 of shape \(2, 1\), got .*\(2, 3\)"),
        (torch.zeros(1, 1).long(), r"of shape \(2, 1\), got .*\(1, 1\)"),
        (torch.zeros(2, 1), r"int64 of shape \(2, 1\), got torch.float32"),
    ],
)
def test_bad_choices(values, message):
    codes = torch.zeros(2, 1, 1, dtype=torch.long)
    for walk in (
        lambda choose: tiny_level(num_symbols=5).walk(codes, choose),
        lambda choose: tiny_level(num_channels=1).walk(codes, choose),
        lambda choose: tiny_level(num_symbols=5, decoder_type="causal_lm").walk(codes, choose),
        lambda choose: tiny_prior().walk(2, choose),
    ):
        with pytest.raises(ValueError, match=message):
            walk(lambda distribution, place: values)


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
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny_level(num_symbols=5))


@pytest.mark.parametrize("downsample", [8, 16, 32, 64])
@pytest.mark.parametrize(
    "kind",
    [
        dict(num_channels=3), dict(num_channels=1, **LOGISTICS), dict(num_channels=1, **GUIDED),
        dict(num_channels=1, ordering="factorized"),
        dict(num_channels=1, ordering="masked"), dict(num_symbols=5),
        dict(num_symbols=5, decoder_type="causal_lm"),
    ],
)  # fmt: skip
def test_one_level_may_span_a_large_factor(kind, downsample):
    level = tiny_level(downsample=downsample, **kind)
    size = (11, 13) if level.config.ordering == "raster" else (65, 70)
    codes_size = tuple(-(-n // downsample) for n in size)
    if level.config.is_finest:
        finer = torch.randint(256, (2, kind["num_channels"], *size)) / 127.5 - 1
    else:
        finer = torch.randint(5, (2, *size))
    codes = level.encode(finer)
    assert codes.shape == (2, *codes_size)
    drawn, chosen, nats = check_walk(
        lambda choose: level.walk(codes, choose, finer_size=size),
        size,
        level.config.value_channels,
        None,
    )
    with torch.no_grad():
        assert torch.allclose(nats, level.log_prob(drawn, codes), rtol=1e-4)
    sampled = level.sample(codes, finer_size=size)
    assert sampled.shape == finer.shape and sampled.dtype == finer.dtype
    if level.config.ordering == "lattice":
        assert level.config.num_groups == 1 + 3 * (downsample.bit_length() - 1)


def test_pixel_orders_are_walked_in_all_their_groups():
    for order, downsample, num_groups in PIXEL_ORDERS:
        level, numbers = level_of(order, downsample, num_groups, num_channels=1), []

        def choose(distribution, place, numbers=numbers):
            numbers.append(place.group)
            return distribution.logits.argmax(-1)

        with torch.no_grad():
            level.walk(torch.zeros(1, 4, 4).long(), choose)
        assert numbers == list(range(level.config.num_groups))
