# /// script
# requires-python = ">=3.10"
# dependencies = ["progressive-vae[demo]"]
#
# [tool.uv.sources]
# progressive-vae = { path = "..", editable = true }
# ///
"""Gradio demo: sample images coarse to fine, and inspect the codes of your own images.

python examples/app.py
    with the project's Fashion-MNIST model, on http://127.0.0.1:7860.

python examples/app.py --model you/photos --push_to_space you/demo
    creates a Space of the demo on the Hub, or updates it.

Two requests run at a time, each on half of the CPU's cores; at most 32 more wait.
"""

import base64
import io
import math
import os
import random
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import gradio as gr
import numpy as np
import PIL.Image
import torch
from torch import Tensor
from transformers import HfArgumentParser

from progressive_vae import ProgressiveVAEPipeline
from progressive_vae.codec.progressive import progressive_previews
from progressive_vae.evaluation.image_codecs import LOSSLESS, codec_roundtrip
from progressive_vae.image_files import open_image
from progressive_vae.image_processor import from_pixel_values, resize_and_convert
from progressive_vae.models.sampling import per_factor
from progressive_vae.models.value_types import uint8_to_signed
from progressive_vae.paths import expand_home
from progressive_vae.scripts import default_device, run_script
from progressive_vae.visualization import code_map

MODEL = str(Path(__file__).parent / "fashion_mnist")
CONCURRENCY = 2  # requests that run at a time
MAX_QUEUE = 32  # requests that wait
MAX_IMAGES = 16  # of one request
MAX_SAMPLED_PIXELS = 2**20  # of one request
MAX_FILE_SIZE = "20mb"
MAX_UPLOADED_PIXELS = 2**26
EXPIRY_SECONDS = 600  # of uploaded files and their codes
NO_CLASS = "any class"
NO_IMAGE = "Choose an image first."
NOT_READ = (
    "This file is not an image that can be read: it has another format, is damaged, or has more "
    f"than {MAX_UPLOADED_PIXELS // 10**6} million pixels. PNG, JPEG and WebP are supported."
)
CSS = """
.strip {display: flex; flex-wrap: wrap; gap: 10px; align-items: flex-start; margin: 4px 0 18px}
.strip .tile {max-width: 170px}
.strip img {image-rendering: pixelated; border-radius: 4px; display: block}
.strip .caption {font-size: 12px; color: #64748b; margin-top: 4px}
.heading {font-size: 14px; margin: 0 0 4px; color: var(--body-text-color)}
.heading small {color: #64748b; font-size: 13px}
.bars {display: grid; grid-template-columns: max-content 1fr; gap: 6px 12px; align-items: center;
  font-size: 13px; margin: 4px 0 18px; max-width: 640px; color: var(--body-text-color)}
.bars span {display: block; height: 16px; border-radius: 3px; background: #94a3b8; min-width: 2px;
  float: left; margin-right: 8px}
.bars .highlight {background: #f97316}
footer {display: none !important}
"""


@dataclass
class Arguments:
    model: str = field(
        default=MODEL, metadata={"help": "a pipeline's folder, or its repository on the Hub"}
    )
    push_to_space: str | None = field(
        default=None, metadata={"help": "you/name: create or update a Space of this demo, and exit"}
    )
    private: bool = field(default=False, metadata={"help": "make a new Space private"})
    package: str = field(
        default="progressive-vae[demo]",
        metadata={"help": "line of requirements.txt that installs this package"},
    )
    port: int | None = field(default=None, metadata={"help": "by default the first free from 7860"})

    def __post_init__(self):
        self.model = expand_home(self.model, "model")


# ---- HTML with embedded images, so that none is stored on the disk -------------------------------


