"""Tiny text encoders with their tokenizers, and pipelines that are conditioned on texts."""

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from helpers.models import randomize, tiny_level, tiny_prior
from progressive_vae import ProgressiveVAEPipeline
from progressive_vae.models.text_encoding import load_text_encoder

WORDS = ["<pad>", "<start>", "<end>", "<unknown>", "a", "red", "green", "blue", "square", "disk"]
WIDTH = 8


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words, between a start and an end as in CLIP."""
    ids = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<start>", eos_token="<end>",
        unk_token="<unknown>", model_max_length=10,
    )  # fmt: skip


def tiny_clip() -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(WORDS), hidden_size=WIDTH, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=10, projection_dim=4, bos_token_id=1,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return randomize(CLIPTextModel(config))


def tiny_t5() -> T5EncoderModel:
    config = T5Config(vocab_size=len(WORDS), d_model=WIDTH, d_kv=4, d_ff=8, num_layers=1,
                      num_heads=2)  # fmt: skip
    return randomize(T5EncoderModel(config))


def text_pipeline(text_encoder=None, tokenizer=None, **options) -> ProgressiveVAEPipeline:
    """N = 2, images of 5×7; the prior has classes, too, and the finest level no condition.

    Without an encoder it is the hashed one.
    """
    if text_encoder is None:
        text_encoder, tokenizer = load_text_encoder(None)
    dim = text_encoder.config.hidden_size
    prior = tiny_prior(grid_size=[2, 2], num_classes=2, condition_dim=dim)
    coarsest = tiny_level(num_symbols=4, seed=1, condition_dim=dim)
    finest = tiny_level(num_channels=3, codebook_size=4, seed=2)
    parts = {"text_encoder": text_encoder, "tokenizer": tokenizer, **options}
    pipe = ProgressiveVAEPipeline.from_levels(prior, [coarsest, finest], [5, 7], **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe
