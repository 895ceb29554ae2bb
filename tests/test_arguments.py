import numpy as np
import pytest
import torch

from progressive_vae.arguments import as_integer, as_number


@pytest.mark.parametrize(
    "value", [3, 3.0, np.int64(3), np.uint8(3), np.float32(3), np.array(3), torch.tensor(3)]
)
def test_numbers_of_any_library(value):
    integer, number = (
        as_integer("steps", value, 1, 3),
        as_number("scale", value, "", lambda x: True),
    )
    assert (integer, type(integer)) == (3, int)
    assert (number, type(number)) == (3.0, float)


@pytest.mark.parametrize(
    "value",
    [
        True,
        np.True_,
        None,
        "3",
        b"3",
        [3],
        np.array([3]),
        2.5,
        float("nan"),
        float("inf"),
        0,
        4,
        3j,
    ],
)
def test_what_is_no_integer_of_the_range(value):
    with pytest.raises(ValueError, match="expected steps in 1 … 3, got "):
        as_integer("steps", value, 1, 3)


@pytest.mark.parametrize(
    "value", [True, np.False_, None, "0.5", [0.5], float("nan"), float("inf"), 1.5, np.ones(2)]
)
def test_what_is_no_number_of_the_range(value):
    with pytest.raises(ValueError, match="expected share <= 1, got "):
        as_number("share", value, "<= 1", lambda x: x <= 1)


def test_errors_show_the_value():
    with pytest.raises(ValueError, match="expected steps >= 1, got 'two'$"):
        as_integer("steps", "two", 1)
    with pytest.raises(ValueError, match=r"expected steps >= 1, got None \(NoneType\)$"):
        as_integer("steps", None, 1)
