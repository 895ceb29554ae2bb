"""`examples/app.py` under load: a thousand requests, wrong files among them."""

import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gradio", reason='pip install -e ".[demo,codec]"')
from helpers.images import as_png, bomb, photograph  # noqa: E402
from helpers.processes import free_port  # noqa: E402
from helpers.scripts import ROOT  # noqa: E402


def is_open(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def resident(pid: int) -> float:
    """MB."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


@contextmanager
def served(folder: Path):
    """The page as a process of its own: its address and pid."""
    port, environ = free_port(), {**os.environ, "GRADIO_TEMP_DIR": str(folder)}
    words = [sys.executable, str(ROOT / "examples" / "app.py"), "--port", str(port)]
    with open(folder / "log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(words, env=environ, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 300
        while not is_open(port):
            assert process.poll() is None and time.monotonic() < end, (folder / "log").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.terminate()
        process.wait()


def request(client, kind: str, folder: Path, number: int) -> str:
    """One request; "answer", or the message of an error."""
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    try:
        if kind == "sample":
            ones = [1.0] * 6
            client.predict("Bag", 8, number, *ones, api_name="/sample")
        elif kind == "reconstruct":
            client.predict(1, number, api_name="/reconstruct")
        else:
            client.predict(handle_file(str(folder / f"{kind}.png")), api_name="/encode")
    except AppError as error:
        return str(error)
    return "answer"


@pytest.mark.slow
def test_a_thousand_requests(tmp_path, capsys):
    from gradio_client import Client

    rng, images = np.random.default_rng(0), tmp_path / "images"
    images.mkdir()
    photograph().save(images / "encode.png")
    (images / "broken.png").write_bytes(as_png(photograph())[:300])
    (images / "bomb.png").write_bytes(bomb())
    kinds = rng.choice(["sample", "encode", "reconstruct", "broken", "bomb"], 1000,
                       p=[0.5, 0.1, 0.2, 0.1, 0.1])  # fmt: skip
    answers, seconds, lock = Counter(), list[float](), threading.Lock()
    with served(tmp_path) as (address, pid):
        users = [Client(address, verbose=False) for _ in range(8)]

        def visit(user: int, requests: list[str]):
            for number, kind in enumerate(requests):
                start = time.monotonic()
                answer = request(users[user], kind, images, number)
                with lock:
                    seconds.append(time.monotonic() - start)
                    answers[kind, answer[:60]] += 1

        def run_together(requests: list[list[str]]):
            threads = [threading.Thread(target=visit, args=user) for user in enumerate(requests)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        run_together([["encode", "sample", "reconstruct", "bomb"]] * 8)  # warm-up
        seconds.clear()
        run_together([["encode"]] * 8)  # the longest requests
        slowest = max(seconds)
        answers.clear()
        sizes = []
        for part in np.array_split(kinds, 5):
            run_together([part[i::8].tolist() for i in range(8)])
            sizes.append(round(resident(pid)))
        with capsys.disabled():
            print(f"\n8 at once: {slowest:.1f} s; MB after each 200: {sizes}; {dict(answers)}; "
                  f"slowest of all {max(seconds):.1f} s")  # fmt: skip
    assert sum(answers.values()) == 1000
    for (kind, answer), count in answers.items():
        assert (answer == "answer") == (kind in ("encode", "sample", "reconstruct")), (
            kind,
            answer,
            count,
        )
    assert sizes[-1] < max(sizes[:2]) + 60  # memory of freed results varies by as much
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 20e6
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert slowest < 10
