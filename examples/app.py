# /// script
# requires-python = ">=3.10"
# dependencies = ["progressive-vae[demo]"]
#
# [tool.uv.sources]
# progressive-vae = { path = "..", editable = true }
# ///
"""A page to play with: draw images coarse to fine, and look into pictures of your own.

python examples/app.py
    over the Fashion-MNIST model that comes with the project, on http://127.0.0.1:7860.

python examples/app.py --model you/pictures --push_to_space you/page
    makes a Space of it on the Hub, or brings it up to date.

Each answer is drawn by its share of the processor's cores, two at a time; others wait, 32 at most.
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
from progressive_vae.hub.space import PACKAGE, push_space
from progressive_vae.image_files import open_image
from progressive_vae.image_processor import from_pixel_values, resize_and_convert
from progressive_vae.models.class_labels import known_labels, label_ids
from progressive_vae.models.value_types import uint8_to_signed
from progressive_vae.paths import expand_home
from progressive_vae.scripts import default_device, run_script
from progressive_vae.visualization import code_map, has_previews

MODEL = str(Path(__file__).parent / "fashion_mnist")
AT_A_TIME, WAITING = 2, 32  # answers
MAX_IMAGES, MAX_DRAWN_PIXELS = 16, 2**20  # of one answer
MAX_FILE_SIZE, MAX_PICTURE_PIXELS = "20mb", 2**26  # of an uploaded picture
SECONDS_KEPT = 600  # uploaded files and what was seen in them
NO_CLASS = "any class"
NOT_READ = (
    "This file is not a picture that can be read: it is of another kind, broken, or has more than "
    f"{MAX_PICTURE_PIXELS // 10**6} million pixels. PNG, JPEG, WebP and the like can be."
)
CSS = """
.strip {display: flex; flex-wrap: wrap; gap: 10px; align-items: flex-start; margin: 4px 0 18px}
.strip figure {margin: 0; max-width: 170px}
.strip img {image-rendering: pixelated; border-radius: 4px; display: block}
.strip figcaption {font-size: 12px; color: #64748b; margin-top: 4px}
.said {font-size: 14px; margin: 0 0 4px; color: var(--body-text-color)}
.said small {color: #64748b; font-size: 13px}
.bars {display: grid; grid-template-columns: max-content 1fr; gap: 6px 12px; align-items: center;
  font-size: 13px; margin: 4px 0 18px; max-width: 640px; color: var(--body-text-color)}
.bars span {display: block; height: 16px; border-radius: 3px; background: #94a3b8; min-width: 2px;
  float: left; margin-right: 8px}
.bars .ours {background: #f97316}
footer {display: none !important}
"""


@dataclass
class Arguments:
    model: str = field(
        default=MODEL, metadata={"help": "a pipeline's folder, or its repository on the Hub"}
    )
    push_to_space: str | None = field(
        default=None, metadata={"help": "you/name: make a Space of this page, and do not show it"}
    )
    private: bool = field(default=False, metadata={"help": "of a new Space"})
    package: str = field(
        default=PACKAGE, metadata={"help": "what the Space installs: a line of requirements.txt"}
    )
    port: int | None = field(default=None, metadata={"help": "7860, or the first free one after"})

    def __post_init__(self):
        self.model = expand_home(self.model, "model")


# ---- what the page shows: HTML, so that nothing is left on the disk ------------------------------


def picture(image: PIL.Image.Image, size: int, says: str = "") -> str:
    """An image, its longer side `size` wide on the page, with a line below it."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    scale = size / max(image.size)
    width, height = (max(1, round(scale * n)) for n in image.size)
    data = base64.b64encode(buffer.getvalue()).decode()
    caption = f"<figcaption>{says}</figcaption>" if says else ""
    return (
        f'<figure><img width="{width}" height="{height}" alt="{says or "picture"}" '
        f'src="data:image/png;base64,{data}">{caption}</figure>'
    )


def told(title: str, more: str = "") -> str:
    return f'<p class="said"><b>{title}</b> <small>{escape(more)}</small></p>'


def strip(title: str, pictures: list[str]) -> str:
    return f'{title}<div class="strip">{"".join(pictures)}</div>'


def bars(rows: list[tuple[str, float, str, bool]]) -> str:
    """(name, length, what is written beside it, whether it is ours)."""
    longest = max(length for _, length, _, _ in rows) or 1.0
    cells = [
        f'<div>{name}</div><div><span class="{"ours" if ours else ""}" '
        f'style="width: {70 * max(length, 0) / longest:.1f}%"></span>{shown}</div>'
        for name, length, shown, ours in rows
    ]
    return f'<div class="bars">{"".join(cells)}</div>'


def z(i: int) -> str:
    return f"z{i}".translate({ord(str(n)): chr(0x2080 + n) for n in range(10)})


def kept(k: int) -> str:
    return z(1) if k == 1 else f"{z(1)} … {z(k)}"


# ---- what the model does -------------------------------------------------------------------------


class Page:
    """What the page's buttons ask of a pipeline."""

    def __init__(self, pipe: ProgressiveVAEPipeline):
        self.pipe = pipe
        _, height, width = pipe.image_shape
        self.max_images = max(1, min(MAX_IMAGES, MAX_DRAWN_PIXELS // (height * width)))
        self.has_previews = has_previews(pipe)
        self.size = max(96, min(width, 256))

    def name(self, i: int) -> str:
        """Of what factor i draws."""
        return "image" if i == self.pipe.num_levels else z(i + 1)

    def extent(self, i: int) -> str:
        height, width = self.pipe.grid_sizes[i]
        return f"{height}×{width} {'pixels' if i == self.pipe.num_levels else 'symbols'}"

    @property
    def controls(self) -> list[tuple[str, bool]]:
        """Of each factor its name and what it draws, and whether it knows the classes."""
        parts = [self.pipe.prior, *self.pipe.levels]
        factors = enumerate(zip(self.pipe.factor_names, parts, strict=True))
        return [(f"{name}: {self.name(i)}", part.config.num_classes > 0)
                for i, (name, part) in factors]  # fmt: skip

    def draw(self, label: str, count: int, seed: int | None, *controls: float) -> Iterator[str]:
        """Rows of pictures, coarse to fine, one more at each step: as `pipe(…)` samples, seen from
        the inside."""
        pipe, number, count = self.pipe, self.pipe.num_levels + 1, int(count)
        asked = None if label == NO_CLASS else [label] * count
        labels = label_ids(asked, pipe._class_config, count)
        draws, grids, rows = generators(seed, count), list[Tensor](), list[str]()
        for i in range(number):
            part = pipe.levels[i - 1] if i else pipe._require_prior()
            given = {"class_labels": known_labels(labels, part.config), "generator": draws}
            given |= {"temperature": controls[i], "guidance_scale": controls[number + i]}
            if i == 0:
                grids.append(part.sample(count, **given))
            else:
                grids.append(part.sample(grids[-1], finer_size=pipe.grid_sizes[i], **given))
            rows.append(self.row(grids))
            later = [told(f"drawing {self.name(i + 1)} …")] if i + 1 < number else []
            yield "".join([*rows, *later])

    def row(self, grids: list[Tensor]) -> str:
        """Of the finest of some grids."""
        i, codes = len(grids) - 1, [grid.cpu() for grid in grids]
        if i == self.pipe.num_levels:
            return self.images(from_pixel_values(codes[-1], "pil"), self.name(i), self.extent(i))
        row = self.images([*map(code_map, codes[-1])], self.name(i), self.extent(i))
        if self.has_previews:
            row += self.images(self.pipe.preview(codes), self.name(i), "as a preview")
        return row

    def images(self, images: list[PIL.Image.Image], title: str, more: str) -> str:
        return strip(told(title, more), [picture(image, self.size) for image in images])

    def opened(self, contents: bytes | None) -> tuple[PIL.Image.Image, str]:
        """A file as a picture of the model's kind, and what was done to it."""
        if not contents:
            raise gr.Error("Choose an image first.", print_exception=False)
        try:
            image = open_image(contents, MAX_PICTURE_PIXELS).image
        except ValueError as error:
            raise gr.Error(f"{NOT_READ} ({error})", print_exception=False) from error
        image, done = resize_and_convert(image, self.pipe.image_shape)
        return image, f"Your picture, {', '.join(done) or 'as it is'}."

    def look(self, contents: bytes | None) -> Iterator[tuple]:
        yield from self.seen(*self.opened(contents))

    def look_into_a_drawn_one(self, _=None) -> Iterator[tuple]:
        label = random.choice(list(self.pipe.labels)) if self.pipe.labels else None
        image = self.pipe(label).images[0]
        yield from self.seen(image, f"A drawn picture{f', {label}' if label else ''}.")

    def seen(self, image: PIL.Image.Image, says: str) -> Iterator[tuple]:
        """Codes, bits, sizes and growing as HTML, and the codes; what takes longest comes last."""
        pipe, size = self.pipe, self.size
        codes, bits = pipe.encode(image), pipe.bits_per_dim(image) if pipe.prior else {}
        grids = [picture(image, size, "the picture")]
        for i, grid in enumerate(codes):
            used = f"{z(i + 1)}: {grid.numel()} symbols of {len(grid.unique())} kinds"
            grids.append(picture(code_map(grid[0]), size, used))
        found = strip(told("Its symbols", says), grids)
        views = [picture(self.shown(codes[:k]), size, f"{kept(k)} alone")
                 for k in range(1, pipe.num_levels + 1)]  # fmt: skip
        how = "previews" if self.has_previews else "the most probable pixels"
        found += strip(told("What they say", how), views)
        dims = math.prod(pipe.image_shape)
        names = [*map(z, range(1, len(codes) + 1)), "pixels"]
        rows = [(name, value, f"{value * dims:.0f} bits", True)
                for name, value in zip(names, bits.values(), strict=False)]  # fmt: skip
        if not rows:
            yield found, "", "", "", codes
            return
        total = f"{bits['total'] * dims:.0f}, or {bits['total']:.2f} bits/dim"
        stated = told("Bits by factor", total) + bars(rows)
        yield found, stated, told("Its size", "compressing …"), "", codes
        yield found, stated, *self.compressed(image), codes

    def shown(self, codes: list[Tensor]) -> PIL.Image.Image:
        if self.has_previews:
            return self.pipe.preview(codes)[0]
        return self.pipe(codes=codes, num_levels=len(codes)).images[0]

    def compressed(self, image: PIL.Image.Image) -> tuple[str, str]:
        """Its sizes as files, and what its first bytes show."""
        try:
            stream = self.pipe.compress(image)[0]
        except ImportError:
            return told("Its size", 'pip install "progressive-vae[codec]"'), ""
        sizes = [("this model", len(stream), True)]
        for name, options in LOSSLESS.items():
            with suppress(ImportError):  # imagecodecs is not there
                sizes.append(
                    (name, len(codec_roundtrip(name, np.asarray(image), options)[0]), False)
                )
        rows = [(name, float(size), f"{size} bytes", ours) for name, size, ours in sizes]
        views = []
        for k, (length, view) in enumerate(progressive_previews(self.pipe, image, stream), 1):
            view = from_pixel_values(uint8_to_signed(view[None]), "pil")[0]
            views.append(picture(view, self.size, f"{length} bytes: {kept(k)}"))
        views.append(picture(image, self.size, f"all {len(stream)} bytes: no loss"))
        grown = strip(told("It grows", "what the first bytes of its stream show"), views)
        return told("Its size", "without a loss") + bars(rows), grown

    def redraw(self, codes: list[Tensor] | None, k: int, seed: int | None) -> str:
        """Eight pictures of the same z_1 … z_k."""
        if codes is None:
            raise gr.Error("Choose an image first.", print_exception=False)
        count, k = min(8, self.max_images), min(int(k), len(codes))
        told_to = {"num_images_per_prompt": count, "generator": generators(seed, count)}
        images = self.pipe(codes=codes[:k], **told_to).images
        return self.images(images, f"{kept(k)} kept", "all that is finer drawn again")


def generators(seed: int | None, count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed((seed or 0) + i) for i in range(count)]


# ---- the page ------------------------------------------------------------------------------------


def make_demo(pipe: ProgressiveVAEPipeline, model: str) -> gr.Blocks:
    """The page, whose queue is bounded; `show` starts it."""
    page = Page(pipe)
    queue = {"concurrency_limit": AT_A_TIME, "concurrency_id": "model", "show_progress": "minimal"}
    with gr.Blocks(
        title="progressive VAE", analytics_enabled=False, delete_cache=(60, SECONDS_KEPT)
    ) as demo:
        steps = [f"{page.name(i)} <small>{page.extent(i)}</small>"
                 for i in range(pipe.num_levels + 1)]  # fmt: skip
        gr.HTML(f'<h1 style="margin: 0">A progressive VAE</h1><p class="said">It draws coarse to '
                f"fine: {' → '.join(steps)}. Model: {escape(Path(model).name)}</p>")  # fmt: skip
        if pipe.prior is not None:
            with gr.Tab("Draw"):
                draw_tab(page, demo, queue)
        with gr.Tab("Look into an image"):
            look_tab(page, queue)
    return demo.queue(max_size=WAITING, default_concurrency_limit=AT_A_TIME)


def draw_tab(page: Page, demo: gr.Blocks, queue: dict):
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            choices = [NO_CLASS, *page.pipe.labels]
            label = gr.Dropdown(choices, value=NO_CLASS, label="Class", visible=len(choices) > 1)
            most = page.max_images
            count = gr.Slider(1, max(2, most), min(8, most), step=1, label="Pictures")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31)
            again = gr.Button("Draw", variant="primary", elem_id="draw")
            other = gr.Button("Draw others", elem_id="other")
            with gr.Accordion("Temperature of each factor", open=False):
                gr.Markdown("1 is the model as it is; 0 takes the most probable value each time.")
                temperature = [
                    gr.Slider(0, 2, 1, step=0.05, label=name) for name, _ in page.controls
                ]
            knows = any(known for _, known in page.controls)
            with gr.Accordion("Guidance by the class", open=False, visible=knows):
                gr.Markdown("Above 1: more like the class. Factors that know no classes have none.")
                guidance = [gr.Slider(1, 5, 1, step=0.1, label=name, visible=known)
                            for name, known in page.controls]  # fmt: skip
        with gr.Column(scale=3):
            drawn = gr.HTML(elem_id="drawn")
    inputs = [label, count, seed, *temperature, *guidance]
    again.click(page.draw, inputs, drawn, api_name="draw", **queue)
    other.click(lambda: random.randrange(2**31), None, seed, api_name=False, queue=False).then(
        page.draw, inputs, drawn, api_name=False, **queue
    )
    demo.load(page.draw, inputs, drawn, api_name=False, **queue)


def look_tab(page: Page, queue: dict):
    codes = gr.State(time_to_live=SECONDS_KEPT)
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            file = gr.File(label="A picture: PNG, JPEG, WebP …", type="binary", height=150,
                           elem_id="file")  # fmt: skip
            one = gr.Button("Take a drawn one", elem_id="drawn_one", visible=bool(page.pipe.prior))
            most = page.pipe.num_levels
            level = gr.Slider(1, max(2, most), 1, step=1, label="Levels to keep", visible=most > 1,
                              info="What is finer is drawn again.", elem_id="keep")  # fmt: skip
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31)
            rest = gr.Button("Draw the rest", variant="primary", elem_id="rest")
        with gr.Column(scale=3):
            found = gr.HTML(strip("Choose a picture, or take a drawn one.", []), elem_id="found")
            redrawn = gr.HTML(elem_id="redrawn")
            with gr.Row():
                bits = gr.HTML(elem_id="bits")
                sizes = gr.HTML(elem_id="sizes")
            grown = gr.HTML(elem_id="grown")
    outputs = [found, bits, sizes, grown, codes]
    for event in (
        file.upload(page.look, file, outputs, api_name="look", **queue),
        one.click(page.look_into_a_drawn_one, None, outputs, api_name=False, **queue),
    ):
        event.success(page.redraw, [codes, level, seed], redrawn, api_name=False, **queue)
    rest.click(page.redraw, [codes, level, seed], redrawn, api_name="redraw", **queue)
    level.release(page.redraw, [codes, level, seed], redrawn, api_name=False, **queue)


def show(demo: gr.Blocks, **options):
    """Serve the page. Its fonts are those of the machine that looks at it."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // AT_A_TIME))
    fonts = ["system-ui", "sans-serif"]
    theme = gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"])
    return demo.launch(
        theme=theme, css=CSS, max_file_size=MAX_FILE_SIZE, ssr_mode=False,
        state_session_capacity=1000, footer_links=[],
        max_threads=2 * AT_A_TIME,  # each keeps memory of its own
        **options,
    )  # fmt: skip


def main(words: list[str]):
    arguments = HfArgumentParser(Arguments).parse_args_into_dataclasses(
        words, look_for_args_file=False
    )[0]
    if arguments.push_to_space:
        source = Path(__file__).read_text(encoding="utf-8")
        made = push_space(arguments.push_to_space, source, arguments.model, gr.__version__,
                          arguments.package, arguments.private or None)  # fmt: skip
        print(f"pushed {made}")
        return
    pipe = ProgressiveVAEPipeline.from_pretrained(arguments.model)
    pipe.to(default_device()).set_progress_bar_config(disable=True)
    show(make_demo(pipe, arguments.model), server_port=arguments.port)


if __name__ == "__main__":
    run_script(main)
