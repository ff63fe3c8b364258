"""Calibrated rounding by llm-compressor, in an environment of its own: it wants an older transformers than training.

What goes there and back are files: the model, the rows to calibrate with as token ids, and the compressed model in
compressed-tensors' layout. The other side of it is `gptq_job`.
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import os
import signal
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
from safetensors.torch import load_file

from runtimes.environment import EnvironmentFault, Environments
from training.contract import Examples, Rows, Weights
from training.data import conversations
from training.errors import RecipeError, TrainingError
from training.llm import render
from training.models.generator import Generator, to_compress
from training.run import Run
from training.spec.llm import Gptq

LOG = logging.getLogger("training")

JOB = Path(__file__).with_name("gptq_job.py")


class CompressionFailed(TrainingError):
    """Says why, and where it is told in full."""


def quantize(spec: Gptq, model: Generator, rows: Rows, run: Run) -> Weights:
    """The weights, rounded with what the training rows make of them. What the job read and said is left in the run's
    folder. Raises CompressionFailed."""
    network = to_compress(model, "gptq")
    check_groups(spec, network)
    chosen = calibration(spec, tokens(model.tokenizer, rows.train))
    python = _python()
    folder = run.scratch("gptq")
    network.save_pretrained(folder / "whole")
    model.tokenizer.save_pretrained(folder / "whole")  # it asks for one, though it is given token ids
    job = msgspec.to_builtins(spec) | {
        "model": str(folder / "whole"),
        "out": str(folder / "small"),
        "rows": chosen,
        "seed": run.derived("gptq") % 2**32,
        "threads": 1,
    }
    (folder / "job.json").write_bytes(msgspec.json.encode(job))
    LOG.info("compress: %s by GPTQ, calibrated with %d rows", spec.scheme, len(chosen))
    carry_out([str(python), "-P", str(JOB), str(folder / "job.json")], log=folder / "log.txt", s_max=spec.s_max)
    tensors = load_file(folder / "small" / "model.safetensors")
    config = msgspec.json.decode((folder / "small" / "config.json").read_bytes())
    return Weights(tensors, {name: config[name] for name in ("dtype", "quantization_config")})


def tokens(tokenizer: Any, examples: Examples) -> Iterator[list[int]]:
    """Rows as the model reads them, one after the other."""
    if "conversation" not in examples.inputs:
        raise RecipeError("compress = 'gptq' calibrates with conversations: set data.kind = 'conversations'")
    return (render.render(tokenizer, it).ids for it in conversations.decoded(examples))


def calibration(spec: Gptq, rows: Iterable[list[int]]) -> list[list[int]]:
    """The longest rows, cut: one of a few tokens says little of what a layer meets. Raises RecipeError without any."""
    longest = heapq.nlargest(spec.rows, rows, key=len)
    if not longest:
        raise RecipeError("compress = 'gptq' calibrates with training rows, and there are none: set data.train")
    return [row[: spec.tokens_max] for row in longest]


def check_groups(spec: Gptq, network: Any) -> None:
    """Raise RecipeError unless each row of each weight is a whole number of groups."""
    if spec.scheme != "w4a16":
        return
    for name, module in network.named_modules():
        width = getattr(module, "in_features", 0)
        if width % spec.group and name != "lm_head":
            fitting = " or ".join(str(it) for it in (128, 64, 32) if not width % it) or "none of those there are"
            raise RecipeError(
                f"compress.group is {spec.group}, and the {width} inputs of {name} are no multiple of it; "
                f"one that fits is {fitting}"
            )


def carry_out(argv: Sequence[str], *, log: Path, s_max: float) -> None:
    """Run it to its end, or to `s_max`; whatever it started ends with it. Raises CompressionFailed."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    env = kept | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with (
        log.open("wb") as told,
        subprocess.Popen(argv, stdout=told, stderr=told, env=env, start_new_session=True) as process,  # noqa: S603
    ):
        try:
            status = process.wait(s_max)
        except subprocess.TimeoutExpired:
            raise CompressionFailed(
                f"stopped after {s_max:g} s, see {log}: raise compress.s_max, or lower compress.rows or "
                "compress.tokens_max"
            ) from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if status:
        lines = [it for it in log.read_text(errors="replace").splitlines() if it.strip()]
        raise CompressionFailed(f"llm-compressor failed, see {log}: {lines[-1] if lines else 'it said nothing'}")


def _python() -> Path:
    try:
        return Environments(Path(os.environ.get("HEADRACE_STATE") or ".headrace")).python("compress")
    except EnvironmentFault as fault:
        raise CompressionFailed(str(fault)) from fault
