import inspect
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from helpers.model_cards import METRICS
from progressive_vae import ProgressiveVAELevelConfig, ProgressiveVAEPriorConfig
from progressive_vae.hub import write_card
from progressive_vae.hub.model_card import is_generated, metrics_table, model_card

ROOT = Path(__file__).parents[1]

CONFIGS = {
    "level_1": ProgressiveVAELevelConfig(num_symbols=8, downsample=2, num_classes=3),
    "level_2": ProgressiveVAELevelConfig(num_channels=3, codebook_size=8, downsample=4),
    "prior": ProgressiveVAEPriorConfig(grid_size=[2, 2], num_classes=3),
}


def make_card(metrics=None, configs=CONFIGS, **options):
    return model_card("org/name", configs, [15, 16], metrics, **options)


def test_the_card_has_metrics_of_its_run():
    card = make_card(METRICS, images=["samples.png"])
    assert "| level_1 | 2.0000 | 7 of 8 | 5.5 | 80.0 % |" in card.content
    assert "| total | 2.1000 |" in card.content and "--config recipe.yaml`" in card.content
    assert "](samples.png)" in card.content and "reconstructions.png" not in card.content
    parsed = ModelCard(card.content).data
    assert parsed.library_name == "diffusers" and parsed.license == "cc-by-4.0"
    assert parsed.datasets == ["some/images"]
    values = {result.metric_type: result.metric_value for result in parsed.eval_results}
    assert values == {"bits_per_dim": pytest.approx(2.1), "frechet_distance": 1.25}
    text = card.content.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(text) == METRICS["recipe"]  # it can be copied and run again


def test_a_column_for_accuracy_of_previews():
    accuracy = {"images": 0.9, "level_1": 0.8, "preview_of_level_1": 0.7}
    content = make_card(METRICS | {"label_accuracy": accuracy}).content
    assert "| label accuracy | label accuracy of previews |" in content
    assert "| level_1 | 2.0000 | 7 of 8 | 5.5 | 80.0 % | 70.0 % |" in content


def test_metrics_of_early_versions_without_a_recipe():
    older = {k: v for k, v in METRICS.items() if k != "recipe"}
    older |= {"command": "accelerate launch x.py", "settings": {"learning_rate": "[0.004]"}}
    content = make_card(older).content
    assert "Command: `accelerate launch x.py`" in content and "learning_rate: '[0.004]'" in content


@pytest.mark.parametrize("metrics", [None, METRICS, METRICS | {"dataset": "images"}])
def test_every_card_is_complete(metrics):
    content = make_card(metrics).content
    _, head, body = content.split("---\n", 2)
    fields = {*inspect.signature(ModelCardData).parameters, "model-index"}
    assert set(yaml.safe_load(head)) <= fields
    assert ("datasets" in head) == (metrics is METRICS)  # "images" is no name on the Hub
    assert re.findall("^## (.*)", body, re.M) == [
        "How to use", "Model details", "Evaluation", "Training data", "Training procedure",
        "Limits", "License", "Citation",
    ]  # fmt: skip
    # No gaps, no unfilled fields, no links into a checkout.
    assert not [text for text in ("TODO", "None", "$", "\n\n\n", "](examples/") if text in body]
    assert is_generated(content)


def test_the_card_describes_the_parts():
    content = make_card(METRICS | {"parameters": {"prior": 1_234_000, "level_1": 10_000}}).content
    assert (
        "15×16 color images in 3 classes" in content and "2 levels of codes (2×2, 4×4)" in content
    )
    assert "| `prior` | 2×2 codes, K = 64 | the class | 1.23 M |" in content
    assert "| `level_1` | 4×4 codes, K = 8 | 2×2 codes, the class | 0.01 M |" in content
    assert "| `level_2` | 15×16 pixels, 3 × 8 bits | 4×4 codes |  |" in content
    assert 'pipe(["0"], num_images' in content
    levels = {name: config for name, config in CONFIGS.items() if name != "prior"}
    content = make_card(configs=levels).content
    assert "PIL.Image.open" in content and "samples images" not in content


def test_the_card_has_the_sampling_settings():
    sampling = {"temperature": [1.0, 1.0, 0.75], "top_p": 0.9}
    tuning = {
        "settings": sampling,
        "explanation": "Chosen among 5 settings.",
        "command": "python x.py",
        "held_out": {
            "exact distribution": {"Fréchet distance": 0.045123},
            "these settings": {"Fréchet distance": 0.03},
        },
    }
    content = make_card(METRICS | {"sampling": tuning}, sampling=sampling).content
    assert "| setting | prior | level_1 | level_2 |" in content
    assert (
        "| `temperature` | 1 | 1 | 0.75 |" in content and "| `top_p` | 0.9 | 0.9 | 0.9 |" in content
    )
    assert "| Fréchet distance | 0.04512 | 0.03 |" in content
    assert "Chosen among 5 settings. Command: `python x.py`" in content
    # Metrics of other settings are left out.
    content = make_card(METRICS | {"sampling": tuning}, sampling={"temperature": 0.5}).content
    assert "| `temperature` | 0.5 | 0.5 | 0.5 |" in content and "Chosen" not in content
    assert "setting" not in make_card(METRICS).content


def test_the_project_card_is_that_of_the_included_model():
    """Every paragraph that `model_card` writes is in MODEL_CARD.md, which has a section more."""
    folder = Path("examples/fashion_mnist")
    metrics = json.loads((ROOT / folder / "metrics.json").read_text())
    configs = {
        name: (ProgressiveVAEPriorConfig if name == "prior" else ProgressiveVAELevelConfig)
        .from_pretrained(ROOT / folder / name)
        for name in ("level_1", "level_2", "prior")
    }  # fmt: skip
    card = model_card(
        folder.as_posix(),
        configs,
        [28, 28],
        metrics | {"dataset": "zalando-datasets/fashion_mnist"},
        [(folder / name).as_posix() for name in ("samples.png", "reconstructions.png")],
        sampling=json.loads((ROOT / folder / "model_index.json").read_text()).get("sampling"),
    )
    project_card = (ROOT / "MODEL_CARD.md").read_text()
    for paragraph in str(card).strip().split("\n\n"):
        assert paragraph in project_card
    assert metrics_table(metrics).split("\n\n")[0] in project_card


@pytest.mark.parametrize("name", ["fashion_mnist", "color_64"])
def test_cards_of_included_models_are_current(name, tmp_path, monkeypatch):
    """Else write them again: `progressive_vae.hub.write_card("examples/fashion_mnist")`."""
    shutil.copytree(ROOT / "examples" / name, tmp_path / "examples" / name)
    monkeypatch.chdir(tmp_path)
    path = Path("examples") / name
    content = (path / "README.md").read_text()
    write_card(path)
    assert (path / "README.md").read_text() == content


def test_usage_of_a_repository_with_code():
    content = make_card(variant="fp16", with_code=True).content
    call = 'DiffusionPipeline.from_pretrained("org/name", trust_remote_code=True, variant="fp16"'
    assert call in content and "without an installation" in content
    assert "from progressive_vae import" not in content


def test_cards_of_earlier_versions_are_generated_ones():
    assert is_generated("# Title\n\n<!-- figures -->\n\n<!-- /figures -->\n")
    assert not is_generated("# By hand")
