"""How a progressive VAE is made and measured: greedily, from the data up.

| file | purpose |
|---|---|
| `data.py` | the images of a data set, as grids of 8-bit values |
| `codes.py` | a data set's grids, cached on disk |
| `streaming.py` | images read as they come, where a disk does not hold them |
| `sources.py` | a data set, opened: its splits, columns and classes; their pixels |
| `evaluation.py` | bits/dim per factor, code use, Fréchet distance |
| `checkpoints.py` | a phase that was interrupted goes on where it was |
| `run.py` | what one training leaves behind, and where it lies |
| `muon.py` | the optimizer |
| `fitting.py` | one loss minimised, on one process or many |
| `phases.py` | the greedy order: `train_level()`, `train_prior()`, `refit_level()` |
"""
