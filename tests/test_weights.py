"""A model comes whole from its files, or not at all."""

import json
import shutil

import pytest
import torch
from conftest import HUB, LFS_POINTER, tiny_level, tiny_pipeline, tiny_prior
from safetensors.torch import load_file, save_file
from transformers import AutoModel, QuantoConfig

from progressive_vae import (
    ProgressiveVAELevel,
    ProgressiveVAELevelConfig,
    ProgressiveVAEPipeline,
    ProgressiveVAEPrior,
    ProgressiveVAEPriorConfig,
)
from progressive_vae.models.modeling_utils import (
    CONFIG_SEAL,
    WEIGHTS_SEAL,
    _header,
    is_weights,
    seal,
)


@pytest.fixture
def level(tmp_path):
    tiny_level(num_channels=1).save_pretrained(tmp_path / "level")
    return tmp_path / "level"


@pytest.fixture
def prior(tmp_path):
    tiny_prior().save_pretrained(tmp_path / "prior")
    return tmp_path / "prior"


def change_weights(folder, change):
    """As another program would: without a seal."""
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
def test_half_a_level_is_an_error_that_names_the_keys(level, load):
    change_weights(level, drop_half_of_the_decoder)
    with pytest.raises(ValueError, match="missing: decoder.*save the model again"):
        load(level)


def test_half_a_level_is_an_error_of_the_pipeline_too(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    change_weights(tmp_path / "level_2", drop_half_of_the_decoder)
    with pytest.raises(ValueError, match="level_2 to be those of its config.*missing: decoder"):
        ProgressiveVAEPipeline.from_pretrained(tmp_path)


def test_a_config_of_another_decoder(level):
    change_weights(level, lambda _: None)
    change_config(level, ordering="masked", num_groups=3)
    with pytest.raises(ValueError, match="missing: decoder.*left over: decoder|of another shape"):
        ProgressiveVAELevel.from_pretrained(level)


def test_a_prior_without_a_matching_key(prior):
    def rename(weights):
        for name in list(weights):
            weights["other." + name] = weights.pop(name)

    change_weights(prior, rename)
    with pytest.raises(ValueError, match="missing: backbone.*left over: other"):
        ProgressiveVAEPrior.from_pretrained(prior)


def test_weights_of_another_shape(level):
    def grow(weights):
        weights["encoder.out.1.bias"] = torch.zeros(7)

    change_weights(level, grow)
    with pytest.raises(ValueError, match="1 of another shape: .*encoder.out.1.bias"):
        ProgressiveVAELevel.from_pretrained(level)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(level, wrong):
    def spoil(weights):
        weights["encoder.out.1.weight"].view(-1)[3] = wrong

    change_weights(level, spoil)
    with pytest.raises(ValueError, match="expected finite weights .*got others in encoder.out.1.w"):
        ProgressiveVAELevel.from_pretrained(level)


def test_weights_too_large_for_the_dtype_asked_for(level):
    change_weights(level, lambda weights: weights["encoder.out.1.weight"].fill_(1e30))
    with pytest.raises(ValueError, match="finite weights in .* as torch.float16"):
        ProgressiveVAELevel.from_pretrained(level, dtype=torch.float16)


def test_every_flipped_byte_of_a_sealed_file_is_seen(level):
    path = level / "model.safetensors"
    whole = path.read_bytes()
    places = torch.randint(len(whole), (60,), generator=torch.Generator().manual_seed(0)).tolist()
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        try:
            found = ProgressiveVAELevel.from_pretrained(level)
        except ValueError as error:
            assert "model.safetensors" in str(error)
        else:  # in what the header says of the file, not of its weights
            path.write_bytes(whole)
            for name, value in ProgressiveVAELevel.from_pretrained(level).state_dict().items():
                assert torch.equal(value, found.state_dict()[name])
    path.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match="expected whole weights in .*model.safetensors"):
        ProgressiveVAELevel.from_pretrained(level)


def test_a_config_that_says_something_else_of_sealed_weights(prior):
    backbone = json.loads((prior / "config.json").read_text())["backbone_config"]
    change_config(prior, backbone_config={**backbone, "rms_norm_eps": 0.5})
    with pytest.raises(ValueError, match="another config.*seal"):
        ProgressiveVAEPrior.from_pretrained(prior)
    seal(prior, again=True)  # the change is meant
    assert ProgressiveVAEPrior.from_pretrained(prior).backbone.config.rms_norm_eps == 0.5


def test_fields_that_say_nothing_of_the_weights_may_change(level):
    change_config(level, restart_threshold=0.5, finer_fingerprint=None, dtype="float32")
    assert ProgressiveVAELevel.from_pretrained(level).config.restart_threshold == 0.5


def test_class_dropout_may_be_edited(level, prior):
    for kind, folder in ((ProgressiveVAELevel, level), (ProgressiveVAEPrior, prior)):
        change_config(folder, class_dropout=0.3)
        assert kind.from_pretrained(folder).config.class_dropout == 0.3


