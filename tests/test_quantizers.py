import math

import pytest
import torch

from progressive_vae import ProgressiveVAELevelConfig
from progressive_vae.evaluation.op_count import count_ops
from progressive_vae.models.layers import add_dither
from progressive_vae.models.quantizers import (
    QUANTIZERS,
    BinarySphericalQuantizer,
    FiniteScalarQuantizer,
    GumbelQuantizer,
    LookupFreeQuantizer,
    VectorQuantizer,
    fsq_levels,
    make_quantizer,
)

LAYERS = {
    "vq": lambda: VectorQuantizer(codebook_size=12, dim=3, decay=0.5),
    "fsq": lambda: FiniteScalarQuantizer(levels=[4, 3, 1]),
    "gumbel": lambda: GumbelQuantizer(codebook_size=12, dim=3),
    "lfq": lambda: LookupFreeQuantizer(num_bits=3),
    "bsq": lambda: BinarySphericalQuantizer(num_bits=3),
}


def quantizer(size=8, dim=4):
    module = VectorQuantizer(size, dim, commitment_weight=0.5, decay=0.9, restart_threshold=0.1)
    module.codebook.copy_(torch.randn(size, dim, generator=torch.Generator().manual_seed(0)))
    return module


def statistics_of(module):
    return {name: value.clone() for name, value in module.named_buffers()}


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("shape", [(), (7,), (4, 5), (2, 3, 4)])
def test_a_layer_for_latents_of_any_spatial_shape(kind, shape):
    module = LAYERS[kind]()
    latents = torch.randn(6, 3, *shape, requires_grad=True)
    quantized, codes, loss = module(latents)
    assert quantized.shape == latents.shape and codes.shape == (6, *shape)
    assert codes.dtype == torch.int64 and 0 <= codes.min() and codes.max() < 12
    assert torch.allclose(quantized, module.lookup(codes), atol=1e-6)
    assert loss.shape == () and loss.dtype == torch.float32
    (quantized.square().sum() + loss).backward()
    assert latents.grad.isfinite().all() and latents.grad.any()
    module.eval()
    assert module.encode(latents).shape == codes.shape
    assert module.encode(latents, torch.Generator().manual_seed(0)).shape == codes.shape
    assert module.entropy(latents).shape == (6,)
    assert module.add_noise(codes, torch.ones(6), None).shape == codes.shape


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("call", [lambda m, x: m(x), lambda m, x: m.encode(x)])
def test_latents_of_another_length_are_an_error(kind, call):
    for latents in (torch.randn(2, 4, 5, 5), torch.randn(3)):
        with pytest.raises(ValueError, match=r"expected latents .*3.*got \("):
            call(LAYERS[kind](), latents)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: VectorQuantizer(0, 4), "codebook_size"),
        (lambda: VectorQuantizer(8, -1), "dim"),
        (lambda: FiniteScalarQuantizer([8, 0]), "levels"),
        (lambda: GumbelQuantizer(8, 1.5), "dim"),
    ],
)
def test_sizes_are_checked(make, name):
    with pytest.raises(ValueError, match=f"expected {name} >= 1, got"):
        make()


def test_a_layer_trains_its_codebook_in_any_loop_as_after_step_does():
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(5, 3, 4, generator=generator) for _ in range(4)]
    layer, explicit = LAYERS["vq"](), LAYERS["vq"]()
    for latents in batches:
        layer(latents)
        explicit.after_step(latents, explicit(latents).codes, lambda tensor: tensor)
    for module in (layer, explicit):
        assert module.codebook.unique(dim=0).shape == (12, 3)  # k-means started it
        module.eval()  # the last step counts, too
    before = statistics_of(layer)
    layer(batches[0])
    for name, value in explicit.state_dict().items():
        assert torch.equal(layer.state_dict()[name], value), name
        assert torch.equal(before[name], value), name


def test_codes_of_a_layer_learn_clusters():
    centers = torch.tensor([[5.0, 0.0], [0.0, 5.0], [-5.0, 0.0], [0.0, -5.0]])
    module, generator = VectorQuantizer(8, 2, decay=0.8), torch.Generator().manual_seed(0)
    for _ in range(20):
        rows = torch.randint(4, (64,), generator=generator)
        module(centers[rows] + 3 + 0.1 * torch.randn(64, 2, generator=generator))
    module.eval()
    assert module(centers + 3).loss < 0.01


