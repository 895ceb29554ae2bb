"""Pipelines that are conditioned on texts."""

import json
import warnings

import numpy as np
import pytest
import torch
from accelerate.hooks import CpuOffload
from diffusers import DiffusionPipeline
from transformers import CLIPTextModel

from helpers.hub import HUB
from helpers.models import assert_same, generators, tiny_pipeline
from helpers.texts import WIDTH, text_pipeline, tiny_clip, tiny_t5, tiny_tokenizer
from progressive_vae import HashedTextEncoder, ProgressiveVAEPipeline
from progressive_vae.models.conditioning import Conditioning
from progressive_vae.models.text_encoding import encode_texts, load_text_encoder

ENCODERS = {"clip": tiny_clip, "t5": tiny_t5}
PROMPT = "a red square"
LATENT = {"output_type": "latent"}
SIGNS = [0, 1, 1, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 0, 1]  # of the first entries of word0


@pytest.fixture
def pipe():
    return text_pipeline(tiny_clip(), tiny_tokenizer())


def codes_of(pipe, *args, count=1, **kwargs):
    options = {**LATENT, "generator": generators(count), **kwargs}
    return torch.cat([z.flatten(1) for z in pipe(*args, **options).codes], 1)


# ---- text encoders -------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", [*ENCODERS.values(), None], ids=[*ENCODERS, "hashed"])
def test_a_text_has_its_own_embeddings_whatever_the_batch(encoder):
    text_encoder, tokenizer = (encoder(), tiny_tokenizer()) if encoder else load_text_encoder(None)
    texts = [PROMPT, "", "  ", "blue disk"]
    embeddings, mask = encode_texts(text_encoder, tokenizer, texts)
    num_special = 2 if encoder else 0
    assert mask.sum(1).tolist() == [3 + num_special, 0, 0, 2 + num_special]
    assert embeddings.shape == (*mask.shape, text_encoder.config.hidden_size)
    alone, alone_mask = encode_texts(text_encoder, tokenizer, texts[:1])
    assert torch.equal(mask[:1], alone_mask)
    assert torch.allclose(embeddings[:1][alone_mask], alone[alone_mask], atol=1e-5)
    assert (embeddings[0, :2] - embeddings[3, :2]).abs().max() > 1e-2
    with pytest.warns(UserWarning, match="1 texts are cut off after .* 'red red"):
        _, mask = encode_texts(text_encoder, tokenizer, [" ".join(["red"] * 99), "a"])
    assert mask[0].all()


def test_hashed_words_are_almost_orthogonal_unit_vectors(tmp_path):
    encoder, tokenizer = load_text_encoder(None)
    words = " ".join(f"word{i}" for i in range(64))
    vectors = encode_texts(encoder, tokenizer, [words])[0][0]
    products = vectors @ vectors.T
    assert torch.allclose(products.diag(), torch.ones(64))
    off_diagonal = products[~torch.eye(64, dtype=torch.bool)]
    assert off_diagonal.abs().max() < 0.5 and off_diagonal.std() == pytest.approx(128**-0.5, 0.1)
    # Fixed for all time: saved models know words by them.
    assert (vectors[0, :16] > 0).long().tolist() == SIGNS
    # Case and punctuation do not count.
    first, second = (encode_texts(encoder, tokenizer, [t]) for t in ("Red, DISK!", "red disk"))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    encoder.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_text_encoder(str(tmp_path))
    assert torch.equal(encode_texts(*loaded, [words])[0][0], vectors)


@pytest.mark.parametrize("encoder", ENCODERS.values(), ids=ENCODERS)
def test_text_encoders_load_from_folders_and_pipelines(encoder, tmp_path):
    model, tokenizer = encoder(), tiny_tokenizer()
    expected = encode_texts(model, tokenizer, [PROMPT])[0]
    model.save_pretrained(tmp_path / "folder")
    tokenizer.save_pretrained(tmp_path / "folder")
    text_pipeline(model, tokenizer).save_pretrained(tmp_path / "pipe")
    for folder in ("folder", "pipe"):
        loaded = load_text_encoder(str(tmp_path / folder))
        assert type(loaded[0]) is type(model) and not loaded[0].training
        assert torch.equal(encode_texts(*loaded, [PROMPT])[0], expected)


# ---- sampling ------------------------------------------------------------------------------------


def test_samples_follow_the_prompt(pipe):
    kwargs = {"num_images_per_prompt": 40, "count": 80, "guidance_scale": 3.0}
    codes = codes_of(pipe, prompt=[PROMPT, "blue disk"], **kwargs)
    assert (codes[:40].double().mean(0) - codes[40:].double().mean(0)).abs().max() > 0.3
    assert torch.equal(codes_of(pipe, prompt=PROMPT, count=1, guidance_scale=3.0), codes[:1])
    # With a class too, and by embeddings.
    both = codes_of(pipe, [0, 1], prompt=[PROMPT, PROMPT], count=2)
    embeds, mask, *negative = pipe.encode_prompt(PROMPT, num_images_per_prompt=2)
    assert negative == [None, None]
    same = codes_of(pipe, [0, 1], prompt_embeds=embeds, prompt_attention_mask=mask, count=2)
    assert torch.equal(both, same)
    vector = pipe(prompt_embeds=embeds[:, 0], **LATENT).images  # one vector for each image
    assert len(vector) == 2


