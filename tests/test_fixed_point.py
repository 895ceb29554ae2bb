"""Fixed-point arithmetic: close to floats, and the same in any batch and on any machine."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from helpers.codec import KINDS, codec_pipeline
from helpers.images import noise_images
from helpers.models import tiny_pipeline
from progressive_vae import ProgressiveVAEPipeline
from progressive_vae.codec import fixed_point
from progressive_vae.codec.fixed_point import fixed_point_arithmetic
from progressive_vae.models.distributions import IS_LAYOUT_INVARIANT, DiscretizedLogisticMixture

ROOT = Path(__file__).parents[1]


def numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 4


ELEMENTWISE = ["exp", "log", "sin", "cos", "sigmoid", "tanh", "sinh"]


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_functions(name):
    x = torch.cat([numbers(1000), torch.tensor([0.0, -0.0, 1e-30, 700.0, -700.0, -1e4])]).double()
    x = x.abs() if name == "log" else x
    function = getattr(torch, name)
    with fixed_point_arithmetic():
        double, single = function(x), function(x.float())
        assert x.clone().sigmoid_().equal(torch.sigmoid(x))
    assert double.dtype == torch.float64 and single.dtype == torch.float32
    # Near its zeros a sine is only as good as π.
    assert torch.allclose(double, function(x), rtol=1e-11, atol=1e-12)


def test_sums_and_products():
    x, weight, bias = numbers(3, 5, 6, 7), numbers(4, 5, 3, 3), numbers(4)
    q, k = numbers(2, 3, 5, 8), numbers(2, 3, 9, 8).flip(0)
    matrix, row = numbers(4, 7), numbers(7)
    places = torch.tensor([3, 0, 3, 3, 1, 0, 3]).expand(x.shape)

    def functions():
        yield F.conv2d(x, weight, bias, stride=2, padding=1)
        yield F.linear(x, matrix, bias)
        yield x @ matrix.T
        yield F.layer_norm(x, (7,), row, row)
        yield x.softmax(1) + x.log_softmax(1)
        yield F.scaled_dot_product_attention(q, k, k, is_causal=False)
        yield F.scaled_dot_product_attention(k, k, k, is_causal=True)
        yield F.silu(x)
        yield x.mean((1, 3), keepdim=True) + x.sum(2, keepdim=True)
        yield x.pow(2).mean() * torch.rsqrt(x.abs() + 1)
        yield x.cumsum(2) + torch.arange(7).cumsum(0)
        yield torch.addcmul(x, x, x)
        yield x.scatter_add(-1, places, x) + places.scatter_add(-1, places, places)
        yield F.cross_entropy(matrix, torch.arange(4), reduction="none")

    expected = [*functions()]
    with fixed_point_arithmetic():
        results = [*functions()]
    for actual, expected_value in zip(results, expected, strict=True):
        assert actual.dtype == expected_value.dtype
        assert torch.allclose(actual, expected_value, rtol=1e-4, atol=1e-3)  # 18 bits of a factor


def test_a_sum_does_not_depend_on_its_order():
    x, order = numbers(300, 400), torch.randperm(400, generator=torch.Generator().manual_seed(1))
    back = order.argsort()
    with fixed_point_arithmetic():
        assert torch.equal(x[:, order] @ x[:, order].T, x @ x.T)
        assert torch.equal(x[:, order].sum(1), x.sum(1))
        assert torch.equal(x[:, order].softmax(1)[:, back], x.softmax(1))
        assert torch.equal((x @ x.T)[7:8], x[7:8] @ x.T)  # nor a row on the others
    assert not torch.equal(x[:, order].sum(1), x.sum(1))  # as it does in floats


@pytest.mark.parametrize("odd", [0.0, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("num_values", [2, 256])
def test_columns_of_sharp_mixtures(num_values, odd):
    """Columns in which a component's logistics are 0 or 1 are not computed: the same results."""
    weights = numbers(5, 3, 70).softmax(0)
    means = numbers(4, 3, 70) * num_values / 8 + num_values / 2
    means[0, 0, 0] += odd
    precisions = numbers(4, 3, 70).clamp(-5, 3).exp()
    mixture = DiscretizedLogisticMixture(weights, means, precisions, num_values)
    with fixed_point_arithmetic():
        probs = mixture.probs()
        token = IS_LAYOUT_INVARIANT.set(False)
        expected = mixture.probs()
        IS_LAYOUT_INVARIANT.reset(token)
    assert torch.equal(probs.nan_to_num(9.0), expected.nan_to_num(9.0))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e3])