def test_nearest_is_the_arg_min_of_the_distance():
    module, latents = quantizer(), torch.randn(2, 4, 3, 5)
    distances = (latents.movedim(1, -1)[..., None, :] - module.codebook).square().sum(-1)
    assert torch.equal(module.encode(latents), distances.argmin(-1))


def test_dither_tells_apart_what_is_nearer_than_codes_are():
    # A latent that is the same all over, in cells of length 1: without dither all errors are one.
    module = VectorQuantizer(21, 1, commitment_weight=0.5, decay=0.9, restart_threshold=0.1)
    module.codebook.copy_(torch.arange(-10.0, 11.0)[:, None])
    latents = torch.linspace(-3, 3, 97)[:, None, None, None].expand(-1, 1, 8, 12)

    def error(scale: float) -> torch.Tensor:
        """Of the mean over the grid of what decoders see, for each latent."""
        codes = module.encode(add_dither(latents, scale))
        seen = add_dither(module.lookup(codes), -scale)
        assert (seen - latents).abs().max() <= 0.501  # no error is larger than without
        return (seen - latents).mean((1, 2, 3)).abs()

    plain, told = error(0.0), error(12**-0.5)  # the root mean square of a cell
    assert plain.max() > 0.49
    assert told.mean() < plain.mean() / 4 and told.max() < 0.2


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (4, 4), (9, 2)])
def test_dither_is_a_pattern_of_the_grid_and_goes_again(size):
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    assert add_dither(x, 0.0) is x
    with_it = add_dither(x, 0.7)
    assert torch.allclose(add_dither(with_it, -0.7), x, atol=1e-6)
    whole = add_dither(torch.zeros(1, 3, 8, 8), 0.7)
    assert torch.equal(whole[..., :4, :4], whole[..., 4:, 4:])
    assert torch.allclose(whole.square().mean().sqrt(), torch.tensor(0.7))
    assert torch.allclose((with_it - x)[0], whole.repeat(1, 1, 2, 1)[0, :, : size[0], : size[1]],
                          atol=1e-6)  # fmt: skip


def test_distances_are_fp32_under_autocast():
    # Codes closer to each other than bfloat16 can tell apart.
    module = quantizer(64, 2)
    module.codebook.copy_(1 + torch.arange(128).view(64, 2) * 1e-3)
    latents = module.codebook.T.reshape(1, 2, 8, 8).clone()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module.encode(latents).flatten(), torch.arange(64))


def test_gradient_is_straight_through():
    module, latents = quantizer(), torch.randn(1, 4, 2, 2, requires_grad=True)
    output = module(latents)
    assert torch.allclose(output.quantized, module.lookup(output.codes))
    weights = torch.randn_like(latents)
    (output.quantized * weights).sum().backward()
    assert torch.allclose(latents.grad, weights)


def test_the_loss_is_the_weighted_distance_to_the_code():
    module, latents = quantizer(), torch.randn(2, 4, 3, 3)
    output = module(latents)
    distance = (latents - module.lookup(output.codes)).square().mean()
    assert output.loss.item() == pytest.approx(0.5 * distance.item(), rel=1e-5)


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_every_kind_is_told_of_the_data_before_it_learns(kind):
    config = ProgressiveVAELevelConfig(num_channels=1, codebook_size=8, quantizer=kind)
    module, vectors = make_quantizer(config), torch.randn(50, config.codebook_dim)
    before = module.codebook.clone()
    module.initialize(vectors, torch.Generator().manual_seed(0))
    assert torch.equal(module.codebook, before) == (kind != "vq")
    names = dict([*module.named_buffers(), *module.named_parameters()])
    assert set(module.TRAINING_STATE) <= set(names) - {"codebook"}


def test_statistics_of_two_halves_add_up_to_those_of_the_whole():
    module, latents = quantizer(), torch.randn(6, 4, 3, 3)
    codes = module.encode(latents)
    halves = [module.statistics(latents[i : i + 3], codes[i : i + 3]) for i in (0, 3)]
    for whole, first, second in zip(module.statistics(latents, codes), *halves, strict=True):
        assert torch.allclose(whole, first + second, atol=1e-5)


def test_update_with_decay_0_is_the_k_means_step():
    module, latents = quantizer(), torch.randn(20, 4, 3, 3)
    codes = module.encode(latents)
    module.update(*module.statistics(latents, codes), decay=0.0)
    vectors = latents.movedim(1, -1)
    for k in codes.unique():
        assert torch.allclose(module.codebook[k], vectors[codes == k].mean(0), atol=1e-5)


