"""Checkpoints that are damaged, unsafe or of other models raise errors, and nothing is written."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.conversion import assert_raises, convert, save_vqmodel
from helpers.hub import LFS_POINTER
from helpers.scripts import load_script


def drop(weights):
    del weights["decoder.conv_out.bias"]


def reshape(weights):
    weights["quant_conv.weight"] = weights["quant_conv.weight"][:, :3].contiguous()


def add(weights):
    weights["encoder.extra.weight"] = torch.zeros(2)


def add_discriminator(weights):
    weights["discriminator.weight"] = torch.zeros(2)


def set_nan(weights):
    weights["encoder.conv_in.weight"][0, 0, 0, 0] = float("nan")


def add_integer(weights):
    weights["encoder.steps"] = torch.tensor(3)


@pytest.mark.parametrize("change, words", [
    (drop, r"1 missing: auxiliary.decoder.conv_out.bias"),
    (reshape, r"1 mismatched: quant_conv.weight \(4, 3, 1, 1\), expected \(4, 5, 1, 1\)"),
    (add, r"1 unexpected: encoder.extra.weight"),
    (add_discriminator, r"1 unexpected: discriminator.weight"),
    (set_nan, r"expected finite weights, .* in encoder.conv_in.weight"),
    (add_integer, r"expected names and tensors of floats in .*, got others: encoder.steps"),
])  # fmt: skip
@pytest.mark.parametrize("is_safe", [True, False])
def test_weights_that_do_not_match_the_config(tmp_path, change, words, is_safe):
    save_vqmodel(tmp_path / "source")
    path = tmp_path / "source" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    change(weights)
    if is_safe:
        save_file(weights, path)
    else:
        path.unlink()
        torch.save(weights, path.with_suffix(".bin"))
    flags = "--checkpoint_path", tmp_path / "source"
    assert_raises(words, "convert_diffusers_vqmodel", *flags, output=tmp_path / "level")


class Malicious:
    """An object that runs code when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("created by unpickling"),)


def test_pickles_of_objects_are_not_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = save_vqmodel(tmp_path / "source", safe_serialization=False)
    path = tmp_path / "source" / "diffusion_pytorch_model.bin"
    flags = "convert_diffusers_vqmodel", "--checkpoint_path", tmp_path / "source"
    words = "a pickle that contains code or objects, which is not loaded"
    for contents in ({"object": Malicious()}, model, {**model.state_dict(), "path": Path("x")}):
        torch.save(contents, path)
        assert_raises(words, *flags, output=tmp_path / "level")
    torch.save([torch.zeros(2)], path)
    assert_raises("expected a dict of names and tensors in", *flags, output=tmp_path / "level")
    torch.save({**model.state_dict(), "note": "x"}, path)
    assert_raises("tensors of floats .* got others: note", *flags, output=tmp_path / "level")


@pytest.mark.parametrize("is_safe", [True, False])
@pytest.mark.parametrize("name", ["config.json", "diffusion_pytorch_model.*"])
def test_pointers_of_git_lfs(tmp_path, name, is_safe):
    save_vqmodel(tmp_path / "source", safe_serialization=is_safe)
    (path,) = (tmp_path / "source").glob(name)
    path.write_bytes(LFS_POINTER)
    flags = "--checkpoint_path", tmp_path / "source"
    words = f"{path.name}, got a git-lfs pointer: run `git lfs pull`"
    assert_raises(words, "convert_diffusers_vqmodel", *flags, output=tmp_path / "level")


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("is_safe", [True, False])
def test_truncated_files(tmp_path, share, is_safe):
    save_vqmodel(tmp_path / "source", safe_serialization=is_safe)
    (path,) = (tmp_path / "source").glob("diffusion*")
    contents = path.read_bytes()
    path.write_bytes(contents[: int(share * len(contents))])
    flags = "--checkpoint_path", tmp_path / "source"
    words = "expected a complete (safetensors file|file of tensors) in"
    assert_raises(words, "convert_diffusers_vqmodel", *flags, output=tmp_path / "level")


def test_missing_files_and_invalid_configs(tmp_path):
    save_vqmodel(tmp_path / "source")
    flags = "convert_diffusers_vqmodel", "--checkpoint_path", tmp_path / "source"
    target = tmp_path / "level"
    config = tmp_path / "source" / "config.json"
    fields = json.loads(config.read_text())

    def with_config(**changes):
        config.write_text(json.dumps({**fields, **changes}))

    with_config(width=3)
    assert_raises(r"got \['width'\]", *flags, output=target)
    with_config(_class_name="AutoencoderKL")
    assert_raises("config of a VQModel .* got 'AutoencoderKL'", *flags, output=target)
    with_config(norm_num_groups=3)
    assert_raises(
        "tokenizer_config of a network of 'vq_model', got .*num_groups", *flags, output=target
    )
    with_config(norm_num_groups=-1)
    assert_raises("norm_num_groups >= 1 in tokenizer_config, got -1", *flags, output=target)
    with_config(down_block_types=["NoBlock2D"] * 2)
    assert_raises("of a network of 'vq_model', got .*NoBlock2D", *flags, output=target)
    with_config(num_vq_embeddings=25)
    assert_raises("quantize.embedding.weight .24, 4., expected .25, 4.", *flags, output=target)
    with_config(num_vq_embeddings=10**12)
    assert_raises("expected codebook_size <= 1048576", *flags, output=target)
    config.write_text(json.dumps(fields)[:-9])
    assert_raises("expected JSON in .*config.json", *flags, output=target)
    config.unlink()
    assert_raises("expected config.json in", *flags, output=target)
    elsewhere = tmp_path / "elsewhere.json"
    words = "config_file to be a file, got .*elsewhere.json"
    assert_raises(words, *flags, "--config_file", elsewhere, output=target)
    elsewhere.write_text(json.dumps(fields))
    convert(*flags, "--config_file", elsewhere, output=target)
    before = (target / "config.json").stat().st_mtime_ns
    with pytest.raises(ValueError, match="expected output_path to be a new or empty folder"):
        load_script(flags[0], "conversion").main(
            [*map(str, flags[1:]), "--output_path", str(target)]
        )
    assert (target / "config.json").stat().st_mtime_ns == before
    config.write_text(json.dumps(fields))
    (tmp_path / "source" / "diffusion_pytorch_model.safetensors").unlink()
    assert_raises("expected diffusion_pytorch_model.safetensors or", *flags, output=tmp_path / "x")
    with pytest.raises(ValueError, match="a folder or a repository, got .*config.json"):
        load_script(flags[0], "conversion").main(
            ["--checkpoint_path", str(config), "--output_path", str(tmp_path / "x")]
        )
