"""Calibrated compression by llm-compressor, in an environment of its own: it wants an older transformers than training.

What goes there and back are files: the model, the rows to calibrate with as token ids, and the compressed model in
compressed-tensors' layout. The other side of it is `compress_job`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from safetensors.torch import load_file

from runtimes.environment import EnvironmentFault, Environments
from training.llm.spec import Gptq

JOB = Path(__file__).with_name("compress_job.py")


class Failed(RuntimeError):
    """It did not work out. The message says why, and where it is told in full."""


def compress(
    spec: Gptq, network: Any, rows: Sequence[list[int]], *, state: Path, folder: Path, seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors of the compressed model, and what its config.json has to say of them. `folder` must be empty; what is
    left there is for people who want to know. Raises Failed."""
    chosen = calibration(spec, rows)
    check_groups(spec, network)
    python = _python(state)
    network.save_pretrained(folder / "whole")
    job = msgspec.to_builtins(spec) | {
        "model": str(folder / "whole"),
        "out": str(folder / "small"),
        "rows": chosen,
        "seed": seed,
        "threads": 1,
    }
    (folder / "job.json").write_bytes(msgspec.json.encode(job))
    _carry_out([str(python), "-P", str(JOB), str(folder / "job.json")], log=folder / "log.txt", s_max=spec.s_max)
    tensors = load_file(folder / "small" / "model.safetensors")
    config = msgspec.json.decode((folder / "small" / "config.json").read_bytes())
    return tensors, {"dtype": config["dtype"], "quantization_config": config["quantization_config"]}


def calibration(spec: Gptq, rows: Sequence[list[int]]) -> list[list[int]]:
    """The longest rows, cut: a row of a few tokens says little of what a layer meets. Raises Failed without any."""
    chosen = sorted(rows, key=len, reverse=True)[: spec.rows]
    if not chosen:
        raise Failed("compress.gptq calibrates with training rows, and there are none: set data.train")
    return [row[: spec.tokens_max] for row in chosen]


def check_groups(spec: Gptq, network: Any) -> None:
    """Raise Failed unless each row of each weight is a whole number of groups."""
    if spec.scheme != "w4a16":
        return
    for name, module in network.named_modules():
        width = getattr(module, "in_features", 0)
        if width % spec.group and name != "lm_head":
            fitting = [it for it in (128, 64, 32) if not width % it]
            raise Failed(
                f"compress.group is {spec.group}, and the {width} inputs of {name} are no multiple of it; "
                f"{' or '.join(map(str, fitting)) or 'no usual group'} would do"
            )


def _python(state: Path) -> Path:
    try:
        return Environments(state).python("compress")
    except EnvironmentFault as fault:
        raise Failed(str(fault)) from fault


def _carry_out(argv: list[str], *, log: Path, s_max: float) -> None:
    """Run it to its end, or to `s_max`; whatever it started ends with it."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    env = kept | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with (
        log.open("wb") as told,
        subprocess.Popen(argv, stdout=told, stderr=told, env=env, start_new_session=True) as process,  # noqa: S603
    ):
        try:
            status = process.wait(s_max)
        except subprocess.TimeoutExpired:
            raise Failed(
                f"compression was stopped after {s_max:.0f} s ({log}): raise compress.s_max, or lower compress.rows or "
                "compress.tokens_max"
            ) from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if status:
        lines = log.read_text(errors="replace").splitlines()
        raise Failed(f"compression failed ({log}): {next((it for it in reversed(lines) if it.strip()), 'no word')}")
