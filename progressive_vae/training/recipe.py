"""A recipe: all knobs of a training, in the words of the configs and settings that own them.

    level_1: {codebook_size: 64, decoder_type: causal_lm, fit: {max_train_steps: 7000}}
    level_2: {codebook_size: 64, downsample: 4, refit: {code_noise: 0.1, fit: {time_share: 0.5}}}
    prior: {backbone_config: {model_type: llama, hidden_size: 96}, fit: {max_train_steps: 4000}}
    data: {dataset_name: zalando-datasets/fashion_mnist}
    run: {output_dir: runs/fashion_mnist, mixed_precision: bf16}

A section `level_i` has the fields of `ProgressiveVAELevelConfig`, `fit` those of `FitSettings`, and
`refit`, where it is there, those of the decoder and a `fit` of its own. `levels` speaks for all
levels, `num_levels` says how many there are: as many as are named, or two, where it is silent.
Without a recipe it is one for pictures of any kind, N = 3.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentParser

from ..configuration.level import DECODER_FIELDS, ProgressiveVAELevelConfig
from ..configuration.prior import ProgressiveVAEPriorConfig
from ..configuration.renamed_fields import rename_fields, renamed_names, warn_about_names
from ..configuration.validation import MAX_LEVELS, grid_sizes
from ..data.args import DataSettings
from ..hub.repository import INDEX, pipeline_parts
from ..paths import expand_home
from .args import FitSettings, PriorFitSettings, RunSettings
from .cli import in_words

Kind = TypeVar("Kind")

SECTIONS = ("levels", *(f"level_{i}" for i in range(1, MAX_LEVELS + 1)), "prior", "data", "run")

_SOURCES = ("dataset_name", "train_data_dir")


@dataclass
class RefitRecipe:
    """A second fit of a decoder: the fields of its config that change, whether its weights begin
    anew, and how it is fitted."""

    changes: dict[str, Any]
    from_scratch: bool
    fit: FitSettings


@dataclass
class LevelRecipe:
    """The fields of a level's config, and how it is fitted: at once, or where there is an
    `encoder_fit` its encoder first, by the auxiliary decoder, and its decoder later."""

    config: dict[str, Any]
    class_conditional: bool
    encoder_fit: FitSettings | None
    fit: FitSettings
    refit: RefitRecipe | None


@dataclass
class PriorRecipe:
    """The fields of the prior's config, and how it is fitted."""

    config: dict[str, Any]
    class_conditional: bool
    fit: PriorFitSettings


