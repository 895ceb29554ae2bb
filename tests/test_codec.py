"""Lossless compression: round trips, stream lengths near log_prob, errors of other streams."""

import math

import pytest
import torch

from helpers.codec import KINDS, codec_pipeline
from helpers.images import noise_images
from helpers.models import LOGISTICS, decoder_fields, pipeline_of, tiny_pipeline
from progressive_vae import ProgressiveVAEPipeline
from progressive_vae.codec import codec
from progressive_vae.codec.bitstream import FORMAT, FORMATS, Header
from progressive_vae.codec.codec import TOTAL, EntropyDecoder, EntropyEncoder, frequency_table
from progressive_vae.codec.progressive import minimal_prefix
from progressive_vae.configuration.decoders import PIXEL_DISTRIBUTIONS
from progressive_vae.image_processor import from_pixel_values
from progressive_vae.models.distributions import (
    Categorical,
    DiscretizedLogisticMixture,
    Distribution,
)
from progressive_vae.models.value_types import unit_to_uint8
from progressive_vae.models.walk import WalkStep

WIDE = {"hidden_size": 16, "codebook_dim": 16}
SIZES = [(1, 1), (65, 17)]
# One of each architecture: of the others a codec sees no more than their distributions.
KINDS_AT_ALL_SIZES = [
    decoder_fields("lattice"),
    decoder_fields("raster"),
    {"pixel_distribution": "guided_logistic_mixture"},
]


@pytest.mark.parametrize(
    ("kind", "size"),
    [(kind, (5, 7)) for kind in KINDS]
    + [(kind, size) for kind in KINDS_AT_ALL_SIZES for size in SIZES],
    ids=lambda value: "-".join(map(str, value.values() if isinstance(value, dict) else value)),
)
def test_round_trip_and_stream_length_near_log_prob(kind, size):
    pipe = codec_pipeline(size, **kind)
    samples = pipe(num_images_per_prompt=3, generator=torch.Generator(), output_type="pt").images
    images = torch.cat([noise_images(3, size), unit_to_uint8(samples)])
    streams = pipe.compress(images)
    assert torch.equal(pipe.decompress(streams), images)
    bits = -sum(pipe.log_prob(images).values()) / math.log(2)
    lengths = torch.tensor([8 * len(stream) for stream in streams])
    assert (lengths <= 1.01 * bits + 8 * 12).all()
    # No value costs more than 24 bits, as some of these odd distributions' would.
    assert (lengths[3:] >= 0.9 * bits[3:]).all()


@pytest.mark.parametrize("distribution", PIXEL_DISTRIBUTIONS)
def test_a_stream_does_not_depend_on_its_batch(distribution):
    # More than a batch, by networks whose rows fill registers, as real ones do.
    pipe = codec_pipeline((5, 7), pixel_distribution=distribution, **WIDE)
    images = noise_images(130, (5, 7))
    streams = pipe.compress(images)
    for part in (slice(0, 1), slice(3, 5), slice(124, 130)):
        assert pipe.compress(images[part]) == streams[part]
        assert torch.equal(pipe.decompress(streams[part]), images[part])
    assert torch.equal(pipe.decompress(streams[::-1]), images.flip(0))
    assert torch.equal(pipe.decompress(streams[7]), images[7:8])  # one, by itself


def test_streams_of_earlier_versions_are_decoded_in_their_batch_size(monkeypatch):
    pipe, images = codec_pipeline((5, 7), **WIDE), noise_images(70, (5, 7))
    monkeypatch.setattr(codec, "MAX_IMAGES", 64)
    older = pipe.compress(images)
    monkeypatch.undo()
    newer, sizes = pipe.compress(images), []
    assert older[0][3] != newer[0][3]  # the header's byte for arithmetic

    class Watched(codec.EntropyDecoder):
        def __init__(self, streams, batch_size, may_end, format_number):
            super().__init__(streams, batch_size, may_end, format_number)
            sizes.append((len(streams), batch_size))

    monkeypatch.setattr(codec, "EntropyDecoder", Watched)
    mixed = [*older[:66], *newer[66:]]
    assert torch.equal(pipe.decompress(mixed), images)
    assert sizes == [(64, 64), (2, 64), (4, 128)]


