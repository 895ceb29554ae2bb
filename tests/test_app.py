"""`examples/app.py`, in a browser.

python tests/test_app.py examples/docs/app.png
    writes the README's screenshot.
"""

import base64
import io
import os
import re
import shutil
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import yaml

from helpers.hub import HUB
from helpers.images import as_png, bomb, photograph
from helpers.models import tiny_level, tiny_pipeline, tiny_prior
from helpers.scripts import load_script
from progressive_vae import ProgressiveVAEPipeline
from progressive_vae.image_processor import resize_and_convert

PIP = 'pip install -e ".[demo,codec]" && pip install selenium'
ROOT = Path(__file__).parents[1]
FLAGS = (
    "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    "disable-component-update disable-sync window-size=1280,900"
)
TINY_IMAGE = base64.b64decode("R0lGODlhAQABAAAAACw=")


@pytest.fixture(scope="module")
def gradio():
    return pytest.importorskip("gradio", reason=PIP)  # not at the top: it takes seconds


@pytest.fixture(scope="module")
def app(gradio):
    return load_script("app")


@pytest.fixture(scope="module")
def shipped():
    pipe = ProgressiveVAEPipeline.from_pretrained(ROOT / "examples" / "fashion_mnist")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images_of(html: str) -> list[np.ndarray]:
    found = re.findall(r"base64,([^\"]+)", html)
    return [np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(data)))) for data in found]


# ---- functions -----------------------------------------------------------------------------------


def test_sample_shows_each_factor_of_the_pipelines_sample(app, shipped):
    page = app.Page(shipped)
    steps = list(page.sample("Bag", 2, 5, 1.0, 0.9, 0.8, 1.0, 1.5, 1.0))
    assert [len(images_of(step)) for step in steps] == [2, 4, 6]
    assert "sampling z₂ …" in steps[0] and "sampling" not in steps[-1]
    generators = [torch.Generator().manual_seed(5 + i) for i in range(2)]
    controls = {"temperature": [1.0, 0.9, 0.8], "guidance_scale": [1.0, 1.5, 1.0]}
    images = shipped("Bag", num_images_per_prompt=2, generator=generators, **controls).images
    for array, image in zip(images_of(steps[-1])[-2:], images, strict=True):
        assert np.array_equal(array, image)


def test_sliders_start_at_the_sampling_settings(app):
    pipe = tiny_pipeline()
    pipe.register_to_config(sampling={"temperature": [1.0, 0.9, 0.8, 0.5], "top_p": 0.7})
    page = app.Page(pipe)
    demo = app.make_demo(pipe, "x")
    sliders = [block for block in demo.blocks.values() if type(block).__name__ == "Slider"]
    values = {slider.label: slider.value for slider in sliders if slider.maximum == 2}
    assert list(values.values()) == [1.0, 0.9, 0.8, 0.5]
    *_, last = page.sample(app.NO_CLASS, 2, 0, *values.values(), *[1.0] * 4)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    top_p = [1.0, 0.7, 0.7, 0.7]  # temperature 1 is the exact distribution
    temperature = [*values.values()]
    images = pipe(
        num_images_per_prompt=2, generator=generators, temperature=temperature, top_p=top_p
    ).images
    for array, image in zip(images_of(last)[-2:], images, strict=True):
        assert np.array_equal(array, image)


def test_encode_shows_codes_bits_and_sizes(app, shipped):
    page = app.Page(shipped)
    *_, (grids, bits, sizes, progressive, codes) = page.encode(as_png(photograph()))
    assert "converted from RGB to grayscale, center crop resized from 120×80 to 28×28" in grids
    assert len(images_of(grids)) == 3 + 2 and " 1 different" not in grids
    image = resize_and_convert(photograph(), shipped.image_shape)[0]
    expected = shipped.bits_per_dim(image)
    assert f"{expected['total']:.2f} bits/dim" in bits
    stream = shipped.compress(image)[0]
    assert f"{len(stream)} bytes" in sizes and "PNG" in sizes and "WebP" in sizes
    lengths = [int(n) for n in re.findall(r">(\d+) bytes: z", progressive)]
    for k, length in enumerate(lengths, 1):
        shipped.decompress(stream[:length], k)
        with pytest.raises(ValueError):
            shipped.decompress(stream[: length - 1], k)
    reconstructions = page.reconstruct(codes, 2, 3)
    assert "z₁ … z₂ fixed" in reconstructions and len(images_of(reconstructions)) == 8


