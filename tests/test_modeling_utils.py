"""Models are loaded with complete and finite weights, and saved completely or not at all."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, QuantoConfig

from helpers.hub import HUB, LFS_POINTER
from helpers.models import tiny_level, tiny_pipeline, tiny_prior
from progressive_vae import (
    ProgressiveVAELevel,
    ProgressiveVAELevelConfig,
    ProgressiveVAEPipeline,
    ProgressiveVAEPrior,
    ProgressiveVAEPriorConfig,
)
from progressive_vae.models.modeling_utils import is_weights

BACKBONE = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_size": 16,
    "intermediate_size": 16,
}


@pytest.fixture
def level(tmp_path):
    tiny_level(num_channels=1).save_pretrained(tmp_path / "level")
    return tmp_path / "level"


@pytest.fixture
def prior(tmp_path):
    tiny_prior().save_pretrained(tmp_path / "prior")
    return tmp_path / "prior"


def change_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})


def change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def drop_half_of_the_decoder(weights):
    for name in sorted(n for n in weights if n.startswith("decoder."))[::2]:
        del weights[name]


@pytest.mark.parametrize("load", [ProgressiveVAELevel.from_pretrained, AutoModel.from_pretrained])
def test_missing_weights_of_a_level_are_named(level, load):
    change_weights(level, drop_half_of_the_decoder)
    with pytest.raises(ValueError, match="missing: decoder.*save the model again"):
        load(level)


def test_missing_weights_of_a_level_are_named_by_the_pipeline(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    change_weights(tmp_path / "level_2", drop_half_of_the_decoder)
    with pytest.raises(ValueError, match="level_2 to be those of its config.*missing: decoder"):
        ProgressiveVAEPipeline.from_pretrained(tmp_path)


def test_a_config_of_another_ordering(level):
    change_config(level, ordering="masked", num_groups=3)
    with pytest.raises(ValueError, match="missing: decoder.*unexpected: decoder|mismatched"):
        ProgressiveVAELevel.from_pretrained(level)


def test_a_prior_with_renamed_weights(prior):
    def rename(weights):
        for name in list(weights):
            weights["other." + name] = weights.pop(name)

    change_weights(prior, rename)
    with pytest.raises(ValueError, match="missing: backbone.*unexpected: other"):
        ProgressiveVAEPrior.from_pretrained(prior)


def test_weights_of_another_shape(level):
    def grow(weights):
        weights["encoder.out.1.bias"] = torch.zeros(7)

    change_weights(level, grow)
    with pytest.raises(ValueError, match="1 mismatched: .*encoder.out.1.bias"):
        ProgressiveVAELevel.from_pretrained(level)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_non_finite_weights_are_named(level, wrong):
    def spoil(weights):
        weights["encoder.out.1.weight"].view(-1)[3] = wrong

    change_weights(level, spoil)
    with pytest.raises(ValueError, match="expected finite weights .*encoder.out.1.w"):
        ProgressiveVAELevel.from_pretrained(level)


def test_weights_that_overflow_the_requested_dtype(level):
    change_weights(level, lambda weights: weights["encoder.out.1.weight"].fill_(1e30))
    with pytest.raises(ValueError, match="finite weights in .* as torch.float16"):
        ProgressiveVAELevel.from_pretrained(level, dtype=torch.float16)


def test_a_truncated_file_or_a_damaged_header_is_an_error(level):
    path = level / "model.safetensors"
    contents = path.read_bytes()
    flipped = bytearray(contents)
    flipped[10] ^= 0x10  # a byte of the header
    for damaged in (contents[:-5], contents[: len(contents) // 2], contents[:40], bytes(flipped)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="model.safetensors"):
            ProgressiveVAELevel.from_pretrained(level)


def test_any_config_field_may_be_edited(level, prior):
    for model_class, folder in ((ProgressiveVAELevel, level), (ProgressiveVAEPrior, prior)):
        change_config(folder, class_dropout=0.3)
        assert model_class.from_pretrained(folder).config.class_dropout == 0.3
    change_config(level, restart_threshold=0.5, finer_fingerprint=None, dtype="float32")
    assert ProgressiveVAELevel.from_pretrained(level).config.restart_threshold == 0.5
    backbone = json.loads((prior / "config.json").read_text())["backbone_config"]
    change_config(prior, backbone_config={**backbone, "rms_norm_eps": 0.5})
    assert ProgressiveVAEPrior.from_pretrained(prior).backbone.config.rms_norm_eps == 0.5


def test_files_with_checksums_of_an_earlier_version_are_loaded(level):
    """Headers held a CRC-32 of the weights and one of the config; both are ignored."""
    path = level / "model.safetensors"
    weights = load_file(path)
    metadata = {"format": "pt", "weights_crc32": "1", "config_crc32": "2"}
    save_file(weights, path, metadata)
    state = ProgressiveVAELevel.from_pretrained(level).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in weights.items())
    ProgressiveVAELevel.from_pretrained(level).save_pretrained(level)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_missing_shard_is_named(prior):
    model = ProgressiveVAEPrior.from_pretrained(prior)
    shutil.rmtree(prior)
    model.save_pretrained(prior, max_shard_size="4KB")
    shards = sorted(prior.glob("*.safetensors"))
    assert len(shards) > 1
    assert ProgressiveVAEPrior.from_pretrained(prior).num_parameters() == model.num_parameters()
    shards[0].unlink()
    with pytest.raises(ValueError, match=rf"expected \['{shards[0].name}'\] in .*index.json says"):
        ProgressiveVAEPrior.from_pretrained(prior)


# ---- as transformers' own tests of models, ModelTesterMixin --------------------------------------


@pytest.mark.parametrize("make", [lambda: tiny_level(num_channels=1), tiny_prior])
def test_load_save_without_tied_weights(make, tmp_path):
    model = make()
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value)
    assert info["missing_keys"] == set()


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("part", ["level", "prior"])
def test_loading_info_names_all_weights_that_are_missing(part, is_tied, tmp_path):
    backbone = {**BACKBONE, "tie_word_embeddings": is_tied}
    if part == "prior":
        model = tiny_prior(backbone_config=backbone)
    else:
        model = tiny_level(
            num_channels=None, num_symbols=5, decoder_type="causal_lm", backbone_config=backbone
        )
    model.save_pretrained(tmp_path)
    save_file({"tensor": torch.tensor([1, 2])}, tmp_path / "model.safetensors", {"format": "pt"})
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == set(loaded.state_dict())
    assert info["unexpected_keys"] == {"tensor"}
    with pytest.raises(ValueError, match="missing: .*1 unexpected: tensor"):
        type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize("part", ["level", "prior"])
def test_cannot_load_with_meta_device_context_manager(part, level, prior):
    model_class = {"level": ProgressiveVAELevel, "prior": ProgressiveVAEPrior}[part]
    with (
        torch.device("meta"),
        pytest.raises(RuntimeError, match="`from_pretrained` with a meta device context manager"),
    ):
        model_class.from_pretrained({"level": level, "prior": prior}[part])


# ---- files ---------------------------------------------------------------------------------------


def test_a_save_in_shards_deletes_an_older_single_file(level):
    model = ProgressiveVAELevel.from_pretrained(level)
    with torch.no_grad():
        model.encoder.out[1].bias += 1
    model.save_pretrained(level, max_shard_size="2KB")
    assert not (level / "model.safetensors").exists()
    found = ProgressiveVAELevel.from_pretrained(level)
    assert torch.equal(found.encoder.out[1].bias, model.encoder.out[1].bias)


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("config.json", None, "expected config.json in .*got none: name the folder of one model"),
        ("config.json", b"{", "expected JSON in .*config.json.*: save the model again"),
        ("config.json", b"[1]", "expected an object in .*config.json"),
        ("config.json", b"\xff\xfe", "expected JSON in .*config.json"),
        ("model.safetensors", None, r"expected model.safetensors or .*index.json in .*got \[\]"),
        ("model.safetensors", b"", "complete safetensors file in .*model.safetensors"),
        (
            "model.safetensors",
            b"\xff" * 50,
            "complete safetensors file in .*model.safetensors",
        ),
        (
            "model.safetensors",
            b"\2\0\0\0\0\0\0\0[]",
            "complete safetensors file in .*model.saf",
        ),
        (
            "config.json",
            b"<!DOCTYPE html>",
            "expected JSON in .*config.json, got '<!DOCTYPE html>'",
        ),
        ("config.json", LFS_POINTER, "config.json, got a git-lfs pointer: run `git lfs pull`"),
        ("model.safetensors", LFS_POINTER, "model.safetensors, got a git-lfs pointer: run"),
    ],
)
def test_missing_and_damaged_files_are_named(level, name, contents, message):
    (level / name).unlink()
    if contents is not None:
        (level / name).write_bytes(contents)
    with pytest.raises(ValueError, match=message):
        ProgressiveVAELevel.from_pretrained(level)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(beta=3), TypeError, "beta"),
        (dict(dtype="nonsense"), ValueError, "dtype"),
        (dict(variant="bf16"), ValueError, r"model.bf16.safetensors .* got .'model.safetensors'"),
        (dict(subfolder="level_9"), ValueError, "level/level_9, got none"),
        (dict(attn_implementation="flash_attention_2"), ImportError, "FlashAttention2"),
        (dict(quantization_config=QuantoConfig()), ImportError, "quanto"),
    ],
)
def test_errors_of_wrong_arguments_do_not_mention_the_files(level, arguments, error, message):
    with pytest.raises(error, match=message) as raised:
        ProgressiveVAELevel.from_pretrained(level, **arguments)
    assert type(raised.value) is error and "save the model again" not in str(raised.value)


def test_an_unreachable_hub_is_an_oserror():
    HUB.fail_on = ".*"
    for options in ({}, {"subfolder": "level_1"}, {"local_files_only": True}):
        with pytest.raises(OSError, match="connect"):
            ProgressiveVAELevel.from_pretrained("org/not-cached", **options)


def test_a_model_of_another_type_is_named(level, prior):
    with pytest.raises(ValueError, match="model_type='progressive_vae_prior' in .*vae_level'"):
        ProgressiveVAEPrior.from_pretrained(level)
    with pytest.raises(ValueError, match="model_type='progressive_vae_level' in .*vae_prior'"):
        ProgressiveVAELevel.from_pretrained(prior)


@pytest.mark.parametrize("is_sharded", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("first", ["fp16", "non-ema", None])
def test_a_save_preserves_weights_of_other_variants(tmp_path, first, is_sharded):
    second = "fp16" if first is None else None
    size = {True: "2KB", False: "1GB"}
    levels = {}

    def save(variant, is_sharded, seed):
        levels[variant] = tiny_level(num_channels=1, seed=seed)
        levels[variant].save_pretrained(tmp_path, variant=variant, max_shard_size=size[is_sharded])
        for name, level in levels.items():
            loaded = ProgressiveVAELevel.from_pretrained(tmp_path, variant=name)
            assert torch.equal(loaded.encoder.out[1].weight, level.encoder.out[1].weight)

    save(first, is_sharded[0], seed=0)
    save(second, is_sharded[1], seed=1)
    save(first, not is_sharded[0], seed=2)  # its own shards or file are replaced
    weights = [path.name for path in tmp_path.iterdir() if is_weights(path.name, first)]
    assert (len(weights) > 1) is not is_sharded[0]


def test_a_failed_save_preserves_the_previous_files(level, monkeypatch):
    def fail(*_, **__):
        raise OSError("no space left on device")

    before = {path.name: path.read_bytes() for path in level.iterdir()}
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fail)
    with pytest.raises(OSError, match="no space"):
        tiny_level(num_channels=1, seed=1).save_pretrained(level)
    assert {path.name: path.read_bytes() for path in level.iterdir()} == before


@pytest.mark.parametrize(
    ("part", "fields"),
    [
        ("level", dict(num_layers=1_000_000)),
        ("level", dict(num_layers=900)),
        ("level", dict(hidden_size=100_000)),
        ("level", dict(num_channels=10**9)),
        ("level", dict(quantizer="fsq", codebook_size=2**31, codebook_dim=11)),
        ("level", dict(quantizer="fsq", codebook_size=2**31 - 1, codebook_dim=1)),
        ("level", dict(num_classes=10**9, id2label=None)),
        ("prior", dict(backbone_config={**BACKBONE, "hidden_size": 16_384})),
        ("prior", dict(backbone_config={**BACKBONE, "num_hidden_layers": 10**9})),
        ("prior", dict(backbone_config={**BACKBONE, "intermediate_size": 10**9})),
        ("prior", dict(codebook_size=10**12)),
    ],
)
def test_a_config_much_larger_than_the_files_is_an_error(level, prior, part, fields):
    """The error comes before any memory is allocated for the model."""
    folder = {"level": level, "prior": prior}[part]
    change_config(folder, **fields)
    model_class = {"level": ProgressiveVAELevel, "prior": ProgressiveVAEPrior}[part]
    with pytest.raises(ValueError, match="expected .*(parameters, more than|<=)"):
        model_class.from_pretrained(folder)


def test_num_groups_of_a_lattice_is_limited_by_the_grid():
    level = tiny_level(num_channels=1, num_groups=19)
    with pytest.raises(ValueError, match="num_groups <= 4 for lattices .*1×1, got 19"):
        ProgressiveVAEPipeline(None, level, image_size=[1, 1])
    assert ProgressiveVAEPipeline(None, level, image_size=[33, 1]).num_levels == 1


@pytest.mark.parametrize(
    "backbone", [{"model_type": "t5"}, {"model_type": "bert", "num_hidden_layers": 1}]
)
def test_a_prior_must_be_a_causal_language_model(backbone):
    small = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    with pytest.raises(ValueError, match="backbone_config of a causal language model"):
        config = ProgressiveVAEPriorConfig(backbone_config={**small, **backbone})
        ProgressiveVAEPrior(config).eval().check_causal()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "mamba"])
def test_causal_language_models_are_accepted(kind):
    backbone = {**BACKBONE, "model_type": kind}
    config = ProgressiveVAEPriorConfig(grid_size=[3, 3], backbone_config=backbone)
    ProgressiveVAEPrior(config).eval().check_causal()


def test_the_error_of_an_invalid_config_is_one_line():
    with pytest.raises(ValueError) as error:
        ProgressiveVAELevelConfig(num_channels=1, hidden_size="wide")
    assert "hidden_size" in str(error.value) and "\n" not in str(error.value)
