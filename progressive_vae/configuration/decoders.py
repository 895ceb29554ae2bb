"""The choices of a decoder: its type, the ordering of positions, and the distribution of pixels."""

import math
from collections.abc import Callable

# An architecture, and the orderings that it can have; the first where the config leaves it open.
DECODER_TYPES: dict[str, tuple[str, ...]] = {
    "conv": ("lattice", "factorized", "masked"),
    "causal_lm": ("raster",),
    "transformer": ("lattice", "factorized", "masked", "raster", "diagonal"),
    "auxiliary": ("factorized",),  # the auxiliary decoder, without a stronger one
}
PIXEL_DECODER_TYPES = ("conv", "transformer", "auxiliary")
BIT_DECODER_TYPES = ("conv", "transformer")  # of codes that are split into blocks of bits
DROPOUT_DECODER_TYPES = ("causal_lm", "transformer")

# The numbers of groups of an ordering for a downsample; the first where the config leaves it open.
GROUP_NUMBERS: dict[str, Callable[[int], list[int | None]]] = {
    "factorized": lambda downsample: [1],
    "lattice": lambda downsample: [1 + 3 * k for k in range(int(math.log2(downsample)), 7)],
    "masked": lambda downsample: [8, *range(1, 257)],
    "raster": lambda downsample: [None],  # as many as positions
    # As many as anti-diagonals: of the grid, or of cells of a power of two.
    "diagonal": lambda downsample: [None, *(2**k - 1 for k in range(2, 8))],
}
ORDERINGS = tuple(GROUP_NUMBERS)
DOWNSAMPLES = (2, 4, 8, 16, 32, 64)

PIXEL_DISTRIBUTIONS = ("categorical", "logistic_mixture", "guided_logistic_mixture")
# Mixtures around the image that the auxiliary decoder expects, besides the neighbors.
GUIDED_DISTRIBUTIONS = ("guided_logistic_mixture",)
# Mixtures around the nearest pixels of earlier groups, which only lattices have.
COMPONENT_MEANS_DISTRIBUTIONS = ("logistic_mixture", *GUIDED_DISTRIBUTIONS)

CODE_NOISE_KINDS = ("random", "near")
