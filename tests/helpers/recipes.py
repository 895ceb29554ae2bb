"""Recipes and flags of runs that take seconds."""

import shlex

BACKBONE = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
FEW = {"max_train_steps": 4}
RECIPE = {
    "num_levels": 2,
    "levels": {"hidden_size": 8, "num_layers": 1, "codebook_size": 8, "fit": FEW},
    "prior": {"backbone_config": BACKBONE, "fit": FEW},
    "data": {"eval_fraction": 0.3},
    "run": {"report_to": "none", "num_validation_images": 2},
}
SMALL = shlex.split(
    "--levels.hidden_size 8 --levels.encoder_hidden_size 8 --levels.num_layers 1 "
    "--levels.codebook_size 8 --levels.fit.max_train_steps 6 --prior.fit.max_train_steps 6 "
    "--validation_steps 4 --num_validation_images 2 --logging_steps 2 "
    '--prior.backbone_config \'{"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, '
    '"num_hidden_layers": 1, "num_attention_heads": 2}\''
)
# Few images and no tracker: half the time of a run on all digits.
SMALLER = [
    *SMALL,
    *shlex.split("--report_to none --max_train_samples 200 --max_eval_samples 40"),
]
SHORT = shlex.split("--levels.fit.max_train_steps 2 --prior.fit.max_train_steps 2")