def test_softmax_is_that_of_exact_exponentials(scale):
    """Also of the rows, about one in fifty, for which torch's own ones are not enough."""
    rows = scale * torch.randn(4000, 17, generator=torch.Generator().manual_seed(0))
    rows[0, :3] = -math.inf
    rows[1] = -math.inf
    centered = rows.double() - rows.double().amax(-1, keepdim=True).clamp(min=-1e300)
    masses = fixed_point._exp(centered.masked_fill(rows.amax(-1, keepdim=True) == -math.inf, 0.0))
    sums = fixed_point._sum_of_masses(masses)
    with fixed_point_arithmetic():
        probabilities, log_probabilities = rows.softmax(-1), rows[2:].log_softmax(-1)
    assert torch.equal(probabilities, (masses / sums).float())
    expected = (centered - fixed_point.log(sums))[2:].float()
    assert torch.equal(log_probabilities, expected)


def test_exponentials_of_far_numbers():
    """Those of a part have the same results as alone."""
    special = [math.nan, math.inf, -math.inf, 709.5, -708.5, -1e300]
    x = torch.cat([numbers(100).double(), torch.tensor(special, dtype=torch.float64)])
    with fixed_point_arithmetic():
        together = x.exp()
        alone = torch.cat([number.exp() for number in x.split(1)])
    assert torch.equal(together.nan_to_num(9.0), alone.nan_to_num(9.0))
    assert together[-6].isnan() and together[-4] == 0


def test_inexact_operations_raise_an_error():
    x, image, places = numbers(3), numbers(1, 1, 3, 3), torch.tensor([0, 1, 0])
    for call in (lambda: torch.erf(x), lambda: x.pow(0.5), lambda: torch.add(x, x, alpha=2),
                 lambda: torch.rsub(x, 1.0, 2), lambda: 2**x,
                 lambda: x.scatter_reduce(0, places, x, "sum"),
                 lambda: x.index_put((places,), x, accumulate=True),
                 lambda: F.conv_transpose2d(image, image)):  # fmt: skip
        with fixed_point_arithmetic(), pytest.raises(ValueError, match="fixed-point arithmetic"):
            call()
    with pytest.raises(ValueError, match=r"arithmetic among \('float', 'integer'\), got 'exact'"):
        tiny_pipeline().compress(noise_images(1, (5, 7)), arithmetic="exact")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def test_streams_in_fixed_point_arithmetic(kind):
    pipe, images = codec_pipeline((5, 7), **kind), noise_images(3, (5, 7))
    streams, floats = pipe.compress(images, arithmetic="integer"), pipe.compress(images)
    assert torch.equal(pipe.decompress(streams), images)
    mixed = [floats[0], streams[1], floats[1], streams[0]]
    assert torch.equal(pipe.decompress(mixed), images[[0, 1, 1, 0]])
    for stream, float_stream in zip(streams, floats, strict=True):
        assert len(stream) <= 1.002 * len(float_stream) + 4
    assert pipe.compress(images[1:2], arithmetic="integer") == streams[1:2]


OTHER = """
import sys, torch
torch.set_num_threads(3)
torch.backends.mkldnn.enabled = False
from progressive_vae import ProgressiveVAEPipeline
pipe = ProgressiveVAEPipeline.from_pretrained(sys.argv[1])
streams = torch.load(sys.argv[2], weights_only=True)
capability = torch.backends.cpu.get_cpu_capability()
images = torch.cat([pipe.decompress(stream) for stream in streams])
assert torch.equal(images, torch.load(sys.argv[3], weights_only=True)), "other images"
print(capability, pipe.compress(images, arithmetic="integer") == streams)
"""


def test_another_kind_of_machine_decodes_the_streams(tmp_path):
    """Other kernels of torch, other libraries, other threads, other batches."""
    folder = ROOT / "examples" / "fashion_mnist"
    pipe = ProgressiveVAEPipeline.from_pretrained(folder)
    images = (pipe(num_images_per_prompt=2, output_type="pt").images * 255).round().to(torch.uint8)
    streams = pipe.compress(images, arithmetic="integer")
    torch.save(streams, tmp_path / "streams")
    torch.save(images, tmp_path / "images")
    words = [sys.executable, "-c", OTHER, str(folder), tmp_path / "streams", tmp_path / "images"]
    environment = os.environ | {
        "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "True"
    if torch.backends.cpu.get_cpu_capability() != "DEFAULT":
        assert done.stdout.split()[0] in ("DEFAULT", "NO")  # the kernels were others
