"""Auxiliary decoders: encoders that learn by them, previews, and decoders that come later."""

import json

import pytest
import torch
import yaml

from helpers.images import random_images
from helpers.interruptions import weights
from helpers.models import AUXILIARY, AUXILIARY_ONLY, pipeline_of, tiny_level, tiny_prior
from helpers.probabilities import all_grids
from helpers.processes import TRAIN, start
from helpers.recipes import FEW, RECIPE, SMALLER
from progressive_vae import ProgressiveVAELevel, ProgressiveVAEPipeline
from progressive_vae.evaluation.likelihood import psnr_of, rate_distortion
from progressive_vae.models import distributions
from progressive_vae.models.fingerprint import fingerprint
from progressive_vae.models.preview_decoder import PreviewDecoder
from progressive_vae.training import train

pytestmark = pytest.mark.usefixtures("fresh_state")


def test_it_is_a_distribution():
    level, grids = tiny_level(num_symbols=3, **AUXILIARY_ONLY), all_grids(3, 2, 2)
    codes = torch.ones(len(grids), 1, 1, dtype=torch.long)
    with torch.no_grad():
        assert level.log_prob(grids, codes).exp().sum().item() == pytest.approx(1, abs=1e-4)
        pixel = tiny_level(num_channels=1, **AUXILIARY_ONLY)
        values = (torch.arange(256) / 127.5 - 1).view(256, 1, 1, 1)
        nats = pixel.log_prob(values, torch.ones(256, 1, 1, dtype=torch.long))
    assert nats.exp().sum().item() == pytest.approx(1, abs=1e-4)
    with pytest.raises(ValueError, match="auxiliary_hidden_size for decoder_type='auxiliary'"):
        tiny_level(num_channels=1, decoder_type="auxiliary")


@pytest.mark.parametrize("kind", [AUXILIARY_ONLY, AUXILIARY])
def test_previews(kind, images):
    pipe = pipeline_of(**kind)
    codes = pipe.encode(images)
    for k in (1, 2):
        expectation = pipe.preview(codes, k, output_type="pt")
        assert (
            expectation.shape == (4, 3, 5, 7) and 0 <= expectation.min() and expectation.max() <= 1
        )
        assert torch.equal(expectation, pipe.preview(images, k, output_type="pt"))
        again = pipe.preview(images, k, output_type="pt", batch_size=3)
        assert torch.allclose(expectation, again, atol=1e-4)
        assert torch.equal(expectation, pipe.preview(codes[:k], output_type="pt"))
    output = pipe(num_images_per_prompt=3, preview=True, output_type="pt")
    assert len(output.codes) == 2
    assert torch.equal(output.images, pipe.preview(output.codes, output_type="pt"))
    assert pipe.preview(images)[0].size == (7, 5)
    with pytest.raises(ValueError, match="expected level in 1 … 1, got 2"):
        pipe.preview(codes[:1], 2)
    with pytest.raises(ValueError, match="expected a level with an auxiliary decoder"):
        pipeline_of().preview(images)


def test_a_decoder_that_comes_later_leaves_codes_and_previews_alone(tmp_path, images):
    level = tiny_level(num_channels=3, **AUXILIARY_ONLY)
    pixels = images / 127.5 - 1
    later = level.with_decoder(decoder_type="conv", hidden_size=8, num_layers=1).eval()
    later.save_pretrained(tmp_path)
    loaded = ProgressiveVAELevel.from_pretrained(tmp_path).eval()
    codes = level.encode(pixels)
    assert torch.equal(codes, loaded.encode(pixels)) and level.decoder is None
    assert torch.equal(level.expect(codes, (5, 7)), loaded.expect(codes, (5, 7)))
    assert fingerprint([level]) == fingerprint([loaded])
    assert not any(p.requires_grad for p in [*later.encoder.parameters(),
                                             *later.auxiliary.parameters()])  # fmt: skip
    assert all(p.requires_grad for p in later.decoder.parameters())


def test_a_level_of_codes_learns_by_the_preview():
    """The gradient of the preview's error reaches the encoder, and no finer level."""
    pipe = pipeline_of(**AUXILIARY_ONLY)
    coarsest, finest = pipe.level_1.train(), pipe.level_2.requires_grad_(False)
    finer = torch.randint(4, (2, 3, 4))

    paint = PreviewDecoder([finest], [(5, 7)])
    plain = coarsest(finer).loss
    with_preview = coarsest(finer, preview_decoder=paint).loss
    assert with_preview > plain
    gradient = torch.autograd.grad(with_preview - plain, coarsest.encoder.out[1].weight)[0]
    assert gradient.abs().max() > 0
    # An expectation that is certain and right costs nothing.
    assert torch.equal(paint.decode_codes(finer), finest.expect(finer, (5, 7)))
    exact = torch.nn.functional.one_hot(finer, 4).movedim(-1, 1).float()
    assert torch.allclose(paint.decode_codes(finer), finest.expect(exact, (5, 7)), atol=1e-6)


