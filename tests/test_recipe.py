"""Recipes: sections, types, overrides, YAML."""

from dataclasses import fields

import pytest
import yaml

from helpers.models import tiny_level, tiny_pipeline
from progressive_vae import (
    ProgressiveVAELevelConfig,
    ProgressiveVAEPipeline,
    ProgressiveVAEPriorConfig,
)
from progressive_vae.configuration.level import DECODER_FIELDS
from progressive_vae.data.args import DataSettings
from progressive_vae.training.args import FitSettings, RunSettings
from progressive_vae.training.recipe import read_recipe
from progressive_vae.training.resume import pretrained_levels
from progressive_vae.training.sections import LevelSection, PriorSection, RefitSection


def test_sections_of_levels_override_levels():
    recipe = read_recipe(
        {
            "levels": {"hidden_size": 32, "fit": {"learning_rate": 1e-4}},
            "level_3": {"hidden_size": 48, "refit": {"code_noise": 0.1}},
        }
    )
    assert [level.config["hidden_size"] for level in recipe.levels] == [32, 32, 48]
    assert {level.fit.learning_rate for level in recipe.levels} == {1e-4}
    assert [level.refit is None for level in recipe.levels] == [True, True, False]
    assert recipe.levels[2].refit.changes == {"code_noise": 0.1}
    assert recipe.levels[2].refit.fit == FitSettings()


def test_extend_uses_the_levels_of_the_index(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    finest = tiny_level(num_channels=3)
    ProgressiveVAEPipeline(None, finest, image_size=[8, 8]).save_pretrained(tmp_path)
    assert (tmp_path / "level_3").is_dir()  # of a previous pipeline
    recipe = read_recipe({"run": {"extend": str(tmp_path), "output_dir": str(tmp_path / "run")}})
    assert len(recipe.levels) == 2
    assert pretrained_levels(recipe) == {2: tmp_path / "level_1"}


def test_overrides_take_precedence():
    recipe = {"level_1": {"hidden_size": 16}, "data": {"dataset_name": "digits"}}
    read = read_recipe(recipe, {"levels": {"hidden_size": 8}, "data": {"train_data_dir": "x"}})
    assert [level.config["hidden_size"] for level in read.levels] == [8]
    assert read.data.dataset_name is None and read.data.train_data_dir == "x"


def test_model_type_replaces_the_backbone_config():
    recipe = {"prior": {"backbone_config": {"model_type": "opt", "ffn_dim": 8, "dropout": 0.0}}}
    same = read_recipe(recipe, {"prior": {"backbone_config": {"ffn_dim": 16}}})
    expected = {"model_type": "opt", "ffn_dim": 16, "dropout": 0.0}
    assert same.prior.config["backbone_config"] == expected
    other = read_recipe(recipe, {"prior": {"backbone_config": {"model_type": "llama"}}})
    assert other.prior.config["backbone_config"] == {"model_type": "llama"}


def test_defaults_are_those_of_configs_and_settings():
    recipe, config = read_recipe({}), ProgressiveVAELevelConfig(num_channels=1)
    assert len(recipe.levels) == 2 and recipe.levels[0].fit == FitSettings()
    (finest,) = recipe.level_configs(1, [], {})[1:]
    assert finest.to_dict() == config.to_dict()


@pytest.mark.parametrize("count", [1, 2, 4])
def test_default_recipe(count):
    recipe = read_recipe(None, {"num_levels": count, "levels": {"hidden_size": 8}})
    finest = recipe.levels[-1]
    assert finest.config["downsample"] == 4
    assert finest.config["pixel_distribution"] == "logistic_mixture"
    assert all(level.config["hidden_size"] == 8 for level in recipe.levels)
    assert all(level.encoder_fit.learning_rate == 4e-3 for level in recipe.levels)
    assert len(recipe.level_configs(3, [], {})) == count
    assert len(read_recipe().levels) == 3 and read_recipe({}).levels[0].encoder_fit is None


def test_overrides_of_the_default_recipe(tmp_path):
    """They do not change the number of its levels."""
    assert len(read_recipe(None, {"level_1": {"hidden_size": 96}}).levels) == 3
    assert len(read_recipe(None, {"level_5": {"hidden_size": 96}}).levels) == 5
    for overrides in (
        {"levels": {"downsample": 16}},
        {"level_3": {"ordering": "masked"}},
        {"levels": {"ordering": "factorized"}},
    ):
        read_recipe(None, overrides).level_configs(3, [], {})
    (tmp_path / "empty.yaml").write_text("# no sections")
    assert read_recipe(tmp_path / "empty.yaml") == read_recipe({})


def test_sizes_by_name():
    levels = {"decoder_size": "base", "decoder_type": "transformer"}
    recipe = read_recipe({"levels": levels, "level_2": {"decoder_type": "conv", "num_layers": 3}})
    sizes = [(x.config["hidden_size"], x.config["num_layers"]) for x in recipe.levels]
    assert sizes == [(768, 12), (768, 3)]
    assert read_recipe(recipe.sections) == recipe
    larger = read_recipe({"levels": levels}, {"level_1": {"decoder_size": "large"}})
    assert larger.levels[0].config["num_layers"] == 24
    with pytest.raises(ValueError, match="decoder_size in .*'large'.*got 'huge'"):
        read_recipe({"level_1": {"decoder_size": "huge"}})


def test_sections_give_the_same_recipe(tmp_path):
    recipe = read_recipe(
        {
            "num_levels": 3,
            "level_2": {"refit": {"num_layers": 3, "fit": {"max_grad_norm": None}}},
            "run": {"checkpointing_steps": None, "max_train_minutes": 5},
        }
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.sections))
    again = read_recipe(path)
    assert again == recipe
    assert again.run.checkpointing_steps is None and again.levels[1].refit.fit.max_grad_norm is None


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"level_9": {}}, "expected sections level_1 … level_8, .* got 'level_9'"),
        ({"hidden_size": 8}, "expected sections level_1 … level_8, .* got 'hidden_size'"),
        ({"level_1": 5}, "expected names and values in section level_1, got 5"),
        ({"level_1": {"hidden": 3}}, "level_1.*'hidden'"),
        ({"level_1": {"hidden_size": 3.5}}, 'level_1.hidden_size".*int.*Got value: 3.5'),
        ({"level_1": {"fit": {"learning_rate": 0}}}, "level_1.fit: expected learning_rate > 0"),
        ({"level_1": {"refit": {"x": 1}}}, 'level_1.refit"'),
        ({"level_1": {"code_noise": 0.1}}, "level_1.*'code_noise'"),
        ({"prior": {"grid_size": [2, 2]}}, "prior.*'grid_size'"),
        ({"num_levels": 0}, "expected num_levels in 1 … 8, got 0"),
        ({"num_levels": "two"}, "expected num_levels in 1 … 8, got 'two'"),
        ({"num_levels": 1, "level_2": {}}, "sections of level_1 … level_1, got level_2"),
        ({"run": {"steps": 3}}, "run.*'steps'"),
        ([1, 2], "expected sections in recipe, got"),
        ([], "expected sections in recipe, got"),
        (False, "expected sections in recipe, got"),
        ({"num_levels": True}, "expected num_levels in 1 … 8, got True"),
        ({"run": {"output_dir": None}}, "run: expected output_dir to be a folder, got None"),
        ("/nowhere.yaml", "expected the path of a recipe, got /nowhere.yaml"),
    ],
)
def test_invalid_recipes(recipe, words):
    with pytest.raises(ValueError, match=words) as error:
        read_recipe(recipe)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize("text", ["{", "5", "[a, b]", "\t- x"])
