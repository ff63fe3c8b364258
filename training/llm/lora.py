"""Low-rank adapters: put on a model, saved in peft's layout, merged into the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import peft

from training.llm.spec import Lora

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def attach(network: Any, spec: Lora) -> Any:
    """The model with fresh adapters, which alone can learn. They start at zero, so it answers as before."""
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules="all-linear",
    )
    return peft.get_peft_model(network, config)


def save(adapted: Any, folder: Path, *, base: str) -> None:
    """Write the adapter, nothing else, in peft's layout. `base` is the model it fits, by the name people know."""
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # a form that nobody has filled in
    config = msgspec.json.decode((folder / CONFIG).read_bytes())
    # A set became a list: in an order of its own each time, and equal adapters would not be equal files.
    config["target_modules"] = sorted(config["target_modules"])
    config["base_model_name_or_path"] = base
    (folder / CONFIG).write_bytes(msgspec.json.format(msgspec.json.encode(config, order="sorted"), indent=2))


def load(network: Any, folder: Path) -> Any:
    """The model with a saved adapter, to be asked and not to be trained."""
    return peft.PeftModel.from_pretrained(network, folder, local_files_only=True).eval()


def merged(adapted: Any) -> Any:
    """The plain model whose weights hold what the adapter had learnt; the adapted one is used up."""
    return adapted.merge_and_unload()
