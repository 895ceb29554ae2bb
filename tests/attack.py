"""Attack the package with damaged images, streams and archives, random flags, tampered pipelines
and kills; count the outcomes.

    python tests/attack.py --images 10000 --streams 10000 --flags 500 --pipelines 200 --kills 40 \
        --archives 2000 --archive_kills 40

What goes wrong is printed, and the script ends with 1.
"""

import argparse
import sys
import time
from collections import Counter

import torch

import helpers.hub  # noqa: F401  # before others import huggingface_hub
from helpers.attacks import ATTACKS, LEFT_OUT, REFUSED, WELL, WRONG, Outcome


def row(what: str, outcomes: list[Outcome], seconds: float) -> str:
    counts = Counter(kind for kind, _ in outcomes)
    cells = [str(counts[kind]) for kind in (WELL, LEFT_OUT, REFUSED, WRONG)]
    return f"| {what} | {len(outcomes)} | {' | '.join(cells)} | {seconds:.0f} |"


def parse(words: list[str]) -> dict[str, int]:
    """Return the number of trials of each attack."""
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = {"images": 10_000, "streams": 10_000, "flags": 500, "pipelines": 200, "kills": 40}
    sizes |= {"archives": 2000, "archive_kills": 40}
    for name, count in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=count)
    return vars(parser.parse_args(words))


def main(words: list[str]) -> int:
    counts = parse(words)
    wrong = []
    print("| attack | tried | went well | left out, named | refused, in words | wrong | seconds |")
    print("|---" * 7 + "|")
    for name, (what, attack) in ATTACKS.items():
        if counts[name]:
            begun = time.perf_counter()
            outcomes = attack(counts[name])
            print(row(what, outcomes, time.perf_counter() - begun), flush=True)
            wrong += [words for kind, words in outcomes if kind == WRONG]
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
