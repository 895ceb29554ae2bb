"""What users of diffusers, transformers and Accelerate try on any pipeline."""

import copy
import importlib.util

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import compile_regions
from diffusers import PipelineQuantizationConfig
from torch._dynamo.utils import counters

from helpers.models import (
    GUIDED,
    assert_same,
    generators,
    pipeline_of,
    tiny_level,
    tiny_pipeline,
    tiny_prior,
    weights_of,
)
from helpers.recipes import RECIPE
from progressive_vae import ProgressiveVAEPipeline, ProgressiveVAEPrior
from progressive_vae.evaluation.op_count import OpCount
from progressive_vae.models.modeling_utils import BLOCK_GRAPHS
from progressive_vae.training import train
from progressive_vae.training.args import RunSettings
from progressive_vae.training.run import make_accelerator

WHOLE = {"backend": "eager", "fullgraph": True}
BATCH_SIZES = [8, 5, 12, 33, 1, 2]
MAX_GRAPHS = 4  # of these batch sizes: the first one, any other, and 1
CODES = {"num_symbols": 6}
KINDS = {
    "lattice": {**CODES, "code_noise": 0.3},
    "masked, gumbel": {**CODES, "ordering": "masked", "quantizer": "gumbel"},
    "raster": {**CODES, "ordering": "raster", "decoder_type": "causal_lm"},
    "transformer": {**CODES, "decoder_type": "transformer"},
    "pixels, fsq": {"num_channels": 1, "quantizer": "fsq", "codebook_size": 15, "codebook_dim": 2},
    "guided": {"num_channels": 3, **GUIDED},
}


def slow_but(names, quick):
    """Parameters, of which all but the quick ones are marked `slow`: compilation takes seconds."""
    return [pytest.param(x, marks=[] if x in quick else pytest.mark.slow) for x in names]


@pytest.fixture(autouse=True)
def dynamo():
    torch._dynamo.reset()
    counters.clear()


def num_graphs():
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def finer_of(level, batch_size):
    """A random grid of 4×4, which a level encodes."""
    config = level.config
    if config.is_finest:
        return torch.randint(256, (batch_size, config.value_channels, 4, 4)) / 127.5 - 1
    return torch.randint(config.num_values, (batch_size, 4, 4))


def write_images(folder):
    folder.mkdir()
    for i in range(20):
        PIL.Image.fromarray(np.full((4, 4), 10 * i, np.uint8)).save(folder / f"{i}.png")


def samples(pipe, batch_size=2, temperature=1.0, seed=0):
    return pipe(
        num_images_per_prompt=batch_size,
        temperature=temperature,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    ).images


def gray_pipeline():
    """Quick to compile: N = 2, gray images of 4×4."""
    levels = [tiny_level(num_symbols=4), tiny_level(num_channels=1, codebook_size=4)]
    pipe = ProgressiveVAEPipeline.from_levels(tiny_prior(grid_size=[1, 1]), levels)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("backend", [pytest.param("eager", marks=pytest.mark.slow), "aot_eager"])
def test_a_compiled_pipeline(backend, tmp_path):
    pipe = gray_pipeline()
    images = samples(pipe)
    stream = pipe.compress(images)
    log_prob = pipe.prior.log_prob(pipe.encode(images)[0])
    pipe.compile(backend=backend, fullgraph=True)
    assert torch.equal(samples(pipe), images) and num_graphs() == 3
    assert pipe.compress(images) == stream
    torch.testing.assert_close(pipe.prior(pipe.encode(images)[0]).log_prob, log_prob)
    if backend != "eager":
        return
    pipe.save_pretrained(tmp_path)
    assert_same(pipe, ProgressiveVAEPipeline.from_pretrained(tmp_path))
    torch.testing.assert_close(samples(copy.deepcopy(pipe)), images)
    assert samples(pipe.to(torch.bfloat16)).shape == images.shape