def tile_html(image: PIL.Image.Image, size: int, caption: str = "") -> str:
    """Return an image whose longer side is `size` pixels on the page, with a caption."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    scale = size / max(image.size)
    width, height = (max(1, round(scale * n)) for n in image.size)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<div class="tile"><img width="{width}" height="{height}" alt="{caption or "image"}" '
        f'src="data:image/png;base64,{data}"><div class="caption">{caption}</div></div>'
    )


def heading_html(title: str, details: str = "") -> str:
    return f'<p class="heading"><b>{title}</b> <small>{escape(details)}</small></p>'


def strip_html(heading: str, tiles: list[str]) -> str:
    return f'{heading}<div class="strip">{"".join(tiles)}</div>'


def bars_html(rows: list[tuple[str, float, str, bool]]) -> str:
    """Return a bar chart.

    Args:
        rows: name, length, label, and whether the bar is highlighted.
    """
    longest = max(length for _, length, _, _ in rows) or 1.0
    cells = [
        f'<div>{name}</div><div><span class="{"highlight" if is_highlighted else ""}" '
        f'style="width: {70 * max(length, 0) / longest:.1f}%"></span>{label}</div>'
        for name, length, label, is_highlighted in rows
    ]
    return f'<div class="bars">{"".join(cells)}</div>'


def code_name(i: int) -> str:
    """Return z_i with a subscript."""
    return f"z{i}".translate({ord(str(n)): chr(0x2080 + n) for n in range(10)})


def code_names(k: int) -> str:
    """Return z_1 … z_k with subscripts."""
    return code_name(1) if k == 1 else f"{code_name(1)} … {code_name(k)}"


# ---- the model -----------------------------------------------------------------------------------


class Page:
    """Functions of a pipeline that the page calls."""

    def __init__(self, pipe: ProgressiveVAEPipeline):
        self.pipe = pipe
        _, height, width = pipe.image_shape
        self.max_images = max(1, min(MAX_IMAGES, MAX_SAMPLED_PIXELS // (height * width)))
        self.has_previews = pipe.stack.has_previews
        self.tile_size = max(96, min(width, 256))
        settings = {"temperature": 1.0, "top_p": 1.0, "guidance_scale": 1.0}
        settings |= pipe.config["sampling"] or {}
        self.settings = per_factor(pipe.factor_names, **settings)  # at first, of each factor

    def name(self, i: int) -> str:
        """Return the name of the variable of factor i."""
        return "image" if i == self.pipe.num_levels else code_name(i + 1)

    def grid_size(self, i: int) -> str:
        """Return the size of the variable of factor i."""
        height, width = self.pipe.grid_sizes[i]
        return f"{height}×{width} {'pixels' if i == self.pipe.num_levels else 'codes'}"

    @property
    def factors(self) -> list[tuple[str, bool]]:
        """The name of each factor, and whether it is class-conditional."""
        parts = [self.pipe.prior, *self.pipe.levels]
        return [
            (f"{name}: {self.name(i)}", part.config.num_classes > 0)
            for i, (name, part) in enumerate(zip(self.pipe.factor_names, parts, strict=True))
        ]

    def sample(self, label: str, count: int, seed: int | None, *controls: float) -> Iterator[str]:
        """Yield rows of images, one more after each factor.

        It samples as `pipe(…)` does, but factor by factor, to show intermediate codes.

        Args:
            label: name of a class, or `NO_CLASS`.
            controls: the temperature of each factor, and then the guidance scale of each.
        """
        pipe = self.pipe
        count = int(count)
        num_factors = pipe.num_levels + 1
        stack = pipe.stack
        labels = None if label == NO_CLASS else [label] * count
        conditioning = stack.as_conditioning(labels, count)
        noise = generators(seed, count)
        grids = list[Tensor]()
        rows = list[str]()
        for i in range(num_factors):
            grid = stack.sample(
                i,
                grids[-1] if grids else None,
                conditioning,
                noise,
                temperature=controls[i],
                top_p=1.0 if controls[i] == 1 else self.settings[i]["top_p"],
                guidance_scale=controls[num_factors + i],
            )
            grids.append(grid)
            rows.append(self.grid_html(grids))
            is_last = i + 1 == num_factors
            status = "" if is_last else heading_html(f"sampling {self.name(i + 1)} …")
            yield "".join([*rows, status])

    def grid_html(self, grids: list[Tensor]) -> str:
        """Return the finest of the grids, and its preview if it is of codes."""
        i = len(grids) - 1
        codes = [grid.cpu() for grid in grids]
        name = self.name(i)
        size = self.grid_size(i)
        if i == self.pipe.num_levels:
            return self.images_html(from_pixel_values(codes[-1], "pil"), name, size)
        row = self.images_html([*map(code_map, codes[-1])], name, size)
        if self.has_previews:
            row += self.images_html(self.pipe.preview(codes), name, "preview")
        return row

    def images_html(self, images: list[PIL.Image.Image], title: str, details: str) -> str:
        tiles = [tile_html(image, self.tile_size) for image in images]
        return strip_html(heading_html(title, details), tiles)

    def open(self, contents: bytes | None) -> tuple[PIL.Image.Image, str]:
        """Return the image of a file in the model's size and mode, and how it was converted."""
        if not contents:
            raise gr.Error(NO_IMAGE, print_exception=False)
        try:
            image = open_image(contents, MAX_UPLOADED_PIXELS).image
        except ValueError as error:
            raise gr.Error(f"{NOT_READ} ({error})", print_exception=False) from error
        image, conversions = resize_and_convert(image, self.pipe.image_shape)
        return image, f"Your image, {', '.join(conversions) or 'not converted'}."

    def encode(self, contents: bytes | None) -> Iterator[tuple]:
        """Yield `analysis` of an uploaded file."""
        yield from self.analysis(*self.open(contents))

    def encode_sample(self, _=None) -> Iterator[tuple]:
        """Yield `analysis` of a sample of a random class."""
        label = random.choice(list(self.pipe.labels)) if self.pipe.labels else None
        image = self.pipe(label).images[0]
        yield from self.analysis(image, f"A sample{f', {label}' if label else ''}.")

    def analysis(self, image: PIL.Image.Image, source: str) -> Iterator[tuple]:
        """Yield the HTML of codes, bits, sizes and progressive decoding, and the codes.

        Compression takes longest, so it follows with the second result.
        """
        codes = self.pipe.encode(image)
        codes_html = self.codes_html(image, codes, source)
        if self.pipe.prior is None:
            yield codes_html, "", "", "", codes
            return
        bits_html = self.bits_html(image)
        yield codes_html, bits_html, heading_html("Compressed size", "compressing …"), "", codes
        yield codes_html, bits_html, *self.compression_html(image), codes

    def codes_html(self, image: PIL.Image.Image, codes: list[Tensor], source: str) -> str:
        """Return an image with its code grids, and what z_1 … z_k encode for each level k."""
        grids = [tile_html(image, self.tile_size, "the image")]
        for i, grid in enumerate(codes, 1):
            caption = f"{code_name(i)}: {grid.numel()} codes, {len(grid.unique())} different"
            grids.append(tile_html(code_map(grid[0]), self.tile_size, caption))
        decoded = [
            tile_html(self.decoded(codes[:k]), self.tile_size, f"from {code_names(k)}")
            for k in range(1, self.pipe.num_levels + 1)
        ]
        kind = "previews" if self.has_previews else "the most probable pixels"
        return strip_html(heading_html("Codes", source), grids) + strip_html(
            heading_html("Decoded", kind), decoded
        )

    def decoded(self, codes: list[Tensor]) -> PIL.Image.Image:
        """Return the preview or the most probable image of z_1 … z_k."""
        if self.has_previews:
            return self.pipe.preview(codes)[0]
        return self.pipe(codes=codes, num_levels=len(codes)).images[0]

    def bits_html(self, image: PIL.Image.Image) -> str:
        """Return the code length of each factor."""
        bits = self.pipe.bits_per_dim(image)
        num_dims = math.prod(self.pipe.image_shape)
        names = [*map(code_name, range(1, self.pipe.num_levels + 1)), "pixels"]
        rows = [
            (name, value, f"{value * num_dims:.0f} bits", True)
            for name, value in zip(names, bits.values(), strict=False)
        ]
        total = f"{bits['total'] * num_dims:.0f}, or {bits['total']:.2f} bits/dim"
        return heading_html("Bits by factor", total) + bars_html(rows)

    def compression_html(self, image: PIL.Image.Image) -> tuple[str, str]:
        """Return the compressed size beside image files, and progressive decoding."""
        try:
            stream = self.pipe.compress(image)[0]
        except ImportError:
            return heading_html("Compressed size", 'pip install "progressive-vae[codec]"'), ""
        rows = [("this model", float(len(stream)), f"{len(stream)} bytes", True)]
        for name, options in LOSSLESS.items():
            with suppress(ImportError):  # imagecodecs is not installed
                size = len(codec_roundtrip(name, np.asarray(image), options)[0])
                rows.append((name, float(size), f"{size} bytes", False))
        sizes = heading_html("Compressed size", "lossless") + bars_html(rows)
        tiles = []
        for k, (length, preview) in enumerate(
            progressive_previews(self.pipe.stack, image, stream), 1
        ):
            preview = from_pixel_values(uint8_to_signed(preview[None]), "pil")[0]
            tiles.append(tile_html(preview, self.tile_size, f"{length} bytes: {code_names(k)}"))
        tiles.append(tile_html(image, self.tile_size, f"all {len(stream)} bytes: no loss"))
        heading = heading_html("Progressive decoding", "of the first bytes of the stream")
        return sizes, strip_html(heading, tiles)

    def reconstruct(self, codes: list[Tensor] | None, k: int, seed: int | None) -> str:
        """Return eight samples conditioned on z_1 … z_k."""
        if codes is None:
            raise gr.Error(NO_IMAGE, print_exception=False)
        count = min(8, self.max_images)
        k = min(int(k), len(codes))
        images = self.pipe(
            codes=codes[:k], num_images_per_prompt=count, generator=generators(seed, count)
        ).images
        return self.images_html(images, f"{code_names(k)} fixed", "finer codes and pixels sampled")


