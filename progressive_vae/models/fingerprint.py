"""Fingerprints of the levels on whose codes a part was trained.

A pipeline refuses parts whose codes differ from those of training.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor

from .level import ProgressiveVAELevel
from .prior import ProgressiveVAEPrior


def fingerprint(levels: list[ProgressiveVAELevel]) -> str:
    """Return a hash of the encoders and codebooks of levels, which determine the codes.

    It includes the signs of the weights, and of the config the quantizer, K and the dither.
    Training flips some signs at every step; rounding to another float type flips none. So a
    half-precision copy has the fingerprint of the original. A refit does not change it, as it
    trains only the decoder.

    Args:
        levels: [level_i … level_N].
    """
    return _hash_digests([_digest(level) for level in levels])


def original_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by their names without the prefix that `torch.compile` adds to a module."""
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


def _hash_digests(digests: list[bytes]) -> str:
    return hashlib.sha256(b"".join(digests)).hexdigest()[:16]


def check_fingerprints(prior: ProgressiveVAEPrior | None, levels: list[ProgressiveVAELevel]):
    """Raise a `ValueError` if a part was trained on codes of other finer levels.

    Levels on the meta device or with quantized weights are not checked, as their signs are unknown.

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
        if expected is not None and (got := _hash_digests(digests[i:])) != expected:
            finer = [f"level_{j}" for j in range(i + 1, len(levels) + 1)]
            raise ValueError(
                f"expected {finer} with the fingerprint {expected} of the levels on whose codes "
                f"{name} was trained, got {got}. To combine them all the same, load {name} with "
                "`from_pretrained(…, finer_fingerprint=None)`, and do not trust its likelihood"
            )
