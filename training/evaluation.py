"""Measures of models and of bundles, and the gate between a bundle and the shelf."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from runtimes.artifact import Artifact, Shelf
from runtimes.batch import BATCH_MAX
from runtimes.clock import SystemClock
from runtimes.contract import InferRequest, Site
from runtimes.onnx import Onnx
from training import data, model
from training.recipe import GateFailed, RecipeError
from training.spec import Task

LOG = logging.getLogger(__name__)

Scores = dict[str, float]
Array = np.ndarray[Any, np.dtype[Any]]

MEASURES: dict[Task, tuple[str, ...]] = {
    "classify": ("accuracy", "macro_f1", "batch_drift"),
    "embed": ("spearman", "cosine_to_fp32", "cosine_to_fp32_least", "batch_drift"),
    "generate": ("nll",),
}

_ROWS_AT_ONCE = 64
_CALL_S_MAX = 600.0


def score(it: model.Model | Artifact, rows: list[data.Row], *, reference: model.Model | None = None) -> Scores:
    """Measure a model in torch, or a bundle through the runtime that will serve it.

    accuracy and macro_f1 in 0..1; spearman, the rank correlation of cosine and the rows' similarity;
    cosine_to_fp32, mean and least over the texts, of a bundle to `reference`; batch_drift, how far any number that a
    bundle answers moves when texts go through it together; nll in nats per token of the answers.

    Generators are the exception: their engine lives in an environment of its own, so a bundle is read back from its
    files and run by transformers, in the arithmetic and number formats that the engine is started with.
    """
    if isinstance(it, model.Generator):
        scores = {"nll": nll(it.network, it.tokenizer, rows)}
    elif isinstance(it, Artifact) and it.manifest.task == "generate":
        scores = {"nll": nll(*_read_generator(it.path), rows)}
    elif isinstance(it, model.Classifier):
        scores = _score_classes(it, it.labels, rows)
    elif isinstance(it, Artifact) and it.manifest.task == "classify":
        scores = _score_classes(it, it.manifest.labels, rows)
    else:
        scores = _score_pairs(it, rows, reference)
    LOG.info(
        "evaluation: %s %s",
        "after " if isinstance(it, Artifact) else "before",
        "  ".join(f"{name} {value:.4f}" for name, value in scores.items()),
    )
    return scores


def check(gate: dict[str, float], task: Task) -> None:
    """Raise RecipeError for a bound on something that is not measured."""
    for name in gate:
        measure, _ = _bound(name)
        if measure not in MEASURES[task]:
            raise RecipeError(f"the gate's {name!r} is a bound on nothing; a {task!r} recipe measures {MEASURES[task]}")


def require(gate: dict[str, float], before: Scores, after: Scores) -> None:
    """Raise GateFailed naming every bound that does not hold."""
    failed = []
    for name, limit in gate.items():
        measure, kind = _bound(name)
        value = {
            "_min": lambda m: after[m],
            "_max": lambda m: after[m],
            "_drop_max": lambda m: before[m] - after[m],
            "_increase_max": lambda m: after[m] - before[m],
        }[kind](measure)
        if not (value >= limit if kind == "_min" else value <= limit):  # a NaN fails either way
            failed.append(f"{name} is {limit:g}, measured {value:.4f}")
    if failed:
        raise GateFailed(f"nothing was published: {'; '.join(failed)}")


def accuracy(predicted: Sequence[str], wanted: Sequence[str]) -> float:
    """Share of rows that are right."""
    return float(np.mean([it == want for it, want in zip(predicted, wanted, strict=True)]))


def macro_f1(predicted: Sequence[str], wanted: Sequence[str]) -> float:
    """Mean over the labels, of those wanted or predicted, of 2·hits / (predicted + wanted)."""
    values = []
    for label in sorted({*predicted, *wanted}):
        hits = sum(it == want == label for it, want in zip(predicted, wanted, strict=True))
        values.append(2 * hits / (sum(it == label for it in predicted) + sum(it == label for it in wanted)))
    return float(np.mean(values))


def spearman(left: Sequence[float], right: Sequence[float]) -> float:
    """Pearson's correlation of the ranks; ties share their mean rank."""
    return float(np.corrcoef(_ranks(left), _ranks(right))[0, 1])