@dataclass
class Recipe:
    """A recipe whose every field has its value.

    Args:
        levels: of [level_1 … level_N].
        sections: the same as JSON and YAML hold it, from which it can be read again.
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
        given: Mapping[int, ProgressiveVAELevelConfig],
    ) -> list[ProgressiveVAELevelConfig]:
        """The configs of [level_1 … level_N]: as the recipe says, but for those that are given."""
        configs: list[ProgressiveVAELevelConfig] = []
        for i in range(len(self.levels), 0, -1):
            level = self.levels[i - 1]
            finer = (
                {"num_symbols": configs[0].codebook_size}
                if configs
                else {"num_channels": num_channels}
            )
            if i in given:
                config = given[i]
                if not configs and config.num_channels != num_channels:
                    raise ValueError(
                        f"expected a level of images with {num_channels} colors to start from, "
                        f"got one with num_channels={config.num_channels}"
                    )
            else:
                classes = self._classes(i, class_names)
                config = _built(
                    ProgressiveVAELevelConfig, {**level.config, **classes, **finer}, f"level_{i}"
                )
            configs.insert(0, config)
        return configs

    def decoder_changes(self, index: int, class_names: list[str]) -> dict[str, Any]:
        """The fields of its config that the refit of level `index` changes."""
        refit = self.levels[index - 1].refit
        return {**(refit.changes if refit else {}), **self._classes(index, class_names)}

    def _classes(self, index: int, class_names: list[str]) -> dict[str, Any]:
        if not self.levels[index - 1].class_conditional:
            return {}
        if not class_names:
            raise ValueError(
                f"expected class_conditional=False of level_{index}, as the data set has no "
                "labels, got True"
            )
        return named_classes(class_names)

    def prior_config(
        self,
        levels: list[ProgressiveVAELevelConfig],
        image_size: tuple[int, int],
        class_names: list[str],
    ) -> ProgressiveVAEPriorConfig:
        names = class_names if self.prior.class_conditional else []
        codes = {
            "codebook_size": levels[0].codebook_size,
            "grid_size": grid_sizes(levels, image_size)[0],
        }
        values = {**self.prior.config, **codes, **named_classes(names)}
        return _built(ProgressiveVAEPriorConfig, values, "prior")


def named_classes(names: list[str]) -> dict[str, Any]:
    """The fields by which a config knows the classes."""
    return {"num_classes": len(names), "id2label": dict(enumerate(names)) or None}


def read_recipe(
    recipe: Mapping[str, Any] | str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Recipe:
    """The recipe of a dict or a YAML file, with its sections' types and names checked.

    Args:
        recipe: where not given, one for pictures: encoders learn first, by auxiliary decoders.
        overrides: sections whose values win; of two data sets that of the overrides.

    Raises:
        ValueError: a name that is none, or a value out of its type or range.
    """
    where = str(recipe) if isinstance(recipe, (str, os.PathLike)) else "recipe"
    is_silent = recipe is None
    if isinstance(recipe, (str, os.PathLike)):
        path = Path(expand_home(recipe, "recipe"))
        if not path.is_file():
            raise ValueError(f"expected the path of a recipe, got {where}, where no file is")
        recipe = read_yaml(path)
    layers: list[Mapping[str, Any]] = [
        _checked({} if each is None else each, name)
        for each, name in ((recipe, where), (overrides, "overrides"))
    ]
    warn_about_names([name for layer in layers for name in _old_names(layer)])
    layers = [_renamed(layer) for layer in layers]
    extended = _merged(layers[0].get("run", {}), layers[1].get("run", {})).get("extend")
    found = [] if extended is None else levels_in(expand_home(extended, "extend"))
    count = _count(layers, 1 + len(found) if found else None, [3] if is_silent else [])
    sections: dict[str, Any] = {}
    if is_silent:
        spread = _spread(layers[1], count)
        layers[0] = _for_pictures(count, {*spread[f"level_{count}"]})
    for layer in layers:
        if set(_SOURCES) & set(layer.get("data", {})):  # a data set is one or the other
            data = {k: v for k, v in sections.get("data", {}).items() if k not in _SOURCES}
            sections = {**sections, "data": data}
        sections = _merged(sections, _spread(layer, count))
    if sections["run"].get("mixed_precision") is False:  # what YAML reads in a bare no
        sections["run"] = {**sections["run"], "mixed_precision": "no"}
    return _recipe(_typed(sections, count))


class UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which refuses a key that stands twice in one mapping."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here a node holds its keys as written; merge keys (`<<`) add others to it later.
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in lines:
                places = f"in lines {lines[name]} and {line}"
                raise yaml.YAMLError(f"the key {key.value!r} twice, {places}")
            lines[name] = line
        return node


def read_yaml(path: Path, advice: str = "") -> Any:
    """Return the contents of a YAML file in UTF-8, or in UTF-16 with a byte order mark.

    Args:
        advice: what to do about a damaged file, for the error.

    Raises:
        ValueError: it is not YAML, or a key stands twice in one mapping.
    """
    try:
        return yaml.load(path.read_bytes(), UniqueKeyLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        words = " ".join(str(error).split())
        raise ValueError(
            f"expected YAML in {path}, got {words}{advice and f': {advice}'}"
        ) from error


def _for_pictures(count: int, said: set[str]) -> dict[str, Any]:
    """What holds for pictures of any kind where no recipe is given; its encoders learn in a quarter
    of the time, if N = 3.

    Args:
        said: what is said elsewhere of the finest level, and may not go with all of this.
    """
    learns = {"train_batch_size": 16, "learning_rate": 4e-3}
    shared = {
        "codebook_size": 512,
        "auxiliary_hidden_size": 64,
        "restart_threshold": 0.1,
        "reconstruction_weight": 1000.0,
        "encoder_fit": {**learns, "adam_weight_decay": 0.05, "time_share": 0.05},
        "fit": {"adam_weight_decay": 0.2, "time_share": 0.05},
    }
    finest: dict[str, Any] = {
        "downsample": 4,
        "reconstruction_weight": 100.0,
        "pixel_distribution": "logistic_mixture",
        "num_groups": 10,  # the first lattice is of every eighth pixel
        "encoder_fit": {"time_share": 0.15},
        "fit": {**learns, "time_share": 0.6},
    }
    if {"decoder_type", "ordering"} & said:
        del finest["num_groups"], finest["pixel_distribution"]
    elif "downsample" in said:
        del finest["num_groups"]
    prior = {"fit": {"adam_weight_decay": 0.2, "time_share": 0.05}}
    return {"levels": shared, f"level_{count}": finest, "prior": prior}


def levels_in(folder: str | Path) -> list[Path]:
    """The folders [level_1 … level_N] of a saved pipeline; [] where none is saved."""
    if not (Path(folder) / INDEX).is_file():
        return []
    return [Path(folder) / name for name in pipeline_parts(folder) if name != "prior"]


def _count(layers: list[Mapping[str, Any]], settled: int | None, usual: list[int]) -> int:
    """N: as it is settled elsewhere, as it is said, as many as are named or usual, or two."""
    said = [layer["num_levels"] for layer in layers if layer.get("num_levels") is not None]
    named = [i for i in range(1, MAX_LEVELS + 1) for layer in layers if f"level_{i}" in layer]
    count = said[-1] if said else settled or max([*named, *usual], default=2)
    if type(count) is not int or not 1 <= count <= MAX_LEVELS:
        raise ValueError(f"expected num_levels in 1 … {MAX_LEVELS}, got {count!r}")
    if settled is not None and count != settled:
        raise ValueError(f"expected num_levels={settled}, one more than extend has, got {count}")
    if named and max(named) > count:
        raise ValueError(f"expected sections of level_1 … level_{count}, got level_{max(named)}")
    return count


def _checked(sections: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(sections, Mapping):
        raise ValueError(f"expected sections in {where}, got {sections!r}")
    sections = {
        name: {} if section is None and name in SECTIONS else section  # a heading alone
        for name, section in sections.items()
    }
    for name, section in sections.items():
        if name != "num_levels" and name not in SECTIONS:
            raise ValueError(
                f"expected sections level_1 … level_{MAX_LEVELS}, levels, prior, data, run and "
                f"num_levels in {where}, got {name!r}"
            )
        if name in SECTIONS and not isinstance(section, Mapping):
            raise ValueError(f"expected names and values in section {name}, got {section!r}")
    return sections


def _old_names(layer: Mapping[str, Any]) -> list[str]:
    """The names of fields up to format 6 in a layer, as `section.name`."""
    names = []
    for section, values in layer.items():
        if not section.startswith("level"):
            continue
        names += [f"{section}.{name}" for name in renamed_names(values)]
        if isinstance(values.get("refit"), Mapping):
            names += [f"{section}.refit.{name}" for name in renamed_names(values["refit"])]
    return names


def _renamed(layer: Mapping[str, Any]) -> Mapping[str, Any]:
    """A layer in today's names of fields."""
    sections = dict(layer)
    for section, values in layer.items():
        if not section.startswith("level"):
            continue
        sections[section] = rename_fields(values)
        if isinstance(values.get("refit"), Mapping):
            sections[section]["refit"] = rename_fields(values["refit"])
    return sections


