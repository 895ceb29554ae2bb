"""Texts as conditions: embeddings by a text encoder of transformers."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
    CLIPConfig,
    CLIPTextModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .hashed_text import HashedTextConfig, HashedTextEncoder, HashedTokenizer
from .modeling_utils import CONFIG, find_file

MAX_TEXT_TOKENS = 77  # those of CLIP; longer texts are cut off


@torch.no_grad()
def encode_texts(
    text_encoder: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the embeddings of texts, float (B, T, D), and their mask, bool (B, T).

    T does not depend on the texts. An empty text has no embedding, whatever special tokens the
    tokenizer adds: it is the null condition.

    Args:
        device: of the text encoder; `None`: that of its weights.
    """
    texts = list(texts)
    limit = min(tokenizer.model_max_length, MAX_TEXT_TOKENS)
    lengths = [len(ids) for ids in tokenizer(texts, truncation=False, verbose=False)["input_ids"]]
    if long := [text for text, n in zip(texts, lengths, strict=True) if n > limit]:
        warnings.warn(
            f"{len(long)} texts are cut off after {limit} tokens, the first is {long[0]!r}",
            stacklevel=2,
        )
    tokens = tokenizer(
        texts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt",
        return_attention_mask=True,
    )  # fmt: skip
    device = text_encoder.device if device is None else device
    mask = tokens["attention_mask"].to(device)
    output = text_encoder(input_ids=tokens["input_ids"].to(device), attention_mask=mask)
    has_text = torch.tensor([bool(text.strip()) for text in texts], device="cpu").to(device)
    return output.last_hidden_state, mask.bool() & has_text[:, None]


def load_text_encoder(name: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a text encoder, frozen, and its tokenizer.

    Args:
        name: a repository or folder of a text encoder such as CLIP or T5, or of a pipeline that has
            one in `text_encoder` and `tokenizer`. `None`: `HashedTextEncoder`.

    Raises:
        OSError: there is none.
    """
    if name is None:
        encoder: PreTrainedModel = HashedTextEncoder(HashedTextConfig())
        return encoder.requires_grad_(False).eval(), HashedTokenizer()
    subfolders = {"text_encoder": "", "tokenizer": ""}
    is_pipeline = find_file(name, CONFIG, {}) is None
    if is_pipeline and find_file(name, CONFIG, {"subfolder": "text_encoder"}) is not None:
        subfolders = {part: part for part in subfolders}
    options = {"subfolder": subfolders["text_encoder"]}
    config = AutoConfig.from_pretrained(name, **options)
    model_class: Any = AutoModel
    if isinstance(config, CLIPConfig):  # the whole of CLIP, which has a text model
        model_class = CLIPTextModel
    elif type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING:
        model_class = AutoModelForTextEncoding
    encoder = model_class.from_pretrained(name, **options)
    tokenizer = AutoTokenizer.from_pretrained(name, subfolder=subfolders["tokenizer"])
    return encoder.requires_grad_(False).eval(), tokenizer