def generators(seed: int | None, count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed((seed or 0) + i) for i in range(count)]


# ---- the page ------------------------------------------------------------------------------------


def make_demo(pipe: ProgressiveVAEPipeline, model: str) -> gr.Blocks:
    """Return the page, whose queue is bounded; `launch` serves it."""
    page = Page(pipe)
    queue = {
        "concurrency_limit": CONCURRENCY,
        "concurrency_id": "model",
        "show_progress": "minimal",
    }
    with gr.Blocks(
        title="progressive VAE", analytics_enabled=False, delete_cache=(60, EXPIRY_SECONDS)
    ) as demo:
        steps = [
            f"{page.name(i)} <small>{page.grid_size(i)}</small>" for i in range(pipe.num_levels + 1)
        ]
        gr.HTML(
            '<h1 style="margin: 0">A progressive VAE</h1><p class="heading">It samples coarse to '
            f"fine: {' → '.join(steps)}. Model: {escape(Path(model).name)}</p>"
        )
        if pipe.prior is not None:
            with gr.Tab("Sample"):
                sample_tab(page, demo, queue)
        with gr.Tab("Encode an image"):
            encode_tab(page, queue)
    return demo.queue(max_size=MAX_QUEUE, default_concurrency_limit=CONCURRENCY)


