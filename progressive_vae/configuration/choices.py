"""What the knobs of a level can be set to."""

import math
from collections.abc import Callable

DECODER_ORDERS = ("factorized", "lattice", "masked", "raster", "auxiliary")
PIXEL_DISTRIBUTIONS = ("categorical", "logistics", "guided_logistics")
GUIDED = ("guided_logistics",)  # around the picture of the auxiliary decoder, and as below
GUESSING = ("logistics", *GUIDED)  # around the nearest known pixels, which only lattices have
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