def replayed(graph, inputs):
    """A backend with what a CUDA graph has: results in the same memory at each call, and operations
    that neither wait nor generate noise."""
    memory = {}

    def run(*arguments):
        with OpCount() as count:
            results = graph(*arguments)
        assert not count.waits and not {"rand", "uniform_", "random_"} & {*count.ops}
        static = memory.setdefault(tuple(result.shape for result in results), results)
        for kept, result in zip(static, results, strict=True):
            kept.copy_(result)
        return static

    return run


def test_samples_of_graphs_that_write_into_the_same_memory():
    pipe = gray_pipeline()

    def three_batches():
        generator = torch.Generator().manual_seed(0)
        output = pipe(num_images_per_prompt=6, batch_size=2, generator=generator, output_type="pt")
        return [*output.codes, output.images]

    expected = three_batches()
    with pytest.raises(ValueError, match="CUDA device.*one on cpu"):
        pipe.enable_cuda_graph()
    assert all(map(torch.equal, three_batches(), expected)) and not num_graphs()
    pipe.compile(backend=replayed, fullgraph=True)
    assert all(map(torch.equal, three_batches(), expected)) and num_graphs() == 3


@pytest.mark.gpu
def test_samples_of_cuda_graphs():
    """Of several batch sizes, temperatures and weights, in an order that replays old graphs."""
    pipe = gray_pipeline().to("cuda")
    with_graphs = copy.deepcopy(pipe)
    with_graphs.enable_cuda_graph()
    results = []
    for weight in (1.0, 1.5):
        for one in (pipe, with_graphs):
            one.level_2.decoder.stem.weight.data.mul_(weight)
        for batch_size, temperature in ((2, 1.0), (5, 1.0), (2, 0.5), (2, 1.0)):
            results.append([samples(one, batch_size, temperature) for one in (pipe, with_graphs)])
    for expected, images in results:
        assert torch.equal(images, expected)


def test_a_compiled_pipeline_without_a_prior():
    pipe = tiny_pipeline()
    levels = ProgressiveVAEPipeline.from_levels(None, pipe.levels, [5, 7])
    levels.compile(**WHOLE)
    finer = finer_of(pipe.level_1, 2)
    expected = pipe.level_1(finer).loss
    assert torch.equal(levels.level_1(finer).loss, expected)


@torch.no_grad()
@pytest.mark.parametrize("method", slow_but(["log_prob", "encode", "sample"], ["encode", "sample"]))
def test_all_batch_sizes_need_few_graphs(method):
    level = tiny_level(**CODES)
    compiled = copy.deepcopy(level)
    if method == "sample":
        compiled.compile(**WHOLE)
    else:
        setattr(compiled, method, torch.compile(getattr(level, method), **WHOLE))
    for batch_size in BATCH_SIZES:
        finer = finer_of(level, batch_size)
        codes = level.encode(finer)
        inputs = {
            "log_prob": {"finer": finer, "codes": codes},
            "encode": {"finer": finer},
            "sample": {"codes": codes},
        }[method]
        results = []
        for model in (level, compiled):
            options = {"generator": generators(batch_size)} if method == "sample" else {}
            results.append(getattr(model, method)(**inputs, **options))
        torch.testing.assert_close(*results)
    assert num_graphs() <= MAX_GRAPHS


def test_sampling_of_a_transformer_is_one_graph():
    level = tiny_level(**KINDS["transformer"])
    compiled = copy.deepcopy(level)
    compiled.compile(**WHOLE)
    codes = level.encode(finer_of(level, 3))
    samples = [model.sample(codes, generator=generators(3)) for model in (level, compiled)]
    assert torch.equal(*samples) and num_graphs() == 1