def _spread(layer: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The sections of a layer, with what it says of all levels in each."""
    shared = layer.get("levels", {})
    spread = {
        f"level_{i}": _merged(shared, layer.get(f"level_{i}", {})) for i in range(1, count + 1)
    }
    return spread | {name: layer.get(name, {}) for name in ("prior", "data", "run")}


def _merged(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Theirs win. A backbone that names its kind is another one, and nothing of ours is kept."""
    merged = dict(ours)
    for name, value in theirs.items():
        value = {} if value is None and name == "fit" else value  # a heading alone
        is_nested = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = (
            _merged(merged[name], value) if is_nested and "model_type" not in value else value
        )
    return merged


# ---- types ---------------------------------------------------------------------------------------


def _section(name: str, config: type, names: list[str], is_whole: bool, **more: tuple) -> type:
    """A section's names, types and values: those of so many fields of a config, of which nothing
    has to be given where the section is not whole, and more of (type, value)."""
    of_config: dict[str, tuple[Any, Any]] = {
        f.name: (dict[str, Any] | None if f.name == "backbone_config" else f.type, f.default)
        for f in fields(config)
        if f.name in names
    }
    if not is_whole:
        of_config = {name: (kind | None, None) for name, (kind, _) in of_config.items()}
    columns = []
    for each, (kind, value) in {**of_config, **more}.items():
        is_class = isinstance(value, type)
        columns.append(
            (each, kind, field(default_factory=value) if is_class else field(default=value))
        )
    made = make_dataclass(name, columns, namespace={"__module__": __name__})
    made.__doc__ = config.__doc__
    return made


def _own(config: type, *settled: str) -> list[str]:
    """The fields of a config that are not transformers', nor settled by something else."""
    return [name for name in config.__annotations__ if name not in settled]


RefitSection = _section(
    "RefitSection",
    ProgressiveVAELevelConfig,
    [name for name in DECODER_FIELDS if name not in ("num_classes", "id2label")],
    is_whole=False,
    from_scratch=(bool, False),
    fit=(FitSettings, FitSettings),
)
# Wrong codes are for decoders that are refitted.
LevelSection = _section(
    "LevelSection",
    ProgressiveVAELevelConfig,
    _own(ProgressiveVAELevelConfig, "num_channels", "num_symbols", "num_classes",
         "finer_fingerprint", "code_noise", "code_noise_kind", "tokenizer_config"),
    is_whole=True,
    class_conditional=(bool, False),
    encoder_fit=(FitSettings | None, None),
    fit=(FitSettings, FitSettings),
    refit=(RefitSection | None, None),
)  # fmt: skip
PriorSection = _section(
    "PriorSection",
    ProgressiveVAEPriorConfig,
    _own(ProgressiveVAEPriorConfig, "codebook_size", "grid_size", "num_classes",
         "finer_fingerprint"),
    is_whole=True,
    class_conditional=(bool, True),
    fit=(PriorFitSettings, PriorFitSettings),
)  # fmt: skip


def add_sections(parser: ArgumentParser, levels: list[str]):
    """Arguments `--level_1.hidden_size` and so on for all fields of a recipe."""
    for name in levels:
        parser.add_class_arguments(LevelSection, name)
    parser.add_class_arguments(PriorSection, "prior")
    parser.add_class_arguments(DataSettings, "data")
    parser.add_class_arguments(RunSettings, "run")


def _typed(sections: Mapping[str, Any], count: int) -> dict[str, Any]:
    """All fields of all sections, in their types."""
    parser = ArgumentParser(exit_on_error=False)
    add_sections(parser, [f"level_{i}" for i in range(1, count + 1)])
    return in_words(lambda: parser.parse_object(dict(sections))).as_dict()


def _recipe(sections: dict[str, Any]) -> Recipe:
    levels = []
    for i in range(1, 1 + sum(name.startswith("level_") for name in sections)):
        name, section = f"level_{i}", dict(sections[f"level_{i}"])
        fit = _built(FitSettings, section.pop("fit"), f"{name}.fit")
        conditional, refit = section.pop("class_conditional"), section.pop("refit", None)
        if refit is not None:
            refit = dict(refit)
            again = _built(FitSettings, refit.pop("fit"), f"{name}.refit.fit")
            from_scratch = refit.pop("from_scratch")
            changes = {field: value for field, value in refit.items() if value is not None}
            refit = RefitRecipe(changes, from_scratch, again)
        encoder_fit = section.pop("encoder_fit", None)
        if encoder_fit is not None:
            encoder_fit = _built(FitSettings, encoder_fit, f"{name}.encoder_fit")
            if section["auxiliary_hidden_size"] is None:
                raise ValueError(f"expected auxiliary_hidden_size of {name}, which has an "
                                 "encoder_fit, got null")  # fmt: skip
        levels.append(LevelRecipe(section, conditional, encoder_fit, fit, refit))
    section = dict(sections["prior"])
    fit = _built(PriorFitSettings, section.pop("fit"), "prior.fit")
    prior = PriorRecipe(config=section, class_conditional=section.pop("class_conditional"), fit=fit)
    data = _built(DataSettings, sections["data"], "data")
    run = _built(RunSettings, sections["run"], "run")
    # With their paths expanded, so that what is written down is what runs.
    sections = {**sections, "data": asdict(data), "run": asdict(run)}
    return Recipe(levels, prior, data, run, sections)


def _built(kind: type[Kind], values: Mapping[str, Any], where: str) -> Kind:
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
