import inspect
import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from helpers.model_cards import METRICS
from progressive_vae.hub.model_card import for_repository, metrics_table, model_card

ROOT = Path(__file__).parents[1]


def test_the_card_has_metrics_of_its_run():
    card = model_card("org/name", METRICS, ["samples.png"])
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
    content = model_card("org/name", METRICS | {"label_accuracy": accuracy}).content
    assert "| label kept | label kept by the preview |" in content
    assert "| level_1 | 2.0000 | 7 of 8 | 5.5 | 80.0 % | 70.0 % |" in content


def test_metrics_of_early_versions_without_a_recipe():
    older = {k: v for k, v in METRICS.items() if k != "recipe"}
    older |= {"command": "accelerate launch x.py", "settings": {"learning_rate": "[0.004]"}}
    content = model_card("org/name", older).content
    assert "by `accelerate launch x.py`" in content and "learning_rate: '[0.004]'" in content


@pytest.mark.parametrize("metrics", [None, METRICS, METRICS | {"dataset": "images"}])
def test_every_card_is_complete(metrics):
    content = model_card("org/name", metrics).content
    _, head, body = content.split("---\n", 2)
    fields = {*inspect.signature(ModelCardData).parameters, "model-index"}
    assert set(yaml.safe_load(head)) <= fields
    assert ("datasets" in head) == (metrics is METRICS)  # "images" is no name on the Hub
    assert "pip install progressive-vae" in body.split("#")[0]
    assert re.findall("^## (.*)", body, re.M) == [
        "Model details", "Uses", "How to get started", "Training", "Evaluation", "Limits",
        "Changes",
    ]  # fmt: skip
    # No gaps, no metrics of the project's own model, no links into its checkout.
    assert not [text for text in ("TODO", "2.8787", "](examples/") if text in body]


def test_the_project_card_has_metrics_of_the_included_model():
    card = ModelCard.load(ROOT / "MODEL_CARD.md")
    metrics = json.loads((ROOT / "examples" / "fashion_mnist" / "metrics.json").read_text())
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert values["bits_per_dim"] == round(metrics["bits_per_dim"]["total"], 4)
    assert values["frechet_distance"] == round(metrics["frechet_distance"], 4)
    assert metrics_table(metrics).split("\n\n")[0] in card.content
    assert f"{metrics['sampled_images_per_second']:.0f} images a second" in card.content


def test_usage_names_the_repository():
    content = model_card("folder/of/mine").content
    assert 'Pipeline.from_pretrained("folder/of/mine")' in content
    content = 'OtherPipeline.from_pretrained("a/b")\n' + content  # not changed
    moved = for_repository(content, "org/name")
    assert moved == content.replace("folder/of/mine", "org/name")


@pytest.mark.parametrize("text", ["<!-- usage -->", "<!-- /installation -->", "from progressive"])
def test_a_card_without_its_marked_parts_is_an_error(text):
    content = model_card("folder/of/mine").content
    assert "without an installation" in for_repository(content, "org/name", with_code=True)
    with pytest.raises(ValueError, match="expected .* card"):
        for_repository(content.replace(text, "", 1), "org/name", with_code=True)
