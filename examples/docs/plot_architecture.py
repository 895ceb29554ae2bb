# /// script
# requires-python = ">=3.10"
# dependencies = ["progressive-vae[eval]"]
#
# [tool.uv.sources]
# progressive-vae = { path = "../..", editable = true }
# ///
"""Plot the diagram of the README: the factors of the Fashion-MNIST model, on one of its samples.

python examples/docs/plot_architecture.py
    writes examples/docs/architecture.png.
"""

import json
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from progressive_vae import ProgressiveVAEPipeline, example
from progressive_vae.scripts import run_script
from progressive_vae.visualization import code_map

matplotlib.use("Agg")
OUTPUT = Path(__file__).parent / "architecture.png"
SAMPLING, ENCODING, TEXT, GRAY = "#0f766e", "#b45309", "#0f172a", "#475569"
WIDTH, HEIGHT = 13.2, 4.0  # of the axes
SIDE, MIDDLE = 1.7, 2.3  # of the grids, and the height of their centers
CENTERS = {"z_1": 4.1, "z_2": 8.0, "s": 11.9}
GAP = 0.95  # between the center of a grid and an arrow


def add_box(axes: Axes, left: float, bottom: float, width: float, height: float, **style):
    """Add a rectangle with round corners."""
    shape = "round,pad=0,rounding_size=0.15"
    axes.add_patch(FancyBboxPatch((left, bottom), width, height, boxstyle=shape, **style))


def add_grid(axes: Axes, center: float, image: np.ndarray, title: str):
    """Add an image or a map of codes, with its name and size above it."""
    extent = (center - SIDE / 2, center + SIDE / 2, MIDDLE - SIDE / 2, MIDDLE + SIDE / 2)
    axes.imshow(image, cmap="gray", extent=extent, interpolation="nearest", zorder=2)
    top = MIDDLE + SIDE / 2 + 0.2
    axes.text(center, top, title, ha="center", fontsize=13, color=TEXT)


def add_arrow(axes: Axes, start: float, end: float, text: str):
    """Add an arrow: to the right for sampling, above; to the left for encoding, below."""
    sign, color, side = (1, SAMPLING, "bottom") if end > start else (-1, ENCODING, "top")
    height = MIDDLE + 0.25 * sign
    style = {"arrowstyle": "-|>", "mutation_scale": 18, "linewidth": 2.2, "color": color}
    axes.add_patch(FancyArrowPatch((start, height), (end, height), **style))
    middle = (start + end) / 2
    axes.text(middle, height + 0.12 * sign, text, ha="center", va=side, fontsize=12.5, color=color)


def add_factor(axes: Axes, center: float, bits: float, training: str):
    """Add the bits of a factor, and how it is trained."""
    axes.text(center, 0.75, f"{bits:.2f} bits/dim", ha="center", fontsize=13, color=SAMPLING)
    axes.text(center, 0.35, training, ha="center", fontsize=11, color=GRAY)


def main(words: list[str]):
    if words:
        raise ValueError(f"expected no arguments, got {words}")
    model = example("fashion_mnist")
    bits = json.loads((model / "metrics.json").read_text(encoding="utf-8"))["bits_per_dim"]
    pipe = ProgressiveVAEPipeline.from_pretrained(model)
    generator = torch.Generator().manual_seed(4)
    output = pipe(["Ankle boot"], temperature=0.7, generator=generator, output_type="np")

    figure, axes = plt.subplots(figsize=(WIDTH, HEIGHT))
    axes.set_position((0, 0, 1, 1))
    axes.axis("off")
    # An opaque panel, for dark pages.
    panel = {"facecolor": "white", "edgecolor": "#cbd5e1"}
    add_box(axes, 0.08, 0.08, WIDTH - 0.16, HEIGHT - 0.16, **panel, zorder=0)
    add_box(axes, 0.35, MIDDLE - 0.25, 1.5, 1.0, facecolor="#ccfbf1", edgecolor=SAMPLING)
    axes.text(1.1, MIDDLE + 0.25, "causal\ntransformer", ha="center", va="center", fontsize=12)

    # Grids, and the arrows between them.
    for codes, name, level in zip(output.codes, ("z_1", "z_2"), pipe.levels, strict=True):
        height, width = codes.shape[1:]
        title = f"${name}$: {height}×{width} of {level.config.codebook_size} codes"
        add_grid(axes, CENTERS[name], np.asarray(code_map(codes[0])), title)
    add_grid(axes, CENTERS["s"], output.images[0], "$s$: 28×28 pixels")
    add_arrow(axes, 1.9, CENTERS["z_1"] - GAP, "prior\n$P_\\Phi(z_1)$")
    for level_index, coarse, fine in ((1, "z_1", "z_2"), (2, "z_2", "s")):
        left, right = CENTERS[coarse] + GAP, CENTERS[fine] - GAP
        factor = f"$P_\\Theta({fine} \\mid {coarse})$"
        add_arrow(axes, left, right, f"decoder {level_index}\n{factor}")
        function = f"${coarse} = \\Psi_{level_index}({fine})$"
        add_arrow(axes, right, left, f"encoder {level_index}\n{function}")

    # Below: the factors of the likelihood.
    add_factor(axes, 2.0, bits["prior"], "trained third, on codes $z_1$")
    add_factor(axes, 6.05, bits["level_1"], "trained second, on codes $z_2$")
    add_factor(axes, 9.95, bits["level_2"], "trained first, on pixels")
    for center in (CENTERS["z_1"], CENTERS["z_2"]):
        axes.text(center, 0.75, "+", ha="center", fontsize=13, color=SAMPLING)
    total = f"= {bits['total']:.2f} bits/dim"
    axes.text(CENTERS["s"], 0.75, total, ha="center", fontsize=13, color=SAMPLING, weight="bold")
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    figure.savefig(OUTPUT, dpi=140, transparent=True)
    print(f"wrote {OUTPUT.name}")


if __name__ == "__main__":
    run_script(main)
