"""What the first bytes of a picture's stream show."""

import math
from collections.abc import Iterator

from torch import Tensor

from ..image_processor import Images
from ..pipeline import ProgressiveVAEPipeline
from .bitstream import Header


def progressive_previews(
    pipe: ProgressiveVAEPipeline, image: Images, stream: bytes
) -> Iterator[tuple[int, Tensor]]:
    """Of each level from the coarsest on, the least number of the stream's first bytes that hold
    z_1 … z_k, and what they show, uint8 (C, H, W).

    Args:
        image: one, of the pipeline's size.
        stream: what `pipe.compress` says of it, without a class.
    """
    nats = pipe.log_prob(image)
    bits = 0.0
    for k, factor in enumerate(pipe.factor_names[:-1], 1):
        bits -= nats[factor].item() / math.log(2)
        yield minimal_prefix(pipe, stream, k, bits)


def minimal_prefix(
    pipe: ProgressiveVAEPipeline, stream: bytes, num_levels: int, bits: float = 0.0
) -> tuple[int, Tensor]:
    """The least number of a stream's first bytes that hold z_1 … z_k, and what they show.

    Args:
        bits: that the model states of z_1 … z_k. No fewer bytes hold them, and hardly more do, so
            that few lengths are tried.

    Raises:
        ValueError: a stream that does not hold them.
    """
    header = Header.from_bytes(stream, "stream 0").length
    for length in range(header + math.ceil(max(0.0, bits - 0.1) / 8), len(stream)):
        try:
            return length, pipe.decompress(stream[:length], num_levels)[0]
        except ValueError:  # it ends before
            continue
    return len(stream), pipe.decompress(stream, num_levels)[0]
