"""Stochastic gradient descent, so that a run which was killed goes on to the bit.

All that changes from step to step is in the checkpoint: weights, the optimizer's state, and the best epoch so far. The
order of the rows, the learning rate and the random numbers of a step are functions of the seed and the step.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from training.contract import Array, Classes, Examples, Targets
from training.errors import Diverged, RecipeError
from training.evaluation.measures import measure
from training.model import Model, predict, row_losses, weighted
from training.progress import Advance, progress
from training.run import Run
from training.spec.trainers import Gradient
from training.trainers import batches, schedule
from training.trainers.team import Team

LOG = logging.getLogger("training")


def fit(spec: Gradient, model: Model, examples: Examples, run: Run) -> Model:
    """The model, having learnt. Raises Diverged, and Interrupted when somebody wants to stop."""
    if not isinstance(model, Model):
        raise RecipeError("the trainer 'gradient' does not fit a generator; see llm-sft")
    learnt, held = _validation(spec, len(examples), run)
    if spec.probe is not None:
        model = spec.probe.fit(model, examples.take(learnt), run)
    if spec.lora is None:
        model.load_state_dict(Descent(spec, model, examples, learnt, held, run).descend())
    else:
        from training.trainers import lora  # peft takes seconds to import

        model = lora.attach(spec.lora, model)
        model.load_state_dict(Descent(spec, model, examples, learnt, held, run).descend())
        model = lora.merge(model)
    model.eval()
    return model


class Descent:
    """One model's way down: by some of the examples, measured with some others."""

    def __init__(self, spec: Gradient, model: Model, examples: Examples, learnt: Array, held: Array, run: Run) -> None:
        self.spec = spec
        self.model = model
        self.examples = examples
        self.learnt = learnt
        self.held = examples.take(held) if len(held) else None
        self.run = run
        self.costs = model.costs(examples.inputs)[learnt]
        self.weights = _weights(spec, examples.targets.take(learnt))
        self.per_epoch = math.ceil(len(learnt) / spec.batch)
        self.steps = max(1, round(spec.epochs * self.per_epoch))
        self.optimizer = _optimizer(spec, model)
        self.team = Team()
        self.forward = self.team.joined(model)
        self.step = 0
        self.best: dict[str, Tensor] = {}
        self.best_loss = math.inf
        self.waited = 0

    def descend(self) -> dict[str, Tensor]:
        """All steps; returns the weights to keep."""
        self._restore()
        with progress("train", (self.steps - self.step) * self.spec.batch) as advance:
            return self._go_on(advance)

    def _go_on(self, advance: Advance) -> dict[str, Tensor]:
        saved_s = time.monotonic()
        started_s, started_at, losses = saved_s, self.step, [0.0]
        LOG.info("train: %d rows, %d steps of %d", len(self.learnt), self.steps, self.spec.batch)
        while self.step < self.steps and not self._patience_is_over():
            number, at = divmod(self.step, self.per_epoch)
            if at == 0 or self.step == started_at:
                order = batches.epoch(self.costs, self.spec.batch, seed=self.run.derived("epoch", number))
                losses = []
            losses.append(self._learn(order[at]))
            self.step += 1
            advance(self.spec.batch)
            if self.step % self.per_epoch == 0 or self.step == self.steps:
                self._epoch_is_over(number + 1, losses, started_s, started_at)
            if self.team.first and (self.run.stopping or time.monotonic() - saved_s > self.spec.checkpoint_s):
                self.run.checkpoint(self._state())
                saved_s = time.monotonic()
        return self.best or self.model.state_dict()

    def _learn(self, chosen: Array) -> float:
        """One step on these rows; returns their mean loss."""
        batch = self.examples.take(self.learnt[chosen])
        own, counts = self.team.share(np.arange(len(chosen)))
        place = () if self.team.first else (self.team.rank,)
        torch.manual_seed(self.run.derived("step", self.step, *place))
        self.model.train()
        rate = schedule.share(self.spec, self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["highest"] * rate
        # The whole batch by every process, so that a row is changed alike however many there are.
        chance = np.random.default_rng(self.run.derived("augment", self.step))
        changed = self.model.augment(batch.inputs, chance)
        rows = msgspec.structs.replace(batch, inputs=dict(changed)).take(own)
        outputs = self.forward(*self.model.feed(rows.inputs))
        whole = self.weights[chosen]
        weights = torch.from_numpy(whole[own])
        # Its part of the whole batch's mean; the gradients of all are then averaged, so it counts once for each.
        part = float(weights.sum()) / float(whole.sum()) if counts else 0.0
        loss = self._loss(outputs, rows, weights) * part
        value = self.team.total(float(loss.detach()))
        if not math.isfinite(value):
            if self.team.first and all(bool(it.isfinite().all()) for it in self.model.parameters()):
                self.run.checkpoint(self._state())
            raise Diverged(
                f"the loss is {value} at step {self.step} of {self.steps}: lower trainer.rate; the last good weights "
                f"are in {self.run.folder / 'checkpoint.pt'}"
            )
        self.optimizer.zero_grad(set_to_none=True)
        (loss * self.team.size).backward()
        if self.spec.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.spec.clip)
        self.optimizer.step()
        return value

    def _loss(self, outputs: tuple[Tensor, ...], rows: Examples, weights: Tensor) -> Tensor:
        if self.spec.smoothing and isinstance(rows.targets, Classes):
            logits = self.model.named(outputs)["logits"]
            wanted = torch.from_numpy(rows.targets.index)
            losses = nn.functional.cross_entropy(logits, wanted, reduction="none", label_smoothing=self.spec.smoothing)
            return weighted(losses, weights)
        return self.model.loss(outputs, rows.targets, weights)

    def _epoch_is_over(self, number: int, losses: list[float], started_s: float, started_at: int) -> None:
        values: dict[str, float] = {"loss": float(np.mean(losses))}
        if self.held is not None:
            values |= self.team.told(self._validated() if self.team.first else None)
            self._compare(values["validation_loss"])
        if not self.team.first:
            return
        speed = (self.step - started_at) * self.spec.batch / (time.monotonic() - started_s)
        self.run.note(step=self.step, epoch=number, **values)
        left_s = (self.steps - self.step) * self.spec.batch / speed
        LOG.info(
            "train: epoch %d of %g  %s  %.0f rows/s, %.0f s left", number, self.spec.epochs,
            "  ".join(f"{name} {it:.4f}" for name, it in values.items()), speed, left_s,
        )  # fmt: skip

    def _validated(self) -> dict[str, float]:
        """Loss and measures of the rows that are held back."""
        assert self.held is not None
        outputs = predict(self.model, self.held.inputs)
        with torch.inference_mode():
            tensors = {name: torch.from_numpy(it) for name, it in outputs.items()}
            loss = float(row_losses(tensors, self.held.targets).mean())
        scores = measure(self.held.targets, outputs)
        return {"validation_loss": loss} | {f"validation_{name}": it for name, it in scores.items()}

    def _compare(self, held_loss: float) -> None:
        if held_loss >= self.best_loss:
            self.waited += 1
            return
        self.best_loss, self.waited = held_loss, 0
        if self.spec.keep == "best":
            self.best = copy.deepcopy(self.model.state_dict())

    def _patience_is_over(self) -> bool:
        return self.spec.patience is not None and self.waited >= self.spec.patience

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": (self.best_loss, self.waited, self.best),
        }

    def _restore(self) -> None:
        state = self.run.kept()
        if self.team.first:
            self.run.rewind(state["step"] if state else -1)
        if state is None:
            return
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best_loss, self.waited, self.best = state["best"]
        LOG.info("train: going on after step %d of %d", self.step, self.steps)