@pytest.mark.parametrize("num_symbols", [5, 2100])
def test_previews_go_by_expected_vectors(num_symbols, monkeypatch):
    """They are what probabilities of all codes would make, passed on from level to level."""
    monkeypatch.setattr(distributions, "LOGITS_PER_CHUNK", 50_000)  # several parts
    shared = {"decoder_type": "auxiliary", "auxiliary_hidden_size": 8}
    levels = [
        tiny_level(num_symbols=4, seed=1, **shared),
        tiny_level(num_symbols=num_symbols, codebook_size=4, codebook_dim=3, seed=2, **shared),
        tiny_level(num_channels=3, codebook_size=num_symbols, codebook_dim=2, seed=3, **shared),
    ]
    pipe = ProgressiveVAEPipeline.from_levels(None, levels, [13, 15])
    codes = torch.randint(3, (6, 2, 2))
    expectation = codes
    for level, size in zip(levels, pipe.grid_sizes[1:], strict=True):
        expectation = level.expect(expectation, size)
        if level is not levels[-1]:
            assert expectation.shape == (6, level.config.num_symbols, *size)
            assert torch.allclose(expectation.sum(1), torch.ones(6, *size), atol=1e-5)
    preview = pipe.preview([codes], output_type="pt")
    assert torch.allclose(preview * 2 - 1, expectation, atol=1e-5)
    paint = PreviewDecoder(levels[1:], pipe.grid_sizes[2:])
    vectors = levels[1].quantizer.codebook[torch.randint(4, (2, 4, 4))].movedim(-1, 1)
    vectors.requires_grad_()
    gradient = torch.autograd.grad(paint(vectors).square().sum(), vectors)[0]
    assert gradient.abs().max() > 0


def test_the_finest_level_learns_by_its_preview(images):
    pixels, losses = images / 127.5 - 1, []
    for weight in (0.0, 10.0):
        level = tiny_level(num_channels=3, reconstruction_weight=weight, **AUXILIARY_ONLY).train()
        losses.append(level(pixels).loss)
    expectation = level.expect(level.encode(pixels), (5, 7))
    error = (expectation - pixels).square().mean()
    assert torch.allclose(losses[1] - losses[0], 10 * error, rtol=1e-3)


def test_a_guided_decoder_leaves_the_auxiliary_one_alone(images):
    """It is conditioned on the preview of the one pass that the auxiliary decoder learns by."""
    level = tiny_level(
        num_channels=3, pixel_distribution="guided_logistic_mixture", **AUXILIARY
    ).train()
    passes = []
    level.auxiliary.register_forward_hook(lambda *_: passes.append(1))
    output = level(images / 127.5 - 1)
    weight = level.auxiliary.out[1].weight
    of_decoder = torch.autograd.grad(output.log_prob.sum(), weight, allow_unused=True)[0]
    assert of_decoder is None and len(passes) == 1
    output = level(images / 127.5 - 1)
    output.loss.backward()
    assert weight.grad.abs().max() > 0


def test_codes_that_look_alike_start_alike():
    encoder = tiny_level(num_symbols=6).encoder
    codebook = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    codebook[1] = codebook[0] + 1e-3
    encoder.embed_like(codebook, torch.Generator().manual_seed(0))
    distances = torch.cdist(encoder.embed.weight, encoder.embed.weight)
    assert distances[0, 1] < 0.01 < 0.3 < distances[0, 2:].min()
    assert encoder.embed.weight.square().mean().item() == pytest.approx(1, rel=0.6)
    encoder.embed_like(torch.zeros(6, 8), torch.Generator())  # nothing is known of them
    assert encoder.embed.weight.isfinite().all()


