"""Damaged images and streams, random flags, tampered pipelines and kills, with the outcome of each.

An attack goes well, is skipped with a count, or raises one `ValueError` in plain words. What
escapes (another error, a crash, a minute's wait) or is silently wrong (a run that learns nothing, a
pipeline with other bits per dimension than before) is an outcome of the kind `WRONG`.
"""

import contextlib
import io
import json
import math
import random
import resource
import shutil
import signal
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from tqdm.auto import tqdm

from helpers.archives import differences, pack_folder, unpack_folder, write_samples
from helpers.damage import FORMATS, damage, make_image_file, tamper
from helpers.interruptions import disturb, finish, start, weights
from helpers.models import tiny_pipeline
from helpers.processes import SERVER
from helpers.scripts import load_script
from progressive_vae import ProgressiveVAEPipeline
from progressive_vae.codec import archive, codec, packing
from progressive_vae.codec.container import ArchiveReader
from progressive_vae.codec.tiles import STREAM, image_from_bytes
from progressive_vae.data.dataset import decode, prepare_image

WELL, LEFT_OUT, REFUSED, WRONG = "went well", "left out", "refused", "wrong"
Outcome = tuple[str, str]  # one of these, and what to say of it


@contextlib.contextmanager
def quiet():
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield


# ---- damaged images ------------------------------------------------------------------------------


def try_images(numbers: range) -> list[tuple[Outcome, float]]:
    timed_outcomes = []
    for number in numbers:
        rng = random.Random(number)
        kind = FORMATS[number % len(FORMATS)]
        contents = damage(make_image_file(kind, rng), rng)
        begun = time.perf_counter()
        try:
            image = decode({"bytes": contents, "path": None}).image
            prepare_image(image, "RGB", 16, center_crop=True)
            outcome = WELL, kind
        except ValueError:  # the reason, for those who name the file
            outcome = LEFT_OUT, kind
        except BaseException as error:
            outcome = WRONG, f"{kind} {number}: {error!r}"
        timed_outcomes.append((outcome, time.perf_counter() - begun))
    return timed_outcomes


def attack_images(count: int) -> list[Outcome]:
    """In processes of their own: a codec that crashes must not take this one along."""
    outcomes: list[Outcome] = []
    chunks = [range(i, min(i + 100, count)) for i in range(0, count, 100)]
    with ProcessPoolExecutor(2, mp_context=SERVER) as pool:
        jobs = [pool.submit(try_images, chunk) for chunk in chunks]
        for chunk, job in zip(chunks, jobs, strict=True):
            try:
                timed_outcomes = job.result()
            except BrokenProcessPool as error:
                outcomes.append((WRONG, f"images {chunk}: {error!r}"))
                break
            outcomes += [outcome for outcome, _ in timed_outcomes]
            slowest = max(seconds for _, seconds in timed_outcomes)
            if slowest > 20:
                outcomes.append((WRONG, f"images {chunk}: one took {slowest:.0f} s"))
    return outcomes


# ---- random flags --------------------------------------------------------------------------------