def test_an_empty_prompt_is_the_null_condition(pipe):
    expected = codes_of(pipe)
    for arguments in (
        {"prompt": ""},
        {"prompt": [" "], "guidance_scale": 4.0},
        {"prompt": "", "negative_prompt": "", "guidance_scale": 4.0},
    ):
        assert torch.equal(codes_of(pipe, **arguments), expected)
    images = torch.randint(256, (2, 3, 5, 7), dtype=torch.uint8)
    null = pipe.log_prob(images)
    nats = pipe.log_prob(images, prompt=["", PROMPT])
    for name in ("prior", "level_1"):
        assert nats[name][0] == null[name][0] and nats[name][1] != null[name][1]
    assert torch.equal(nats["level_2"], null["level_2"])  # has no condition


def test_guidance(pipe):
    unguided = codes_of(pipe, prompt=PROMPT)
    assert torch.equal(codes_of(pipe, prompt=PROMPT, guidance_scale=1.0), unguided)
    kwargs = {"prompt": [PROMPT] * 8, "count": 8}
    guided = codes_of(pipe, guidance_scale=3.0, **kwargs)
    per_factor = codes_of(pipe, guidance_scale=[3.0, 1.0, 1.0], **kwargs)
    assert torch.equal(guided[:, :4], per_factor[:, :4]) and not torch.equal(guided, per_factor)
    away = codes_of(pipe, negative_prompt="blue disk", guidance_scale=3.0, **kwargs)
    assert not torch.equal(away, guided)
    null = codes_of(pipe, negative_prompt="", guidance_scale=3.0, **kwargs)
    assert torch.equal(null, guided)
    # Away from the prompt itself there is no guidance.
    same = codes_of(pipe, negative_prompt=PROMPT, guidance_scale=3.0, **kwargs)
    assert torch.equal(same, codes_of(pipe, **kwargs))
    pipe.register_to_config(sampling={"guidance_scale": 3.0})
    assert torch.equal(codes_of(pipe, **kwargs), guided)


def test_editing_with_a_prompt(pipe):
    images = torch.randint(256, (2, 3, 5, 7), dtype=torch.uint8)
    prompts = [PROMPT, "blue disk"]
    mask = torch.ones(5, 7)
    masked = pipe.inpaint(images, mask, prompt=prompts, guidance_scale=2.0, num_particles=2)
    assert len(masked.images) == 2
    assert len(pipe.reconstruct(images, level=1, prompt=prompts)) == 2
    kwargs = {"prompt": prompts, "negative_prompt": "a", "guidance_scale": 2.0}
    assert len(pipe.variations(images, **kwargs).images) == 2
    between = pipe.interpolate(images[:1], images[1:], level=1, steps=3, prompt=PROMPT)
    assert len(between.images) == 3
    bits = pipe.bits_per_dim(images, prompt=prompts)
    assert np.isfinite(bits["total"])


