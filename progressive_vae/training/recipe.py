"""A recipe: all settings of a training run, with the names of configs and settings classes.

    level_1: {codebook_size: 64, decoder_type: causal_lm, fit: {max_train_steps: 7000}}
    level_2: {codebook_size: 64, downsample: 4, refit: {code_noise: 0.1, fit: {time_share: 0.5}}}
    prior: {backbone_config: {model_type: llama, hidden_size: 96}, fit: {max_train_steps: 4000}}
    data: {dataset_name: zalando-datasets/fashion_mnist}
    run: {output_dir: runs/fashion_mnist, mixed_precision: bf16}

A section `level_i` has the fields of `ProgressiveVAELevelConfig`, `fit` those of `FitSettings`, and
`refit`, which is optional, those of the decoder and its own `fit`. `decoder_size` names the width
and the layers of a decoder: small, base or large. `levels` has defaults for all levels.
`num_levels` is N; by default the highest index of a section, or two. Without a recipe the defaults
are those of `_default_recipe`, with N = 3.
"""

import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

from ..configuration.level import ProgressiveVAELevelConfig
from ..configuration.prior import ProgressiveVAEPriorConfig
from ..configuration.renamed_fields import rename_fields, renamed_names, warn_about_names
from ..configuration.validation import MAX_LEVELS, grid_sizes
from ..data.args import DataSettings
from ..hub.repository import INDEX, pipeline_parts
from ..paths import expand_home
from .args import FitSettings, PriorFitSettings, RunSettings
from .sections import DECODER_SIZES, SECTIONS, parse_sections
from .yaml_files import read_yaml

Kind = TypeVar("Kind")

_SOURCES = ("dataset_name", "train_data_dir")
CONDITIONS = ("class_conditional", "text_conditional")
DEFAULT_LEVELS = 3  # without a recipe


@dataclass
class RefitRecipe:
    """A second fit of a decoder.

    Args:
        changes: fields of its config.
        from_scratch: initialize its weights again.
    """

    changes: dict[str, Any]
    from_scratch: bool
    fit: FitSettings


@dataclass
class LevelRecipe:
    """Config and fits of a level.

    Args:
        config: fields of its config.
        encoder_fit: of encoder, codebook and auxiliary decoder, if the decoder is trained later;
            `None`: one fit trains all.
        fit: of the decoder, or of all.
    """

    config: dict[str, Any]
    class_conditional: bool
    text_conditional: bool
    encoder_fit: FitSettings | None
    fit: FitSettings
    refit: RefitRecipe | None


@dataclass
class PriorRecipe:
    """Config and fit of the prior.

    Args:
        config: fields of its config.
    """

    config: dict[str, Any]
    class_conditional: bool
    text_conditional: bool
    fit: PriorFitSettings