def test_update_is_a_running_mean():
    module = quantizer(1, 2)
    for value in (1.0, 3.0):
        module.update(torch.tensor([2.0]), torch.full((1, 2), 2 * value))
    # Counts 0.2, 0.38; sums 0.2·1, then 0.9·0.2 + 0.1·6.
    assert torch.allclose(module.codebook, torch.full((1, 2), (0.18 + 0.6) / 0.38))


def test_restart_resets_the_running_statistics():
    module = quantizer(4, 2)
    module.update(torch.tensor([5.0, 5.0, 0.0, 5.0]), torch.ones(4, 2))
    assert module.dead().tolist() == [False, False, True, False]
    candidate = torch.tensor([[7.0, 7.0]])
    module.restart(module.dead(), candidate.expand(4, -1))
    assert not module.dead().any()
    module.update(torch.zeros(4), torch.zeros(4, 2))  # would undo a restart that forgot them
    assert torch.allclose(module.codebook[2], candidate[0])


def plain_update(book, latents, codes):
    """The update of `VectorQuantizer.update_from` with the control flow of the host."""
    vectors = latents.movedim(1, -1).flatten(0, -2)
    counts = torch.bincount(codes.flatten(), minlength=len(book["codebook"])).float()
    sums = torch.zeros_like(book["codebook"]).index_add_(0, codes.flatten(), vectors)
    book["ema_counts"].lerp_(counts, 1 - 0.9)
    book["ema_sums"].lerp_(sums, 1 - 0.9)
    used = book["ema_counts"] > 0
    book["codebook"][used] = book["ema_sums"][used] / book["ema_counts"][used, None]
    dead = book["ema_counts"] < 0.1 * book["ema_counts"].mean()
    if dead.any():
        step = max(1, len(vectors) // int(dead.sum()))
        replacements = vectors[int(dead.nonzero()[0]) % step :: step]
        rows = torch.arange(int(dead.sum())) % len(replacements)
        count = book["ema_counts"][~dead].mean()
        book["codebook"][dead] = replacements[rows]
        book["ema_counts"][dead] = count
        book["ema_sums"][dead] = replacements[rows] * count
    return int(dead.sum())


@pytest.mark.parametrize("num_latents", [3, 40])
def test_an_update_is_that_of_plain_code_and_waits_for_nothing(num_latents):
    """Over steps with dead codes and without."""
    module = quantizer(12, 4)
    module.codebook[[2, 7]] = 50.0  # far from all latents
    book = {name: buffer.clone() for name, buffer in module.named_buffers()}
    numbers_of_dead = set()
    generator = torch.Generator().manual_seed(0)
    for step in range(60):
        latents = torch.randn(num_latents, 4, 2, 1, generator=generator) * (1 + step % 7)
        codes = module.encode(latents)
        numbers_of_dead.add(plain_update(book, latents, codes))
        module.update_from(latents, codes, gather=lambda tensor: tensor)
        for name, buffer in module.named_buffers():
            scale = book[name].abs().max()
            assert torch.allclose(buffer, book[name], rtol=0, atol=5e-7 * scale), (name, step)
    assert {0} < numbers_of_dead
    count = count_ops(lambda: module.update_from(latents, codes, lambda tensor: tensor))
    assert not count.waits and sum(count.ops.values()) <= 50


def test_all_codes_may_be_dead():
    module = quantizer(3, 2)
    replacements = torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]])
    module.restart(torch.ones(3, dtype=torch.bool), replacements)
    assert torch.equal(module.codebook, replacements)
    assert torch.equal(module.ema_counts, torch.ones(3))


def test_k_means_finds_clusters():
    centers = torch.tensor([[5.0, 0.0], [0.0, 5.0], [-5.0, 0.0], [0.0, -5.0]])
    noise = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    vectors = centers.repeat_interleave(50, 0) + 0.1 * noise
    module = quantizer(8, 2)
    module.initialize(vectors, torch.Generator().manual_seed(0))
    assert (torch.cdist(centers, module.codebook).min(1).values < 0.3).all()
    assert (module.ema_counts > 0).all()


@pytest.mark.parametrize(
    ("size", "levels"), [(1, [1]), (3, [3]), (16, [4, 4]), (64, [8, 8]), (100, [4, 5, 5])]
)
def test_scalars_multiply_to_the_codebook(size, levels):
    assert fsq_levels(size) == levels
    module = FiniteScalarQuantizer(levels)
    assert module.codebook.shape == (size, len(levels))
    assert len(module.codebook.unique(dim=0)) == size


