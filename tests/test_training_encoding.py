"""Encoding in several processes: the order is kept, and neither a process nor its parent dies unnoticed."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from llmfast.documents import Part
from llmfast.tokenizers import CharTokenizer
from llmfast.training import encoding
from llmfast.training.encoding import Encoder, encode_all

TEXTS = [f"document {i}, " * (i % 7 + 1) for i in range(200)]
PARTS = [("train" if i % 3 else "validation", Part(text, ends=i % 5 > 0)) for i, text in enumerate(TEXTS)]


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_tokens_come_in_the_order_of_the_documents(monkeypatch, workers):
    monkeypatch.setattr(encoding, "BATCH", 100)
    tokenizer = CharTokenizer.train(TEXTS)
    pieces = list(encode_all(iter(PARTS), Encoder(tokenizer, "uint16", masked=False), workers))
    for side in ("train", "validation"):
        tokens = np.concatenate([piece.tokens for piece in pieces if piece.side == side])
        text = "".join(part.text + ("<|endoftext|>" if part.ends else "") for of, part in PARTS if of == side)
        assert tokens.dtype == np.uint16 and tokenizer.decode(tokens) == text
    assert sum(piece.bytes for piece in pieces) == sum(map(len, TEXTS))


class Deadly(CharTokenizer):
    def encode(self, text, allow_special=False):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_is_an_error_that_says_what_to_do(monkeypatch):
    monkeypatch.setattr(encoding, "BATCH", 100)
    with pytest.raises(MemoryError, match="an encoding process was killed.*fewer workers"):
        list(encode_all(iter(PARTS), Encoder(Deadly.train(TEXTS), "uint16", masked=False), 2))


STUCK = """
import os, sys, time
from llmfast.tokenizers import CharTokenizer
from llmfast.training import encoding
from llmfast.documents import Part

class Slow(CharTokenizer):
    def encode(self, text, allow_special=False):
        print(os.getpid(), flush=True)
        time.sleep(60)

encoding.BATCH = 1
parts = (("train", Part("text")) for _ in range(100))
list(encoding.encode_all(parts, encoding.Encoder(Slow.train(["text"]), "uint16", False), 2))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_processes_do_not_outlive_a_parent_that_is_killed():
    with subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        workers = {int(parent.stdout.readline()) for _ in range(2)}
        parent.kill()
    assert len(workers) == 2
    for _ in range(100):
        alive = [pid for pid in workers if os.path.exists(f"/proc/{pid}") and not _is_zombie(pid)]
        if not alive:
            break
        time.sleep(0.1)
    assert not alive


def _is_zombie(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True
