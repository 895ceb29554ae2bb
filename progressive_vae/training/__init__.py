"""How a progressive VAE is made and measured: greedily, from the data up.

    from progressive_vae.training import train

    pipe = train("examples/configs/digits.yaml", output_dir="runs/digits")

| file | purpose |
|---|---|
| `settings.py` | the knobs of training, once: of the data, of one fit, of a run |
| `classes.py` | the classes of a labeled data set: names, and the id of each label |
| `image_folder.py` | a folder of image files as a data set: its splits and classes |
| `data.py` | the images of a data set, as grids of 8-bit values |
| `codes.py` | a data set's grids, cached on disk |
| `forms.py` | for the finest level more images than there are: turned, in other colours |
| `streaming.py` | images read as they come, where a disk does not hold them |
| `sources.py` | a data set, opened: its splits, columns and classes; their pixels |
| `yardsticks.py` | how near drawn images are to real ones: a classifier, distances |
| `patches.py` | the same without labels or networks: patches, scale by scale |
| `distances.py` | both, of two sets of images |
| `evaluation.py` | bits/dim per factor, code use, rate and distortion |
| `speed.py` | images a second, and the arithmetic that they take |
| `files.py` | what image files cost |
| `growing.py` | what the first bytes of a picture's stream show |
| `afternoon.py` | what one writes in an afternoon, to compare with |
| `checkpoints.py` | a phase that was interrupted goes on where it was |
| `lock.py` | one run at a time writes to a folder |
| `run.py` | what one training leaves behind, and where it lies |
| `muon.py` | the optimizer |
| `fitting.py` | one loss minimised, on one process or many |
| `phases.py` | what is fitted, from what: a level, its decoder again, the prior |
| `command.py` | flags of scripts, from the names of classes and functions |
| `recipe.py` | all knobs of a training, in the words of the configs and settings |
| `report.py` | what a run tells of its pipeline: figures, pictures, the card |
| `begin.py` | before the first step: what lies in the folder, what is given, what is kept |
| `greedy.py` | the greedy order, from the data up: `train()` |
"""

from .greedy import train

__all__ = ["train"]
