"""Causal language models in a raster decoder; `test_prior.py` tests those of priors."""

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, OPTConfig

from helpers.models import randomize, tiny_level
from helpers.probabilities import all_grids, total_variation
from progressive_vae import ProgressiveVAELevel, ProgressiveVAELevelConfig

SMALL = {
    "hidden_size": 12,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
}
BACKBONES = [
    {**SMALL, "model_type": "llama"},
    LlamaConfig(**SMALL),
    GPT2Config(n_embd=12, n_layer=1, n_head=2, n_positions=4),
    OPTConfig(
        hidden_size=12,
        word_embed_proj_dim=6,
        ffn_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        dropout=0.0,
        max_position_embeddings=4,
    ),
    {"model_type": "mamba", "hidden_size": 12, "state_size": 4, "num_hidden_layers": 1},
]


def raster_level(backbone, **config):
    return tiny_level(num_symbols=3, decoder_type="causal_lm", backbone_config=backbone, **config)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_raster_decoder_with_any_causal_backbone(backbone, tmp_path):
    level = raster_level(backbone)
    assert level.config.hidden_size == 8  # the backbone has another width
    level.check_causal()
    grids = all_grids(3, 2, 2)
    code = torch.zeros(1, 1, 1, dtype=torch.long)
    with torch.no_grad():
        log_prob = level.log_prob(grids, code.expand(81, -1, -1))
        large = level.sample(torch.zeros(1, 8, 8, dtype=torch.long))  # 256 positions
        assert level.log_prob(large, torch.zeros(1, 8, 8, dtype=torch.long)).isfinite()
    assert log_prob.exp().sum().item() == pytest.approx(1, abs=1e-4) and log_prob.std() > 0.1
    generator = torch.Generator().manual_seed(0)
    samples = level.sample(code.expand(40_000, -1, -1), generator=generator)
    assert total_variation(log_prob, grids, samples) < 0.03
    level.save_pretrained(tmp_path)
    loaded = ProgressiveVAELevel.from_pretrained(tmp_path)
    assert loaded.config.backbone_config.vocab_size == 3
    with torch.no_grad():
        loaded_log_prob = loaded.log_prob(grids, code.expand(81, -1, -1))
    assert torch.allclose(loaded_log_prob, log_prob)


def test_the_default_backbone_is_an_opt_of_the_levels_size():
    level = tiny_level(num_symbols=3, decoder_type="causal_lm", num_layers=3, hidden_size=16)
    backbone = level.decoder.backbone.config
    assert level.config.backbone_config is None and backbone.model_type == "opt"
    assert (backbone.hidden_size, backbone.num_hidden_layers, backbone.vocab_size) == (16, 3, 3)
    assert backbone.max_position_embeddings == 256
    level.check_causal()
    tiny_level(num_symbols=3).check_causal()  # other orderings are causal by construction


@pytest.mark.parametrize("is_trained", [False, True])
def test_a_bidirectional_backbone_is_refused(is_trained):
    """Also before training, when all logits are 0."""
    config = ProgressiveVAELevelConfig(
        num_symbols=5, decoder_type="causal_lm", backbone_config={**SMALL, "model_type": "bert"}
    )
    level = ProgressiveVAELevel(config).eval()
    if is_trained:
        randomize(level)
    with pytest.raises(ValueError, match="backbone_config .*BertConfig"):
        level.check_causal()


def test_the_backbone_has_the_attention_and_dtype_of_the_level(tmp_path):
    raster_level(BACKBONES[0]).save_pretrained(tmp_path)
    for attention in ("eager", "sdpa"):
        loaded = ProgressiveVAELevel.from_pretrained(
            tmp_path, attn_implementation=attention, dtype="bfloat16"
        )
        backbone = loaded.decoder.backbone.config
        assert (backbone._attn_implementation, backbone.dtype) == (attention, torch.bfloat16)


def test_a_refit_with_another_backbone():
    level = tiny_level(num_symbols=3)
    finer = torch.randint(3, (2, 4, 4))
    codes = level.encode(finer)
    refitted = level.with_decoder(decoder_type="causal_lm", backbone_config=BACKBONES[0])
    assert refitted.config.backbone_config.model_type == "llama"
    assert torch.equal(refitted.encode(finer), codes)
    copied = refitted.with_decoder(class_dropout=0.5)  # keeps the decoder's weights
    with torch.no_grad():
        assert torch.equal(copied.log_prob(finer, codes), refitted.log_prob(finer, codes))
    deeper = refitted.with_decoder(backbone_config={**BACKBONES[0], "num_hidden_layers": 2})
    assert deeper.config.backbone_config.num_hidden_layers == 2
    conv = refitted.with_decoder(decoder_type="conv")
    assert conv.config.backbone_config is None