def test_invalid_recipe_files(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="expected (YAML|sections) in .*recipe.yaml"):
        read_recipe(path)


def test_class_conditional_levels_need_labels():
    recipe = read_recipe({"level_2": {"class_conditional": True}})
    coarsest, finest = recipe.level_configs(1, ["cat", "dog"], {})
    assert (coarsest.num_classes, finest.num_classes) == (0, 2)
    with pytest.raises(ValueError, match="class_conditional=False of level_2.*no labels"):
        recipe.level_configs(1, [], {})
    assert recipe.prior_config([coarsest, finest], (8, 8), []).num_classes == 0
    assert recipe.prior_config([coarsest, finest], (8, 8), ["a"]).num_classes == 1


def test_config_errors_name_the_section():
    recipe = read_recipe({"level_1": {"hidden_size": -4}})
    with pytest.raises(ValueError, match="level_1: .*expected hidden_size >= 1, got -4"):
        recipe.level_configs(1, [], {})


def test_empty_sections_and_an_unquoted_no():
    recipe = read_recipe(
        {"level_1": None, "level_2": {"fit": None}, "run": {"mixed_precision": False}}
    )
    assert len(recipe.levels) == 2 and recipe.run.mixed_precision == "no"


def test_command_line(script):
    def parse(words):
        return script.parse(words.split())[0]

    recipe = parse("--random_flip --seed=3 --levels.class_conditional")
    assert recipe.data.random_flip and recipe.run.seed == 3 and recipe.levels[0].class_conditional
    assert parse("--level_2.refit.from_scratch true").levels[1].refit.from_scratch
    recipe = parse("--config examples/configs/fashion_mnist.yaml --prior.backbone_config.ffn_dim 5")
    backbone = recipe.prior.config["backbone_config"]
    assert backbone["ffn_dim"] == 5 and backbone["model_type"] == "opt"
    for words in ("--output_dir", "--dataset_name --seed 1", "--hub_model_id"):
        with pytest.raises(ValueError, match="expected one argument"):
            parse(words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("level_1: {}\nlevel_2: {}\nlevel_1: {}", "'level_1' twice, in lines 1 and 3"),
        (
            "level_1:\n  fit:\n    time_share: 1\n    time_share: 2",
            "'time_share' twice, in lines 3 a",
        ),
        ("prior: {backbone_config: {a: 1, 'a': 1}}", "'a' twice, in lines 1 and 1"),
    ],
)
def test_duplicate_keys(tmp_path, text, words):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"expected YAML in {path}, got the key {words}"):
        read_recipe(path)


