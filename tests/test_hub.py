import pytest
import torch
from conftest import randomize, tiny_level
from huggingface_hub import ModelCard

from progressive_vae.hub import fingerprint, model_card

METRICS = {
    "dataset": "some/images",
    "split": "test",
    "num_images": 10,
    "bits_per_dim": {"prior": 0.1, "level_1": 2.0, "total": 2.1},
    "codes": {"level_1": {"codebook_size": 8, "codes_used": 7, "codebook_perplexity": 5.5}},
    "label_accuracy": {"images": 0.9, "level_1": 0.8},
    "phases": {"level_1": {"seconds": 3.0, "images": 30, "images_per_second": 10.0}},
    "sampled_images_per_second": 100.0,
    "seed": 0,
    "machine": "a machine",
    "command": "accelerate launch examples/train.py",
}


def test_a_fingerprint_is_of_encoder_and_codebook_alone():
    level = tiny_level(num_channels=1)
    before = fingerprint([level])
    randomize(level.decoder, seed=7)
    assert fingerprint([level]) == before
    level.quantizer.codebook[0, 0] += 1e-3
    changed = fingerprint([level])
    assert changed != before
    with torch.no_grad():
        next(level.encoder.parameters())[0] += 1e-3
    assert fingerprint([level]) not in (before, changed)


def test_the_card_has_the_figures_of_its_run():
    card = model_card(METRICS)
    assert "| level_1 | 2.0000 | 7 of 8 | 5.5 | 80.0 % |" in card.content
    assert "| total | 2.1000 |" in card.content and "# Progressive VAE" in card.content
    parsed = ModelCard(card.content).data
    assert parsed.library_name == "diffusers" and parsed.license == "apache-2.0"
    assert parsed.eval_results[0].metric_value == pytest.approx(2.1)