def test_the_header_holds_the_class():
    pipe, images = tiny_pipeline(), noise_images(3, (5, 7))
    streams = pipe.compress(images, [1, 0, 2])  # the last is the null class
    plain = pipe.compress(images)
    assert [len(a) - len(b) for a, b in zip(streams, plain, strict=True)] == [1, 1, 1]
    assert torch.equal(pipe.decompress(streams), images)
    assert torch.equal(pipe.decompress(plain), images)
    header = Header.from_bytes(streams[0], "a stream")
    assert header.label == 1 and Header.from_bytes(plain[0], "a stream").label is None
    many = Header(b"ab", b"c", 7, 99_999, True)
    assert Header.from_bytes(many.to_bytes() + b"more", "a stream") == many
    with pytest.raises(ValueError, match="stream 1 of a class in 0 … 2, .* got 3"):
        pipe.decompress([plain[0], Header(header.weights, b"c", 7, 3).to_bytes()])
    assert all(not stream.startswith(plain[0][:1]) for stream in streams)


@pytest.mark.parametrize("kind", [{"auxiliary_hidden_size": 16, **WIDE}, WIDE])
def test_prefixes_decode_to_previews(kind):
    pipe, images = pipeline_of(**kind), noise_images(2, (5, 7))
    streams, codes = pipe.compress(images), pipe.encode(images)
    lengths = []
    for k in (1, 2):
        decoded = pipe.decompress(streams, num_levels=k)
        if "auxiliary_hidden_size" in kind:
            expected = pipe.preview(codes[:k], output_type="pt")
        else:  # the most probable values, as there is no auxiliary decoder
            expected = pipe(codes=codes[:k], num_levels=k, output_type="pt").images
        assert (decoded - 255 * expected).abs().max() <= 0.51 and decoded.dtype == torch.uint8
        for stream, view in zip(streams, decoded, strict=True):
            ends = range(8, 64, 3)
            enough = [n for n in ends if _reads(pipe, stream[:n], k)]
            assert enough == [n for n in ends if n >= enough[0]]  # from some length on
            assert torch.equal(pipe.decompress(stream[: enough[0]], num_levels=k)[0], view)
            lengths.append(enough[0])
    assert all(a <= b for a, b in zip(lengths[:2], lengths[2:], strict=True))
    with pytest.raises(ValueError, match="expected stream 0 to hold all levels that are asked for"):
        pipe.decompress(streams[0][:9], num_levels=2)


def _reads(pipe, stream, num_levels):
    try:
        return pipe.decompress(stream, num_levels=num_levels) is not None
    except ValueError:
        return False


# A few bytes before the end, most second digits of the last group are missing.
@pytest.mark.parametrize(("kind", "num_missing"), [({}, 20), (LOGISTICS, 60)])
@pytest.mark.parametrize("arithmetic", ["float", "integer"])
def test_truncated_pixels_are_expected_values(arithmetic, kind, num_missing):
    pipe, image = pipeline_of(**WIDE, **kind), noise_images(1, (5, 7))
    stream = pipe.compress(image, arithmetic=arithmetic)[0]
    codes_end = minimal_prefix(pipe.stack, stream, pipe.num_levels)[0]
    first: list[tuple[torch.Tensor, torch.Tensor]] = []

    def step_fn(distribution, step):
        values = (distribution.probs() * torch.arange(256)).sum(-1).round().long()
        first.append((values, step.positions))
        return values

    null = pipe.stack.as_conditioning(None, 1)
    pipe.stack.walk(pipe.num_levels, pipe.encode(image)[-1], step_fn, null)
    means, positions = first[0]
    decoded = pipe.decompress(stream[:codes_end], allow_truncated=True)
    assert (decoded[:, 0].flatten(1)[:, positions] - means).abs().max() <= 1
    num_equal = [
        (pipe.decompress(stream[:n], allow_truncated=True) == image).sum().item()
        for n in range(codes_end, len(stream) + 1, 8)
    ]
    # By chance an expected value is the right one.
    assert all(b >= a - 3 for a, b in zip(num_equal[:-1], num_equal[1:], strict=True))
    assert num_equal[0] < 20 and num_equal[-1] > image.numel() - num_missing
    assert torch.equal(pipe.decompress(stream, allow_truncated=True), image)
    with pytest.raises(ValueError, match="expected stream 0 to hold all levels"):
        pipe.decompress(stream[:9], allow_truncated=True)