def test_streams_are_conditioned_on_no_text(pipe):
    images = torch.randint(256, (2, 3, 5, 7), dtype=torch.uint8)
    for arithmetic in ("float", "integer"):
        streams = pipe.compress(images, arithmetic=arithmetic)
        assert torch.equal(pipe.decompress(streams), images)
    with pytest.raises(ValueError, match="prompt=None, as streams are of the null condition"):
        pipe.compress(images, prompt=PROMPT)
    condition = Conditioning.from_labels(None, pipe.prior.config, 2)
    with pytest.raises(ValueError, match="prompt=None, as streams .* got embeddings"):
        pipe.compress(images, condition.with_embeddings(torch.zeros(2, WIDTH)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": 3}, "prompt to be a text or a list of texts, got 3"),
        ({"prompt": []}, "prompt to be a text or a list of texts"),
        ({"prompt": ["a", None]}, "prompt to be a text or a list of texts"),
        ({"prompt": "a", "prompt_embeds": torch.zeros(1, 2, 8)}, "one of prompt and prompt_embeds"),
        ({"prompt_attention_mask": torch.ones(1, 2)}, "prompt_attention_mask with prompt_embeds"),
        ({"negative_prompt": "a"}, "a prompt with negative_prompt"),
        ({"prompt": "a", "negative_prompt": "red"}, "guidance_scale other than 1 for negative"),
        ({"prompt": ["a", "red"], "class_labels": [0]}, "expected 2 class_labels, got 1"),
        ({"prompt": ["a", "red"], "negative_prompt": ["a"] * 3, "guidance_scale": 2.0},
         r"embeddings to be floats of shape \(2, T, D\)"),
        ({"prompt_embeds": torch.zeros(1, 2, 5)}, "length condition_dim=8, got 5"),
        ({"prompt": "a", "codes": [torch.zeros(2, 2, 2).long()]}, "expected 2 class_labels, got 1"),
        ({"prompt": "a", "codes": [torch.zeros(1, 2, 2).long(), torch.zeros(1, 3, 4).long()]},
         "expected prompt=None, as no sampled factor"),
    ],
)  # fmt: skip
def test_invalid_prompts(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


def test_pipelines_without_a_text_encoder():
    with pytest.raises(ValueError, match="all parts have config.condition_dim=None"):
        tiny_pipeline()(prompt_embeds=torch.zeros(1, 2, 8))
    with pytest.raises(ValueError, match="text_encoder and tokenizer for a prompt"):
        tiny_pipeline()(prompt="a")
    with pytest.raises(ValueError, match="text_encoder and tokenizer or none, got no tokenizer"):
        text_pipeline(tiny_clip(), None)


# ---- saved, pushed, moved ------------------------------------------------------------------------


def test_saved_and_pushed_with_the_text_encoder(pipe, tmp_path):
    expected = codes_of(pipe, prompt=PROMPT)
    pipe.save_pretrained(tmp_path / "pipe")
    pipe.push_to_hub("org/texts")
    files = HUB.files("org/texts")
    assert {"text_encoder/model.safetensors", "tokenizer/tokenizer.json"} <= set(files)
    card = files["README.md"].decode()
    assert 'pipe(["0"], prompt="a text", num_images' in card and "the class, embeddings" in card
    assert "pipeline_tag: text-to-image" in card
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sources = [str(tmp_path / "pipe"), "org/texts"]
        loaded = [ProgressiveVAEPipeline.from_pretrained(source) for source in sources]
        loaded.append(DiffusionPipeline.from_pretrained("org/texts"))
    for other in loaded:
        assert_same(pipe, other)
        assert type(other.text_encoder) is CLIPTextModel
        assert torch.equal(codes_of(other, prompt=PROMPT), expected)
    # Without its text encoder the pipeline takes embeddings.
    bare = ProgressiveVAEPipeline.from_pretrained(
        str(tmp_path / "pipe"), text_encoder=None, tokenizer=None
    )
    embeds, mask, *_ = pipe.encode_prompt(PROMPT)
    same = codes_of(bare, prompt_embeds=embeds, prompt_attention_mask=mask)
    assert torch.equal(same, expected)
    # A later push without it deletes its files.
    bare.push_to_hub("org/texts")
    assert not [name for name in HUB.files("org/texts") if name.startswith(("text", "token"))]


def test_a_variant_has_the_text_encoder_too(pipe, tmp_path):
    pipe.to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    pipe.push_to_hub("org/half-texts", variant="fp16")
    assert "text_encoder/model.fp16.safetensors" in HUB.files("org/half-texts")
    for source in (str(tmp_path), "org/half-texts"):
        options = {"variant": "fp16", "dtype": torch.float16}
        loaded = ProgressiveVAEPipeline.from_pretrained(source, **options)
        assert loaded.text_encoder.dtype == torch.float16
        assert torch.equal(codes_of(loaded, prompt=PROMPT), codes_of(pipe, prompt=PROMPT))


def test_offload_moves_the_text_encoder_first(pipe, monkeypatch):
    expected = codes_of(pipe, prompt=PROMPT)
    moved = []
    pre_forward = CpuOffload.pre_forward

    def record(hook, module, *args, **kwargs):
        moved.append(module)
        return pre_forward(hook, module, *args, **kwargs)

    monkeypatch.setattr(CpuOffload, "pre_forward", record)
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(codes_of(pipe, prompt=PROMPT), expected)
    assert moved[0] is pipe.text_encoder and pipe.prior in moved


def test_hashed_texts_on_the_hub():
    pipe = text_pipeline()
    expected = codes_of(pipe, prompt=PROMPT, guidance_scale=2.0)
    pipe.push_to_hub("org/hashed", with_code=True)
    files = HUB.files("org/hashed")
    assert "tokenizer/progressive_vae.py" in files and "text_encoder/progressive_vae.py" in files
    loaded = ProgressiveVAEPipeline.from_pretrained("org/hashed")
    assert type(loaded.text_encoder) is HashedTextEncoder
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(codes_of(loaded, prompt=PROMPT, guidance_scale=2.0), expected)


def test_a_text_encoder_by_reference(tmp_path):
    model, tokenizer = tiny_clip(), tiny_tokenizer()
    model.save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    expected = codes_of(text_pipeline(model, tokenizer), prompt=PROMPT)
    pipe = text_pipeline(model, tokenizer)
    parts = {"text_encoder": None, "tokenizer": None}
    pipe = ProgressiveVAEPipeline(
        **{**pipe.components, **parts}, image_size=[5, 7], text_encoder_id=str(tmp_path / "encoder")
    )
    assert torch.equal(codes_of(pipe, prompt=PROMPT), expected)
    pipe.save_pretrained(tmp_path / "pipe")
    assert not (tmp_path / "pipe" / "text_encoder").exists()
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert index["text_encoder_id"] == str(tmp_path / "encoder")
    loaded = ProgressiveVAEPipeline.from_pretrained(str(tmp_path / "pipe"))
    assert torch.equal(codes_of(loaded, prompt=PROMPT), expected)
