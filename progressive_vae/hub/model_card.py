"""Model cards: MODEL_CARD.md with the usage, metrics and images of a saved pipeline."""

import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

IMAGE_CAPTIONS = {
    "samples.png": "Samples; one row for each class, if there are classes.",
    "reconstructions.png": "Held-out images reconstructed from their codes: from z₁ only in the "
    "first row, with one more level in each next row; the images themselves in the last row.",
}
_METADATA = re.compile(r"\A---\n.*?\n---\n", re.S)

# A card consists of marked parts, <!-- name --> … <!-- /name -->, and the text between them.
_INSTALLATION = "installation"
_USAGE = "usage"
_METRICS = "figures"  # the name in cards that are already published

_CALL = re.compile(r'(ProgressiveVAEPipeline\.from_pretrained\()"([^"]*)"')
_IMPORT = "from progressive_vae import ProgressiveVAEPipeline"
_INSTALL = "Needs `pip install progressive-vae`; with that, and nothing else, the lines below run."
_WITHOUT_INSTALLATION = """\
This repository contains its code: the lines below run without an installation, if you trust it.
With `pip install progressive-vae` the installed package is used instead."""
_SAMPLE = """\
images = pipe(num_images_per_prompt=4, generator=torch.Generator().manual_seed(0)).images
images[0].save("sample.png")
codes = pipe.encode(images)  # [z_1 … z_N], the coarsest first
print(pipe.bits_per_dim(images))  # one term for each factor, and their total
"""
_RECONSTRUCT = """\
images = [PIL.Image.open("image.png")]  # of the model's size; there is no prior to sample from
codes = pipe.encode(images)  # [z_1 … z_N], the coarsest first
variations = pipe(codes=codes[:1], generator=torch.Generator().manual_seed(0)).images  # same z_1
variations[0].save("sample.png")
"""


def card_template() -> str:
    """Return MODEL_CARD.md without its metadata, which describe the project's own model.

    It is package data of an installed wheel, and at the top level of a checkout.
    """
    packaged = resources.files("progressive_vae") / "MODEL_CARD.md"
    checkout = Path(__file__).parents[2] / "MODEL_CARD.md"
    text = (packaged if packaged.is_file() else checkout).read_text(encoding="utf-8")
    return _METADATA.sub("", text)


def model_card(
    repository: str,
    metrics: dict | None = None,
    images: Sequence[str] = (),
    has_prior: bool = True,
    variant: str | None = None,
) -> ModelCard:
    """Return the card of a pipeline.

    Args:
        repository: a name on the Hub or a folder, which the usage passes to `from_pretrained`.
        metrics: the contents of `metrics.json`, if there are any.
        images: names among `IMAGE_CAPTIONS` of files beside the card.
        has_prior: without a prior the usage starts from an image instead of sampling one.
        variant: of the weights, if there are only weights of this variant.
    """
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        license=(metrics or {}).get("license", "apache-2.0"),
        tags=["diffusers:ProgressiveVAEPipeline", "progressive-vae", "vq-vae", "image-generation"],
        **(_metadata(metrics) if metrics else {}),
    )
    results = [
        f"![{name.partition('.')[0]}]({name})\n\n*{IMAGE_CAPTIONS[name]}*" for name in images
    ]
    if metrics:
        results.append(_evaluation(metrics))
    else:
        results.append(
            "No metrics were saved with this pipeline; `pipe.bits_per_dim(images)` computes bits "
            "per dimension, one term for each factor."
        )
    text = card_template()
    text = _replace_part(text, _INSTALLATION, _INSTALL)
    text = _replace_part(text, _USAGE, _usage(repository, has_prior, variant))
    text = _replace_part(text, _METRICS, "\n" + "\n\n".join(results) + "\n")
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text.rstrip()}\n")


def is_generated(text: str) -> bool:
    """Return whether `model_card` made a card; others are written by hand."""
    return f"<!-- {_METRICS} -->" in text and f"<!-- /{_METRICS} -->" in text


def for_repository(text: str, repository: str, with_code: bool = False) -> str:
    """Change the first `ProgressiveVAEPipeline.from_pretrained` of a card to another repository.

    Args:
        with_code: the repository contains the package's code, so the usage needs no installation.

    Raises:
        ValueError: with `with_code`, the card has no marked installation or usage.
    """
    text = _CALL.sub(lambda call: f'{call[1]}"{repository}"', text, count=1)
    if not with_code or not is_generated(text):
        return text
    usage = _part(text, _USAGE)
    if _IMPORT not in usage or not _CALL.search(usage):
        raise ValueError(
            f"expected the card's usage to import ProgressiveVAEPipeline and to load it, got "
            f"{usage!r}: delete the card, and save the pipeline again"
        )
    usage = usage.replace(_IMPORT, "from diffusers import DiffusionPipeline")
    call = f'DiffusionPipeline.from_pretrained("{repository}", trust_remote_code=True'
    usage = _CALL.sub(lambda _: call, usage, count=1)
    return _replace_part(_replace_part(text, _USAGE, usage), _INSTALLATION, _WITHOUT_INSTALLATION)


