"""Converted tokenizers have the codes and images of their source, or raise and write nothing.

The sources here are of required libraries. `test_conversion_peers.py` has the others, and
`test_conversion_damage.py` invalid checkpoints.
"""

import json
import shutil

import pytest
import torch
from diffusers import VQModel
from safetensors.torch import load_file, save_file
from transformers import JanusVQVAE, JanusVQVAEConfig

from helpers.conversion import (
    PLAIN,
    VQMODELS,
    assert_raises,
    assert_same_outputs,
    assert_same_weights,
    convert,
    pixels,
    save_vqmodel,
    shake,
)
from helpers.hub import HUB
from helpers.scripts import load_script
from progressive_vae import ProgressiveVAELevel

SMALL_JANUS = {"base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1,
               "latent_channels": 6, "embed_dim": 4, "num_embeddings": 24,
               "num_patches": 8}  # fmt: skip


@torch.no_grad()
def vqmodel_outputs(model: VQModel, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    latents = model.encode(x).latents
    codes = model.quantize(latents)[2][2].view(len(x), *latents.shape[2:])
    shape = (*codes.shape, latents.shape[1])
    vectors = model.quantize.get_codebook_entry(codes.flatten(), shape)
    decoder_in = model.post_quant_conv(vectors)
    is_spatial = model.config.norm_type == "spatial"
    return codes, model.decoder(decoder_in, vectors if is_spatial else None)


# ---- diffusers' VQModel --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", VQMODELS)
def test_a_vqmodel_to_a_level_and_back(tmp_path, kind):
    model = save_vqmodel(tmp_path / "source", kind)
    level = convert(
        "convert_diffusers_vqmodel", "--checkpoint_path", tmp_path / "source",
        output=tmp_path / "level",
    )  # fmt: skip
    x = pixels(model.config.in_channels)
    codes, image = vqmodel_outputs(model, x)
    assert_same_outputs(level, x, codes, image.clamp(-1, 1))
    main = load_script("convert_diffusers_vqmodel", "conversion").main
    main(["--reverse", "--checkpoint_path", str(tmp_path / "level"),
          "--output_path", str(tmp_path / "back")])  # fmt: skip
    back = VQModel.from_pretrained(tmp_path / "back")
    assert_same_weights(model, back)
    fields = {k: v for k, v in model.config.items() if not k.startswith("_")}
    assert fields == {k: v for k, v in back.config.items() if not k.startswith("_")}


def test_the_image_range_of_a_vqmodel_is_that_of_its_pipeline(tmp_path):
    model = shake(VQModel(**VQMODELS["plain"]))
    with torch.no_grad():
        model.decoder.conv_out.weight.mul_(0.5)
        model.decoder.conv_out.bias.fill_(0.5)
    model.save_pretrained(tmp_path / "amused" / "vqvae", safe_serialization=False)
    index = {"_class_name": "AmusedPipeline", "vqvae": ["diffusers", "VQModel"],
             "scheduler": ["diffusers", "AmusedScheduler"]}  # fmt: skip
    (tmp_path / "amused" / "model_index.json").write_text(json.dumps(index))
    x = pixels()
    codes, image = vqmodel_outputs(model, (x + 1) / 2)
    for i, source in enumerate(("amused", "amused/vqvae")):
        level = convert(
            "convert_diffusers_vqmodel", "--checkpoint_path", tmp_path / source,
            output=tmp_path / f"level_{i}",
        )  # fmt: skip
        assert_same_outputs(level, x, codes, (image * 2 - 1).clamp(-1, 1))
    level = convert(
        "convert_diffusers_vqmodel", "--checkpoint_path", tmp_path / "amused",
        "--do_normalize", "true", output=tmp_path / "normalized",
    )  # fmt: skip
    assert torch.equal(level.encode(x), vqmodel_outputs(model, x)[0])
    index["vqvae"][1] = "AutoencoderKL"
    (tmp_path / "amused" / "model_index.json").write_text(json.dumps(index))
    assert_raises(
        "expected a pipeline with a VQModel in", "convert_diffusers_vqmodel",
        "--checkpoint_path", tmp_path / "amused", output=tmp_path / "no",
    )  # fmt: skip


def test_conversion_from_and_to_the_hub(tmp_path, capsys):
    model = shake(VQModel(**VQMODELS["attentive"]))
    model.push_to_hub("org/vqmodel")
    level = convert(
        "convert_diffusers_vqmodel", "--checkpoint_path", "org/vqmodel", "--push_to_hub",
        "--hub_model_id", "org/converted", output=tmp_path / "level",
    )  # fmt: skip
    assert_same_weights(level, ProgressiveVAELevel.from_pretrained("org/converted"))
    assert "config.json" in HUB.files("org/converted")
    assert_raises(
        "org/nothing is not a local folder", "convert_diffusers_vqmodel",
        "--checkpoint_path", "org/nothing", output=tmp_path / "no", error=OSError,
    )  # fmt: skip
    HUB.fail_on = ".*"
    flags = "convert_diffusers_vqmodel", "--checkpoint_path", "org/not-cached"
    assert_raises("couldn.t connect to", *flags, output=tmp_path / "no", error=OSError)


def test_names_of_attention_before_diffusers_0_15(tmp_path):
    model = save_vqmodel(tmp_path / "source", "attentive")
    path = tmp_path / "source" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, name in old.items():
        weights = {key.replace(f".{new}.", f".{name}."): value for key, value in weights.items()}
    assert "encoder.mid_block.attentions.0.proj_attn.bias" in weights
    save_file(weights, path)
    level = convert(
        "convert_diffusers_vqmodel", "--checkpoint_path", tmp_path / "source",
        output=tmp_path / "level",
    )  # fmt: skip
    assert torch.equal(level.encode(pixels()), vqmodel_outputs(model, pixels())[0])


def test_a_dry_run_prints_the_table_and_writes_nothing(tmp_path, capsys):
    save_vqmodel(tmp_path / "source")
    before = sorted(tmp_path.rglob("*"))
    script = load_script("convert_diffusers_vqmodel", "conversion")
    script.main(["--checkpoint_path", str(tmp_path / "source"), "--dry_run"])
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    rows = [[word.strip() for word in line if word.strip()] for line in lines]
    assert ["quantize.embedding.weight", "quantizer.quantize.embedding.weight", "(24, 4)",
            "float32"] in rows  # fmt: skip
    assert len([row for row in rows if len(row) == 4]) == 1 + len(VQModel(**PLAIN).state_dict())
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(ValueError, match="expected output_path, or dry_run, got neither"):
        script.main(["--checkpoint_path", str(tmp_path / "source")])


def test_dtypes_of_weights(tmp_path):
    model = save_vqmodel(tmp_path / "source")
    flags = "convert_diffusers_vqmodel", "--checkpoint_path", tmp_path / "source"
    level = convert(*flags, "--dtype", "float16", output=tmp_path / "half")
    halves = load_file(tmp_path / "half" / "model.safetensors")
    assert {weight.dtype for weight in halves.values()} == {torch.float16}
    codebook = level.quantizer.quantize.embedding.weight
    assert torch.equal(codebook.half(), model.quantize.embedding.weight.half())
    codes = level.half().encode(pixels())
    assert (codes == vqmodel_outputs(model, pixels())[0]).float().mean() > 0.9
    assert level.expect(codes).isfinite().all()
    model.to(torch.bfloat16).save_pretrained(
        tmp_path / "source"
    )  # the default is the dtype of the source
    convert(*flags, output=tmp_path / "same")
    load_script("convert_diffusers_vqmodel", "conversion").main(
        ["--reverse", "--checkpoint_path", str(tmp_path / "same"),
         "--output_path", str(tmp_path / "back")]
    )  # fmt: skip
    back = load_file(tmp_path / "back" / "diffusion_pytorch_model.safetensors")
    for name, weight in model.state_dict().items():
        assert torch.equal(back[name], weight) and back[name].dtype == torch.bfloat16
    same = load_file(tmp_path / "same" / "model.safetensors")
    assert {weight.dtype for weight in same.values()} == {torch.bfloat16}
    path = tmp_path / "source" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["quantize.embedding.weight"][3, 1] = 1e6
    save_file(weights, path)
    words = "torch.float16, got others in quantize.embedding.weight"
    assert_raises(words, *flags, "--dtype", "float16", output=tmp_path / "no")
    weights["encoder.conv_in.bias"] = weights["encoder.conv_in.bias"].double()
    save_file(weights, path)
    assert_raises("expected dtype for weights of", *flags, output=tmp_path / "no")


# ---- transformers' JanusVQVAE --------------------------------------------------------------------


@torch.no_grad()
def janus_outputs(model: JanusVQVAE, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes = model.encode(x).image_tokens.view(len(x), -1)
    size = x.shape[-1] // 2 ** (len(model.config.channel_multiplier) - 1)
    return codes.view(-1, size, size), model.decode(codes)


def test_a_janus_vqvae(tmp_path):
    model = shake(JanusVQVAE(JanusVQVAEConfig(**SMALL_JANUS)))
    model.save_pretrained(tmp_path / "source")
    level = convert(
        "convert_janus_vqvae", "--checkpoint_path", tmp_path / "source", output=tmp_path / "level"
    )
    codes, image = janus_outputs(model, pixels())
    assert_same_outputs(level, pixels(), codes, image.clamp(-1, 1))

    # As a part of a Janus, in shards of which only one has its weights.
    state = {f"model.vqmodel.{key}": weight for key, weight in model.state_dict().items()}
    janus = tmp_path / "janus"
    janus.mkdir()
    save_file(state, janus / "model-00002-of-00002.safetensors")
    index = {key: "model-00002-of-00002.safetensors" for key in state}
    index["lm_head.weight"] = "model-00001-of-00002.safetensors"  # a missing file
    (janus / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    fields = json.loads((tmp_path / "source" / "config.json").read_text())
    config = {"model_type": "janus", "vq_config": {**fields, "beta": 0.25}}
    (janus / "config.json").write_text(json.dumps(config))
    part = convert("convert_janus_vqvae", "--checkpoint_path", janus, output=tmp_path / "part")
    assert_same_weights(level, part)

    flags = "convert_janus_vqvae", "--checkpoint_path", janus
    config["vq_config"]["depth"] = 3
    (janus / "config.json").write_text(json.dumps(config))
    assert_raises(r"fields of a JanusVQVAEConfig in .*, got \['depth'\]", *flags,
                   output=tmp_path / "no")  # fmt: skip
    (janus / "config.json").write_text(json.dumps({"model_type": "multi_modality"}))
    assert_raises("got 'multi_modality'", *flags, output=tmp_path / "no")
    config["vq_config"] = {**fields, "double_latent": True}
    (janus / "config.json").write_text(json.dumps(config))
    assert_raises("expected double_latent=False", *flags, output=tmp_path / "no")
    config["vq_config"] = {**fields, "base_channels": "many"}
    (janus / "config.json").write_text(json.dumps(config))
    assert_raises(
        "of a network of 'janus_vqgan', got .*base_channels", *flags, output=tmp_path / "no"
    )
    config["vq_config"] = fields
    (janus / "config.json").write_text(json.dumps(config))
    (janus / "model-00002-of-00002.safetensors").unlink()
    assert_raises("expected model-00002-of-00002.safetensors in", *flags, output=tmp_path / "no")
    shutil.rmtree(janus)
    janus.mkdir()
    assert_raises("expected config.json in", *flags, output=tmp_path / "no")