@dataclass
class Recipe:
    """A recipe with the values of all fields.

    Args:
        levels: [level_1 … level_N].
        sections: the same as JSON values; `read_recipe` returns the same recipe for them.
    """

    levels: list[LevelRecipe]
    prior: PriorRecipe
    data: DataSettings
    run: RunSettings
    sections: dict[str, Any]

    def level_configs(
        self,
        num_channels: int,
        class_names: list[str],
        pretrained: Mapping[int, ProgressiveVAELevelConfig],
        condition_dim: int | None = None,
    ) -> list[ProgressiveVAELevelConfig]:
        """Return the configs of [level_1 … level_N].

        Args:
            num_channels: of the images.
            class_names: of the data set, [] if it has no labels.
            pretrained: configs that replace those of the recipe.
            condition_dim: length of the embeddings of captions; `None`: there are none.

        Raises:
            ValueError: a config is invalid, or a pretrained level is of other images.
        """
        configs: list[ProgressiveVAELevelConfig] = []
        for i in range(len(self.levels), 0, -1):
            if i in pretrained:
                config = pretrained[i]
                if not configs and config.num_channels != num_channels:
                    raise ValueError(
                        f"expected a pretrained level of images with {num_channels} colors, got "
                        f"one with num_channels={config.num_channels}"
                    )
            else:
                conditions = self._conditions(i, class_names, condition_dim)
                values = {**self.levels[i - 1].config, **conditions}
                if configs:
                    values["num_symbols"] = configs[0].codebook_size
                else:
                    values["num_channels"] = num_channels
                config = _build(ProgressiveVAELevelConfig, values, f"level_{i}")
            configs.insert(0, config)
        return configs

    def decoder_changes(
        self, index: int, class_names: list[str], condition_dim: int | None = None
    ) -> dict[str, Any]:
        """Return the fields of its config that the refit of level `index` changes."""
        refit = self.levels[index - 1].refit
        changes = refit.changes if refit else {}
        return {**changes, **self._conditions(index, class_names, condition_dim)}

    def _conditions(
        self, index: int, class_names: list[str], condition_dim: int | None
    ) -> dict[str, Any]:
        """Return the fields of a level's config that say what its decoder is conditioned on."""
        level = self.levels[index - 1]
        fields: dict[str, Any] = {}
        if level.class_conditional and not class_names:
            raise ValueError(
                f"expected class_conditional=False of level_{index}, as the data set has no "
                "labels, got True"
            )
        if level.text_conditional and condition_dim is None:
            raise ValueError(
                f"expected text_conditional=False of level_{index} without caption_column, got True"
            )
        if level.class_conditional:
            fields |= named_classes(class_names)
        if level.text_conditional:
            fields["condition_dim"] = condition_dim
        return fields

    def prior_config(
        self,
        levels: list[ProgressiveVAELevelConfig],
        image_size: tuple[int, int],
        class_names: list[str],
        condition_dim: int | None = None,
    ) -> ProgressiveVAEPriorConfig:
        """Return the config of the prior, for images of (H, W)."""
        names = class_names if self.prior.class_conditional else []
        codes = {
            "codebook_size": levels[0].codebook_size,
            "grid_size": grid_sizes(levels, image_size)[0],
        }
        values = {**self.prior.config, **codes, **named_classes(names)}
        if self.prior.text_conditional:
            values["condition_dim"] = condition_dim
        return _build(ProgressiveVAEPriorConfig, values, "prior")


def named_classes(names: list[str]) -> dict[str, Any]:
    """Return the fields of a config that describe the classes."""
    return {"num_classes": len(names), "id2label": dict(enumerate(names)) or None}