def test_a_finite_scalar_quantizer_reaches_every_code():
    module = FiniteScalarQuantizer([5, 6])
    centers = torch.cartesian_prod((torch.arange(5) + 0.5) / 5, (torch.arange(6) + 0.5) / 6)
    latents = centers.logit().T.reshape(1, 2, 5, 6).requires_grad_()
    output = module(latents)
    assert torch.equal(output.codes.flatten(), torch.arange(30))
    assert torch.allclose(output.quantized, module.lookup(output.codes))
    output.quantized.sum().backward()
    assert (latents.grad > 0).all()  # the gradient of the squashed latent
    far = module.encode(latents.detach() * 1e6)  # the middle one of five values stays at 0
    assert far.unique().tolist() == [0, 5, 12, 17, 24, 29]


def test_a_categorical_encoder_draws_from_its_distribution():
    module = GumbelQuantizer(4, 3)
    latents = torch.randn(1, 3, 1, 1)
    probabilities = module.log_probs(latents).exp().flatten()
    many = latents.expand(20_000, -1, -1, -1)
    drawn = module.encode(many, torch.Generator().manual_seed(0))
    for codes in (drawn, module(many).codes):  # the forward pass sees true draws too
        frequency_table = torch.bincount(codes.flatten(), minlength=4) / 20_000
        assert (frequency_table - probabilities).abs().sum() / 2 < 0.02
    assert module.encode(latents).item() == probabilities.argmax()
    assert module.entropy(latents).item() == pytest.approx(
        torch.distributions.Categorical(probabilities).entropy().item(), rel=1e-4
    )


def test_the_kl_to_the_uniform_prior_and_its_gradient():
    module = GumbelQuantizer(4, 3)
    latents = torch.randn(2, 3, 2, 5, requires_grad=True)
    quantized, codes, loss = module(latents)
    kl = (10 * math.log(4) - module.entropy(latents)).mean()
    assert torch.allclose(loss, kl / 10)  # a mean over the codes
    assert torch.allclose(module(latents, num_values=40).loss, kl / 40)
    assert torch.allclose(quantized, module.lookup(codes), atol=1e-6)
    (quantized.square().sum() + loss).backward()
    assert latents.grad.abs().min() > 0 and module.codebook.grad.abs().sum() > 0


def test_the_temperature_anneals_to_its_end():
    module = GumbelQuantizer(4, 8, [2.0, 0.5], temperature_decay=0.5)
    seen = []
    for _ in range(3):
        seen.append(module.temperature.item())
        module.after_step(None, None, None)
    assert seen == [2.0, 1.0, 0.5] and module.temperature.item() == 0.5


def test_noise_replaces_codes_by_others():
    module, codes = quantizer(8, 2), torch.arange(8).repeat(100).view(2, 20, 20)
    assert torch.equal(module.add_noise(codes, torch.zeros(2), None), codes)
    corrupted = module.add_noise(codes, torch.ones(2), None)
    assert (corrupted != codes).all() and len(corrupted[codes == 0].unique()) == 7
    half = module.add_noise(codes, torch.tensor([0.5, 0.0]), None)
    assert 0.3 < (half[0] != codes[0]).float().mean() < 0.7 and torch.equal(half[1], codes[1])
    distances = torch.cdist(module.codebook, module.codebook)
    near = module.add_noise(codes, torch.ones(2), num_nearest=2)
    assert (distances[codes, near] <= distances.sort().values[:, 2][codes] + 1e-5).all()
    single = quantizer(1, 2)
    zeros = torch.zeros(1, 2, 2, dtype=torch.long)
    assert torch.equal(single.add_noise(zeros, torch.ones(1), None), zeros)


def test_statistics_weigh_as_much_as_they_are_told():
    """So a code that k-means found and nobody needs any more is dead after a few hundred steps."""
    vectors = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    books = [VectorQuantizer(8, 2, 0.25, 0.99, 0.1) for _ in range(2)]
    for book, weight in zip(books, (None, 20), strict=True):
        book.initialize(vectors, torch.Generator().manual_seed(0), weight)
    assert torch.equal(books[0].codebook, books[1].codebook)
    assert [round(book.ema_counts.sum().item()) for book in books] == [300, 20]
    for book in books:
        moved = (book.ema_sums / book.ema_counts[:, None] - book.codebook).abs().max()
        assert moved < 1e-5
