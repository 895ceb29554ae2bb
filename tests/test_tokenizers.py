"""Levels that hold a pretrained tokenizer: its codes and images, and probabilities."""

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate.state import AcceleratorState

from helpers.hub import HUB
from progressive_vae import (
    ProgressiveVAELevel,
    ProgressiveVAELevelConfig,
    ProgressiveVAEPipeline,
    ProgressiveVAEPrior,
    ProgressiveVAEPriorConfig,
)
from progressive_vae.inpainting import observe
from progressive_vae.models import pretrained_tokenizers as tokenizers
from progressive_vae.models.fingerprint import fingerprint
from progressive_vae.training import train

VQ_MODEL = {
    "model_type": "vq_model", "block_out_channels": [4, 8], "layers_per_block": 1,
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
    "latent_channels": 3, "num_vq_embeddings": 12, "norm_num_groups": 2,
}  # fmt: skip
JANUS = {
    "model_type": "janus_vqgan", "base_channels": 32, "channel_multiplier": [1, 1, 1],
    "num_res_blocks": 1, "latent_channels": 4, "embed_dim": 5, "num_embeddings": 12,
}  # fmt: skip
DALLE = {"model_type": "dalle_dvae", "vocab_size": 12, "n_hid": 4, "n_init": 6}
SPATIAL = {**VQ_MODEL, "norm_type": "spatial", "block_out_channels": [32, 32],
           "do_normalize": False}  # fmt: skip
LFQ = {
    "model_type": "lfq_vqgan", "base_channels": 32, "channel_multiplier": [1, 1],
    "num_res_blocks": 1, "num_bits": 4,
}  # fmt: skip
TITOK = {
    "model_type": "titok", "image_size": 16, "num_tokens": 8, "codebook_size": 12,
    "codebook_dim": 5, "encoder_width": 8, "encoder_num_layers": 1, "encoder_patch_size": 8,
    "decoder_width": 8, "decoder_num_layers": 1, "decoder_patch_size": 4,
    "pixel_codebook_size": 6, "latent_channels": 4, "base_channels": 32,
    "channel_multiplier": [1, 1, 1], "num_res_blocks": 1,
}  # fmt: skip
# The fields of a level that they decide: codebook_size, codebook_dim, downsample.
TOKENIZERS = [(VQ_MODEL, 12, 3, 2), (JANUS, 12, 5, 4), (DALLE, 12, 6, 8), (SPATIAL, 12, 3, 2),
              (LFQ, 16, 4, 2)]  # fmt: skip
KINDS = pytest.mark.parametrize("tokenizer", [row[0] for row in TOKENIZERS])


def level_with(tokenizer, seed: int = 0, **config) -> ProgressiveVAELevel:
    config = {"decoder_type": "auxiliary", "hidden_size": 8, "num_layers": 1, **config}
    torch.manual_seed(seed)
    return ProgressiveVAELevel(
        ProgressiveVAELevelConfig(tokenizer_config=tokenizer, **config)
    ).eval()


def pixels(count: int = 3, height: int = 11, width: int = 13):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 3, height, width), generator=generator) / 127.5 - 1