NUMBERS = ["0", "-1", "1", "3", "nan", "inf", "-0.5", "1e-3", "1e30", "x", "99999999999"]
FLAGS: dict[str, list[str]] = {
    **{name: NUMBERS for name in (
        "levels.fit.learning_rate", "levels.fit.adam_beta1", "level_1.fit.adam_beta2",
        "level_2.fit.adam_weight_decay", "levels.fit.max_grad_norm", "levels.fit.ema_decay",
        "levels.fit.lr_warmup_share", "levels.fit.time_share", "prior.fit.learning_rate",
        "prior.fit.adam_weight_decay", "levels.class_dropout", "prior.class_dropout",
        "level_2.refit.fit.learning_rate", "level_2.refit.code_noise",
        "levels.gumbel_temperature_decay",
        "levels.codebook_decay", "levels.commitment_weight", "eval_fraction",
    )},
    **{name: ["0", "-1", "1", "2", "3", "x", "2.5", "7", "null", "[2]"] for name in (
        "gradient_accumulation_steps", "levels.fit.lr_warmup_steps", "logging_steps",
        "validation_steps", "num_validation_images", "checkpointing_steps",
        "checkpoints_total_limit", "seed", "dataloader_num_workers", "levels.fit.max_train_steps",
        "level_1.fit.train_batch_size", "prior.fit.max_train_steps", "prior.fit.train_batch_size",
        "num_levels", "levels.codebook_size", "level_1.codebook_dim", "level_2.hidden_size",
        "levels.num_layers", "levels.encoder_hidden_size", "levels.encoder_num_layers",
        "level_1.block_kernel_size", "level_2.num_groups", "level_2.refit.fit.max_train_steps",
        "level_2.refit.hidden_size", "level_1.refit.num_layers", "level_2.refit.num_groups",
        "resolution", "max_train_samples", "max_eval_samples", "max_image_pixels",
        "shuffle_buffer_size", "levels.pixel_logit_rank", "level_3.hidden_size", "levels",
        "level_1", "prior", "data", "run", "level_1.refit", "level_1.fit",
    )},
    "level_1.downsample": ["2", "4", "3", "8"],
    "levels.quantizer": ["vq", "fsq", "gumbel", "lfq"],
    "levels.gumbel_temperature": ["[1,0.5]", "[0.5,1]", "1", "[1,0.5,0.2]", "x"],
    "levels.class_conditional": ["true", "false", "x", ""],
    "levels.decoder_type": ["conv", "causal_lm", "transformer", "auxiliary", "spiral"],
    "levels.ordering": ["lattice", "factorized", "masked", "raster", "diagonal", "spiral"],
    "level_1.ordering": ["raster", "masked"],
    "level_1.refit.decoder_type": ["conv", "causal_lm", "transformer"],
    "level_1.refit.ordering": ["masked", "raster", "spiral", "factorized"],
    "level_2.refit.code_noise_kind": ["near", "random", "far"],
    "levels.pixel_distribution": ["categorical", "logistic_mixture", "normal"],
    "levels.fit.optimizer": ["muon", "adamw", "sgd"],
    "levels.fit.lr_scheduler": ["linear", "constant", "cosine", "piecewise_constant", "wave"],
    "mixed_precision": ["no", "bf16", "fp16", "fp4"],
    "report_to": ["none", "wandb", "tensorboard", "nobody"],
    "max_train_minutes": ["0.01", "0", "-1", "nan", "x"],
    "phase": ["all", "level_2", "level_1", "prior", "evaluate", "level_9", "refit_level_1", "x"],
    "resume_from_checkpoint": ["latest", "/nowhere", "checkpoint-level_2-00000001"],
    "config": ["/nowhere.yaml", "/dev/null", "."],
    "label_column": ["label", "image", "nothing"],
    "image_column": ["image", "label", "nothing"],
    "train_split": ["train", "test", "nothing"],
    "eval_split": ["test", "train", "nothing"],
    "dataset_name": ["digits", "/nowhere", "no such name"],
    "train_data_dir": ["/nowhere", "/dev/null", "."],
    "finest_level": ["/nowhere", "."],
    "extend": ["/nowhere", "."],
    **{name: ["true", "false", "x", ""] for name in (
        "levels.fit.use_ema", "random_flip", "center_crop", "streaming", "overwrite_cache",
        "overwrite_output_dir",
    )},
    "prior.backbone_config": ["{}", "[]", "5", "{", '{"model_type":"t5"}', '{"model_type":"no"}',
                     '{"model_type":"gpt2","n_embd":8,"n_head":2,"n_layer":1}',
                     '{"model_type":"gpt2","n_embd":7,"n_head":2,"n_layer":1}',
                     '{"model_type":"llama","hidden_size":-4}', '{"model_type":5}'],
}  # fmt: skip
SMALL = (
    "--levels.hidden_size 8 --levels.encoder_hidden_size 8 --levels.num_layers 1 "
    "--levels.codebook_size 8 --levels.fit.max_train_steps 3 --prior.fit.max_train_steps 3 "
    "--validation_steps 3 --num_validation_images 2 --logging_steps 1 "
    "--max_train_samples 100 --max_eval_samples 20 --report_to none "
    '--prior.backbone_config {"model_type":"llama","hidden_size":16,"intermediate_size":16,'
    '"num_hidden_layers":1,"num_attention_heads":2}'
).split()


