import pytest

from progressive_vae import ProgressiveVAELevelConfig, ProgressiveVAEPriorConfig
from progressive_vae.configuration.validation import (
    check_classes,
    check_image_size,
    check_levels,
    grid_sizes,
)


def level(**fields):
    return ProgressiveVAELevelConfig(**{"num_symbols": 64, **fields})


FINEST = level(num_symbols=None, num_channels=1, downsample=4)


def test_grids_are_ceiling_divisions():
    assert grid_sizes([level(), level(), FINEST], (28, 30)) == [(2, 2), (4, 4), (7, 8), (28, 30)]


def test_an_image_size_follows_from_the_prior():
    prior = ProgressiveVAEPriorConfig(grid_size=[4, 4])
    assert check_image_size(None, [level(), FINEST], prior) == [32, 32]
    assert check_image_size([28, 28], [level(), FINEST], prior) == [28, 28]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: check_levels([FINEST, None, FINEST]), r"without a gap, got levels \[1, 3\]"),
        (lambda: check_levels([level(num_symbols=9), FINEST]), "level_1 with num_symbols=64"),
        (lambda: check_levels([level()]), "level_1, the finest, with num_channels"),
        (
            lambda: check_image_size(None, [FINEST], None),
            "image_size=.H, W. of a pipeline without a prior",
        ),
        (lambda: check_image_size([28], [FINEST], None), "image_size of two positive integers"),
        (lambda: check_image_size(7, [FINEST], None), "image_size of two positive integers, got 7"),
        (
            lambda: check_image_size([28, 28], [FINEST], ProgressiveVAEPriorConfig()),
            r"prior with \(codebook_size, grid_size\)=\(64, \(7, 7\)\)",
        ),
        (
            lambda: check_image_size([80, 64], [level(decoder_type="causal_lm"), FINEST], None),
            "level_1 to have a finer grid of at most 256 positions .*got 20×16",
        ),
        (
            lambda: check_image_size([264, 32], [level(decoder_type="transformer"), FINEST], None),
            "level_1 to have a finer grid of at most 64 rows and columns .*got 66×8",
        ),
        (
            lambda: check_classes([level(num_classes=2), None, level(num_classes=3)]),
            "one id2label in all class-conditional parts",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
