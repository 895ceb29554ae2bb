import pytest

from progressive_vae.evaluation.image_codecs import compare_with_codecs
from progressive_vae.evaluation.likelihood import psnr_of


def test_previews_are_compared_with_the_best_files_that_are_no_larger():
    rows = {
        "level_1": {"bits_per_dim": 0.1, "mse_of_preview": 900.0},
        "level_2": {"bits_per_dim": 0.5, "mse_of_preview": 100.0},
    }
    curves = {
        "JPEG": [(1.0, 20.0), (0.5, 200.0), (0.2, 800.0)],
        "WebP": [(0.05, 1000.0), (0.4, 90.0), (0.08, 1200.0)],  # larger is not always better
    }
    comparison = compare_with_codecs(rows, curves, num_dims=80)
    sizes = {
        name: [row[kind]["bytes"] for kind in ("codes", "JPEG", "WebP")]
        for name, row in comparison.items()
    }
    assert sizes["level_1"] == pytest.approx([1, 2, 0.5])  # no JPEG file is as small
    assert sizes["level_2"] == pytest.approx([5, 5, 4])
    assert comparison["level_1"]["JPEG"]["psnr"] == psnr_of(800.0)
    assert comparison["level_2"]["codes"]["psnr"] == psnr_of(100.0)
    assert comparison["level_2"]["WebP"]["psnr"] == psnr_of(90.0)
