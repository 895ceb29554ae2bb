"""What the knobs of a level can be set to."""

import itertools
import math
from collections.abc import Callable

DECODER_ORDERS = ("factorized", "lattice", "masked", "raster", "auxiliary")
PIXEL_DISTRIBUTIONS = ("categorical", "logistics", "guided_logistics")
GUIDED = ("guided_logistics",)  # around the picture of the auxiliary decoder, and as below
GUESSING = ("logistics", *GUIDED)  # around the nearest known pixels, which only lattices have
QUANTIZERS = ("vq", "fsq", "gumbel")
STOCHASTIC = ("gumbel",)
CORRUPTIONS = ("random", "near")
DOWNSAMPLES = (2, 4, 8, 16, 32, 64)

# The numbers of groups that an order can have for a downsample; the first where it is left open.
GROUP_NUMBERS: dict[str, Callable[[int], list[int | None]]] = {
    "factorized": lambda downsample: [1],
    "lattice": lambda downsample: [1 + 3 * k for k in range(int(math.log2(downsample)), 7)],
    "masked": lambda downsample: [8, *range(1, 257)],
    "raster": lambda downsample: [None],  # as many as positions
    "auxiliary": lambda downsample: [1],
}
PIXEL_ORDERS = tuple(order for order in DECODER_ORDERS if order != "raster")


def fsq_levels(codebook_size: int) -> list[int]:
    """K as a product of the fewest numbers up to 8, as equal as possible: 64 -> [8, 8].

    Each is the number of values of one dimension of a finite scalar quantizer.
    """
    rest = codebook_size
    for prime in (2, 3, 5, 7):
        while rest > 1 and rest % prime == 0:
            rest //= prime
    for length in range(1, 1 + codebook_size.bit_length()) if rest == 1 else ():
        choices = itertools.combinations_with_replacement(range(1, 9), length)
        if fitting := [c for c in choices if math.prod(c) == codebook_size]:
            return list(max(fitting))
    raise ValueError(
        f"expected codebook_size to be a product of numbers up to 8 for quantizer='fsq', "
        f"got {codebook_size}"
    )