def try_flags(script, number: int, folder: Path) -> Outcome:
    rng, chosen = random.Random(number), []
    for name in rng.sample(sorted(FLAGS), rng.choice([1, 1, 2, 3])):
        chosen += [f"--{name}", *rng.choice(FLAGS[name]).split()]
    if "--streaming" in chosen:  # one image alone would pass thousands of times
        chosen += ["--max_train_samples", "100"]
    words, output_dir = f"flags {number}: {' '.join(chosen)}", folder / str(number)
    try:
        script.main([*SMALL, "--output_dir", str(output_dir), *chosen])
    except ValueError as error:
        left = [path.name for path in output_dir.glob("level_*")]
        if str(error).count("\n") > 3 or len(str(error)) > 1000:
            return WRONG, f"{words}: {error!r}"
        if left and "--phase" not in chosen:
            return WRONG, f"{words}: found after training {left}: {error}"
        return REFUSED, words
    except SystemExit as error:  # what no number or no flag is
        return (REFUSED, words) if error.code == 2 else (WRONG, f"{words}: exit {error.code}")
    except FloatingPointError:  # by the loss, which is watched
        return REFUSED, words
    except BaseException as error:
        return WRONG, f"{words}: {type(error).__name__}: {error}"
    finally:
        torch.set_num_threads(1)
    if not (output_dir / "metrics.json").is_file():
        return (WELL, words) if "--phase" in chosen else (WRONG, f"{words}: no metrics")
    metrics = json.loads((output_dir / "metrics.json").read_text())
    bits = metrics["bits_per_dim"]
    finest = max(name for name in bits if name.startswith("level"))
    is_right = all(math.isfinite(b) for b in bits.values()) and 0 < bits[finest] < 8.5
    shutil.rmtree(output_dir)
    return (WELL, words) if is_right else (WRONG, f"{words}: {bits}")


def attack_flags(count: int) -> list[Outcome]:
    script, outcomes = load_script("train"), []
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in tqdm(range(count), desc="flags"):
            with quiet():
                outcomes.append(try_flags(script, number, Path(folder)))
    return outcomes


# ---- tampered pipelines --------------------------------------------------------------------------


def try_pipeline(number: int, source: Path, folder: Path, images, expected: dict) -> Outcome:
    shutil.copytree(source, folder)
    words = f"pipeline {number}: {tamper(folder, random.Random(number))}"
    try:
        pipe = ProgressiveVAEPipeline.from_pretrained(folder)
        actual = pipe.bits_per_dim(images)
    except ValueError as error:
        is_clear = str(error).count("\n") <= 3
        return (REFUSED, words) if is_clear else (WRONG, f"{words}: {error!r}")
    except BaseException as error:
        return WRONG, f"{words}: {type(error).__name__}: {error}"
    finally:
        shutil.rmtree(folder)
    if ".json: " in words:  # a changed field of a config may change the result
        return WELL, words
    is_same = actual.keys() == expected.keys() and all(
        math.isclose(actual[name], bits, rel_tol=1e-5) for name, bits in expected.items()
    )
    return (WELL, words) if is_same else (WRONG, f"{words}: {actual}, not {expected}")


def attack_pipelines(count: int) -> list[Outcome]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (4, 3, 5, 7), generator=generator, dtype=torch.uint8)
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        pipe = tiny_pipeline()
        pipe.save_pretrained(source)
        expected = pipe.bits_per_dim(images)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in tqdm(range(count), desc="pipelines"):
            with quiet():
                begun = time.perf_counter()
                outcome = try_pipeline(number, source, Path(folder) / "run", images, expected)
            if (seconds := time.perf_counter() - begun) > 10:
                outcome = WRONG, f"{outcome[1]} took {seconds:.0f} s"
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
            if grown > 500:
                outcome = WRONG, f"{outcome[1]} took {grown:.0f} MB"
                memory += 1024 * grown
            outcomes.append(outcome)
    return outcomes


# ---- damaged streams -----------------------------------------------------------------------------