def sample_tab(page: Page, demo: gr.Blocks, queue: dict):
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            labels = [NO_CLASS, *page.pipe.labels]
            label = gr.Dropdown(labels, value=NO_CLASS, label="Class", visible=len(labels) > 1)
            most = page.max_images
            count = gr.Slider(1, max(2, most), min(8, most), step=1, label="Images")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31)
            start = gr.Button("Sample", variant="primary", elem_id="sample")
            reseed = gr.Button("New seed", elem_id="reseed")
            with gr.Accordion("Temperature of each factor", open=False):
                gr.Markdown("1 is the model's distribution; 0 takes the most probable values.")
                temperature = [
                    gr.Slider(0, 2, settings["temperature"], step=0.05, label=name)
                    for settings, (name, _) in zip(page.settings, page.factors, strict=True)
                ]
            has_guidance = any(is_conditional for _, is_conditional in page.factors)
            with gr.Accordion("Classifier-free guidance", open=False, visible=has_guidance):
                gr.Markdown("Scales above 1 strengthen the class of class-conditional factors.")
                guidance = [
                    gr.Slider(
                        0, 5, settings["guidance_scale"], step=0.1, label=name, visible=is_visible
                    )
                    for settings, (name, is_visible) in zip(
                        page.settings, page.factors, strict=True
                    )
                ]
        with gr.Column(scale=3):
            samples = gr.HTML(elem_id="samples")
    inputs = [label, count, seed, *temperature, *guidance]
    start.click(page.sample, inputs, samples, api_name="sample", **queue)
    reseed.click(lambda: random.randrange(2**31), None, seed, api_name=False, queue=False).then(
        page.sample, inputs, samples, api_name=False, **queue
    )
    demo.load(page.sample, inputs, samples, api_name=False, **queue)