def test_metrics_of_previews():
    prior = tiny_prior(grid_size=[3, 3])
    pipe = ProgressiveVAEPipeline.from_levels(prior, pipeline_of(**AUXILIARY).levels)
    pipe.set_progress_bar_config(disable=True)
    images = torch.randint(256, (3, 3, 12, 12), dtype=torch.uint8)
    for k, row in enumerate(rate_distortion(pipe, images, num_samples=2).values(), 1):
        expectation = pipe.preview(images, k, "pt") * 255
        error = (expectation - images).square().mean().item()
        assert row["mse_of_preview"] == pytest.approx(error, rel=1e-4)
        assert row["psnr_of_preview"] == pytest.approx(psnr_of(error), rel=1e-4)
        assert all(-1 <= row[f"ssim{kind}"] <= 1 for kind in ("", "_of_mean", "_of_preview"))


def test_encoders_first_then_decoders_in_any_order(tmp_path):
    staged = {"auxiliary_hidden_size": 8, "encoder_fit": FEW, **RECIPE["levels"]}
    recipe = {**RECIPE, "levels": staged}
    one_run, parts = tmp_path / "one_run", tmp_path / "parts"
    pipe = train(recipe, random_images(), one_run)
    costs = json.loads((one_run / "metrics.json").read_text())["phases"]
    assert [name for name in costs if not name.startswith("encode_")] == [
        "encoder_2", "encoder_1", "decoder_2", "decoder_1", "prior"
    ]  # fmt: skip
    assert pipe.level_2.config.ordering == "lattice" and pipe.level_2.auxiliary is not None
    assert pipe.preview(pipe(num_images_per_prompt=2).codes)[0].size == (8, 8)
    for phase in ("encoder_2", "encoder_1", "prior"):
        train(recipe, random_images(), parts, phase=phase, resume_from_checkpoint=None)
    first = train(recipe, random_images(), parts, phase="evaluate")  # it works with what it has
    assert first.level_1.decoder is None
    for phase in ("decoder_1", "decoder_2", "decoder_1"):  # one of them twice
        train(recipe, random_images(), parts, phase=phase, resume_from_checkpoint=None)
    assert weights(parts) == weights(one_run)
    assert train(recipe, random_images(), parts) is not None  # nothing is left to do
    histories = [json.loads((parts / f"level_{i}/history.json").read_text()) for i in (1, 2)]
    assert [[identity["phase"] for identity in h] for h in histories] == [
        ["encoder_1", "decoder_1"], ["encoder_2", "decoder_2"]
    ]  # fmt: skip
    longer = {**recipe, "level_1": {"fit": {"max_train_steps": 5}}}
    train(longer, random_images(), parts, phase="decoder_1", resume_from_checkpoint=None)
    saved = yaml.safe_load((parts / "recipe.yaml").read_text())
    assert saved["level_1"]["encoder_fit"]["max_train_steps"] == 4
    assert saved["level_1"]["fit"]["max_train_steps"] == 5  # what ran, of this level alone
    assert saved["level_2"]["fit"]["max_train_steps"] == 4
    other = {**recipe, "run": {**recipe["run"], "seed": 1}}
    with pytest.raises(ValueError, match="expected seed=0, with which"):
        train(other, random_images(), parts, phase="decoder_1", resume_from_checkpoint=None)
    train(other, random_images(), parts, phase="encoder_2", resume_from_checkpoint=None)
    with pytest.raises(ValueError, match="auxiliary_hidden_size of level_1, which has an encoder"):
        train({**RECIPE, "levels": {"encoder_fit": FEW}}, random_images(), tmp_path / "none")


def test_decoders_and_prior_side_by_side(tmp_path, script):
    """Three processes in one folder end with the weights of one after the other."""
    flags = [*SMALLER, "--levels.auxiliary_hidden_size", "8"]
    flags += ["--levels.encoder_fit.max_train_steps", "4", "--levels.class_conditional", "false"]
    one_run, parts = tmp_path / "one_run", tmp_path / "parts"
    script.main([*flags, "--output_dir", str(one_run)])
    flags += ["--output_dir", str(parts)]
    for phase in ("encoder_2", "encoder_1"):
        script.main([*flags, "--phase", phase])
    beside = [
        start(TRAIN, *flags, "--phase", phase, log=tmp_path / f"{phase}.log")
        for phase in ("decoder_2", "decoder_1", "prior")
    ]
    for process in beside:
        process.join()
        assert process.exitcode == 0
    assert weights(parts) == weights(one_run)
    script.main([*flags, "--resume_from_checkpoint", "latest"])  # nothing is left but to measure
    costs = json.loads((parts / "metrics.json").read_text())["phases"]
    assert set(costs) == set(json.loads((one_run / "metrics.json").read_text())["phases"])
    assert weights(parts) == weights(one_run)
