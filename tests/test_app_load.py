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
from test_app import ROOT, as_png, bomb, photograph  # noqa: E402


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def is_open(port: int) -> bool:
    with socket.socket() as found:
        return found.connect_ex(("127.0.0.1", port)) == 0


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


def ask(client, kind: str, folder: Path, number: int) -> str:
    """One request; "answer", or the message of an error."""
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    try:
        if kind == "draw":
            ones = [1.0] * 6
            client.predict("Bag", 8, number, *ones, api_name="/draw")
        elif kind == "redraw":
            client.predict(1, number, api_name="/redraw")
        else:
            client.predict(handle_file(str(folder / f"{kind}.png")), api_name="/look")
    except AppError as error:
        return str(error)
    return "answer"


@pytest.mark.slow
def test_a_thousand_requests(tmp_path, capsys):
    from gradio_client import Client

    rng, pictures = np.random.default_rng(0), tmp_path / "pictures"
    pictures.mkdir()
    photograph().save(pictures / "look.png")
    (pictures / "broken.png").write_bytes(as_png(photograph())[:300])
    (pictures / "bomb.png").write_bytes(bomb())
    kinds = rng.choice(["draw", "look", "redraw", "broken", "bomb"], 1000,
                       p=[0.5, 0.1, 0.2, 0.1, 0.1])  # fmt: skip
    found, seconds, lock = Counter(), list[float](), threading.Lock()
    with served(tmp_path) as (address, pid):
        users = [Client(address, verbose=False) for _ in range(8)]

        def visit(user: int, asked: list[str]):
            for number, kind in enumerate(asked):
                start = time.monotonic()
                said = ask(users[user], kind, pictures, number)
                with lock:
                    seconds.append(time.monotonic() - start)
                    found[kind, said[:60]] += 1

        def together(asked: list[list[str]]):
            threads = [threading.Thread(target=visit, args=each) for each in enumerate(asked)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        together([["look", "draw", "redraw", "bomb"]] * 8)  # it warms up
        seconds.clear()
        together([["look"]] * 8)  # what takes longest, all at once
        slowest = max(seconds)
        found.clear()
        sizes = []
        for part in np.array_split(kinds, 5):
            together([part[i::8].tolist() for i in range(8)])
            sizes.append(round(resident(pid)))
        with capsys.disabled():
            print(f"\n8 at once: {slowest:.1f} s; MB after each 200: {sizes}; {dict(found)}; "
                  f"slowest of all {max(seconds):.1f} s")  # fmt: skip
    assert sum(found.values()) == 1000
    for (kind, said), count in found.items():
        assert (said == "answer") == (kind in ("draw", "look", "redraw")), (kind, said, count)
    assert sizes[-1] < max(sizes[:2]) + 60  # it goes up and down by as much, of what is kept free
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 20e6
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert slowest < 10