def test_files_without_a_seal_are_read(level):
    expected = ProgressiveVAELevel.from_pretrained(level).state_dict()
    header, _ = _header(level / "model.safetensors")
    assert {WEIGHTS_SEAL, CONFIG_SEAL} <= set(header["__metadata__"])
    change_weights(level, lambda _: None)
    header, _ = _header(level / "model.safetensors")
    assert WEIGHTS_SEAL not in header["__metadata__"]
    found = ProgressiveVAELevel.from_pretrained(level).state_dict()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_shards_are_sealed_and_missed(prior):
    model = ProgressiveVAEPrior.from_pretrained(prior)
    shutil.rmtree(prior)
    model.save_pretrained(prior, max_shard_size="4KB")
    shards = sorted(prior.glob("*.safetensors"))
    assert len(shards) > 1 and all(WEIGHTS_SEAL in _header(s)[0]["__metadata__"] for s in shards)
    assert ProgressiveVAEPrior.from_pretrained(prior).num_parameters() == model.num_parameters()
    shards[0].unlink()
    with pytest.raises(ValueError, match=rf"expected \['{shards[0].name}'\] in .*index.json says"):
        ProgressiveVAEPrior.from_pretrained(prior)


def test_shards_are_not_hidden_by_an_older_file(level):
    change_weights(level, lambda _: None)  # as from before files had seals
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
        ("config.json", None, "expected config.json in .*got none: name the folder of one part"),
        ("config.json", b"{", "expected JSON in .*config.json.*: save the model again"),
        ("config.json", b"[1]", "expected an object in .*config.json"),
        ("config.json", b"\xff\xfe", "expected JSON in .*config.json"),
        ("model.safetensors", None, r"expected model.safetensors or .*index.json in .*got \[\]"),
        ("model.safetensors", b"", "expected whole weights in .*model.safetensors"),
        ("model.safetensors", b"\xff" * 50, "expected whole weights in .*model.safetensors"),
        ("model.safetensors", b"\2\0\0\0\0\0\0\0[]", "expected whole weights in .*model.saf"),
        (
            "config.json",
            b"<!DOCTYPE html>",
            "expected JSON in .*config.json, got '<!DOCTYPE html>'",
        ),
        ("config.json", LFS_POINTER, "config.json, got a git-lfs pointer: run `git lfs pull`"),
        ("model.safetensors", LFS_POINTER, "model.safetensors, got a git-lfs pointer: run"),
    ],
)
def test_files_that_are_missing_or_of_another_kind(level, name, contents, message):
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
def test_a_wrong_argument_is_not_blamed_on_the_files(level, arguments, error, message):
    with pytest.raises(error, match=message) as raised:
        ProgressiveVAELevel.from_pretrained(level, **arguments)
    assert type(raised.value) is error and "save the model again" not in str(raised.value)


def test_a_hub_that_cannot_be_reached_is_not_a_missing_file():
    HUB.fail_on = ".*"
    for options in ({}, {"subfolder": "level_1"}, {"local_files_only": True}):
        with pytest.raises(OSError, match="connect"):
            ProgressiveVAELevel.from_pretrained("org/not-cached", **options)


def test_a_part_of_another_kind_names_its_model_type(level, prior):
    with pytest.raises(ValueError, match="model_type='progressive_vae_prior' in .*vae_level'"):
        ProgressiveVAEPrior.from_pretrained(level)
    with pytest.raises(ValueError, match="model_type='progressive_vae_level' in .*vae_prior'"):
        ProgressiveVAELevel.from_pretrained(prior)


@pytest.mark.parametrize("is_sharded", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("first", ["fp16", "non-ema", None])
def test_a_save_keeps_the_weights_of_other_variants(tmp_path, first, is_sharded):
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


def test_a_failed_save_keeps_what_was_there(level, monkeypatch):
    def fail(*_, **__):
        raise OSError("no space left on device")

    before = {path.name: path.read_bytes() for path in level.iterdir()}
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fail)
    with pytest.raises(OSError, match="no space"):
        tiny_level(num_channels=1, seed=1).save_pretrained(level)
    assert {path.name: path.read_bytes() for path in level.iterdir()} == before


BACKBONE = {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 2,
            "hidden_size": 16, "intermediate_size": 16}  # fmt: skip


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
def test_a_config_that_asks_for_more_than_the_files_hold(level, prior, part, fields):
    """Refused before any of it is built: in a moment, and in no memory."""
    folder = {"level": level, "prior": prior}[part]
    change_weights(folder, lambda _: None)
    change_config(folder, **fields)
    kind = {"level": ProgressiveVAELevel, "prior": ProgressiveVAEPrior}[part]
    with pytest.raises(ValueError, match="expected .*(tensors with|<=|product of numbers up to 8)"):
        kind.from_pretrained(folder)


def test_lattices_are_no_coarser_than_the_grid():
    level = tiny_level(num_channels=1, num_groups=19)
    with pytest.raises(ValueError, match="num_groups <= 4 for lattices .*1×1, got 19"):
        ProgressiveVAEPipeline(None, level, image_size=[1, 1])
    assert ProgressiveVAEPipeline(None, level, image_size=[33, 1]).num_levels == 1


@pytest.mark.parametrize(
    "backbone", [{"model_type": "t5"}, {"model_type": "bert", "num_hidden_layers": 1}]
)
def test_a_prior_that_is_no_causal_model(backbone):
    small = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    with pytest.raises(ValueError, match="backbone_config of a causal language model"):
        config = ProgressiveVAEPriorConfig(backbone_config={**small, **backbone})
        ProgressiveVAEPrior(config).eval().check_causal()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "mamba"])
def test_causal_models_are_told_from_others(kind):
    backbone = {**BACKBONE, "model_type": kind}
    config = ProgressiveVAEPriorConfig(grid_size=[3, 3], backbone_config=backbone)
    ProgressiveVAEPrior(config).eval().check_causal()


def test_words_of_a_wrong_config_are_one_line():
    with pytest.raises(ValueError) as error:
        ProgressiveVAELevelConfig(num_channels=1, hidden_size="wide")
    assert "hidden_size" in str(error.value) and "\n" not in str(error.value)
