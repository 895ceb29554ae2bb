"""The captions of a data set, and the cache of their embeddings.

Each distinct caption is encoded once. The cache holds its embeddings in float16, without padding,
as memory-mapped Arrow, and a manifest: text encoder, captions, and sizes. It is written under a
temporary name and renamed, so it is complete or absent.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets.arrow_writer import ArrowWriter
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models.text_encoding import encode_texts
from ..serialization import read_json
from .classes import Table, find_column, label_counts

NO_CAPTION = -1
FORMAT = 1
_FEATURES = datasets.Features({"embeddings": datasets.Value("binary")})
_REMEDY = "the cache is damaged: delete its folder, and it is written again"


@dataclass(frozen=True)
class Captions:
    """
    Args:
        column: of the captions; `None` where there are none.
        texts: the distinct captions of the training images, sorted.
    """

    column: str | None = None
    texts: list[str] = field(default_factory=list)

    @property
    def ids(self) -> dict[str, int]:
        """The place of each caption among `texts`; others are `NO_CAPTION`."""
        return {text: i for i, text in enumerate(self.texts)}


def find_captions(train: Table, column: str | None) -> Captions:
    """Return the captions in a column of the training split.

    Raises:
        ValueError: no such column, or a column of something else than texts.
    """
    if column is None:
        return Captions()
    find_column(train, column, (), "caption_column")
    assert isinstance(train, datasets.Dataset)  # `DataSettings` refuses streams
    feature = train.features[column]
    if getattr(feature, "dtype", None) not in ("string", "large_string"):
        raise ValueError(f"expected caption_column of texts, got {feature} in {column!r}")
    texts = sorted(text for text in label_counts(train, column) if text and text.strip())
    if not texts:
        raise ValueError(f"expected captions in caption_column, got none in {column!r}")
    return Captions(column, texts)


@dataclass(frozen=True)
class CaptionManifest:
    """The identity of a cache of embeddings.

    Args:
        text_encoder: `text_encoder_digest`.
        texts: SHA-256 of the captions.
    """

    text_encoder: str
    texts: str
    format: int = FORMAT


def text_encoder_digest(text_encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of the text encoder's class and the signs of its weights, and of the tokens
    of some words. It is the same in half precision."""
    digest = hashlib.sha256(type(text_encoder).__name__.encode())
    for name, value in sorted(text_encoder.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(np.packbits(torch.signbit(value).cpu().numpy()).tobytes())
    digest.update(json.dumps(tokenizer("A small text, of twelve WORDS.")["input_ids"]).encode())
    return digest.hexdigest()[:16]


class CaptionEmbeddings:
    """The cache in a folder.

    Raises:
        ValueError: a cache of another text encoder or other captions, or a damaged one.
    """

    def __init__(self, folder: str | Path, expected: CaptionManifest):
        path = Path(folder) / "manifest.json"
        contents = read_json(path, _REMEDY)
        try:
            self.dim: int = contents.pop("dim")
            self.length: int = contents.pop("length")
            count: int = contents.pop("count")
            manifest = CaptionManifest(**contents)
            self.table = datasets.Dataset.from_file(str(Path(folder) / "embeddings.arrow"))
        except (KeyError, TypeError, OSError) as error:
            raise ValueError(f"expected a manifest in {path}, got {error!r}: {_REMEDY}") from error
        if manifest != expected:
            raise ValueError(f"expected {expected} in {path}, got {manifest}")
        if len(self.table) != count:
            raise ValueError(f"expected {count} captions in {path}, got {len(self.table)}")

    def batch(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return embeddings, float16 (B, T, D), and mask, bool (B, T), of captions.

        T is the same for all batches; `NO_CAPTION` has no embedding.
        """
        distinct = sorted({i for i in ids if i != NO_CAPTION})
        rows = self.table[distinct]["embeddings"] if distinct else []
        by_id = dict(zip(distinct, rows, strict=True))
        embeddings = np.zeros((len(ids), self.length, self.dim), np.float16)
        mask = np.zeros((len(ids), self.length), bool)
        for i, caption in enumerate(ids):
            values = np.frombuffer(by_id.get(caption, b""), np.float16).reshape(-1, self.dim)
            embeddings[i, : len(values)] = values
            mask[i, : len(values)] = True
        return torch.from_numpy(embeddings), torch.from_numpy(mask)


def is_caption_cache(folder: Path, manifest: CaptionManifest) -> bool:
    """Return whether the folder is a cache with this manifest."""
    try:
        CaptionEmbeddings(folder, manifest)
    except (ValueError, FileNotFoundError):
        return False
    return True


def caption_manifest(
    captions: Captions, text_encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> CaptionManifest:
    digest = hashlib.sha256(json.dumps(captions.texts).encode()).hexdigest()[:16]
    return CaptionManifest(text_encoder_digest(text_encoder, tokenizer), digest)


def write_caption_embeddings(
    folder: Path,
    manifest: CaptionManifest,
    captions: Captions,
    text_encoder: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = 256,
):
    """Write the cache of all captions."""
    temporary = folder.with_name(folder.name + ".incomplete")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    writer = ArrowWriter(path=str(temporary / "embeddings.arrow"), features=_FEATURES)
    length = dim = 1
    for start in range(0, len(captions.texts), batch_size):
        texts = captions.texts[start : start + batch_size]
        embeddings, mask = encode_texts(text_encoder, tokenizer, texts)
        dim = embeddings.shape[-1]
        length = max(length, int(mask.sum(1).max()))
        rows = [
            row[seen].numpy().tobytes()
            for row, seen in zip(embeddings.half().cpu(), mask.cpu(), strict=True)
        ]
        writer.write_batch({"embeddings": rows})
    writer.finalize()
    contents: dict[str, Any] = {"dim": dim, "length": length, "count": len(captions.texts)}
    text = json.dumps({**asdict(manifest), **contents}, indent=2)
    (temporary / "manifest.json").write_text(text)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