def damaged_stream(streams: list[bytes], foreign: list[bytes], rng: random.Random) -> bytes:
    """Of a codec: other bits, other lengths, other models, other arithmetic, a later version."""
    stream = rng.choice(streams)
    match rng.randrange(6):
        case 0:
            return rng.randbytes(rng.randint(0, 80))
        case 1:
            return stream[:8] + rng.randbytes(rng.randint(0, 80))
        case 2:
            return rng.choice(foreign)
        case 3:
            return stream[:3] + rng.randbytes(1) + stream[4:]
        case 4:
            return bytes([rng.randrange(256)]) + stream[1:]
    return damage(bytearray(stream), rng)


def attack_streams(count: int) -> list[Outcome]:
    generator, outcomes = torch.Generator().manual_seed(0), list[Outcome]()
    images = torch.randint(256, (8, 3, 5, 7), generator=generator, dtype=torch.uint8)
    pipe, other = tiny_pipeline(), tiny_pipeline()
    with torch.no_grad():
        other.level_3.decoder.stem.weight.mul_(1.01)
    streams, foreign = pipe.compress(images), other.compress(images)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in tqdm(range(count), desc="streams"):
        rng = random.Random(number)
        stream = damaged_stream(streams, foreign, rng)
        num_levels = rng.choice([None, None, None, 1, 2, 3])
        words, begun = f"stream {number} to level {num_levels}", time.process_time()
        try:
            image = pipe.decompress(stream, num_levels)[0]
            # The first levels alone cannot be verified; any image will do.
            is_right = num_levels is not None or any(torch.equal(image, x) for x in images)
            outcome = (WELL, words) if is_right else (WRONG, f"{words}: another image")
        except ValueError as error:
            is_clear = str(error).startswith("expected ")
            outcome = (REFUSED, words) if is_clear else (WRONG, f"{words}: {error!r}")
        except BaseException as error:
            outcome = WRONG, f"{words}: {error!r}"
        if (seconds := time.process_time() - begun) > 1:
            outcome = WRONG, f"{outcome[1]} took {seconds:.1f} s"
        outcomes.append(outcome)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
    return [*outcomes, (WRONG, f"streams took {grown:.0f} MB")] if grown > 100 else outcomes


# ---- archives ------------------------------------------------------------------------------------


def write_folder(folder: Path, count: int, columns: int = 1):
    """Images of `columns` tiles, whose streams are short, and files that are stored as they are."""
    write_samples(folder, count, columns=columns)
    (folder / "notes.txt").write_text("no image " * 50)
    (folder / "noise").write_bytes(random.Random(0).randbytes(300))


def known_tiles(path: Path, stack) -> bytes:
    """A journal of all tiles of an archive, so that its undamaged streams are not decoded again."""
    journal = archive.Journal(path.with_name("known"))
    coder = archive.TileCoder(stack, True, journal)
    with ArchiveReader(path) as reader:
        files = [file for part in archive.stored_files(reader) for file in part]
        images = [reader.read(x.start, x.row.length) for x in files if x.row.method == archive.PNG]
    codes = [code for image in images for code in image_from_bytes(image, (5, 7))[2]]
    coder.decode([code.body for code in codes if code.kind == STREAM], None)
    assert journal.file is not None
    journal.file.close()
    return journal.path.read_bytes()


def attack_archives(count: int) -> list[Outcome]:
    """Damaged archives: files come back as they were, or are named."""
    outcomes = []
    stack = tiny_pipeline().stack
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        write_folder(place / "folder", 4)
        pack_folder(stack, place / "folder", place / "archive")
        contents = (place / "archive").read_bytes()
        journal = known_tiles(place / "archive", stack)
        num_files = len([*(place / "folder").iterdir()])
        for number in tqdm(range(count), desc="archives"):
            rng = random.Random(number)
            (place / "damaged").write_bytes(damage(bytearray(contents), rng))
            (place / "back").mkdir()
            (place / "back" / archive.JOURNAL).write_bytes(journal)
            words = f"archive {number}"
            try:
                result = archive.unpack(stack, place / "damaged", place / "back")
            except ValueError as error:
                is_clear = str(error).startswith("expected ")
                outcome = (REFUSED, words) if is_clear else (WRONG, f"{words}: {error!r}")
            except BaseException as error:
                outcome = WRONG, f"{words}: {error!r}"
            else:
                lines = differences(place / "folder", place / "back")
                wrong = [line for line in lines if not line.endswith("missing")]
                extra = num_files - len(lines) - len([*(place / "back").iterdir()])
                is_named = len(lines) <= len(result.failed) or result.failed
                outcome = (LEFT_OUT if result.failed else WELL), words
                if wrong or extra or not is_named and lines:
                    outcome = WRONG, f"{words}: {lines}, {result}"
            outcomes.append(outcome)
            shutil.rmtree(place / "back", ignore_errors=True)
    return outcomes