def test_alias_inside_its_own_anchor_is_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("level_1: &a {fit: *a}")
    with pytest.raises(ValueError, match=f"expected YAML in {path}, got .*recursive"):
        read_recipe(path)


def test_anchors_and_merge_keys(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "level_1: &first {hidden_size: 8, codebook_size: 7}\n"
        "level_2: {<<: *first, hidden_size: 16}\n"
        "level_3: &third {<<: *first}\n"
        "level_4: {<<: [*third, *first], codebook_size: 5}\n"
    )
    levels = read_recipe(path).levels
    sizes = [(level.config["hidden_size"], level.config["codebook_size"]) for level in levels]
    assert sizes == [(8, 7), (16, 7), (8, 7), (8, 5)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_and_numbers(tmp_path, encoding):
    path = tmp_path / "recipe.yaml"
    text = "run: {output_dir: für}\nlevel_1: {fit: {learning_rate: 1e-3}}\ndata: {center_crop: on}"
    path.write_text(text, encoding=encoding)
    recipe = read_recipe(path)
    assert recipe.run.output_dir == "für" and recipe.data.center_crop is True
    assert recipe.levels[0].fit.learning_rate == 1e-3


def test_home_folder_in_paths(tmp_path, monkeypatch, script):
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    home.mkdir()
    sections = {
        "data": {"train_data_dir": "~/images"},
        "run": {"output_dir": "~/run", "finest_level": "~/level", "logging_dir": "~/logs"},
    }
    (home / "recipe.yaml").write_text(yaml.safe_dump(sections))
    recipe = read_recipe("~/recipe.yaml")
    assert recipe.run.output_dir == f"{home}/run" and recipe.run.finest_level == f"{home}/level"
    assert recipe.run.logging_dir == f"{home}/logs"
    assert recipe.data.train_data_dir == f"{home}/images"
    assert read_recipe(recipe.sections) == recipe
    assert DataSettings(dataset_name="~").dataset_name == str(home)
    assert RunSettings(extend="~/run").extend == f"{home}/run"
    recipe, _ = script.parse(["--config=~/recipe.yaml", "--output_dir=~/other"])
    assert recipe.run.output_dir == f"{home}/other"
    assert script.parse(["--train_data_dir=~"])[0].data.train_data_dir == str(home)
    with pytest.raises(ValueError, match="expected output_dir .*'~nobody_here'"):
        read_recipe({"run": {"output_dir": "~nobody_here"}})


def test_old_names_of_fields_are_read_with_one_warning():
    old = {
        "levels": {"picture_weight": 7.0, "gumbel_decay": 0.5},
        "level_1": {"decoder_order": "raster", "refit": {"corruption": 0.1}},
        "level_2": {"pixel_distribution": "logistics", "refit": {"decoder_order": "masked"}},
        "data": {"random_colours": True},
    }
    new = {
        "levels": {"reconstruction_weight": 7.0, "gumbel_temperature_decay": 0.5},
        "level_1": {
            "decoder_type": "causal_lm", "ordering": "raster", "refit": {"code_noise": 0.1}
        },
        "level_2": {
            "pixel_distribution": "logistic_mixture",
            "refit": {"ordering": "masked", "decoder_type": "conv"},
        },
        "data": {"random_channel_permutation": True},
    }  # fmt: skip
    with pytest.warns(FutureWarning, match="level_1.decoder_order") as warned:
        recipe = read_recipe(old)
    assert len(warned) == 1
    assert recipe == read_recipe(new)


@pytest.mark.parametrize(
    ("section", "config", "excluded"),
    [
        (
            LevelSection,
            ProgressiveVAELevelConfig,
            "num_channels num_symbols num_classes condition_dim finer_fingerprint code_noise "
            "code_noise_kind tokenizer_config",
        ),
        (
            PriorSection,
            ProgressiveVAEPriorConfig,
            "codebook_size grid_size num_classes condition_dim finer_fingerprint",
        ),
    ],
)
def test_sections_have_the_fields_of_configs(section, config, excluded):
    names = {*config.__annotations__} - {"has_no_defaults_at_init"}  # no field
    own = {name: getattr(config, name) for name in names}
    section_fields = {field.name: field for field in fields(section)}
    assert own.keys() - section_fields.keys() == {*excluded.split()}
    for name in own.keys() & section_fields.keys():
        assert section_fields[name].default == own[name]
        if name != "backbone_config":
            assert section_fields[name].type == config.__annotations__[name]


def test_refits_have_the_fields_of_decoders():
    names = {*DECODER_FIELDS} - {"num_classes", "id2label", "condition_dim"}
    refit_fields = {field.name: field for field in fields(RefitSection)}
    assert refit_fields.keys() == {*names, "from_scratch", "fit"}
    for name in names - {"backbone_config"}:
        assert refit_fields[name].default is None
        assert refit_fields[name].type == ProgressiveVAELevelConfig.__annotations__[name] | None
