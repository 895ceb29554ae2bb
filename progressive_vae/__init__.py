"""A hierarchical discrete VAE: a stack of VQ-VAEs trained greedily, one level at a time, with an
autoregressive prior over the coarsest code grid.

    P(s, z) = P_Φ(z_1) · ∏ P_Θ(z_i | z_{i−1}) · P_Θ(s | z_N)

`ProgressiveVAELevel` is `P_Ψ(z_i | z_{i+1})` and `P_Θ(z_{i+1} | z_i)`, and `ProgressiveVAEPrior` is
`P_Φ(z_1)`. `stack.LevelStack` is their product: likelihood, sampling, autoregressive loops. Codec
and inpainting are functions of a stack; `ProgressiveVAEPipeline` offers them all as a diffusers
pipeline.

| file or folder | content |
|---|---|
| `configuration/` | configs of levels, prior, tokenizers; which of them fit together |
| `models/` | level and prior, and their components |
| `stack.py` | `LevelStack`: prior and levels as one model |
| `codec/` | lossless compression: entropy coding, byte format, fixed-point arithmetic |
| `inpainting.py` | inpainting by sequential importance resampling, interpolation of codes |
| `hub/` | saving, pushing, model cards, code in repositories |
| `pipeline.py` | `ProgressiveVAEPipeline` |
| `visualization.py` | grids of samples, codes and reconstructions |
| `data/` | data sets of images, cached pixels and codes, augmentation |
| `evaluation/` | bits per dimension, Fréchet distances, rate and distortion, throughput |
| `training/` | `train()`, its phases, recipes and checkpoints |

Imports go one way: configuration → models → image files, image processor → stack → pipeline inputs
→ codec, inpainting, hub → pipeline → visualization → data → evaluation → training.
"""

from transformers import AutoConfig, AutoModel, AutoTokenizer

from .configuration.hashed_text import HashedTextConfig
from .configuration.level import ProgressiveVAELevelConfig
from .configuration.prior import ProgressiveVAEPriorConfig
from .hub.repository import register
from .models.hashed_text import HashedTextEncoder, HashedTokenizer
from .models.level import ProgressiveVAELevel
from .models.prior import ProgressiveVAEPrior
from .paths import example
from .pipeline import ProgressiveVAEPipeline
from .serialization import __version__

AutoConfig.register("progressive_vae_level", ProgressiveVAELevelConfig)
AutoConfig.register("progressive_vae_prior", ProgressiveVAEPriorConfig)
AutoConfig.register(HashedTextConfig.model_type, HashedTextConfig)
AutoModel.register(ProgressiveVAELevelConfig, ProgressiveVAELevel)
AutoModel.register(ProgressiveVAEPriorConfig, ProgressiveVAEPrior)
AutoModel.register(HashedTextConfig, HashedTextEncoder)
AutoTokenizer.register(HashedTextConfig, slow_tokenizer_class=HashedTokenizer)
register(
    ProgressiveVAEPipeline,
    ProgressiveVAELevel,
    ProgressiveVAEPrior,
    HashedTextEncoder,
    HashedTokenizer,
)

__all__ = [
    "HashedTextConfig",
    "HashedTextEncoder",
    "HashedTokenizer",
    "ProgressiveVAELevel",
    "ProgressiveVAELevelConfig",
    "ProgressiveVAEPipeline",
    "ProgressiveVAEPrior",
    "ProgressiveVAEPriorConfig",
    "__version__",
    "example",
]
