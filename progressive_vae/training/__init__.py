"""Greedy training, from the data up, level by level.

from progressive_vae.training import train

pipe = train("examples/configs/digits.yaml", output_dir="runs/digits")
"""

from .greedy import train

__all__ = ["train"]
