import pytest
import torch
from conftest import tiny_level

from progressive_vae import ProgressiveVAELevel, ProgressiveVAELevelConfig
from progressive_vae.level import ProgressiveVAELevelOutput


def identity(tensor):
    return tensor


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (8, 8)])
@pytest.mark.parametrize("downsample", [2, 4])
@pytest.mark.parametrize("kind", [dict(num_channels=1), dict(num_channels=3), dict(num_symbols=5)])
def test_any_size(kind, downsample, size):
    level = tiny_level(downsample=downsample, **kind)
    if level.config.is_finest:
        finer = torch.randint(256, (2, kind["num_channels"], *size)) / 127.5 - 1
    else:
        finer = torch.randint(5, (2, *size))
    codes = level.encode(finer)
    assert codes.shape == (2, -(-size[0] // downsample), -(-size[1] // downsample))
    with torch.no_grad():
        assert level.log_prob(finer, codes).shape == (2,)
    drawn = level.sample(codes, finer_size=size)
    assert drawn.shape == finer.shape and drawn.dtype == finer.dtype


@pytest.mark.parametrize("order", ["factorized", "lattice"])
def test_forward_is_the_loss_under_the_uniform_prior(order):
    level = tiny_level(num_channels=1, decoder_order=order)
    pixels = torch.randint(256, (3, 1, 4, 6)) / 127.5 - 1
    output = level(pixels)
    codes = level.encode(pixels)
    assert torch.equal(output.codes, codes)
    assert torch.allclose(output.log_prob, level.log_prob(pixels, codes), atol=1e-3)
    commitment = (output.latents - level.quantizer.lookup(codes)).square().mean()
    expected = -output.log_prob.mean() / 24 + 0.25 * commitment
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert isinstance(level(pixels, return_dict=False), tuple)
    output.loss.backward()
    assert all(p.grad is not None for p in level.parameters())


def test_saved_and_loaded_alike(tmp_path):
    level, finer = tiny_level(num_channels=3, downsample=4), torch.rand(2, 3, 5, 7) * 2 - 1
    output = level.train()(finer)
    level.after_step(output, identity)
    level.eval().save_pretrained(tmp_path)
    loaded = ProgressiveVAELevel.from_pretrained(tmp_path)
    assert torch.equal(level(finer).log_prob, loaded(finer).log_prob)
    ours, theirs = level.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys() and "quantizer.ema_sums" in ours
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_half_precision_still_knows_256_values():
    level = tiny_level(num_channels=1).to(torch.bfloat16)
    pixels = (torch.arange(256) / 127.5 - 1).view(1, 1, 16, 16)
    assert torch.equal(level._values(pixels).flatten(), torch.arange(256))
    assert level.log_prob(pixels, level.encode(pixels)).isfinite().all()


def test_a_dead_code_comes_back_to_life():
    level, pixels = tiny_level(num_channels=1, codebook_size=16), torch.rand(8, 1, 8, 8) * 2 - 1
    level.quantizer.ema_counts.fill_(10.0)
    level.quantizer.ema_sums.copy_(level.quantizer.codebook * 10)
    level.quantizer.codebook[3] = 1e3  # far from every latent
    level.quantizer.ema_counts[3] = 1e-3
    level.after_step(level(pixels), identity)
    latents = level(pixels).latents.movedim(1, -1).flatten(0, -2)
    assert torch.cdist(level.quantizer.codebook[3:4], latents).min() < 1e-3


def test_gathered_halves_move_the_codebook_like_the_whole():
    pixels = torch.rand(4, 1, 8, 8) * 2 - 1
    whole, halves = tiny_level(num_channels=1), tiny_level(num_channels=1)
    whole.after_step(whole(pixels), identity)
    outputs = [halves(pixels[:2]), halves(pixels[2:])]
    parts = [halves.quantizer.statistics(o.latents, o.codes) for o in outputs]
    gathered = iter(
        [torch.stack([p[0] for p in parts]), torch.stack([p[1] for p in parts])]
        + [torch.cat([o.latents.movedim(1, -1).flatten(0, -2) for o in outputs])]
    )
    halves.after_step(outputs[0], lambda tensor: next(gathered))
    assert torch.allclose(whole.quantizer.codebook, halves.quantizer.codebook, atol=1e-5)


def test_initialization_is_the_one_asked_for():
    level = ProgressiveVAELevel(ProgressiveVAELevelConfig(num_channels=1, hidden_size=32))
    block = level.decoder.stages[0].blocks[0]
    assert not block.conv2.weight.any() and block.conv1.weight.std() > 0.04
    table = level.decoder.embedding.weight
    assert torch.cdist(table[:1], table[1:2]) < torch.cdist(table[:1], table[128:129])


@pytest.mark.parametrize(
    ("finer", "message"),
    [
        (torch.zeros(1, 3, 4, 4), r"finer of shape \(B, 1, H, W\), got \(1, 3, 4, 4\)"),
        (torch.zeros(1, 4, 4), "finer of shape"),
        (torch.zeros(1, 1, 4, 4).long(), "finer of a floating dtype in .*got torch.int64"),
        (torch.full((1, 1, 4, 4), 2.0), r"finer in \[-1, 1\], got values in \[2.0, 2.0\]"),
        (torch.full((1, 1, 4, 4), float("nan")), r"finer in \[-1, 1\], got values in \[nan"),
    ],
)
def test_bad_pixels(finer, message):
    level = tiny_level(num_channels=1)
    for call in (level.encode, level):
        with pytest.raises(ValueError, match=message):
            call(finer)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.encode(torch.zeros(1, 4, 4)), "finer of dtype torch.int64"),
        (lambda m: m.encode(torch.full((1, 4, 4), 9)), "finer in 0 … 4, got values in 9 … 9"),
        (lambda m: m.sample(torch.full((1, 2, 2), -1)), "codes in 0 … 2, got values in -1"),
        (lambda m: m.sample(torch.zeros(1, 2).long()), r"codes of shape \(B, H, W\)"),
        (
            lambda m: m.log_prob(torch.zeros(1, 4, 4).long(), torch.zeros(1, 3, 3).long()),
            r"codes of shape \(B, 2, 2\), got \(1, 3, 3\)",
        ),
        (lambda m: m.sample(torch.zeros(1, 2, 2).long(), temperature=-0.5), "temperature >= 0"),
        (lambda m: m.sample(torch.zeros(1, 2, 2).long(), finer_size=(9, 9)), "finer_size whose"),
    ],
)
def test_bad_codes(call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny_level(num_symbols=5))


def test_output_has_the_loss_in_front():
    assert next(iter(ProgressiveVAELevelOutput(loss=torch.ones(()), codes=torch.ones(1)))) == "loss"
