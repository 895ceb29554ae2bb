import pytest

from progressive_vae import ProgressiveVAELevelConfig, ProgressiveVAEPriorConfig


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(num_channels=1, codebok_size=3), r"unknown names \['codebok_size'\]"),
        (dict(num_channels="1"), "num_channels"),
        (dict(), "one of num_channels"),
        (dict(num_channels=1, num_symbols=4), "one of num_channels"),
        (dict(num_channels=1, codebook_size=0), "codebook_size >= 1, got 0"),
        (dict(num_channels=1, downsample=3), r"downsample in \(2, 4, 8, 16, 32, 64\), got 3"),
        (dict(num_channels=1, downsample=128), "downsample in .*got 128"),
        (
            dict(num_symbols=3, backbone_config={"model_type": "gpt2"}),
            "backbone_config=None for a decoder_order other than 'raster', got GPT2Config",
        ),
        (
            dict(num_symbols=3, decoder_order="raster", backbone_config={"model_type": "t5"}),
            "backbone_config of a causal language model",
        ),
        (
            dict(num_symbols=3, decoder_order="raster", backbone_config={"hidden_size": 8}),
            "backbone_config with a model_type",
        ),
        (dict(num_channels=1, decoder_order="spiral"), "decoder_order in .*got 'spiral'"),
        (dict(num_channels=1, quantizer="none"), "quantizer in .*got 'none'"),
        (dict(num_channels=1, num_groups=3), r"num_groups among \[4, 7, .*got 3"),
        (dict(num_channels=1, downsample=4, num_groups=4), r"num_groups among \[7, 10, .*got 4"),
        (dict(num_symbols=3, decoder_order="raster", num_groups=4), "num_groups among .None.*4$"),
        (
            dict(num_symbols=3, decoder_order="raster", format_version=2),
            "format_version >= 3.*got 2",
        ),
        (dict(num_channels=1, decoder_order="raster"), "decoder_order of pixels .*got 'raster'"),
        (dict(num_channels=1, quantizer="fsq", codebook_size=11), "product of numbers up to 8"),
        (dict(num_channels=1, quantizer="fsq", codebook_dim=8), "codebook_dim=2, .*got 8"),
        (dict(num_channels=1, quantizer="fsq", dither=1.0), "dither=0 .*got dither=1.0 .*'fsq'"),
        (dict(num_channels=1, dither=-1.0), "dither >= 0, got -1.0"),
        (dict(num_channels=1, dither=float("nan")), "dither >= 0, got nan"),
        (
            dict(num_channels=1, quantizer="gumbel", gumbel_temperature=[0.5, 1.0]),
            "gumbel_temperature .start, end",
        ),
        (dict(num_channels=1, corruption=1.5), r"corruption in \[0, 1\], got 1.5"),
        (dict(num_channels=1, corruption_kind="far"), "corruption_kind in"),
        (dict(num_channels=1, num_classes=2, id2label={0: "a"}), "num_classes=2 entries, got 1"),
        (dict(num_symbols=3, symbol_logit_rank=-1), "symbol_logit_rank >= 0, got -1"),
        (dict(num_symbols="3000"), "num_symbols"),
        (dict(num_channels=1, codebook_decay=1.0), "codebook_decay < 1"),
        (dict(num_channels=1, dtype=[]), r"dtype like 'float32', got \[\]"),
    ],
)
def test_bad_level_config(config, message):
    with pytest.raises(ValueError, match=message):
        ProgressiveVAELevelConfig(**config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(vocab=3), r"unknown names \['vocab'\]"),
        (dict(grid_size=[4]), "grid_size of two positive numbers"),
        (dict(num_classes=2, id2label={0: "cat"}), "num_classes=2 entries, got 1"),
        (dict(backbone_config={"hidden_size": 8}), "with a model_type"),
        (dict(class_dropout=2.0), r"class_dropout in \[0, 1\]"),
    ],
)
def test_bad_prior_config(config, message):
    with pytest.raises(ValueError, match=message):
        ProgressiveVAEPriorConfig(**config)


def test_assignment_is_checked_too():
    config = ProgressiveVAELevelConfig(num_channels=1)
    with pytest.raises(ValueError, match="codebook_size"):
        config.codebook_size = "many"


@pytest.mark.parametrize(
    "config",
    [
        ProgressiveVAELevelConfig(num_channels=3, downsample=4),
        ProgressiveVAEPriorConfig(num_classes=2, id2label={0: "cat", 1: "dog"}, dtype="bfloat16"),
        ProgressiveVAEPriorConfig(use_cache=False),  # as the Trainer of transformers leaves it
        ProgressiveVAEPriorConfig(quantization_config={"quant_method": "torchao"}),
    ],
)
def test_a_config_survives_its_file(config, tmp_path):
    config.save_pretrained(tmp_path)
    loaded = type(config).from_pretrained(tmp_path)
    ours, theirs = config.to_dict(), loaded.to_dict()
    assert {k: v for k, v in ours.items() if k != "_name_or_path"} == {
        k: v for k, v in theirs.items() if k != "_name_or_path"
    }
