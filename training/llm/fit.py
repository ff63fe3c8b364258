"""Fine-tuning by TRL: the loop around a step, the same for every trainer.

What was trained up to a checkpoint is trained: from there, the same rows and seed end at the same weights, to the bit,
as without the interruption. A loss that is no number ends the training and names the checkpoint before it.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
import trl

from training.contract import Examples
from training.data import conversations
from training.errors import Diverged, RecipeError
from training.llm import lora, packing, render
from training.models.generator import Generator
from training.run import Run
from training.spec.llm import Dpo, Sft

LOG = logging.getLogger("training")

_CHECKPOINTS_KEPT = 2
_SAID_EVERY = 10
"""Steps between two lines in the log."""


def sft(spec: Sft, model: Any, examples: Examples, run: Run) -> Generator:
    """The model having learnt the assistant's turns. Raises Diverged, and Interrupted when somebody wants to stop."""
    _check(model, examples, "sft")
    rows = (render.render(model.tokenizer, it) for it in conversations.decoded(examples))
    lines = packing.pack(rows, tokens_max=spec.tokens_max)
    LOG.info("train: %d conversations in %d lines of %d tokens", len(examples), len(lines), spec.tokens_max)
    folder = _folder(run)
    arguments = trl.SFTConfig(
        **_arguments(spec, folder, run),
        per_device_train_batch_size=spec.batch,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = trl.SFTTrainer(
        model=lora.attach(model.network, spec.adapter),
        args=arguments,
        # The collator wants lines; a Dataset of their numbers keeps their place, and stays small.
        train_dataset=datasets.Dataset.from_dict({"line": np.arange(len(lines))}),
        data_collator=lambda batch: packing.collate([lines[row["line"]] for row in batch]),
        processing_class=model.tokenizer,
        callbacks=[_Watching(run, folder)],
    )
    return _carry_out(trainer, spec, model, run, folder)


def dpo(spec: Dpo, model: Any, examples: Examples, run: Run) -> Generator:
    """The model having learnt which answers are preferred. As `sft` for the rest."""
    _check(model, examples, "dpo")
    folder = _folder(run)
    arguments = trl.DPOConfig(
        **_arguments(spec, folder, run),
        per_device_train_batch_size=spec.batch,
        beta=spec.beta,
        max_length=spec.tokens_max,
    )
    with _pairs(model.tokenizer, examples, run) as pairs:
        trainer = trl.DPOTrainer(
            model=lora.attach(model.network, spec.adapter),
            args=arguments,
            train_dataset=pairs,
            processing_class=model.tokenizer,
            callbacks=[_Watching(run, folder)],
        )
    # A copy of the adapter before it has learnt, as what the other is compared with: the model without any is the same.
    # And of a checkpoint with two, transformers reads back this one only.
    trainer.model.delete_adapter("ref")
    return _carry_out(trainer, spec, model, run, folder)


def _check(model: Any, examples: Examples, kind: str) -> None:
    if not isinstance(model, Generator):
        raise RecipeError(f"the trainer {kind!r} is for language models: set model.kind = 'generator'")
    if not len(examples):
        raise RecipeError(f"the trainer {kind!r} has no rows to learn from: set data.train, or give it more rows")


def _folder(run: Run) -> Path:
    """Where the trainer keeps its checkpoints; those of a run that was not to be gone on with are gone."""
    folder = run.folder / "checkpoints"
    if run.kept() is None:
        shutil.rmtree(folder, ignore_errors=True)
    return folder


@contextmanager
def _pairs(tokenizer: Any, examples: Examples, run: Run) -> Iterator[datasets.Dataset]:
    """Prompts with two answers each, on disk in the run's folder, where TRL puts their tokens too. When the block ends,
    both lose their names; what is mapped of them stays until the process ends, however it does."""

    def each() -> Iterator[dict[str, str]]:
        for row in conversations.preferences(examples):
            prompt = render.text(tokenizer, row.prompt.messages, row.prompt, answer_next=True)
            yield {"prompt": prompt, "chosen": row.chosen, "rejected": row.rejected}

    folder = run.scratch("pairs")
    try:
        # Its name in that folder, which else would be a hash of all that `each` knows of.
        yield datasets.Dataset.from_generator(each, cache_dir=str(folder), fingerprint="pairs")
    except datasets.exceptions.DatasetGenerationError as error:
        raise (error.__cause__ or error) from None  # a full disk is to be known as one
    finally:
        shutil.rmtree(folder)


def _arguments(spec: Sft | Dpo, folder: Path, run: Run) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "seed": run.derived("trainer") % 2**32,  # numpy takes no more
        "num_train_epochs": spec.epochs,
        "learning_rate": spec.rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": spec.warmup,
        "save_steps": spec.checkpoint_steps,
        "save_total_limit": _CHECKPOINTS_KEPT,
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


def _carry_out(trainer: Any, spec: Sft | Dpo, model: Generator, run: Run, folder: Path) -> Generator:
    trainer.remove_callback(transformers.PrinterCallback)
    kept = run.kept()
    run.rewind(kept["step"] if kept else -1)
    # Its random numbers must be the same, whether or not something asked for some before.
    transformers.set_seed(trainer.args.seed)
    with lora.saving():  # at each checkpoint
        trainer.train(resume_from_checkpoint=str(folder / kept["checkpoint"]) if kept else None)
    adapted = trainer.model.eval()
    # TRL's own way through the model, which a pickle can't hold.
    adapted.get_base_model().__dict__.pop("forward", None)
    if spec.adapter.merge:
        return Generator(adapted.merge_and_unload(), model.tokenizer, tokens_max=model.tokens_max)
    learnt = lora.files(adapted)
    return Generator(adapted.unload(), model.tokenizer, tokens_max=model.tokens_max, adapter=learnt)


class _Watching(transformers.TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Tells the run of every step, keeps its checkpoints, and ends it."""

    def __init__(self, run: Run, folder: Path) -> None:
        self._run = run
        self._folder = folder

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        measures = {name: float(value) for name, value in (logs or {}).items() if isinstance(value, int | float)}
        if "loss" not in measures:
            return  # the summary at the end
        # The gradients' norm too: a step by gradients that are no numbers has spoilt the weights already.
        if not all(math.isfinite(measures[name]) for name in ("loss", "grad_norm") if name in measures):
            kept = self._run.kept()
            raise Diverged(
                f"the loss is {measures['loss']} at step {state.global_step} of {state.max_steps}, and the gradients' "
                f"norm {measures.get('grad_norm')}; the weights of "
                + (f"step {kept['step']} are kept in the run's checkpoint" if kept else "no step before are kept")
                + ": lower trainer.rate and start over"
            )
        self._run.note(step=state.global_step, **measures)
        if state.global_step % _SAID_EVERY == 0 or state.global_step == state.max_steps:
            LOG.info("train: step %d of %d  loss %.4f", state.global_step, state.max_steps, measures["loss"])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save = control.should_save or self._run.stopping

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._run.checkpoint({"step": state.global_step, "checkpoint": f"checkpoint-{state.global_step}"})
