"""From a file to pixels: what is decoded, converted, cropped and resized, and what that says."""

import io

import numpy as np
import PIL.Image
import pytest

from progressive_vae.image_files import (
    convert_image,
    crop_square,
    image_array,
    list_files,
    open_image,
    resize_shorter_side,
)


def png(image, **options):
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def hidden_red(mode):
    """Red or dark, and wholly transparent."""
    if mode == "P":
        palette = PIL.Image.new("P", (4, 4))
        palette.putpalette([255, 0, 0] + [0] * 765)
        return open_image(png(palette, transparency=0)).image
    if mode == "RGB":
        red = PIL.Image.new("RGB", (4, 4), (255, 0, 0))
        return open_image(png(red, transparency=(255, 0, 0))).image
    if mode == "PA":
        return PIL.Image.new("PA", (4, 4))
    return PIL.Image.new("RGBA", (4, 4), (255, 0, 0, 0)).convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "P", "RGB", "LA", "PA"])
@pytest.mark.parametrize("target", ["L", "RGB"])
def test_transparent_colors_are_ignored(mode, target):
    conversion = convert_image(hidden_red(mode), target)
    assert conversion.image.mode == target and not conversion.is_lossless
    assert image_array(conversion.image).min() == 255
    assert conversion.steps[0] == "transparency composited on white"


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_lossless_conversions(mode):
    pixels = np.random.default_rng(0).integers(0, 2, (4, 4), np.uint8) * 255
    image = PIL.Image.fromarray(pixels).convert(mode)
    conversion = convert_image(image, "RGB")
    assert conversion.is_lossless
    assert np.array_equal(image_array(conversion.image), np.stack([pixels] * 3))


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB", "HSV", "RGBX", "La", "RGBa"])
@pytest.mark.parametrize("target", ["L", "RGB"])
def test_lossy_conversions_of_other_modes(mode, target):
    conversion = convert_image(PIL.Image.new(mode, (4, 4)), target)
    assert conversion.image.mode == target and not conversion.is_lossless
    is_transparent = mode in ("La", "RGBa")
    assert ("transparency composited on white" in conversion.steps) == is_transparent


def test_color_to_gray_is_lossy():
    image, steps, is_lossless = convert_image(PIL.Image.new("RGB", (4, 4)), "L")
    assert image.mode == "L" and steps == ["converted from RGB to grayscale"] and not is_lossless


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_more_than_8_bits(mode):
    deep = PIL.Image.fromarray(np.array([[1000, 2000], [3000, 5000]], np.uint16)).convert(mode)
    with pytest.raises(ValueError, match=mode):
        convert_image(deep, "L")
    image, _, is_lossless = convert_image(deep, "L", reduce_depth=True)
    assert np.asarray(image).tolist() == [[0, 63], [127, 255]] and not is_lossless


def test_omissions_of_a_file():
    pages = [PIL.Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(3)]
    for kind, omissions in (("TIFF", ["only the first of 3 frames"]), ("MPO", [])):
        file = io.BytesIO()
        pages[0].save(file, kind, save_all=True, append_images=pages[1:])
        assert open_image(file.getvalue()).omissions == omissions


@pytest.mark.parametrize(
    ("contents", "reason"),
    [(b"no image", "Pillow"), (b"", "Pillow"),
     (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "git lfs pull"),
     (png(PIL.Image.new("L", (20, 20)))[:50], "Pillow"),
     (png(PIL.Image.new("L", (40, 40))), "more than 1000 pixels: 40×40")],
)  # fmt: skip
def test_the_reason_of_an_unreadable_file(contents, reason):
    with pytest.raises(ValueError, match=reason) as error:
        open_image(contents, max_image_pixels=1000)
    assert "BytesIO" not in str(error.value)


def test_a_long_image_is_cropped_before_it_is_resized():
    narrow = PIL.Image.new("L", (1, 60_000), 7)
    image = resize_shorter_side(crop_square(narrow), 256)
    assert image.size == (256, 256) and np.unique(np.asarray(image)).tolist() == [7]
    with pytest.raises(ValueError, match="1×60000 would become 256×15360000"):
        resize_shorter_side(narrow, 256)


@pytest.mark.parametrize("size", [(9, 4), (4, 9), (5, 5)])
def test_crops_are_inside_the_image(size):
    columns, rows = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    image = PIL.Image.fromarray((16 * rows + columns).astype(np.uint8))
    corners = set()
    for seed in range(50):
        square = np.asarray(crop_square(image, np.random.default_rng(seed)))
        assert square.shape == (min(size), min(size))
        corners.add(int(square[0, 0]))
    assert len(corners) == max(size) - min(size) + 1
    middle = (max(size) - min(size)) // 2
    assert np.asarray(crop_square(image))[0, 0] == middle * (16 if size[1] > size[0] else 1)


def test_list_files_follows_links_once(tmp_path):
    (tmp_path / "real" / "sub").mkdir(parents=True)
    (tmp_path / "real" / "sub" / "1.png").touch()
    (tmp_path / "real" / ".hidden").touch()
    (tmp_path / "real" / "sub" / "circle").symlink_to(tmp_path / "real")
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    names = [path.relative_to(tmp_path).as_posix() for path in list_files(tmp_path)]
    assert names == ["linked/sub/1.png", "real/sub/1.png"]
    assert len(list_files(tmp_path, hidden=True)) == 4
