"""More images than there are: the versions of a training image that are as likely as itself."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice, permutations, product

import numpy as np

from .settings import DataSettings


@dataclass(frozen=True)
class Variants:
    """So many versions of an image, of which the first is itself, and the mirror image of each.

    Args:
        count: of versions, mirror images not counted.
        random_crop: squares of the shorter side are cut out anywhere; the first from the middle.
        random_rotation: turned by quarters; by halves where an image is no square.
        random_colours: the colours change places.
        random_flip: with mirror images.
    """

    count: int = 1
    random_crop: bool = False
    random_rotation: bool = False
    random_colours: bool = False
    random_flip: bool = False

    @classmethod
    def of_settings(cls, settings: DataSettings) -> "Variants":
        return cls(
            settings.num_variants,
            settings.random_crop,
            settings.random_rotation,
            settings.random_colours,
            settings.random_flip,
        )

    def all(self, image: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """Those of (C, H, W): no form comes again before all have come."""
        forms = self._forms(image)
        others = [forms[i] for i in 1 + rng.permutation(len(forms) - 1)]
        for number, form in enumerate(islice(cycle([forms[0], *others]), self.count)):
            version = self._in_form(image, form, rng if number else None)
            yield version
            if self.random_flip:
                yield version[..., ::-1]

    def one(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Any of all there could be, if there are others than the image: of a stream, which passes
        again and again."""
        if self.count > 1:
            forms = self._forms(image)
            image = self._in_form(image, forms[rng.integers(len(forms))], rng)
        return image[..., ::-1] if self.random_flip and rng.random() < 0.5 else image

    def _forms(self, image: np.ndarray) -> list[tuple[int, tuple[int, ...]]]:
        """Quarter turns and orders of colours; the first changes nothing."""
        channels, height, width = image.shape
        is_square = height == width or self.random_crop
        turns = range(0, 4, 1 if is_square else 2) if self.random_rotation else range(1)
        colours = tuple(range(channels))
        return [*product(turns, permutations(colours) if self.random_colours else [colours])]

    def _in_form(
        self,
        image: np.ndarray,
        form: tuple[int, tuple[int, ...]],
        rng: np.random.Generator | None,
    ) -> np.ndarray:
        turns, colours = form
        if self.random_crop:
            side = min(image.shape[1:])
            spare = [n - side for n in image.shape[1:]]
            top, left = (n // 2 if rng is None else rng.integers(n + 1) for n in spare)
            image = image[:, top : top + side, left : left + side]
        return np.rot90(image[list(colours)], turns, (1, 2))