def test_other_streams_raise_an_error(monkeypatch):
    pipe, images = tiny_pipeline(), noise_images(2, (5, 7))
    stream, second = pipe.compress(images)
    other = tiny_pipeline()
    other.level_2.decoder.stem.weight.data.mul_(1.5)
    with pytest.raises(ValueError, match="expected stream 0 of the weights .* got one of"):
        other.decompress(stream)
    with pytest.raises(ValueError, match="stream 1 of a format in .*, got 3: .* later version"):
        pipe.decompress([stream, b"\x03" + stream[1:]])
    with pytest.raises(ValueError, match="expected stream 0 of 8 bytes or more, got 7"):
        pipe.decompress(stream[:7])
    with pytest.raises(ValueError, match="with a class in its header, got"):
        pipe.decompress(bytes([129]) + stream[1:8] + 4 * b"\xff")
    with pytest.raises(ValueError, match="checksum of stream 1, got others: .* ends too early"):
        pipe.decompress([stream, second[:-4]])
    with pytest.raises(ValueError, match=r"preview: decompress\(stream, num_levels=1\)"):
        pipe.decompress(second[:-4])
    for data in ([], "text", [stream, 3], None, 5):
        with pytest.raises(ValueError, match="expected data of bytes"):
            pipe.decompress(data)
    for k in (0, 4, 1.5, "1", True):
        with pytest.raises(ValueError, match="expected num_levels in 1 … 3, got"):
            pipe.decompress(stream, num_levels=k)
    # Other arithmetic with equal results decodes; a failure names the arithmetic.
    elsewhere = bytes([stream[0]]) + stream[1:3] + bytes([stream[3] ^ 1]) + stream[4:]
    assert torch.equal(pipe.decompress(elsewhere), images[:1])
    damaged = elsewhere[:10] + bytes([elsewhere[10] ^ 1]) + elsewhere[11:]
    with pytest.raises(
        ValueError,
        match='made with other arithmetic .* than that of this machine.*arithmetic="integer"',
    ):
        pipe.decompress(damaged)
    without = ProgressiveVAEPipeline.from_levels(None, pipe.levels, [5, 7])
    for call in (lambda: without.compress(images), lambda: without.decompress(stream)):
        with pytest.raises(ValueError, match="expected a pipeline with a prior"):
            call()
    with pytest.raises(ValueError, match="expected images of"):
        pipe.compress(images[..., :4])


