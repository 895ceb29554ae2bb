import json
import warnings

import pytest

from progressive_vae import ProgressiveVAELevelConfig, ProgressiveVAEPriorConfig
from progressive_vae.serialization import FORMAT_VERSION


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
            "backbone_config=None for a decoder_type other than 'causal_lm', got GPT2Config",
        ),
        (
            dict(num_symbols=3, decoder_type="causal_lm", backbone_config={"model_type": "t5"}),
            "backbone_config of a causal language model",
        ),
        (
            dict(num_symbols=3, decoder_type="causal_lm", backbone_config={"hidden_size": 8}),
            "backbone_config with a model_type",
        ),
        (dict(num_channels=1, decoder_type="spiral"), "decoder_type in .*got 'spiral'"),
        (dict(num_symbols=3, ordering="raster"), "ordering in .*'conv', got 'raster'"),
        (dict(num_channels=1, ordering="spiral"), "ordering in .*got 'spiral'"),
        (dict(num_channels=1, quantizer="none"), "quantizer in .*got 'none'"),
        (dict(num_channels=1, num_groups=3), r"num_groups among \[4, 7, .*got 3"),
        (dict(num_channels=1, downsample=4, num_groups=4), r"num_groups among \[7, 10, .*got 4"),
        (dict(num_symbols=3, decoder_type="causal_lm", num_groups=4), "num_groups among .None.*4$"),
        (
            dict(num_symbols=3, decoder_order="raster", format_version=2),
            "format_version >= 3.*got 2",
        ),
        (dict(num_channels=1, decoder_type="causal_lm"), "decoder_type in .*got 'causal_lm'"),
        (dict(num_channels=1, decoder_type="causal_lm"), "decoder_type in .*got 'causal_lm'"),
        (
            dict(num_channels=1, decoder_type="transformer", pixel_distribution="logistic_mixture"),
            "decoder_type='conv' for pixel_distribution",
        ),
        (dict(num_channels=1, quantizer="fsq", codebook_size=11), "product of numbers up to 8"),
        (dict(num_channels=1, quantizer="fsq", codebook_dim=8), "codebook_dim=2, .*got 8"),
        (dict(num_channels=1, quantizer="fsq", dither=1.0), "dither=0 .*got dither=1.0 .*'fsq'"),
        (dict(num_channels=1, dither=-1.0), "dither >= 0, got -1.0"),
        (dict(num_channels=1, dither=float("nan")), "dither >= 0, got nan"),
        (
            dict(num_channels=1, quantizer="gumbel", gumbel_temperature=[0.5, 1.0]),
            "gumbel_temperature .start, end",
        ),
        (dict(num_channels=1, code_noise=1.5), r"code_noise in \[0, 1\], got 1.5"),
        (dict(num_channels=1, code_noise_kind="far"), "code_noise_kind in"),
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


# Every field that format 7 renames, with a value that is not the default.
FORMAT_6 = {
    "num_channels": 3,
    "auxiliary_hidden_size": 8,
    "quantizer": "gumbel",
    "decoder_order": "lattice",
    "num_groups": 7,
    "pixel_distribution": "guided_logistics",
    "picture_weight": 7.0,
    "gumbel_decay": 0.5,
    "corruption": 0.25,
    "corruption_kind": "random",
}
FORMAT_7 = {
    "num_channels": 3,
    "auxiliary_hidden_size": 8,
    "quantizer": "gumbel",
    "decoder_type": "conv",
    "ordering": "lattice",
    "num_groups": 7,
    "pixel_distribution": "guided_logistic_mixture",
    "reconstruction_weight": 7.0,
    "gumbel_temperature_decay": 0.5,
    "code_noise": 0.25,
    "code_noise_kind": "random",
}


@pytest.mark.parametrize("format_version", [4, 5, 6])
def test_config_of_an_older_format_is_upgraded_without_a_warning(format_version, tmp_path):
    model_type = ProgressiveVAELevelConfig.model_type
    saved = {**FORMAT_6, "model_type": model_type, "format_version": format_version}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        config = ProgressiveVAELevelConfig.from_pretrained(tmp_path)
    for name, value in FORMAT_7.items():
        assert getattr(config, name) == value, name
    assert not set(config.to_dict()) & (set(FORMAT_6) - set(FORMAT_7))
    assert config.to_dict()["format_version"] == FORMAT_VERSION


def test_transformers_of_older_formats_stay_as_they_are():
    fields = {"num_symbols": 3, "decoder_type": "transformer"}
    older = ProgressiveVAELevelConfig(format_version=7, **fields)
    assert not older.neighbor_inputs and older.attention_head_dim == 16
    assert older.condition_num_layers == 0
    config = ProgressiveVAELevelConfig(**fields)
    assert config.neighbor_inputs and config.attention_head_dim == 32
    assert config.condition_num_layers == 2
    assert config.with_decoder(decoder_type="conv").neighbor_inputs is False
    with pytest.raises(ValueError, match="neighbor_inputs=None .* got True and 'conv'"):
        ProgressiveVAELevelConfig(num_symbols=3, neighbor_inputs=True)


@pytest.mark.parametrize(
    ("old", "ordering", "decoder_type"),
    [
        ("factorized", "factorized", "conv"),
        ("lattice", "lattice", "conv"),
        ("masked", "masked", "conv"),
        ("raster", "raster", "causal_lm"),
        ("auxiliary", "factorized", "auxiliary"),
    ],
)
def test_decoder_order_splits_into_ordering_and_decoder_type(old, ordering, decoder_type):
    fields = {"num_symbols": 3, "auxiliary_hidden_size": 8}
    config = ProgressiveVAELevelConfig(format_version=6, decoder_order=old, **fields)
    assert (config.ordering, config.decoder_type) == (ordering, decoder_type)
    new = ProgressiveVAELevelConfig(ordering=ordering, decoder_type=decoder_type, **fields)
    assert new.to_dict() == config.to_dict()
    default = ProgressiveVAELevelConfig(decoder_type=decoder_type, **fields)
    assert (default.ordering == ordering) == (old not in ("factorized", "masked"))


def test_old_keywords_work_with_one_warning():
    with pytest.warns(FutureWarning) as warned:
        config = ProgressiveVAELevelConfig(**FORMAT_6)
    assert len(warned) == 1 and "decoder_order" in str(warned[0].message)
    assert config.to_dict() == ProgressiveVAELevelConfig(**FORMAT_7).to_dict()
    with pytest.warns(FutureWarning, match="corruption .*decoder_order") as warned:
        changed = config.with_decoder(
            corruption=0.5, decoder_order="masked", pixel_distribution="categorical"
        )
    assert len(warned) == 1
    assert (changed.code_noise, changed.ordering, changed.num_groups) == (0.5, "masked", 8)
