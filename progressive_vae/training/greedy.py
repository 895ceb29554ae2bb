"""The greedy order of the phases, from the data upwards.

for i in N … 1:  train P_Ψ(z_i | z_{i+1}) and P_Θ(z_{i+1} | z_i) under a uniform P(z_i); freeze;
                 encode the data set to z_i
train P_Φ(z_1)
optionally:      train P_Θ(z_{i+1} | z_i) again, on the same codes
"""

import copy
from collections.abc import Collection
from dataclasses import replace

from ..configuration.level import DECODER_FIELDS, ProgressiveVAELevelConfig
from ..configuration.prior import ProgressiveVAEPriorConfig
from ..configuration.validation import check_image_size
from ..models.level import ProgressiveVAELevel
from ..models.prior import ProgressiveVAEPrior
from .args import FitSettings
from .phases import LevelPhase, Model, Phase, PriorPhase, RefitPhase
from .recipe import Recipe

# The scales of pixel distributions around a tokenizer's image are few parameters.
MAX_STEPS_OF_SCALES = 500
MAX_TIME_SHARE_OF_SCALES = 0.05


def greedy_order(
    recipe: Recipe,
    configs: list[ProgressiveVAELevelConfig],
    image_size: tuple[int, int],
    class_names: list[str],
    pretrained: Collection[int],
    condition_dim: int | None = None,
) -> list[Phase]:
    """Return all phases of a recipe in their order.

    First come the levels, the finest first: each with its decoder, or where the recipe has an
    `encoder_fit` with the auxiliary decoder only. Then come the decoders of those levels, the
    prior, and the decoders with a `refit`.

    Args:
        configs: of [level_1 … level_N].
        image_size: (H, W).
        pretrained: indices of levels that are not trained.
        condition_dim: length of the embeddings of captions; `None`: there are none.
    """
    indices = range(len(configs), 0, -1)
    order: list[Phase] = []
    for i in indices:
        if i not in pretrained:
            order.append(_level_phase(recipe, i, configs[i - 1]))
    for i in indices:
        if i in pretrained:
            order += _scale_phases(recipe, i, configs[i - 1])
        elif recipe.levels[i - 1].encoder_fit is not None:
            changes = {name: getattr(configs[i - 1], name) for name in DECODER_FIELDS}
            settings = recipe.levels[i - 1].fit
            order.append(RefitPhase(index=i, changes=changes, is_first=True, settings=settings))
    prior = recipe.prior_config(configs, image_size, class_names, condition_dim)
    order.append(PriorPhase(config=prior, settings=recipe.prior.fit))
    for i in indices:
        refit = recipe.levels[i - 1].refit
        if refit is not None:
            changes = recipe.decoder_changes(i, class_names, condition_dim)
            phase = RefitPhase(
                index=i, changes=changes, from_scratch=refit.from_scratch, settings=refit.fit
            )
            order.append(phase)
    return order


def _level_phase(recipe: Recipe, index: int, config: ProgressiveVAELevelConfig) -> LevelPhase:
    level = recipe.levels[index - 1]
    if level.encoder_fit is None:
        return LevelPhase(index=index, config=config, settings=level.fit)
    # The auxiliary decoder has no condition; the phase of the decoder adds it.
    unconditional = {"num_classes": 0, "id2label": None, "condition_dim": None}
    config = config.with_decoder(decoder_type="auxiliary", **unconditional)
    return LevelPhase(index=index, config=config, is_encoder=True, settings=level.encoder_fit)


def _scale_phases(
    recipe: Recipe, index: int, config: ProgressiveVAELevelConfig
) -> list[RefitPhase]:
    """Return a short fit of a pretrained tokenizer's pixel distributions, if nothing refits it."""
    level = recipe.levels[index - 1]
    is_tokenizer = config.tokenizer_config is not None and config.decoder_type == "auxiliary"
    if not is_tokenizer or level.refit is not None:
        return []
    settings: FitSettings = replace(
        level.fit,
        max_train_steps=min(level.fit.max_train_steps, MAX_STEPS_OF_SCALES),
        time_share=min(level.fit.time_share, MAX_TIME_SHARE_OF_SCALES),
    )
    return [RefitPhase(index=index, changes={}, is_first=True, settings=settings)]


def allocate_time(phases: list[Phase], minutes: float | None) -> list[Phase]:
    """Return the phases with their durations, in proportion to their `time_share`."""
    if minutes is None:
        return phases
    total = sum(phase.settings.time_share for phase in phases)
    return [
        replace(phase, seconds=round(60 * minutes * phase.settings.time_share / total, 3))
        for phase in phases
    ]


def select_phases(order: list[Phase], name: str) -> list[Phase]:
    """Return the phases to run, with their places among them.

    Args:
        name: "all", "evaluate" for none, or the name of a phase.

    Raises:
        ValueError: there is no such phase.
    """
    names = ["all", *(phase.name for phase in order), "evaluate"]
    if name not in names:
        raise ValueError(f"expected phase among {names}, got {name!r}; a refit needs its section")
    phases = [
        replace(phase, is_on_top=name != "all") if isinstance(phase, RefitPhase) else phase
        for phase in order
        if name in ("all", phase.name)
    ]
    for i, phase in enumerate(phases):
        seconds_after = sum(later.seconds or 0.0 for later in phases[i + 1 :])
        phases[i] = replace(phase, place=f"{i + 1} of {len(phases)}", seconds_after=seconds_after)
    return phases


def check_early_stopping(phases: list[Phase], splits: Collection[str]):
    """Raise a `ValueError` if a phase would choose its last step by test images."""
    for phase in phases:
        patience = phase.settings.early_stopping_patience
        if patience is not None and "validation" not in splits:
            raise ValueError(
                f"expected data.validation_fraction > 0 for early_stopping_patience={patience} of "
                f"{phase.name}, got 0"
            )


def check_phases(
    phases: list[Phase],
    configs: list[ProgressiveVAELevelConfig],
    image_size: tuple[int, int],
    condition_dim: int | None = None,
):
    """Raise a `ValueError` unless levels fit the images, also when refitted, backbones are causal,
    and there are captions for parts that are conditioned on them.

    Args:
        condition_dim: length of the embeddings of captions; `None`: there are none.
    """
    refitted = list(configs)
    for phase in phases:
        if isinstance(phase, RefitPhase):
            refitted[phase.index - 1] = phase.model_config(configs)
        config = copy.deepcopy(phase.model_config(configs))
        if config.condition_dim not in (None, condition_dim):
            raise ValueError(
                f"{phase.part}: expected captions with embeddings of length "
                f"condition_dim={config.condition_dim}, got {condition_dim}"
            )
        model: Model
        try:
            if isinstance(config, ProgressiveVAEPriorConfig):
                model = ProgressiveVAEPrior(config)
            else:
                model = ProgressiveVAELevel(config)
            model.eval().check_causal()
        except ValueError as error:
            raise ValueError(f"{phase.part}: {error}") from error
    for levels in (configs, refitted):
        check_image_size(image_size, levels, None)