def _usage(repository: str, has_prior: bool, variant: str | None) -> str:
    dtypes = {"fp16": ", dtype=torch.float16", "bf16": ", dtype=torch.bfloat16"}
    arguments = f'"{repository}"'
    if variant is not None:
        arguments += f', variant="{variant}"{dtypes.get(variant, "")}'
    return (
        "```python\n"
        + ("" if has_prior else "import PIL.Image\n")
        + f"import torch\n{_IMPORT}\n\n"
        + f"pipe = ProgressiveVAEPipeline.from_pretrained({arguments})\n"
        + (_SAMPLE if has_prior else _RECONSTRUCT)
        + "```"
    )


def _split(text: str, part: str) -> tuple[str, str, str]:
    """Return what is before, in and after a marked part of a card."""
    start = f"<!-- {part} -->\n"
    end = f"\n<!-- /{part} -->"
    if text.count(start) != 1 or text.count(end) != 1:
        raise ValueError(
            f"expected one part <!-- {part} --> … <!-- /{part} --> in the card, got "
            f"{text.count(start)}: delete the card, and save the pipeline again"
        )
    before, rest = text.split(start)
    contents, after = rest.split(end)
    return before + start, contents, end + after


def _part(text: str, part: str) -> str:
    return _split(text, part)[1]


def _replace_part(text: str, part: str, contents: str) -> str:
    before, _, after = _split(text, part)
    return before + contents + after


def metrics_table(metrics: dict) -> str:
    """Return the contents of `metrics.json` as Markdown tables."""
    # Likelihood, code use and accuracy: one row for each factor.
    accuracy = metrics.get("label_accuracy", {})
    prefixes = {"label kept": "", "label kept by the preview": "preview_of_"}
    columns = {
        title: prefix for title, prefix in prefixes.items() if f"{prefix}level_1" in accuracy
    }
    lines = _header(["factor", "bits/dim", "codes used", "perplexity", *columns])
    for name, bits in metrics["bits_per_dim"].items():
        cells = [name, f"{bits:.4f}", "", ""]
        if use := metrics["codes"].get(name):
            cells[2] = f"{use['codes_used']} of {use['codebook_size']}"
            cells[3] = f"{use['codebook_perplexity']:.1f}"
        for prefix in columns.values():
            value = accuracy.get(prefix + name)
            cells.append("" if value is None else f"{100 * value:.1f} %")
        lines.append(_row(cells))
    if accuracy:
        lines += ["", f"Label kept by the images themselves: {100 * accuracy['images']:.1f} %."]
    if "frechet_distance" in metrics:
        lines += [
            "",
            f"Fréchet distance of {metrics['num_drawn']} samples to as many held-out images: "
            f"{metrics['frechet_distance']:.4f}, in the features of a small classifier of this "
            "data set: not to be compared with distances in other features, or of other counts.",
        ]

    # Training time: one row for each phase.
    lines += ["", *_header(["phase", "seconds", "share", "waiting for data", "images/s"])]
    total_seconds = sum(phase["seconds"] for phase in metrics["phases"].values())
    for name, phase in metrics["phases"].items():
        seconds = phase["seconds"]
        waiting = phase.get("waiting_share")
        cells = [
            name,
            f"{seconds:.1f}",
            f"{100 * seconds / total_seconds:.1f} %",
            "" if waiting is None else f"{100 * waiting:.1f} %",
            f"{phase['images_per_second']:.0f}",
        ]
        lines.append(_row(cells))
    if "sampled_images_per_second" in metrics:
        lines.append(f"| sample, batch of 250 | | | | {metrics['sampled_images_per_second']:.0f} |")
    for name, error in metrics.get("not_measured", {}).items():
        lines += ["", f"Not measured: {name} ({error})."]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _header(titles: Sequence[str]) -> list[str]:
    return [_row(titles), "|---" * len(titles) + "|"]


def _evaluation(metrics: dict) -> str:
    # Metrics of early versions have a command and flat settings instead of a recipe.
    recipe = metrics.get("recipe") or metrics["settings"]
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).strip()
    command = metrics.get("command", "accelerate launch examples/train.py --config recipe.yaml")
    return (
        f"Measured on {metrics['num_images']} held-out images (`{metrics['dataset']}`, split "
        f"`{metrics['split']}`), seed {metrics['seed']}, {metrics['machine']}:\n\n"
        f"{metrics_table(metrics)}\n\n"
        f"Trained and evaluated by `{command}`.\n\n"
        f"<details><summary>The recipe</summary>\n\n```yaml\n{text}\n```\n\n</details>"
    )


def _metadata(metrics: dict) -> dict:
    """Return the data set and the results as metadata, which the Hub shows beside the card."""
    values = {"bits_per_dim": ("bits per dimension", metrics["bits_per_dim"]["total"])}
    if "frechet_distance" in metrics:
        name = "Fréchet distance in features of a classifier of the data set"
        values["frechet_distance"] = (name, metrics["frechet_distance"])
    results = [
        EvalResult(
            task_type="unconditional-image-generation",
            dataset_type=metrics["dataset"],
            dataset_name=metrics["dataset"],
            dataset_split=metrics["split"],
            metric_type=metric_type,
            metric_name=name,
            metric_value=round(value, 4),
        )
        for metric_type, (name, value) in values.items()
    ]
    # The Hub links `datasets`, so only valid names are listed.
    is_on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", metrics["dataset"]) is not None
    datasets = {"datasets": [metrics["dataset"]]} if is_on_hub else {}
    return {"model_name": "Progressive VAE", "eval_results": results, **datasets}
