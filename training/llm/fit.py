"""Fine-tuning by TRL: the loop around a step, the same for every trainer.

What was trained up to a checkpoint is trained: from there, the same rows and seed end at the same weights, to the bit,
as without the interruption. A loss that is no number ends the training and names the checkpoint before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import msgspec
import torch
import transformers
import trl
from transformers.trainer_utils import get_last_checkpoint

from training.llm import lora, packing, render
from training.llm.conversation import Conversation, Preference
from training.llm.spec import Dpo, Sft

CHECKPOINTS_KEPT = 2


class Diverged(RuntimeError):
    """The loss is no number any more. The message says at which step, and from where one can go on."""


class Stopped(Exception):
    """It was asked to end; there is a checkpoint of the last step."""


class Step(msgspec.Struct, frozen=True):
    """What there is to tell of a step."""

    step: int
    steps: int
    epoch: float
    measures: dict[str, float]
    """`loss`, `grad_norm`, `learning_rate` and what else the trainer measures."""


class Watch(msgspec.Struct, frozen=True):
    """Who looks at a training, and may end it."""

    say: Callable[[Step], None] = lambda step: None
    stop: Callable[[], bool] = lambda: False
    """Asked after every step."""


UNWATCHED = Watch()


def sft(
    spec: Sft,
    network: Any,
    tokenizer: Any,
    rows: Sequence[Conversation],
    *,
    folder: Path,
    seed: int,
    watch: Watch = UNWATCHED,
) -> Any:
    """The model with an adapter that has learnt the assistant's turns of the rows. Goes on from the last checkpoint in
    `folder`, if there is one. Raises Diverged and Stopped."""
    lines = packing.pack([render.render(tokenizer, row) for row in rows], tokens_max=spec.tokens_max)
    arguments = trl.SFTConfig(
        **_arguments(spec, folder, seed),
        per_device_train_batch_size=spec.batch,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = trl.SFTTrainer(
        model=_adapted(spec, network, seed),
        args=arguments,
        # The collator wants lines; a Dataset of one column keeps their place, and stays small.
        train_dataset=datasets.Dataset.from_dict({"line": list(range(len(lines)))}),
        data_collator=lambda rows: packing.collate([lines[row["line"]] for row in rows]),
        processing_class=tokenizer,
        callbacks=[_Watching(watch, folder)],
    )
    return _run(trainer, folder)


def dpo(
    spec: Dpo,
    network: Any,
    tokenizer: Any,
    rows: Sequence[Preference],
    *,
    folder: Path,
    seed: int,
    watch: Watch = UNWATCHED,
) -> Any:
    """The model with an adapter that finds the chosen answers likelier. As `sft` for the rest."""
    arguments = trl.DPOConfig(
        **_arguments(spec, folder, seed),
        per_device_train_batch_size=spec.batch,
        beta=spec.beta,
        max_length=spec.tokens_max,
    )
    trainer = trl.DPOTrainer(
        model=_adapted(spec, network, seed),
        args=arguments,
        train_dataset=datasets.Dataset.from_list([_pair(tokenizer, row) for row in rows]),
        processing_class=tokenizer,
        callbacks=[_Watching(watch, folder)],
    )
    return _run(trainer, folder)


def _pair(tokenizer: Any, row: Preference) -> dict[str, str]:
    prompt = render.text(tokenizer, row.prompt.messages, row.prompt, answer_next=True)
    return {"prompt": prompt, "chosen": row.chosen, "rejected": row.rejected}


def _adapted(spec: Sft | Dpo, network: Any, seed: int) -> Any:
    torch.manual_seed(seed)  # the adapter's first weights
    return lora.attach(network, spec.lora)


def _arguments(spec: Sft | Dpo, folder: Path, seed: int) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "seed": seed,
        "num_train_epochs": spec.epochs,
        "learning_rate": spec.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": spec.warmup,
        "save_steps": spec.checkpoint_steps,
        "save_total_limit": CHECKPOINTS_KEPT,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # else a loss that is no number is told as the last one that was
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": torch.cuda.is_available(),
        "gradient_checkpointing": False,  # a third more work, for memory that small models don't need
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def _run(trainer: Any, folder: Path) -> Any:
    trainer.remove_callback(transformers.PrinterCallback)
    last = get_last_checkpoint(folder) if folder.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    return trainer.model.eval()


class _Watching(transformers.TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    def __init__(self, watch: Watch, folder: Path) -> None:
        self._watch = watch
        self._folder = folder
        self._stopping = False

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        measures = {name: float(value) for name, value in (logs or {}).items() if isinstance(value, int | float)}
        if "loss" not in measures:
            return  # the summary at the end
        # The gradients' norm too: a step by gradients that are no numbers has spoilt the weights already.
        if not all(math.isfinite(measures[name]) for name in ("loss", "grad_norm") if name in measures):
            last = get_last_checkpoint(self._folder)
            raise Diverged(
                f"step {state.global_step}: the loss is {measures['loss']} and the gradients' norm "
                f"{measures.get('grad_norm')}; "
                + (f"the last good checkpoint is {last}" if last else "there is no checkpoint before it")
                + "; lower the trainer's learning_rate"
            )
        self._watch.say(Step(state.global_step, state.max_steps, state.epoch or 0.0, measures))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._watch.stop():
            self._stopping = control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._stopping:
            raise Stopped(f"stopped after step {state.global_step} of {state.max_steps}; a checkpoint holds it")
