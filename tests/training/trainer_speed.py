"""Rows a second of our trainer beside Hugging Face's, with the same model, rows, batch and optimizer, in turns; a
measurement, not a test.

    python -P -m tests.training.trainer_speed [RECIPE] [STEPS] [ROUNDS]

CPU seconds of one core, tokenizing included on both sides. Hugging Face's is run twice: as it is by default, with rows
in random order, and with rows of like length together, as ours has them.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from training import catalogue
from training.contract import Classes, Examples
from training.model import Model
from training.run import Run
from training.spec.trainers import Gradient
from training.trainers import gradient

THEIRS = {"Hugging Face, random order": "random", "Hugging Face, by length": "group_by_length"}


def main(recipe: str = "intent", steps: str = "20", rounds: str = "3") -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    found = catalogue.with_files(catalogue.read(recipe))
    rows = found.data.load()
    assert isinstance(found.trainer, Gradient)
    spec = Gradient(epochs=1, rate=found.trainer.rate, batch=found.trainer.batch, decay=0.0)
    examples = rows.train.take(np.random.default_rng(0).permutation(len(rows.train))[: int(steps) * spec.batch])
    model = found.model.build(rows)
    took: dict[str, list[float]] = {it: [] for it in ("Headrace", *THEIRS)}
    for _ in range(int(rounds)):
        for name, seen in took.items():
            learning = copy.deepcopy(model)
            started_s = time.process_time()
            if name in THEIRS:
                theirs(spec, learning, examples, THEIRS[name])
            else:
                with tempfile.TemporaryDirectory() as folder:
                    gradient.fit(spec, learning, examples, Run(Path(folder), seed=0))
            seen.append(time.process_time() - started_s)
    for name, seen in took.items():
        ratio = np.median(np.array(seen) / np.array(took["Headrace"]))
        print(f"{name:<28}{len(examples) / np.median(seen):6.1f} rows/s of CPU   ours is {ratio:.2f} times as fast")


def theirs(spec: Gradient, model: Model, examples: Examples, order: str) -> None:
    """One epoch by transformers.Trainer."""
    assert isinstance(examples.targets, Classes)
    encoded = model.tokenizer.encode_batch(list(examples.inputs["text"]))
    rows = [
        {"input_ids": it.ids[: model.tokens_max], "labels": int(label)}
        for it, label in zip(encoded, examples.targets.index, strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, num_train_epochs=1, per_device_train_batch_size=spec.batch, learning_rate=spec.rate,
            weight_decay=0.0, max_grad_norm=spec.clip, train_sampling_strategy=order, use_cpu=True, report_to="none",
            save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        transformers.Trainer(Learner(model), arguments, train_dataset=rows, data_collator=padded).train()


class Learner(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """Our model as theirs wants it: it answers with its loss."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.model(input_ids, attention_mask)[1]
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def padded(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch, as wide as its longest row."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(it["input_ids"]) for it in rows], batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(it["input_ids"]), dtype=torch.int64) for it in rows], True)
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([it["labels"] for it in rows])}


if __name__ == "__main__":
    main(*sys.argv[1:])