def nll(network: Any, tokenizer: Any, rows: list[data.Row]) -> float:
    """Mean negative log likelihood in nats per token of the answers, the end-of-turn token included, prompts not."""
    total, count = 0.0, 0
    for row in rows:
        assert isinstance(row, data.Turn)
        turn = [{"role": "user", "content": row.prompt}]
        prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        start = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
        answer = tokenizer(row.answer + "<|im_end|>", add_special_tokens=False, return_tensors="pt").input_ids
        with torch.inference_mode():
            logits = network(torch.cat([start, answer], 1)).logits[0, start.shape[1] - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(logits.float(), answer[0], reduction="sum"))
        count += answer.shape[1]
    return total / count


_KINDS = ("_drop_max", "_increase_max", "_min", "_max")


def _bound(name: str) -> tuple[str, str]:
    for kind in _KINDS:
        if name.endswith(kind):
            return name.removesuffix(kind), kind
    raise RecipeError(f"the gate's {name!r} is no bound: end it with one of {', '.join(_KINDS)}")


def _score_classes(it: model.Classifier | Artifact, labels: tuple[str, ...], rows: list[data.Row]) -> Scores:
    labelled = [row for row in rows if isinstance(row, data.Labelled)]
    texts = [row.text for row in labelled]
    best = _outputs(it, texts).argmax(1)
    predicted, wanted = [labels[at] for at in best], [row.label for row in labelled]
    return {"accuracy": accuracy(predicted, wanted), "macro_f1": macro_f1(predicted, wanted)} | _drift(it, texts)


def _score_pairs(it: model.Embedder | Artifact, rows: list[data.Row], reference: model.Model | None) -> Scores:
    pairs = [row for row in rows if isinstance(row, data.Pair)]
    texts = [row.left for row in pairs] + [row.right for row in pairs]
    embeddings = _outputs(it, texts)
    left, right = embeddings[: len(pairs)], embeddings[len(pairs) :]
    scores = {"spearman": spearman((left * right).sum(1), [row.similarity for row in pairs])}
    if reference is not None:
        cosines = (embeddings * _outputs(reference, texts)).sum(1)
        scores |= {"cosine_to_fp32": float(cosines.mean()), "cosine_to_fp32_least": float(cosines.min())}
    return scores | _drift(it, texts)


def _drift(it: model.Model | Artifact, texts: list[str]) -> Scores:
    if not isinstance(it, Artifact):
        return {}
    together, alone = (asyncio.run(_served(it, texts, batch_max=rows)) for rows in (BATCH_MAX, 1))
    return {"batch_drift": float(np.abs(together - alone).max())}


def _outputs(it: model.Model | Artifact, texts: list[str]) -> Array:
    if isinstance(it, Artifact):
        return asyncio.run(_served(it, texts))
    assert isinstance(it, model.Embedder | model.Classifier)
    return model.outputs(it, texts)


async def _served(bundle: Artifact, texts: list[str], *, batch_max: int | None = None) -> Array:
    """What the runtime answers: the same code, tokenizer and graph that will serve the artifact."""
    site = Site(model=bundle.manifest.name, replica="evaluation", state=bundle.path, shelf=Shelf(bundle.path))
    clock = SystemClock()
    runtime = Onnx(artifact=str(bundle.path), provider="cpu", batch_max=batch_max).build(site, clock=clock)
    output = "scores" if bundle.manifest.task == "classify" else "embedding"
    parts = []
    try:
        await runtime.open()
        for start in range(0, len(texts), _ROWS_AT_ONCE):
            inputs = {"text": np.array(texts[start : start + _ROWS_AT_ONCE], dtype=object)}
            reply = await runtime.infer(InferRequest(inputs, deadline_s=clock.now_s() + _CALL_S_MAX))
            parts.append(reply.outputs[output])
    finally:
        await runtime.aclose()
    stacked: Array = np.concatenate(parts)
    return stacked


def _read_generator(folder: Path) -> tuple[Any, Any]:
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True)
    return network.eval(), transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _ranks(values: Sequence[float]) -> Array:
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Array = np.asarray(last - (counts - 1) / 2)[inverse]
    return ranks