def test_all_batch_sizes_of_a_prior_need_few_graphs():
    prior = tiny_prior(num_classes=2)
    compiled = copy.deepcopy(prior).train()
    compiled.compile(**WHOLE)
    for batch_size in BATCH_SIZES:
        codes = prior.sample(batch_size)
        log_prob = compiled(codes, torch.ones(batch_size, dtype=torch.long)).log_prob
        assert log_prob.shape == (batch_size,)
        log_prob.sum().backward()
    assert num_graphs() <= MAX_GRAPHS


@pytest.mark.parametrize(
    "name", slow_but(KINDS, ["raster", "pixels, fsq", "guided", "transformer"])
)
def test_training_is_one_graph(name):
    level = tiny_level(**KINDS[name]).train()
    level.quantizer.is_initialized = True
    compiled = copy.deepcopy(level)
    compiled.compile(**WHOLE)
    finer = finer_of(level, 3)
    codes = level.encode(finer)
    for inputs in ({"finer": finer}, {"finer": finer, "codes": codes}):
        torch.manual_seed(0)  # of Gumbel noise
        expected = level(**inputs).loss
        torch.manual_seed(0)
        loss = compiled(**inputs).loss
        loss.backward()
        torch.testing.assert_close(loss, expected)
    assert num_graphs() == 2


@pytest.mark.parametrize(
    "compile", [pytest.param(False, marks=pytest.mark.slow), True], ids=["flags", "recipe"]
)
def test_training_compiles_with_accelerate(compile, tmp_path, monkeypatch):
    """As `accelerate launch --dynamo_backend eager` sets it, and with `compile` in the recipe."""
    write_images(tmp_path / "images")
    recipe = {
        **RECIPE,
        "num_levels": 1,
        "data": {**RECIPE["data"], "train_data_dir": str(tmp_path / "images"), "resolution": 4},
    }
    pipelines = []
    for backend in ("no", "eager"):
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", backend)
        AcceleratorState._reset_state(reset_partial_state=True)
        run = {**RECIPE["run"], "output_dir": str(tmp_path / backend)}
        run["compile"] = compile and backend != "no"
        pipelines.append(train({**recipe, "run": run}))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert num_graphs() > 0
    for name, weight in weights_of(pipelines[0]).items():
        torch.testing.assert_close(weights_of(pipelines[1])[name], weight)


@torch.no_grad()
def test_stages_share_graphs():
    """The first stage, those of the same stride, and those of another stride are three kinds."""
    level = tiny_level(
        num_channels=1, pixel_distribution="logistic_mixture", num_groups=7, downsample=4
    )
    compiled = copy.deepcopy(level)
    compiled.compile_repeated_blocks(**WHOLE)
    # PyTorch's convolutions on CPUs differ from 16 images on; a size of 1 has its own graphs.
    for batch_size, max_num_graphs in ((3, 3), (12, 3), (33, 6), (1, 9)):
        finer = torch.randint(256, (batch_size, 1, 8, 8)) / 127.5 - 1
        codes = level.encode(finer)
        log_prob = compiled.log_prob(finer, codes)
        torch.testing.assert_close(log_prob, level.log_prob(finer, codes))
        assert num_graphs() <= max_num_graphs


@pytest.mark.unit
def test_a_recipe_compiles(monkeypatch):
    """With inductor, or with the backend that Accelerate is configured for."""
    for backend in (None, "eager"):
        if backend:
            monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", backend)
        for is_compiled in (True, False):
            settings = RunSettings(compile=is_compiled, report_to="none")
            plugin = make_accelerator(settings, cpu=True).state.dynamo_plugin
            expected = backend or ("inductor" if is_compiled else "no")
            assert plugin.backend.value.lower() == expected
            assert plugin.use_regional_compilation == is_compiled
            limit = plugin.to_kwargs().get("recompile_limit")
            assert limit == (BLOCK_GRAPHS.get("recompile_limit") if is_compiled else None)