def encode_tab(page: Page, queue: dict):
    codes = gr.State(time_to_live=EXPIRY_SECONDS)
    num_levels = page.pipe.num_levels
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            file = gr.File(
                label="An image: PNG, JPEG, WebP …", type="binary", height=150, elem_id="file"
            )
            use_sample = gr.Button(
                "Use a sample", elem_id="use_sample", visible=page.pipe.prior is not None
            )
            level = gr.Slider(
                1,
                max(2, num_levels),
                1,
                step=1,
                label="Levels to fix",
                visible=num_levels > 1,
                info="Finer codes and pixels are sampled.",
                elem_id="level",
            )
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31)
            start = gr.Button("Reconstruct", variant="primary", elem_id="reconstruct")
        with gr.Column(scale=3):
            analysis = gr.HTML(strip_html("Choose an image, or use a sample.", []), elem_id="codes")
            reconstructions = gr.HTML(elem_id="reconstructions")
            with gr.Row():
                bits = gr.HTML(elem_id="bits")
                sizes = gr.HTML(elem_id="sizes")
            progressive = gr.HTML(elem_id="progressive")
    outputs = [analysis, bits, sizes, progressive, codes]
    reconstruct = {
        "fn": page.reconstruct,
        "inputs": [codes, level, seed],
        "outputs": reconstructions,
        **queue,
    }
    for event in (
        file.upload(page.encode, file, outputs, api_name="encode", **queue),
        use_sample.click(page.encode_sample, None, outputs, api_name=False, **queue),
    ):
        event.success(**reconstruct, api_name=False)
    start.click(**reconstruct, api_name="reconstruct")
    level.release(**reconstruct, api_name=False)


def launch(demo: gr.Blocks, **options):
    """Serve the page, without fonts from the internet."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // CONCURRENCY))
    fonts = ["system-ui", "sans-serif"]
    theme = gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"])
    return demo.launch(
        theme=theme,
        css=CSS,
        max_file_size=MAX_FILE_SIZE,
        ssr_mode=False,
        state_session_capacity=1000,
        footer_links=[],
        max_threads=2 * CONCURRENCY,  # each thread has memory of its own
        **options,
    )


def main(words: list[str]):
    arguments = HfArgumentParser(Arguments).parse_args_into_dataclasses(
        words, look_for_args_file=False
    )[0]
    if arguments.push_to_space:
        from space import push_space  # app.py alone is pushed to the Space

        source = Path(__file__).read_text(encoding="utf-8")
        space = push_space(
            arguments.push_to_space,
            source,
            arguments.model,
            gr.__version__,
            arguments.package,
            arguments.private or None,
        )
        print(f"pushed {space}")
        return
    pipe = ProgressiveVAEPipeline.from_pretrained(arguments.model)
    pipe.to(default_device()).set_progress_bar_config(disable=True)
    launch(make_demo(pipe, arguments.model), server_port=arguments.port)


if __name__ == "__main__":
    run_script(main)