def pack_and_unpack(place: Path):
    """What an attack by kills runs in a process of its own."""
    torch.set_num_threads(1)
    codec.MAX_IMAGES = 8  # more batches, and parts of a batch or two
    packing.PART_TILES = 12
    stack = tiny_pipeline().stack
    if not (place / "archive").exists():
        pack_folder(stack, place / "folder", place / "archive")
    unpack_folder(stack, place / "archive", place / "back")


def attack_archives_by_kills(count: int, seed: int = 0) -> list[Outcome]:
    """Archives that are killed up to five times while they are packed and unpacked."""
    outcomes: list[Outcome] = []
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name) / "place"
        write_folder(place / "folder", 12, 8)
        _disturb(place, 0, rng)
        expected = (place / "archive").read_bytes()
        while len(outcomes) < count:
            shutil.rmtree(place / "back")
            (place / "archive").unlink()
            kills, exit_code = _disturb(place, 5, rng)
            words = f"{kills} kills, exit code {exit_code}"
            is_right = (
                exit_code == 0
                and (place / "archive").read_bytes() == expected
                and differences(place / "folder", place / "back") == []
                and not [*place.glob("*.*"), *(place / "back").glob(".*")]
            )
            outcomes += [(WELL if is_right else WRONG, words)] * max(1, kills)
            if exit_code:
                break
    return outcomes


def _disturb(place: Path, max_kills: int, rng: random.Random) -> tuple[int, int]:
    """The number of kills until a process ended by itself, and its exit code."""
    kills = 0
    while True:
        process = SERVER.Process(target=pack_and_unpack, args=(place,))
        process.start()
        if kills < max_kills:
            _kill_later(process, place, rng)
        process.join()
        if process.exitcode != -signal.SIGKILL:
            return kills, process.exitcode
        kills += 1


def _kill_later(process, place: Path, rng: random.Random):
    """Kill a process some time after it has written something new."""

    def state():
        paths = [*place.glob("archive*"), *place.glob("back/*")]
        return sum(path.stat().st_size for path in paths if path.exists())

    before = state()
    while process.is_alive() and state() == before:
        time.sleep(0.005)
    process.join(rng.expovariate(2))
    process.kill()
    process.join()


# ---- kills ---------------------------------------------------------------------------------------


def attack_by_kills(count: int, seed: int = 0) -> list[Outcome]:
    """Runs that are killed up to five times each: the weights of one that nobody disturbed."""
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        output_dir = Path(folder) / "undisturbed"
        finish(start(output_dir), output_dir)
        expected, run = weights(output_dir), 0
        while len(outcomes) < count:
            output_dir = Path(folder) / f"run-{run}"
            kills = disturb(output_dir, min(5, count - len(outcomes)), seed + run)
            outcome = WELL if weights(output_dir) == expected else WRONG
            outcomes += [(outcome, f"run {run}, {kills} kills")] * kills
            run += 1
    return outcomes


ATTACKS = {
    "images": ("damaged image files of eight formats", attack_images),
    "streams": ("damaged streams of the codec", attack_streams),
    "archives": ("damaged archives", attack_archives),
    "archive_kills": ("kills of packing and unpacking", attack_archives_by_kills),
    "flags": ("random sets of flags of `examples/train.py`", attack_flags),
    "pipelines": ("tampered pipelines", attack_pipelines),
    "kills": ("kills of a run that is then resumed", attack_by_kills),
}
