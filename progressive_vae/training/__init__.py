"""Greedy training, level by level, from the data upwards.

from progressive_vae.training import train

pipe = train("examples/configs/digits.yaml", output_dir="runs/digits")
"""

from .train import train

__all__ = ["train"]
