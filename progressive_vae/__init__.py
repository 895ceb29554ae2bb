"""Progressive VAE: images through symbolic images of increasing size.

    P(s, z) = P_Φ(z_1) · ∏ P_Θ(z_i | z_{i−1}) · P_Θ(s | z_N)

| file | purpose |
|---|---|
| `arguments.py` | numbers that callers pass, of Python, numpy or torch |
| `paths.py` | the home folder, folders that can be written, files that are replaced whole |
| `saved.py` | what saved files say of themselves: version, format, checksum; JSON |
| `strict.py` | configs whose every complaint is a `ValueError`, and what they may say |
| `backbones.py` | configs of causal networks: any of transformers, or a small one |
| `tokenizer_configs.py` | configs of tokenizers that others have trained |
| `choices.py` | what the knobs of a level can be set to |
| `configuration.py` | the config of a level: every architectural knob, once |
| `prior_configuration.py` | the config of the prior |
| `weights.py` | weights on the disk: those of their config, whole and unchanged, or an error |
| `chain.py` | what fits together: the grids of a chain of levels |
| `entries.py` | what an entry of a grid is: a colour of a pixel, or a symbol |
| `distributions.py` | what is said of values: free probabilities, of few or many, or mixtures |
| `groups.py` | orders of a grid's positions: lattices, scattered ones; where a walk stands |
| `sampling.py` | draws from distributions, and their controls |
| `labels.py` | class labels: numbers or names, as ids |
| `networks.py` | convolution nets; no probability in here |
| `heads.py` | from features to distributions, and what a head sees of the neighbours |
| `causal.py` | a causal network of transformers: stepwise, in one pass, checked |
| `encoder.py` | from the finer grid to latents |
| `quantizer.py` | from latents to codes, with a gradient: vector, finite scalar, Gumbel |
| `decoders.py` | forms of `P(finer | z)`: one walk over groups, in several orders |
| `auxiliary.py` | the auxiliary decoder, which makes codes carry the picture: previews |
| `painter.py` | what auxiliary decoders of finer levels make of code vectors: pictures |
| `dalle.py` | the nets of DALL-E's discrete VAE |
| `tokenizers.py` | tokenizers that others have trained, as a finest level's parts |
| `level.py` | `ProgressiveVAELevel`: `P_Ψ(z_i | z_{i+1})` and `P_Θ(z_{i+1} | z_i)` |
| `prior.py` | `ProgressiveVAEPrior`: `P_Φ(z_1)` |
| `fingerprint.py` | which codes a part was trained on |
| `image_files.py` | from a file to pixels: decoding, conversion to a model's mode, size |
| `images.py` | what users hold (PIL, arrays, tensors) as pixel values |
| `card.py` | the model card |
| `bundled.py` | the package in one file, as a repository may hold it |
| `remote.py` | code that a repository holds, for those who have not installed the package |
| `hub.py` | a pipeline as a repository: saved, pushed, found again |
| `space.py` | a page over a pipeline as a Space of the Hub |
| `calls.py` | what one call of a pipeline is told, on its thread |
| `whole.py` | arithmetic in whole numbers, which comes to the same on every machine |
| `header.py` | what stands before the code of an image |
| `codec.py` | images as bytes, as few as the model says, and as images again |
| `editing.py` | pictures drawn anew in part: inpainting, variations, what lies between two |
| `pipeline.py` | `ProgressiveVAEPipeline`: the product; encode, log_prob, sample |
| `pictures.py` | images side by side: drawn ones, and what each level says |
| `scripts.py` | how a script starts and ends: errors as one line, images saved whole |

What trains and measures is in `training/`, which nothing here imports.
"""

from transformers import AutoConfig, AutoModel

from . import hub
from .configuration import ProgressiveVAELevelConfig
from .level import ProgressiveVAELevel
from .pipeline import ProgressiveVAEPipeline
from .prior import ProgressiveVAEPrior
from .prior_configuration import ProgressiveVAEPriorConfig
from .saved import __version__

AutoConfig.register("progressive_vae_level", ProgressiveVAELevelConfig)
AutoConfig.register("progressive_vae_prior", ProgressiveVAEPriorConfig)
AutoModel.register(ProgressiveVAELevelConfig, ProgressiveVAELevel)
AutoModel.register(ProgressiveVAEPriorConfig, ProgressiveVAEPrior)
hub.register(ProgressiveVAEPipeline, ProgressiveVAELevel, ProgressiveVAEPrior)

__all__ = [
    "ProgressiveVAELevel",
    "ProgressiveVAELevelConfig",
    "ProgressiveVAEPipeline",
    "ProgressiveVAEPrior",
    "ProgressiveVAEPriorConfig",
    "__version__",
]