def test_stages_compile_as_regions():
    level = tiny_level(num_channels=3, num_layers=2)
    finer = finer_of(level, 2)
    codes = level.encode(finer)
    expected = level(finer).loss, level.sample(codes, generator=generators(2))
    in_place = copy.deepcopy(level)
    in_place.compile_repeated_blocks(**WHOLE)
    for model in (compile_regions(copy.deepcopy(level), **WHOLE), in_place):
        torch._dynamo.reset()
        assert torch.equal(model.encode(finer), codes)
        torch.testing.assert_close(model(finer).loss, expected[0])
        assert torch.equal(model.sample(codes, generator=generators(2)), expected[1])
        assert num_graphs() > 0
        counters.clear()
    with pytest.raises(ValueError, match="Prior"):
        tiny_prior().compile_repeated_blocks()


@pytest.mark.unit
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_stored_in_8_bits(dtype):
    codes = tiny_prior().sample(2)
    finer = finer_of(tiny_level(num_channels=3), 2)
    for model, inputs in (
        (tiny_prior(), [codes]),
        (tiny_level(num_channels=3), [finer, codes]),
        *(
            (tiny_level(**KINDS[kind]), [finer_of(tiny_level(**CODES), 2), codes])
            for kind in ("raster", "transformer")
        ),
    ):
        expected = model.log_prob(*inputs)
        model.to(dtype).enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn)
        assert any(weight.dtype == torch.float8_e4m3fn for weight in model.parameters())
        torch.testing.assert_close(model.log_prob(*inputs).float(), expected, rtol=0.1, atol=0)


@pytest.mark.unit
def test_offloading():
    expected = samples(pipeline_of())
    for offload_type in ("leaf_level", "block_level"):
        pipe = pipeline_of()
        pipe.enable_group_offload(
            torch.device("cpu"), offload_type=offload_type, num_blocks_per_group=1
        )
        assert torch.equal(samples(pipe), expected)
    pipe = pipeline_of()
    with pytest.raises(ValueError, match="streams"):
        pipe.enable_group_offload(torch.device("cpu"), use_stream=True)
    with pytest.raises(ValueError, match="enable_model_cpu_offload"):
        pipe.enable_sequential_cpu_offload()
    if not torch.accelerator.is_available():
        with pytest.raises(RuntimeError, match="requires accelerator"):
            pipe.enable_model_cpu_offload()
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(samples(pipe), expected)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline_of().save_pretrained(folder)
    return folder


@pytest.mark.unit
@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_attention_implementations(name, folder):
    prior = ProgressiveVAEPrior.from_pretrained(folder / "prior", attn_implementation=name)
    assert prior.backbone.config._attn_implementation == name
    expected = tiny_prior().sample(2, generator=generators(2))
    assert torch.equal(prior.sample(2, generator=generators(2)), expected)
    prior.set_attn_implementation("sdpa" if name == "eager" else "eager")
    assert torch.equal(prior.sample(2, generator=generators(2)), expected)


@pytest.mark.unit
def test_arguments_of_from_pretrained(folder):
    load = ProgressiveVAEPipeline.from_pretrained
    for argument in ("torch_dtype", "dtype"):
        assert load(folder, **{argument: torch.bfloat16}).dtype == torch.bfloat16
    mixed = load(folder, dtype={"prior": torch.bfloat16, "default": torch.float32})
    assert (mixed.prior.dtype, mixed.level_1.dtype) == (torch.bfloat16, torch.float32)
    assert load(folder, device_map="cpu").device.type == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(NotImplementedError, match="cuda not supported"):
            load(folder, device_map="cuda")


@pytest.mark.unit
def test_quantization_needs_its_library(folder):
    config = PipelineQuantizationConfig(
        quant_backend="bitsandbytes_4bit",
        quant_kwargs={"load_in_4bit": True},
        components_to_quantize=["prior"],
    )
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(ImportError, match="bitsandbytes"):
            ProgressiveVAEPipeline.from_pretrained(folder, quantization_config=config)