def _validation(spec: Gradient, count: int, run: Run) -> tuple[Array, Array]:
    """The rows to learn from, and those to validate with: their numbers, since what is taken of a table is a copy."""
    if not spec.validation:
        if spec.keep == "best" or spec.patience is not None:
            raise RecipeError("trainer.keep = 'best' and trainer.patience need trainer.validation: a share of the rows")
        return np.arange(count), np.array([], np.int64)
    order = np.random.default_rng(run.derived("validation")).permutation(count)
    held = max(1, round(spec.validation * count))
    return np.sort(order[held:]), np.sort(order[:held])


def _weights(spec: Gradient, targets: Targets) -> Array:
    """What each row counts, float32 [n], one on average."""
    weights = np.ones(len(targets), np.float32)
    if spec.balanced:
        if not isinstance(targets, Classes):
            raise RecipeError("trainer.balanced is for rows with one label each")
        index = targets.index
        counts = np.bincount(index, minlength=len(targets.labels))
        weights *= (len(index) / (np.count_nonzero(counts) * np.maximum(counts, 1)))[index]
    return weights


def _optimizer(spec: Gradient, model: Model) -> torch.optim.Optimizer:
    """Matrices decay, vectors (biases, norms) do not; what is new may learn faster."""
    new = {id(it) for it in model.head()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            rate = spec.head_rate if spec.head_rate is not None and id(parameter) in new else spec.rate
            groups.setdefault((rate, spec.decay if parameter.ndim > 1 else 0.0), []).append(parameter)
    listed = [
        {"params": members, "lr": rate, "highest": rate, "weight_decay": decay}
        for (rate, decay), members in groups.items()
    ]
    if spec.optimizer == "sgd":
        return torch.optim.SGD(listed, momentum=spec.momentum, fused=True)
    # Fused, all of a parameter's numbers are read and written once: a ninth of the time for an encoder's.
    return torch.optim.AdamW(listed, fused=True)