@pytest.mark.parametrize("tokenizer, size, dim, downsample", TOKENIZERS)
def test_a_tokenizer_decides_what_a_level_is(tokenizer, size, dim, downsample):
    level = level_with(tokenizer)
    assert (level.config.codebook_size, level.config.codebook_dim) == (size, dim)
    assert (level.config.downsample, level.config.num_channels) == (downsample, 3)
    codes = level.encode(pixels())
    assert codes.shape == (3, -(-11 // downsample), -(-13 // downsample))
    assert 0 <= codes.min() and codes.max() < size
    image = level.expect(codes, (11, 13))
    assert image.shape == (3, 3, 11, 13) and image.abs().max() <= 1
    assert level.quantizer.lookup(codes).shape == (3, dim, *codes.shape[1:])


@KINDS
def test_pixels_have_probabilities(tokenizer):
    level = level_with(tokenizer, seed=1)
    torch.nn.init.normal_(level.auxiliary.scales[3].weight)
    codes, channels = level.encode(pixels()), []

    def step_fn(distribution, step):
        masses = distribution.probs()
        assert masses.shape == (3, len(step.positions), 256) and masses.min() >= 0
        torch.testing.assert_close(masses.sum(-1), torch.ones_like(masses[..., 0]))
        channels.append(step.channel)
        return masses.argmax(-1)

    level.walk(codes, step_fn, finer_size=(11, 13))
    assert channels == [0, 1, 2]
    samples = level.sample(codes, generator=torch.Generator().manual_seed(0), finer_size=(11, 13))
    assert samples.shape == (3, 3, 11, 13)
    assert torch.isfinite(level.log_prob(samples, codes)).all()


@KINDS
def test_only_the_scales_learn(tokenizer):
    level = level_with(tokenizer).train()
    assert not any(
        module.training
        for part in (level.encoder, level.quantizer, level.auxiliary.decoder)
        for module in part.modules()
    )
    names = [name for name, parameter in level.named_parameters() if parameter.requires_grad]
    assert names and all(name.startswith("auxiliary.scales.") for name in names)
    finer = pixels()
    level(finer, level.encode(finer)).loss.backward()
    grads = [p.grad for p in level.auxiliary.scales.parameters()]
    assert any(grad.abs().sum() > 0 for grad in grads)


@KINDS
def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path):
    level = level_with(tokenizer)
    level.save_pretrained(tmp_path)
    again = ProgressiveVAELevel.from_pretrained(tmp_path)
    assert again.config.tokenizer_config == tokenizer
    for name, value in level.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    codes = level.encode(pixels())
    assert torch.equal(codes, again.encode(pixels()))
    # Libraries of matrix products look at where numbers lie, too, which is another place now.
    torch.testing.assert_close(level.log_prob(pixels(), codes), again.log_prob(pixels(), codes))
    assert not any(p.requires_grad for p in again.encoder.parameters())


def test_a_stronger_decoder_of_the_same_codes():
    level = level_with(VQ_MODEL)
    strong = level.with_decoder(
        decoder_type="conv", num_groups=4, pixel_distribution="guided_logistic_mixture"
    ).eval()
    codes = level.encode(pixels())
    assert torch.equal(strong.encode(pixels()), codes)
    assert torch.equal(strong.expect(codes), level.expect(codes))
    assert fingerprint([strong]) == fingerprint([level])
    assert strong.log_prob(pixels(), codes).shape == (3,)
    # Vectors of any length are of one length to the decoder.
    rms = strong.quantizer.normalize(strong.quantizer.codebook).square().mean()
    assert rms.item() == pytest.approx(1, rel=1e-4)


def test_the_codebook_of_a_lookup_free_tokenizer_is_never_in_memory(monkeypatch):
    level = level_with({**LFQ, "num_bits": 18, "network": "maskgit"})
    monkeypatch.setattr(tokenizers.SignQuantizer, "codebook", property(lambda _: 1 / 0))
    codes = level.encode(pixels())
    assert codes.max() > 2**12 and level.expect(codes, (11, 13)).isfinite().all()
    assert level.sample(codes, finer_size=(11, 13)).shape == (3, 3, 11, 13)
    level.quantizer.add_noise(codes, torch.ones(3), None)
    strong = level.with_decoder(decoder_type="conv").eval()
    assert strong.log_prob(pixels(), codes).isfinite().all()


def test_a_row_of_tokens():
    """A tokenizer for images of one size: no code is of a patch."""
    level = level_with(TITOK)
    images = pixels(height=16, width=16)
    codes = level.encode(images)
    assert codes.shape == (3, 1, 8) and level.expect(codes).shape == (3, 3, 16, 16)
    assert level.log_prob(images, codes).isfinite().all()
    with pytest.raises(ValueError, match=r"images of \(16, 16\), the size of the tokenizer, got"):
        level.expect(codes, (11, 13))
    with pytest.raises(ValueError, match="expected decoder_type='auxiliary' of a tokenizer"):
        level.with_decoder(decoder_type="conv")

    above = ProgressiveVAELevel(
        ProgressiveVAELevelConfig(num_symbols=12, hidden_size=8, num_layers=1, codebook_size=6)
    )
    backbone = {**BACKBONE, "vocab_size": 7}
    prior = ProgressiveVAEPrior(
        ProgressiveVAEPriorConfig(codebook_size=6, grid_size=[1, 4], backbone_config=backbone)
    )
    pipe = ProgressiveVAEPipeline(prior=prior, level_1=above.eval(), level_2=level)
    assert pipe.grid_sizes == [(1, 4), (1, 8), (16, 16)]
    unit = (images + 1) / 2
    assert pipe.bits_per_dim(unit)["total"] > 0
    for size in ([11, 16], [32, 32]):
        with pytest.raises(ValueError, match="the size of the tokenizer"):
            ProgressiveVAEPipeline(None, level_1=level, image_size=size)

    # A token that sees masked pixels is uncertain, wherever they are.
    mask = torch.zeros(16, 16)
    for width, confidence in ((0, 1.0), (4, 0.5), (8, 0.0)):
        mask[:, :width] = 1
        observed = observe(pipe.stack, unit, mask, 3)[1]
        assert observed.confidence.shape == (3, 1, 1, 8)
        assert (observed.confidence == confidence).all()


def test_images_are_seen_as_the_source_saw_them():
    """The same weights that see [0, 1] say of it what those that see [−1, 1] say of twice as much
    less one."""
    plain, halved = level_with(VQ_MODEL), level_with({**VQ_MODEL, "do_normalize": False})
    halved.load_state_dict(plain.state_dict())
    seen = pixels()
    torch.testing.assert_close(halved.encoder(seen * 2 + 1), plain.encoder(seen + 1))
    quantized = plain.quantizer.lookup(plain.encode(seen))
    unscaled, scaled = (level.auxiliary(quantized, (12, 14))[:, :3] for level in (plain, halved))
    torch.testing.assert_close(scaled, unscaled * 2 - 1)


def test_large_batches_go_through_in_parts(monkeypatch):
    level = level_with(JANUS)
    codes = level.encode(pixels(5))
    image = level.expect(codes)
    monkeypatch.setattr(tokenizers, "PIXELS_AT_A_TIME", 200)
    monkeypatch.setattr(tokenizers, "DISTANCES_AT_A_TIME", 200)
    assert torch.equal(level.encode(pixels(5)), codes)
    torch.testing.assert_close(level.expect(codes), image)


@pytest.mark.parametrize(
    "tokenizer, words",
    [
        ({}, "model_type among .*vq_model.* got None"),
        ({**VQ_MODEL, "model_type": "vae"}, "model_type among .* got 'vae'"),
        ({**VQ_MODEL, "width": 3}, r"got \['width'\]"),
        ({**VQ_MODEL, "block_out_channels": 4}, "fields of a 'vq_model'"),
        ({**VQ_MODEL, "block_out_channels": [4, 8, 8]}, "as many down blocks as up blocks"),
        ({**VQ_MODEL, "block_out_channels": [4, 2**20]}, "block_out_channels of at most 16 widths"),
        ({**VQ_MODEL, "layers_per_block": 10**6}, "expected layers_per_block <= "),
        ({**VQ_MODEL, "norm_num_groups": 3}, "network of 'vq_model'.*divisible"),
        ({**VQ_MODEL, "num_vq_embeddings": 0}, "num_vq_embeddings >= 1 .* got 0"),
        ({**VQ_MODEL, "norm_num_groups": -1}, "norm_num_groups >= 1 .* got -1"),
        ({**VQ_MODEL, "out_channels": 1}, "as many output as input channels, got 1 and 3"),
        ({**JANUS, "double_latent": True}, "double_latent=False"),
        ({**DALLE, "n_hid": 4.5}, "network of 'dalle_dvae'"),
        ({**JANUS, "similarity": "l1"}, "expected similarity in .*, got 'l1'"),
        ({**LFQ, "network": "vqgan"}, "expected network in .*, got 'vqgan'"),
        ({**LFQ, "num_bits": 10**9}, "expected num_bits <= 20"),
        ({**LFQ, "base_channels": 33}, "network of 'lfq_vqgan'.*divisible"),
        ({**TITOK, "encoder_patch_size": 5}, "expected encoder_patch_size to divide image_size"),
        ({**TITOK, "channel_multiplier": [1]}, "a decoder that upsamples by decoder_patch_size=4"),
    ],
)  # fmt: skip
def test_what_is_no_tokenizer_is_an_error(tokenizer, words):
    with pytest.raises(ValueError, match=words):
        level_with(tokenizer)


def test_fields_that_a_tokenizer_decides_cannot_be_others():
    with pytest.raises(
        ValueError, match="expected codebook_size=12, as tokenizer_config .* got 13"
    ):
        level_with(VQ_MODEL, codebook_size=13)
    with pytest.raises(ValueError, match="num_channels .* num_symbols"):
        level_with(VQ_MODEL, num_symbols=5)
    assert level_with(VQ_MODEL, codebook_size=12, downsample=2).config.codebook_size == 12


BACKBONE = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16,
            "num_hidden_layers": 1, "num_attention_heads": 2}  # fmt: skip
