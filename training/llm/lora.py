"""Low-rank adapters on language models: put on, taken off as the files that are published, merged into the weights."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import peft

from runtimes.adapter import CONFIG, WEIGHTS
from training.models.generator import Files
from training.spec.llm import Adapter


def attach(network: Any, spec: Adapter) -> Any:
    """The model with a fresh adapter, which alone can learn. It starts at zero, so it answers as before."""
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules="all-linear",
    )
    return peft.get_peft_model(network, config)


@contextmanager
def saving() -> Iterator[None]:
    """Peft looks on a hub whether the vocabulary has grown, and warns where there is none; here it never grows."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Could not find a config file in")
        yield


def files(adapted: Any) -> Files:
    """The adapter that is on a model."""
    with tempfile.TemporaryDirectory(prefix="headrace-adapter-") as name:
        folder = Path(name)
        with saving():
            adapted.save_pretrained(folder)
        config = msgspec.json.decode((folder / CONFIG).read_bytes())
        weights = (folder / WEIGHTS).read_bytes()
    # A set became a list, in another order each time, and equal adapters would not be equal files.
    config["target_modules"] = sorted(config["target_modules"])
    return {CONFIG: msgspec.json.format(msgspec.json.encode(config, order="sorted"), indent=2), WEIGHTS: weights}


@contextmanager
def worn(network: Any, adapter: Files) -> Iterator[Any]:
    """The model with that adapter on while the block lasts, to be asked and not to be trained."""
    with tempfile.TemporaryDirectory(prefix="headrace-adapter-") as name:
        for file, content in adapter.items():
            (Path(name) / file).write_bytes(content)
        adapted = peft.PeftModel.from_pretrained(network, name, local_files_only=True).eval()
    try:
        yield adapted
    finally:
        adapted.unload()


def read(folder: Path) -> Files:
    """Of an artifact."""
    return {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}
