"""Scripts: errors as one line on stderr, tables, and atomic saving of images. Needs no extra."""

import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import PIL.Image
import torch
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError

from .paths import check_writable, replacing

# Errors of a command's input or its machine; safetensors raises `SafetensorError` for a full disk.
# All other errors are bugs and keep their tracebacks.
ERRORS = (ValueError, OSError, FloatingPointError, HTTPError, SafetensorError)
INTERRUPTED = 130  # the exit code of shells after Ctrl-C


def run_script(main: Callable[[list[str]], None]):
    """Run a script's `main` on the command line.

    An error of the input, the network, the disk or the memory ends the script with one line on
    stderr and exit code 1, Ctrl-C with one line and exit code 130. Characters that the console
    cannot encode are printed as question marks.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        print("interrupted: files with their final names are complete", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except (torch.OutOfMemoryError, MemoryError) as error:
        sys.exit(f"error: out of memory, use smaller batches or fewer images: {one_line(error)}")
    except ImportError as error:
        if (error.name or "").startswith(__package__):  # a bug of this package
            raise
        sys.exit(f"error: {one_line(error)}")
    except ERRORS as error:
        sys.exit(f"error: {one_line(error)}")


def one_line(error: BaseException) -> str:
    """Return the message of an error without line breaks, or the name of its class."""
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines if line) or type(error).__name__


def print_markdown_table(rows: Sequence[Sequence[str]]):
    """Print rows of cells as a table in Markdown; the first row is its header."""
    header, *lines = (f"| {' | '.join(row)} |" for row in rows)
    print("\n".join([header, "|---" * len(rows[0]) + "|", *lines]))


def check_image_path(path: str, name: str):
    """Raise a `ValueError` unless an image can be saved as `path`; to be called before sampling."""
    if _image_format(path) is None:
        raise ValueError(f"expected {name} with the suffix of an image file, as .png, got {path!r}")
    if Path(path).is_dir():
        raise ValueError(f"expected {name} to be a file, got the folder {path!r}")
    check_writable(Path(path).parent, name)


def save_image(image: PIL.Image.Image, path: str | Path):
    """Save an image atomically, in the format of the suffix of `path`."""
    with replacing(Path(path)) as temporary:
        image.save(temporary, _image_format(path))


def _image_format(path: str | Path) -> str | None:
    image_format = PIL.Image.registered_extensions().get(Path(path).suffix.lower())
    return image_format if image_format in PIL.Image.SAVE else None


def default_device() -> torch.device:
    """Return the device on which scripts run a pipeline: CUDA where it is available, else CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