def test_other_pipelines(app):
    """Without classes, with auxiliary decoders, of one level, without a prior."""
    auxiliary = {"auxiliary_hidden_size": 8}
    levels = [tiny_level(num_symbols=3, seed=1, **auxiliary),
              tiny_level(num_channels=3, seed=2, **auxiliary)]  # fmt: skip
    plain = tiny_level(num_channels=1)
    for pipe in (
        tiny_pipeline(),
        ProgressiveVAEPipeline.from_levels(tiny_prior(grid_size=[4, 4]), levels),
        ProgressiveVAEPipeline.from_levels(tiny_prior(grid_size=[4, 4]), [plain]),
        ProgressiveVAEPipeline.from_levels(None, [plain], image_size=[8, 8]),
    ):
        pipe.set_progress_bar_config(disable=True)
        app.make_demo(pipe, "x")
        page, num_factors = app.Page(pipe), pipe.num_levels + 1
        *_, (grids, bits, _, progressive, codes) = page.encode(as_png(photograph()))
        assert len(images_of(grids)) == 1 + 2 * pipe.num_levels
        assert len(images_of(page.reconstruct(codes, 1, 0))) == 8
        if pipe.prior is None:
            assert not bits and not progressive
            continue
        assert len(images_of(progressive)) == num_factors
        *_, samples = page.sample(app.NO_CLASS, 2, 0, *[1.0] * 2 * num_factors)
        rows = num_factors + pipe.num_levels * page.has_previews
        assert len(images_of(samples)) == 2 * rows
        *_, (grids, *_) = page.encode_sample()
        assert "A sample" in grids


@pytest.mark.parametrize("contents", [b"not an image", b"\x89PNG\r\n\x1a\n", TINY_IMAGE, bomb(),
                                      as_png(photograph())[:300], b"", None])  # fmt: skip
def test_unreadable_files_show_a_message(gradio, app, shipped, contents):
    with pytest.raises(gradio.Error, match="Choose an image" if not contents else "not an image"):
        next(app.Page(shipped).encode(contents))


def test_images_are_converted_to_the_size_and_mode_of_the_pipeline():
    array = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    glass = PIL.Image.new("RGBA", (9, 9), (0, 0, 0, 0))
    image, done = resize_and_convert(glass, (3, 4, 6))
    assert image.size == (6, 4) and np.all(np.asarray(image) == 255)
    assert done == ["transparency composited on white", "center crop resized from 9×9 to 6×4"]
    image, done = resize_and_convert(PIL.Image.fromarray(array), (1, 8, 8))
    assert done == ["reduced to 8 bits over its range of values"] and np.asarray(image).max() == 255
    gray = PIL.Image.new("L", (8, 8), 3)
    assert resize_and_convert(gray, (1, 8, 8)) == (gray, [])


# ---- a Space of the Hub --------------------------------------------------------------------------


def test_a_space_is_one_commit(gradio, app, tmp_path, capsys):
    tiny_pipeline().save_pretrained(tmp_path / "mine")
    local = ["--push_to_space", "org/page", "--model", str(tmp_path / "mine")]
    app.main(local)
    assert "org/page" in capsys.readouterr().out
    repo, files = HUB.repos["spaces/org/page"], HUB.files("spaces/org/page")
    assert len(repo.commits) == 2 and "org/page" not in HUB.repos
    assert {"app.py", "requirements.txt", "README.md", "model/model_index.json"} <= set(files)
    assert 'MODEL = str(Path(__file__).parent / "model")' in files["app.py"].decode()
    for name, contents in files.items():
        path = tmp_path / "space" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents)
    assert ProgressiveVAEPipeline.from_pretrained(tmp_path / "space" / "model").num_levels == 3
    card = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert card["sdk"] == "gradio" and card["app_file"] == "app.py" and "models" not in card
    assert card["sdk_version"] == gradio.__version__ and card["license"] == "apache-2.0"
    assert files["requirements.txt"] == b"progressive-vae[demo]\n"
    named = ["--push_to_space", "org/page", "--model", "org/public", "--package", "x @ git+y"]
    app.main(named)
    files = HUB.files("spaces/org/page")
    assert set(files) == {"app.py", "requirements.txt", "README.md"}
    assert "\nMODEL = 'org/public'\n" in files["app.py"].decode()
    assert yaml.safe_load(files["README.md"].decode().split("---")[1])["models"] == ["org/public"]
    assert files["requirements.txt"] == b"x @ git+y\n" and len(repo.commits) == 3
    with pytest.raises(ValueError, match="expected model to be a folder or a repository"):
        app.main([*local[:3], str(tmp_path / "nothing")])
    with pytest.raises(ValueError, match="expected org/page to be private, got a public"):
        app.main([*named, "--private"])


# ---- in a browser --------------------------------------------------------------------------------


