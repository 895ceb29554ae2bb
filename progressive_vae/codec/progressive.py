"""Progressive decoding: images of prefixes of a stream."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..image_processor import Images, pixel_value_batches
from ..stack import LevelStack
from .bitstream import Header
from .codec import decompress


def progressive_previews(
    stack: LevelStack, image: Images, stream: bytes
) -> Iterator[tuple[int, Tensor]]:
    """For each level k, coarsest first: the length of the shortest prefix that holds z_1 … z_k, in
    bytes, and its preview, uint8 (C, H, W).

    Args:
        image: one, of the stack's size.
        stream: the image's stream by `compress`, without a class.
    """
    pixel_values = torch.cat(list(pixel_value_batches(image, stack.image_shape, 1)))
    nats = stack.log_prob(pixel_values)
    bits = 0.0
    for k, factor in enumerate(stack.factor_names[:-1], 1):
        bits -= nats[factor].item() / math.log(2)
        yield minimal_prefix(stack, stream, k, bits)


def minimal_prefix(
    stack: LevelStack, stream: bytes, num_levels: int, bits: float = 0.0
) -> tuple[int, Tensor]:
    """The length of a stream's shortest prefix that holds z_1 … z_k, in bytes, and its preview.

    Args:
        bits: −log₂ P(z_1 … z_k). No shorter prefix holds the codes, and hardly a longer one is
            needed, so that few lengths are tried.

    Raises:
        ValueError: a stream that does not hold them.
    """
    header = Header.from_bytes(stream, "stream 0").length
    for length in range(header + math.ceil(max(0.0, bits - 0.1) / 8), len(stream)):
        try:
            return length, decompress(stack, stream[:length], num_levels)[0]
        except ValueError:  # the prefix is too short
            continue
    return len(stream), decompress(stack, stream, num_levels)[0]
