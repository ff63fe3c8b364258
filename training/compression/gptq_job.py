"""What runs in the environment `compress`: one job file, one compressed model. See `training.compression.gptq`.

Stands alone: there is nothing of ours in that environment. Its last line, on stdout, is what it did, as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def main(file: str) -> None:
    job = json.loads(Path(file).read_text())
    import torch
    import transformers
    from datasets import Dataset
    from llmcompressor import oneshot

    torch.manual_seed(job["seed"])
    torch.set_num_threads(job["threads"])
    transformers.utils.logging.disable_progress_bar()
    # In the numbers that it is saved in: else the embedding would stay fp32, and double the file.
    model = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.bfloat16, local_files_only=True)
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in job["rows"]]
    began_s = time.monotonic()
    oneshot(
        model=model,
        dataset=Dataset.from_list(rows),
        recipe=modifiers(job),
        max_seq_length=max(len(ids) for ids in job["rows"]),
        num_calibration_samples=len(rows),
    )
    model.save_pretrained(job["out"], save_compressed=True)
    print(json.dumps({"calibration_s": time.monotonic() - began_s}))  # noqa: T201


def modifiers(job: dict[str, Any]) -> list[Any]:
    """llm-compressor's own recipe of it. lm_head stays as it is: it is the embedding, tied."""
    from llmcompressor.modifiers.quantization import GPTQModifier

    if job["scheme"] == "w8a8":
        from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

        gptq = GPTQModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])
        return [SmoothQuantModifier(smoothing_strength=job["smoothing"]), gptq]
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": job["group"]}
    return [GPTQModifier(ignore=["lm_head"], config_groups={"group_0": {"targets": ["Linear"], "weights": weights}})]


if __name__ == "__main__":
    main(sys.argv[1])