@contextmanager
def browser():
    chromium, driver = map(shutil.which, ("chromium", "chromedriver"))
    if not (chromium and driver):
        pytest.skip("apt-get install -y chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for flag in (*FLAGS.split(), f"user-data-dir={folder}"):
            options.add_argument(f"--{flag}")
        started = webdriver.Chrome(options, Service(driver))
        try:
            yield started
        finally:
            started.quit()


class Visitor:
    def __init__(self, driver):
        self.driver = driver

    def find(self, css: str):
        return self.driver.find_elements("css selector", css)

    def wait(self, until, seconds: float = 60):
        """What it finds or does, tried again while the page is redrawing what it touched."""
        from selenium.common.exceptions import WebDriverException

        end = time.monotonic() + seconds
        while True:
            with suppress(WebDriverException):
                if found := until():
                    return found
            assert time.monotonic() < end, self.driver.find_element("tag name", "body").text
            time.sleep(0.1)

    def click(self, css: str, text: str = ""):
        def clicked():
            element = next(element for element in self.find(css) if text in element.text)
            return element.click() is None

        self.wait(clicked)

    def press(self, css: str, key: str):
        self.wait(lambda: self.find(css)[0].send_keys(key) is None)

    def dismiss(self, css: str):
        """Click all elements until there are none."""

        def gone():
            for element in self.find(css):
                element.click()
            return not self.find(css)

        self.wait(gone)

    def html(self, css: str) -> str:
        return "".join(element.get_attribute("innerHTML") for element in self.find(css))

    def images(self, css: str, count: int, unlike: str = "") -> str:
        """Wait for this number of images, other than those of the HTML `unlike`."""

        def there():
            html = self.html(f"{css} .heading, {css} .strip")
            return html if html.count("<img") == count and html != unlike else ""

        return self.wait(there)

    def tab(self, name: str):
        self.click("button[role=tab]", name)
        self.wait(lambda: self.find("#codes")[0].is_displayed())

    def upload(self, path: Path):
        self.press("input[type=file]", str(path))

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")
                if entry["level"] == "SEVERE"]  # fmt: skip


@pytest.fixture(scope="module")
def address(app, shipped, tmp_path_factory):
    os.environ["GRADIO_TEMP_DIR"] = str(tmp_path_factory.mktemp("gradio"))
    demo = app.make_demo(shipped, "fashion_mnist")
    threads = torch.get_num_threads()
    url = app.launch(demo, prevent_thread_lock=True)[1]
    yield url
    demo.close()
    torch.set_num_threads(threads)
    del os.environ["GRADIO_TEMP_DIR"]


def test_a_visit(address, tmp_path):
    photograph().save(tmp_path / "photograph.jpg")
    (tmp_path / "notes.png").write_text("not an image")
    (tmp_path / "notes.txt").write_text("not an image")
    with browser() as driver:
        visitor = Visitor(driver)
        driver.get(address)
        samples = visitor.images("#samples", 24)  # without a click
        visitor.click("#reseed")
        samples = visitor.images("#samples", 24, unlike=samples)
        visitor.tab("Encode an image")
        visitor.click("#reconstruct")
        visitor.wait(lambda: "Choose an image first" in visitor.html(".toast-wrap"))
        visitor.upload(tmp_path / "photograph.jpg")
        visitor.images("#progressive", 3)
        assert "120×80 to 28×28" in visitor.images("#codes", 5)
        assert "bits/dim" in visitor.html("#bits") and "PNG" in visitor.html("#sizes")
        assert "z₁ fixed" in visitor.images("#reconstructions", 8)
        slider = "#level input[type=range]"
        visitor.press(slider, "\ue014")  # →
        visitor.wait(lambda: visitor.find(slider)[0].get_property("value") == "2")
        visitor.click("#reconstruct")
        visitor.wait(lambda: "z₁ … z₂ fixed" in visitor.images("#reconstructions", 8))
        for name in ("notes.png", "notes.txt"):
            visitor.dismiss("#file button[aria-label=Clear], #file [title=Clear]")
            visitor.upload(tmp_path / name)
            visitor.wait(lambda: "not an image" in visitor.html(".toast-wrap"))
            visitor.dismiss(".toast-close")
            visitor.wait(lambda: "not an image" not in visitor.html(".toast-wrap"))
        assert visitor.errors() == []


# ---- the README's screenshot ---------------------------------------------------------------------


def screenshot(path: str):
    app = load_script("app")
    pipe = ProgressiveVAEPipeline.from_pretrained(app.MODEL)
    pipe.set_progress_bar_config(disable=True)
    demo = app.make_demo(pipe, "fashion_mnist")
    url = app.launch(demo, prevent_thread_lock=True)[1]
    sample = pipe("Ankle boot", generator=torch.Generator().manual_seed(3)).images[0]
    with tempfile.TemporaryDirectory() as folder, browser() as driver:
        visitor, file = Visitor(driver), Path(folder) / "boot.png"
        sample.save(file)
        driver.get(url)
        visitor.images("#samples", 24)
        visitor.tab("Encode an image")
        visitor.upload(file)
        visitor.images("#progressive", 3)
        visitor.images("#reconstructions", 8)
        time.sleep(1)  # until animations end
        height = driver.execute_script("return document.documentElement.scrollHeight")
        driver.set_window_size(1280, height + 150)
        time.sleep(1)
        driver.save_screenshot(path)
    demo.close()
    image = PIL.Image.open(path).convert("RGB")
    image.quantize(255, dither=PIL.Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    screenshot(sys.argv[1])
