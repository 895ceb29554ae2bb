"""Which codes a part was trained on, so that parts that do not belong together are refused."""

import hashlib

import numpy as np
import torch
from torch import Tensor

from .level import ProgressiveVAELevel
from .prior import ProgressiveVAEPrior


def fingerprint(levels: list[ProgressiveVAELevel]) -> str:
    """A hash of the encoders and codebooks of these levels: of all that decides the codes.

    Of the weights only the signs count, and of the config the kind of quantizer, K and the dither.
    Training flips some signs at every step, and rounding to any float type flips none: a
    half-precision copy has the fingerprint of the original, whether it was rounded once or twice.
    Decoders do not count, so a refit leaves it as it is.
    """
    return _joined([_digest(level) for level in levels])


def original_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a module by the names that they have without `torch.compile`, which puts a
    compiled module one step deeper."""
    return {name.replace("_orig_mod.", ""): value for name, value in tensors.items()}


def _digest(level: ProgressiveVAELevel) -> bytes:
    config = level.config
    digest = hashlib.sha256(f"{config.quantizer} {config.codebook_size}".encode())
    if config.dither:
        digest.update(f"dither {config.dither}".encode())
    parts = level.encoder.state_dict(prefix="encoder.")
    parts |= level.quantizer.state_dict(prefix="quantizer.")
    for name, value in sorted(original_names(parts).items()):
        if not name.endswith(level.quantizer.TRAINING_STATE):
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(np.packbits(torch.signbit(value).cpu().numpy()).tobytes())
    return digest.digest()


def _joined(digests: list[bytes]) -> str:
    return hashlib.sha256(b"".join(digests)).hexdigest()[:16]


def check_fingerprints(prior: ProgressiveVAEPrior | None, levels: list[ProgressiveVAELevel]):
    """Raise a `ValueError` if a part remembers finer levels other than those it is to join.

    Weights that are not there yet (on the meta device) or not floats any more (quantized ones) are
    not checked.

    Args:
        levels: [level_1 … level_N].
    """
    parts = [("prior", prior), *((f"level_{i}", level) for i, level in enumerate(levels, 1))]
    if not any(part is not None and part.config.finer_fingerprint for _, part in parts):
        return
    weights = [weight for level in levels for weight in level.parameters()]
    if any(weight.is_meta or not weight.is_floating_point() for weight in weights):
        return
    digests = [_digest(level) for level in levels]
    for i, (name, part) in enumerate(parts):
        expected = part.config.finer_fingerprint if part is not None else None
        if expected is not None and (got := _joined(digests[i:])) != expected:
            finer = [f"level_{j}" for j in range(i + 1, len(levels) + 1)]
            raise ValueError(
                f"expected {finer} with the fingerprint {expected} of the levels on whose codes "
                f"{name} was trained, got {got}. To combine them all the same, load {name} with "
                "`from_pretrained(…, finer_fingerprint=None)`, and do not trust its bits"
            )