FEW = {"max_train_steps": 3}
RECIPE = {
    "num_levels": 2,
    "levels": {"hidden_size": 8, "num_layers": 1, "codebook_size": 6, "auxiliary_hidden_size": 8,
               "encoder_fit": FEW, "fit": FEW},
    "prior": {"backbone_config": BACKBONE, "fit": FEW},
    "data": {"eval_fraction": 0.3},
    "run": {"report_to": "none", "num_validation_images": 2},
}  # fmt: skip


def test_from_a_tokenizer_to_samples(tmp_path):
    """A level and a prior above it, its scales, a repository; then a strong decoder of it."""
    tokenizer = level_with(VQ_MODEL)
    tokenizer.save_pretrained(tmp_path / "converted")
    rng = np.random.default_rng(0)
    images = [PIL.Image.fromarray(x) for x in rng.integers(0, 256, (12, 9, 16, 3), np.uint8)]
    run = {"run": {**RECIPE["run"], "finest_level": str(tmp_path / "converted")}}
    AcceleratorState._reset_state(reset_partial_state=True)
    pipe = train({**RECIPE, **run}, images, tmp_path / "run")
    for name, value in tokenizer.state_dict().items():
        is_trained = name.startswith("auxiliary.scales.")
        assert is_trained or torch.equal(value, pipe.level_2.state_dict()[name]), name
    assert pipe.level_2.auxiliary.scales[3].weight.abs().max() > 0  # they have learned
    assert pipe.grid_sizes == [(3, 4), (5, 8), (9, 16)]
    pipe.push_to_hub("org/on-a-tokenizer")
    again = ProgressiveVAEPipeline.from_pretrained("org/on-a-tokenizer")
    assert "level_2/model.safetensors" in HUB.files("org/on-a-tokenizer")
    assert again.preview(images[:2], level=1)[0].size == (16, 9)
    samples = again(num_images_per_prompt=2, generator=torch.Generator().manual_seed(0)).images
    bits = again.bits_per_dim(samples)
    assert [*bits] == ["prior", "level_1", "level_2", "total"]
    assert again.decompress(again.compress(samples)).shape == (2, 3, 9, 16)

    AcceleratorState._reset_state(reset_partial_state=True)
    assert train({**RECIPE, **run}, images, tmp_path / "run").level_2  # nothing is trained again
    refit = {"level_2": {"refit": {"decoder_type": "conv", "fit": FEW}}}
    AcceleratorState._reset_state(reset_partial_state=True)
    strong = train({**RECIPE, **run, **refit}, images, tmp_path / "strong")
    assert strong.level_2.config.ordering == "lattice"
    assert fingerprint([strong.level_2]) == fingerprint([tokenizer])
