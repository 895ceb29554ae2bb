"""Names of fields up to format 6, and today's: the only place that knows the old ones."""

import warnings
from collections.abc import Mapping
from typing import Any

RENAMED_FIELDS = {
    "picture_weight": "reconstruction_weight",
    "gumbel_decay": "gumbel_temperature_decay",
    "corruption": "code_noise",
    "corruption_kind": "code_noise_kind",
    "random_colours": "random_channel_permutation",  # of the data of a recipe
}
RENAMED_PIXEL_DISTRIBUTIONS = {
    "logistics": "logistic_mixture",
    "guided_logistics": "guided_logistic_mixture",
}
# `decoder_order` named the ordering and the architecture at once.
ARCHITECTURES = {"raster": "causal_lm", "auxiliary": "auxiliary"}


def rename_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a level's config, with old names and values replaced by today's."""
    renamed = {RENAMED_FIELDS.get(name, name): value for name, value in fields.items()}
    distribution = fields.get("pixel_distribution")
    if isinstance(distribution, str):
        renamed["pixel_distribution"] = RENAMED_PIXEL_DISTRIBUTIONS.get(distribution, distribution)
    if "decoder_order" in renamed:
        order = renamed.pop("decoder_order")
        decoder_type = None
        if isinstance(order, str):
            decoder_type = ARCHITECTURES.get(order, "conv")
        renamed["decoder_type"] = decoder_type
        renamed["ordering"] = "factorized" if order == "auxiliary" else order
    return renamed


def renamed_names(fields: Mapping[str, Any]) -> list[str]:
    """The old names, and old values as `name=value`, among the fields of a level's config."""
    names = [name for name in fields if name in RENAMED_FIELDS or name == "decoder_order"]
    distribution = fields.get("pixel_distribution")
    if isinstance(distribution, str) and distribution in RENAMED_PIXEL_DISTRIBUTIONS:
        names.append(f"pixel_distribution={distribution!r}")
    return names


def warn_about_names(names: list[str]):
    """Warn once about old names, if there are any."""
    if names:
        replacements = {
            **RENAMED_FIELDS,
            "decoder_order": "ordering and decoder_type",
            **{
                f"pixel_distribution={old!r}": repr(new)
                for old, new in RENAMED_PIXEL_DISTRIBUTIONS.items()
            },
        }
        pairs = [f"{name} (now {replacements[name.split('.')[-1]]})" for name in names]
        warnings.warn(f"old names of fields: {', '.join(pairs)}", FutureWarning, stacklevel=3)