def test_frequency_tables_are_proportional_to_probabilities():
    generator = torch.Generator().manual_seed(0)
    for num_values in (2, 3, 64, 256, 16_384):
        logits = torch.randn(2, 5, num_values, generator=generator) * 8
        logits[0, 0], logits[1, 1, 1:] = 0, -1e4  # uniform, and certain
        logits[0, 1] = 0
        logits[0, 1, num_values // 2], logits[0, 1, 0] = 0.77, -30  # whose softmax adds up to more
        counts = torch.from_numpy(frequency_table(Categorical(logits).probs(), 2)).double()
        assert (counts >= 0).all() and (counts == counts.round()).all()
        assert (counts.sum(-1) == TOTAL - num_values).all()
        bits = -((counts + 1) / TOTAL).log2()
        probabilities = logits.double().softmax(-1)
        lost = (probabilities * (bits + probabilities.clamp(min=1e-300).log2())).sum(-1)
        assert (lost < 1e-4 * bits.max() + 0.005).all() and (lost > -1e-6).all()
    with pytest.raises(ValueError, match="a weight is not finite"):
        frequency_table(Categorical(logits * math.nan).probs(), 2)


def coded_step(
    distribution: Distribution, values: torch.Tensor, format_number: int
) -> tuple[bytes, WalkStep]:
    """The stream of one step of a walk with values (1, n), and the step."""
    step = WalkStep(0, 0, torch.arange(values.numel()))
    encoder = EntropyEncoder(1, format_number)
    encoder.set_target(values[:, None, None])(distribution, step)
    return encoder.streams()[0], step


@pytest.mark.parametrize("format_number", FORMATS)
def test_values_of_no_probability_are_coded(format_number):
    """Each value has a count, even in a block of values without any mass."""
    ones = torch.ones(1, 1, 256)
    weights = torch.cat([ones, 0 * ones])
    distribution = DiscretizedLogisticMixture(weights, 100 * ones, 20 * ones, 256)
    assert (distribution.probs()[0, 0] == 0).sum() >= 250
    values = torch.arange(256)[None]
    stream, step = coded_step(distribution, values, format_number)
    decoder = EntropyDecoder([stream], 1, False, format_number)
    assert torch.equal(decoder(distribution, step), values)
    # A value takes the 24 bits of a block without mass, and 4 bits in it.
    assert len(stream) * 8 / 256 < 28


def test_missing_digits_are_those_of_expected_values():
    """Second digits are conditioned on the first ones where these are in the stream."""
    generator = torch.Generator().manual_seed(0)
    means = torch.rand(2, 1, 40, generator=generator) * 256
    weights = torch.tensor([0.5, 0.4, 0.1]).view(3, 1, 1).expand(3, 1, 40)
    distribution = DiscretizedLogisticMixture(weights, means, torch.full_like(means, 0.1), 256)
    values = distribution.icdf(torch.rand(1, 40, generator=generator))
    stream, step = coded_step(distribution, values, FORMAT)
    probs = distribution.probs()
    is_in_block = torch.arange(256) // 16 == values[..., None] // 16
    conditional = probs * is_in_block
    expected, expected_in_block = (
        (table @ torch.arange(256.0) / table.sum(-1)).round() for table in (probs, conditional)
    )
    kinds = []
    for length in range(len(stream) + 1):
        decoder = EntropyDecoder([stream[:length]], 1, True)
        decoder.has_means = True
        decoded = decoder(distribution, step)
        num_exact = ((decoded == values).cumprod(-1)).sum().item()
        is_near = (decoded - expected_in_block).abs() <= 1
        num_near = is_near[0, num_exact:].cumprod(-1).sum().item()
        rest = slice(num_exact + num_near, None)
        assert ((decoded - expected).abs() <= 1)[0, rest].all()
        kinds.append((num_exact, num_near, 40 - num_exact - num_near))
    assert kinds[0][2] > 35 and kinds[-1][0] == 40
    assert any(near > 20 and not rest for _, near, rest in kinds)


def test_in_inference_mode_and_of_one_image():
    pipe, image = tiny_pipeline(), from_pixel_values(torch.zeros(1, 3, 5, 7), "pil")[0]
    with torch.inference_mode():
        for arithmetic in ("float", "integer"):
            streams = pipe.compress(image, arithmetic=arithmetic)
            assert (pipe.decompress(streams) == 128).all()
    with pytest.raises(ValueError, match="expected 1 class_labels, got 3"):
        pipe.compress(image, [0, 1, 0])


def test_half_precision_and_other_devices(images):
    pipe = tiny_pipeline().to(torch.bfloat16)
    streams = pipe.compress(images)
    assert torch.equal(pipe.decompress(streams), images)
    with torch.autocast("cpu", torch.bfloat16):  # of others, which it does not see
        plain_pipe = tiny_pipeline()
        inside = plain_pipe.compress(images)
    assert inside == plain_pipe.compress(images)
    assert torch.equal(plain_pipe.decompress(inside), images)


def test_the_error_without_constriction_names_the_extra(images, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(ImportError, match=r'pip install "progressive-vae\[codec\]"'):
        tiny_pipeline().compress(images)


def test_streams_of_compiled_parts_are_those_of_the_same_weights(images):
    pipe, other = tiny_pipeline(), tiny_pipeline()
    other.prior = torch.compile(other.prior, backend="eager")
    other.level_3 = torch.compile(other.level_3, backend="eager")
    other.level_2.decoder = torch.compile(other.level_2.decoder, backend="eager")
    assert pipe.stream_id() == other.stream_id()
    assert torch.equal(pipe.decompress(other.compress(images)), images)
    assert torch.equal(other.decompress(pipe.compress(images)), images)
