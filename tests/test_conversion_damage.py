"""What is no tokenizer, or not whole, or more than tensors: an error that says so, and no files."""

import json
from pathlib import Path

import pytest
import torch
from conftest import LFS_POINTER, load_script
from safetensors.torch import load_file, save_file
from test_conversion import assert_refused, converted, saved_vqmodel


def drop(weights):
    del weights["decoder.conv_out.bias"]


def reshape(weights):
    weights["quant_conv.weight"] = weights["quant_conv.weight"][:, :3].contiguous()


def add(weights):
    weights["encoder.extra.weight"] = torch.zeros(2)


def lose(weights):
    weights["discriminator.weight"] = torch.zeros(2)


def spoil(weights):
    weights["encoder.conv_in.weight"][0, 0, 0, 0] = float("nan")


def count(weights):
    weights["encoder.steps"] = torch.tensor(3)


@pytest.mark.parametrize("harm, words", [
    (drop, r"1 missing: auxiliary.decoder.conv_out.bias"),
    (reshape, r"1 of another shape: quant_conv.weight \(4, 3, 1, 1\) in place of \(4, 5, 1, 1\)"),
    (add, r"1 left over: encoder.extra.weight"),
    (lose, r"1 left over: discriminator.weight"),
    (spoil, r"expected finite weights, got others in encoder.conv_in.weight"),
    (count, r"expected names and tensors of floats in .*, got others: encoder.steps"),
])  # fmt: skip
@pytest.mark.parametrize("is_safe", [True, False])
def test_weights_that_are_not_those_of_the_config(tmp_path, harm, words, is_safe):
    saved_vqmodel(tmp_path / "theirs")
    path = tmp_path / "theirs" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    harm(weights)
    if is_safe:
        save_file(weights, path)
    else:
        path.unlink()
        torch.save(weights, path.with_suffix(".bin"))
    flags = "--checkpoint_path", tmp_path / "theirs"
    assert_refused(words, "convert_diffusers_vqmodel", *flags, output=tmp_path / "level")


class Evil:
    """What a pickle may hold."""

    def __reduce__(self):
        return Path.touch, (Path("a file that nobody asked for"),)


def test_pickles_that_hold_more_than_tensors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = saved_vqmodel(tmp_path / "theirs", safe_serialization=False)
    path = tmp_path / "theirs" / "diffusion_pytorch_model.bin"
    flags = "convert_diffusers_vqmodel", "--checkpoint_path", tmp_path / "theirs"
    words = "a pickle that holds code or objects, which is not loaded .* clean file of it yourself"
    for contents in ({"evil": Evil()}, model, {**model.state_dict(), "path": Path("x")}):
        torch.save(contents, path)
        assert_refused(words, *flags, output=tmp_path / "level")
    torch.save([torch.zeros(2)], path)
    assert_refused("expected a dict of names and tensors in", *flags, output=tmp_path / "level")
    torch.save({**model.state_dict(), "note": "x"}, path)
    assert_refused("tensors of floats .* got others: note", *flags, output=tmp_path / "level")


@pytest.mark.parametrize("is_safe", [True, False])
@pytest.mark.parametrize("name", ["config.json", "diffusion_pytorch_model.*"])
def test_pointers_of_git_lfs(tmp_path, name, is_safe):
    saved_vqmodel(tmp_path / "theirs", safe_serialization=is_safe)
    (path,) = (tmp_path / "theirs").glob(name)
    path.write_bytes(LFS_POINTER)
    flags = "--checkpoint_path", tmp_path / "theirs"
    words = f"{path.name}, got a git-lfs pointer: run `git lfs pull`"
    assert_refused(words, "convert_diffusers_vqmodel", *flags, output=tmp_path / "level")


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("is_safe", [True, False])
def test_files_that_are_cut(tmp_path, share, is_safe):
    saved_vqmodel(tmp_path / "theirs", safe_serialization=is_safe)
    (path,) = (tmp_path / "theirs").glob("diffusion*")
    contents = path.read_bytes()
    path.write_bytes(contents[: int(share * len(contents))])
    flags = "--checkpoint_path", tmp_path / "theirs"
    words = "expected (whole weights|a whole file of tensors) in"
    assert_refused(words, "convert_diffusers_vqmodel", *flags, output=tmp_path / "level")


def test_files_that_are_missing_or_others(tmp_path):
    saved_vqmodel(tmp_path / "theirs")
    flags = "convert_diffusers_vqmodel", "--checkpoint_path", tmp_path / "theirs"
    target = tmp_path / "level"
    config = tmp_path / "theirs" / "config.json"
    fields = json.loads(config.read_text())

    def with_config(**changes):
        config.write_text(json.dumps({**fields, **changes}))

    with_config(width=3)
    assert_refused(r"got \['width'\]", *flags, output=target)
    with_config(_class_name="AutoencoderKL")
    assert_refused("config of a VQModel .* got 'AutoencoderKL'", *flags, output=target)
    with_config(norm_num_groups=3)
    assert_refused(
        "tokenizer_config of a network of 'vq_model', got .*num_groups", *flags, output=target
    )
    with_config(norm_num_groups=-1)
    assert_refused("norm_num_groups >= 1 in tokenizer_config, got -1", *flags, output=target)
    with_config(down_block_types=["NoBlock2D"] * 2)
    assert_refused("of a network of 'vq_model', got .*NoBlock2D", *flags, output=target)
    with_config(num_vq_embeddings=25)
    assert_refused("quantize.embedding.weight .24, 4. in place of .25, 4.", *flags, output=target)
    with_config(num_vq_embeddings=10**12)
    assert_refused("expected codebook_size <= 1048576", *flags, output=target)
    config.write_text(json.dumps(fields)[:-9])
    assert_refused("expected JSON in .*config.json", *flags, output=target)
    config.unlink()
    assert_refused("expected config.json in", *flags, output=target)
    elsewhere = tmp_path / "elsewhere.json"
    words = "config_file to be a file, got .*elsewhere.json"
    assert_refused(words, *flags, "--config_file", elsewhere, output=target)
    elsewhere.write_text(json.dumps(fields))
    converted(*flags, "--config_file", elsewhere, output=target)
    before = (target / "config.json").stat().st_mtime_ns
    with pytest.raises(ValueError, match="expected output_path to be a new or empty folder"):
        load_script(flags[0], "conversion").main(
            [*map(str, flags[1:]), "--output_path", str(target)]
        )
    assert (target / "config.json").stat().st_mtime_ns == before
    config.write_text(json.dumps(fields))
    (tmp_path / "theirs" / "diffusion_pytorch_model.safetensors").unlink()
    assert_refused("expected diffusion_pytorch_model.safetensors or", *flags, output=tmp_path / "x")
    with pytest.raises(ValueError, match="a folder or a repository, got .*config.json"):
        load_script(flags[0], "conversion").main(
            ["--checkpoint_path", str(config), "--output_path", str(tmp_path / "x")]
        )