def read_recipe(
    recipe: Mapping[str, Any] | str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Recipe:
    """Return the recipe of a dict or a YAML file; check names and types of its sections.

    Args:
        recipe: `None` for defaults that suit images of any kind.
        overrides: sections whose values take precedence; a data set replaces the recipe's.

    Raises:
        ValueError: an unknown name, or a value of the wrong type or out of range.
    """
    name = str(recipe) if isinstance(recipe, (str, os.PathLike)) else "recipe"
    is_default = recipe is None
    if isinstance(recipe, (str, os.PathLike)):
        path = Path(expand_home(recipe, "recipe"))
        if not path.is_file():
            raise ValueError(f"expected the path of a recipe, got {name}, where no file is")
        recipe = read_yaml(path)
    layers = [
        _check_sections({} if recipe is None else recipe, name),
        _check_sections({} if overrides is None else overrides, "overrides"),
    ]
    warn_about_names([name for layer in layers for name in _old_names(layer)])
    layers = [_rename_layer(layer) for layer in layers]
    count = _count_levels(layers, is_default)
    if is_default:
        finest = _expand_levels(layers[1], count)[f"level_{count}"]
        layers[0] = _default_recipe(count, finest.keys())
    sections: dict[str, Any] = {}
    for layer in layers:
        if set(_SOURCES) & set(layer.get("data", {})):  # a recipe has one source of data
            data = {k: v for k, v in sections.get("data", {}).items() if k not in _SOURCES}
            sections = {**sections, "data": data}
        sections = _merge(sections, _expand_levels(layer, count))
    if sections["run"].get("mixed_precision") is False:  # YAML reads an unquoted no as false
        sections["run"] = {**sections["run"], "mixed_precision": "no"}
    return _make_recipe(parse_sections(sections, count))


def _default_recipe(count: int, finest_names: Collection[str]) -> dict[str, Any]:
    """Return a recipe for images of any kind. Encoders take a quarter of the time, if N = 3.

    Args:
        finest_names: fields of the finest level that overrides set. Defaults that depend on the
            decoder's ordering or on `downsample` are left out if these are set.
    """
    encoder_fit = {"train_batch_size": 16, "learning_rate": 4e-3}
    levels = {
        "codebook_size": 512,
        "auxiliary_hidden_size": 64,
        "restart_threshold": 0.1,
        "reconstruction_weight": 1000.0,
        "encoder_fit": {**encoder_fit, "adam_weight_decay": 0.05, "time_share": 0.05},
        "fit": {"adam_weight_decay": 0.2, "time_share": 0.05},
    }
    finest: dict[str, Any] = {
        "downsample": 4,
        "reconstruction_weight": 100.0,
        "pixel_distribution": "logistic_mixture",
        "num_groups": 10,  # the first lattice has stride 8
        "encoder_fit": {"time_share": 0.15},
        "fit": {**encoder_fit, "time_share": 0.6},
    }
    if "decoder_type" in finest_names or "ordering" in finest_names:
        del finest["num_groups"], finest["pixel_distribution"]
    elif "downsample" in finest_names:
        del finest["num_groups"]
    prior = {"fit": {"adam_weight_decay": 0.2, "time_share": 0.05}}
    return {"levels": levels, f"level_{count}": finest, "prior": prior}


def levels_in(folder: str | Path) -> list[Path]:
    """Return the folders [level_1 … level_N] of a saved pipeline; [] if there is none."""
    if not (Path(folder) / INDEX).is_file():
        return []
    return [Path(folder) / name for name in pipeline_parts(folder) if name != "prior"]


def _count_levels(layers: list[Mapping[str, Any]], is_default: bool) -> int:
    """Return N: one more than `extend` has, or `num_levels`, or the highest index of a section."""
    run = _merge(layers[0].get("run", {}), layers[1].get("run", {}))
    extend = run.get("extend")
    num_saved = 0 if extend is None else len(levels_in(expand_home(extend, "extend")))
    explicit = [layer["num_levels"] for layer in layers if layer.get("num_levels") is not None]
    indices = [i for i in range(1, MAX_LEVELS + 1) for layer in layers if f"level_{i}" in layer]
    if explicit:
        count = explicit[-1]
    elif num_saved:
        count = num_saved + 1
    else:
        count = max([*indices, *([DEFAULT_LEVELS] if is_default else [])], default=2)
    if type(count) is not int or not 1 <= count <= MAX_LEVELS:
        raise ValueError(f"expected num_levels in 1 … {MAX_LEVELS}, got {count!r}")
    if num_saved and count != num_saved + 1:
        raise ValueError(
            f"expected num_levels={num_saved + 1}, one more than extend has, got {count}"
        )
    if indices and max(indices) > count:
        raise ValueError(f"expected sections of level_1 … level_{count}, got level_{max(indices)}")
    return count


def _check_sections(sections: Any, where: str) -> Mapping[str, Any]:
    """Return the sections, {} for those that are only headings; check their names."""
    if not isinstance(sections, Mapping):
        raise ValueError(f"expected sections in {where}, got {sections!r}")
    for name, section in sections.items():
        if name != "num_levels" and name not in SECTIONS:
            raise ValueError(
                f"expected sections level_1 … level_{MAX_LEVELS}, levels, prior, data, run and "
                f"num_levels in {where}, got {name!r}"
            )
        if name in SECTIONS and not isinstance(section, (Mapping, NoneType)):
            raise ValueError(f"expected names and values in section {name}, got {section!r}")
    return {
        name: {} if section is None and name in SECTIONS else section
        for name, section in sections.items()
    }


def _old_names(layer: Mapping[str, Any]) -> list[str]:
    """Return the names of fields up to format 6 in a layer, as `section.name`."""
    names = []
    for section, values in layer.items():
        if section != "data" and not section.startswith("level"):
            continue
        names += [f"{section}.{name}" for name in renamed_names(values)]
        if isinstance(values.get("refit"), Mapping):
            names += [f"{section}.refit.{name}" for name in renamed_names(values["refit"])]
    return names


def _rename_layer(layer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a layer with old names of fields replaced."""
    sections = dict(layer)
    for section, values in layer.items():
        if section != "data" and not section.startswith("level"):
            continue
        sections[section] = rename_fields(values)
        if isinstance(values.get("refit"), Mapping):
            sections[section]["refit"] = rename_fields(values["refit"])
    return sections


def _expand_levels(layer: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Return the sections level_1 … level_N, with the values of `levels`, prior, data and run."""
    defaults = layer.get("levels", {})
    levels = {
        f"level_{i}": _expand_size(_merge(defaults, layer.get(f"level_{i}", {})))
        for i in range(1, count + 1)
    }
    return levels | {name: layer.get(name, {}) for name in ("prior", "data", "run")}


def _expand_size(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section with the values of its `decoder_size`, unless it has its own."""
    size = section.get("decoder_size")
    if size is None:
        return dict(section)
    if size not in DECODER_SIZES:
        raise ValueError(f"expected decoder_size in {tuple(DECODER_SIZES)}, got {size!r}")
    return {**DECODER_SIZES[size], **section, "decoder_size": None}


def _merge(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested mappings with overrides; a mapping with a `model_type` replaces the base's."""
    merged = dict(base)
    for name, value in overrides.items():
        if value is None and name == "fit":  # only a heading
            value = {}
        is_nested = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        if is_nested and "model_type" not in value:
            value = _merge(merged[name], value)
        merged[name] = value
    return merged


def _make_recipe(sections: dict[str, Any]) -> Recipe:
    count = sum(name.startswith("level_") for name in sections)
    levels = [_level_recipe(f"level_{i}", sections[f"level_{i}"]) for i in range(1, count + 1)]
    section = dict(sections["prior"])
    fit = _build(PriorFitSettings, section.pop("fit"), "prior.fit")
    conditions = {name: section.pop(name) for name in CONDITIONS}
    prior = PriorRecipe(config=section, fit=fit, **conditions)
    data = _build(DataSettings, sections["data"], "data")
    run = _build(RunSettings, sections["run"], "run")
    if not run.save_text_encoder and data.text_encoder is None:
        raise ValueError("run: expected save_text_encoder=True without a text_encoder, got False")
    # The settings have expanded their paths: `recipe.yaml` has to hold those.
    sections = {**sections, "data": asdict(data), "run": asdict(run)}
    return Recipe(levels, prior, data, run, sections)


def _level_recipe(name: str, values: Mapping[str, Any]) -> LevelRecipe:
    section = dict(values)
    fit = _build(FitSettings, section.pop("fit"), f"{name}.fit")
    conditions = {name: section.pop(name) for name in CONDITIONS}
    del section["decoder_size"]  # `_expand_size` has read it
    refit = section.pop("refit", None)
    if refit is not None:
        refit = _refit_recipe(f"{name}.refit", refit)
    encoder_fit = section.pop("encoder_fit", None)
    if encoder_fit is not None:
        encoder_fit = _build(FitSettings, encoder_fit, f"{name}.encoder_fit")
        if section["auxiliary_hidden_size"] is None:
            raise ValueError(
                f"expected auxiliary_hidden_size of {name}, which has an encoder_fit, got null"
            )
    return LevelRecipe(section, encoder_fit=encoder_fit, fit=fit, refit=refit, **conditions)


def _refit_recipe(name: str, values: Mapping[str, Any]) -> RefitRecipe:
    section = dict(values)
    fit = _build(FitSettings, section.pop("fit"), f"{name}.fit")
    from_scratch = section.pop("from_scratch")
    changes = {field: value for field, value in section.items() if value is not None}
    return RefitRecipe(changes, from_scratch, fit)


def _build(kind: type[Kind], values: Mapping[str, Any], where: str) -> Kind:
    """Return `kind(**values)`; errors begin with the section."""
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
