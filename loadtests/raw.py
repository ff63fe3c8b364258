"""ONNX Runtime alone: a text classifier's graph in a loop, with nothing around it, as what serving it is measured by.

A program of its own, so that it has the machine as a server would have it: `python -m loadtests.raw FOLDER …` says what
it did as JSON. Texts are made into token ids before the clock starts, which servers do while it runs.
"""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from cyclopts import App

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

APP = App(name="raw", help="ONNX Runtime alone.", version_flags=[])


class Done(msgspec.Struct, frozen=True):
    """What the loop did."""

    rows: int
    batch_s: list[float]
    """How long each batch took."""
    start_s: float
    """`time.perf_counter`, which all processes of a machine share."""
    cpu_s: float


@APP.default
def raw(
    folder: Path,
    /,
    *,
    texts: Path,
    rows: int,
    duration_s: float,
    threads: int = 1,
    warmup_s: float = 1.0,
    seed: int = 1,
) -> None:
    """Run `model.onnx` on batches of `rows` texts for `duration_s`.

    Parameters
    ----------
    folder
        Of the artifact: model.onnx and tokenizer.json.
    texts
        A JSON list of texts.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # or it tells its makers about every model that it loads
    # Here, not above: whoever only reads what this did needs none of them.
    from onnxruntime import InferenceSession, SessionOptions
    from tokenizers import Tokenizer

    options = SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    encode = Tokenizer.from_file(str(folder / "tokenizer.json")).encode
    found = [encode(text).ids for text in msgspec.json.decode(texts.read_bytes(), type=list[str])]
    chance = random.Random(seed)  # noqa: S311 - repeatable is what it must be
    _loop(session, found, chance, rows=rows, duration_s=warmup_s)
    sys.stdout.buffer.write(msgspec.json.encode(_loop(session, found, chance, rows=rows, duration_s=duration_s)))


def _loop(
    session: InferenceSession, ids: list[list[int]], chance: random.Random, *, rows: int, duration_s: float
) -> Done:
    import numpy as np

    taken_s: list[float] = []
    start_s, cpu_s = time.perf_counter(), time.process_time()
    now_s = start_s
    while now_s < start_s + duration_s:
        batch = chance.choices(ids, k=rows)
        tokens = np.zeros((rows, max(map(len, batch))), np.int64)
        mask = np.zeros_like(tokens)
        for index, row in enumerate(batch):
            tokens[index, : len(row)] = row
            mask[index, : len(row)] = 1
        session.run(None, {"input_ids": tokens, "attention_mask": mask})
        since_s, now_s = now_s, time.perf_counter()
        taken_s.append(now_s - since_s)
    return Done(rows * len(taken_s), taken_s, start_s, time.process_time() - cpu_s)


if __name__ == "__main__":
    APP()
