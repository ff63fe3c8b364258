"""Outputs for the test rows, of a model in torch or of a bundle through the runtime that will serve it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

import msgspec
import numpy as np

from runtimes.artifact import Artifact, Shelf
from runtimes.batch import BATCH_MAX
from runtimes.clock import SystemClock
from runtimes.contract import InferRequest, Predictor, Site
from runtimes.onnx import Onnx
from training.contract import (
    Answers,
    Array,
    Classes,
    Examples,
    Flags,
    Inputs,
    Preferred,
    Scores,
    Targets,
    Values,
)
from training.evaluation import language
from training.evaluation.measures import with_slices
from training.models.generator import Generator
from training.progress import progress

LOG = logging.getLogger("training")

_ROWS_AT_ONCE = 64
_CALL_S_MAX = 600.0
_DRIFT_ROWS = 256
_TIMED_CALLS = 8
_TIMED_ROUNDS = 5
_TIMED_S = 0.5
"""Of CPU, at least: a fast model's calls are too short for five rounds to tell."""


class Measured(msgspec.Struct, frozen=True):
    scores: Scores
    outputs: dict[str, Array]
    """What the measures were taken of, [n, …]."""


def score(it: Generator | Artifact, examples: Examples, *, title: str, base: object = None) -> Measured:
    """Measure a bundle through the runtime that will serve it.

    On top of the measures: `batch_drift`, how far any number that a bundle answers moves when rows go through it
    together; `size_bytes`. Generators are the exception: their engine lives in an environment of its own, so a bundle
    is read back from its files and run by transformers, in the number formats that the engine is started with; an
    adapter on the weights of `base`.
    """
    outputs = _outputs(it, examples, base)
    scores = with_slices(examples, outputs)
    if isinstance(it, Artifact):
        scores["size_bytes"] = float(it.manifest.size_bytes)
        if it.manifest.format == "onnx":
            scores["batch_drift"] = _drift(it, examples)
    LOG.info("%s: %s", title, "  ".join(f"{name} {value:.4g}" for name, value in scores.items() if "[" not in name))
    return Measured(scores, outputs)


def sliced(name: str, examples: Examples, outputs: dict[str, Array]) -> tuple[str, Targets, dict[str, Array]]:
    """The measure of `name`, or of `name[column=value]`, and the targets and outputs that it is taken of."""
    measure_name, _, part = name.partition("[")
    if not part:
        return name, examples.targets, outputs
    column, _, value = part.removesuffix("]").partition("=")
    chosen = np.nonzero(examples.slices[column] == value)[0]
    return measure_name, examples.targets.take(chosen), {key: array[chosen] for key, array in outputs.items()}


def closeness(one: Measured, other: Measured) -> Scores:
    """How close a bundle's embeddings are to those of the fp32 one: mean and least cosine over the texts."""
    cosines = np.concatenate([(one.outputs[side] * other.outputs[side]).sum(1) for side in ("left", "right")])
    return {"cosine_to_fp32": float(cosines.mean()), "cosine_to_fp32_least": float(cosines.min())}


def speedups(before: Artifact, after: Artifact, examples: Examples) -> Scores:
    """How many times as fast the second is, at one row and at eight: medians of rounds in which they take turns, on
    one thread; and its milliseconds for one row."""
    return asyncio.run(_speedups(before, after, examples))


async def _speedups(before: Artifact, after: Artifact, examples: Examples) -> Scores:
    scores: Scores = {}
    async with _opened(before) as first, _opened(after) as second:
        for rows in (1, 8):
            chosen = np.random.default_rng(rows).permutation(len(examples))[: _TIMED_CALLS * rows]
            calls = [
                {name: np.asarray(array[part]) for name, array in _flat(examples).items()}
                for part in np.split(chosen, range(rows, len(chosen), rows))
                if len(part)
            ]
            first_s, second_s = list[float](), list[float]()
            order = [(second, second_s), (first, first_s)]
            while len(first_s) < _TIMED_ROUNDS or sum(first_s + second_s) * len(calls) < _TIMED_S:
                for it, took_s in order:
                    took_s.append(await _timed(it, calls))
                order.reverse()  # because who goes first finds the caches as the other left them
            scores[f"speedup_{rows}"] = float(np.median(np.divide(first_s, second_s)))
            if rows == 1:
                scores["latency_ms"] = float(np.median(second_s) * 1000)
    return scores


async def _timed(runtime: Predictor, calls: Sequence[Inputs]) -> float:
    """Seconds for a call, CPU of this process, mean over these."""
    started_s = time.process_time()
    for call in calls:
        await _ask(runtime, call)
    return (time.process_time() - started_s) / len(calls)


def _flat(examples: Examples) -> Inputs:
    """What single calls are made of."""
    if "left" in examples.inputs:
        return {"text": examples.inputs["left"]}
    return examples.inputs


def _outputs(it: Generator | Artifact, examples: Examples, base: object) -> dict[str, Array]:
    targets = examples.targets
    if isinstance(targets, Answers | Preferred):
        generator = it if isinstance(it, Generator) else as_generator(it, base)
        with generator.asked() as network:
            return language.outputs(network, generator.tokenizer, examples)
    assert isinstance(it, Artifact)
    if isinstance(targets, Values) and targets.meaning == "similarity":
        return {side: served(it, {"text": examples.inputs[side]})["embedding"] for side in ("left", "right")}
    outputs = served(it, examples.inputs)
    if isinstance(targets, Classes | Flags) and it.manifest.labels != targets.labels:
        outputs["scores"] = _aligned(outputs["scores"], it.manifest.labels, targets.labels)
    return outputs


def _aligned(scores: Array, labels: tuple[str, ...], wanted: tuple[str, ...]) -> Array:
    """The columns of these labels; nothing for those that it does not know."""
    found = np.zeros((len(scores), len(wanted)), scores.dtype)
    for at, label in enumerate(wanted):
        if label in labels:
            found[:, at] = scores[:, labels.index(label)]
    return found


def _drift(it: Artifact, examples: Examples) -> float:
    inputs = {name: array[:_DRIFT_ROWS] for name, array in _flat(examples).items()}
    together, alone = (served(it, inputs, batch_max=rows) for rows in (BATCH_MAX, 1))
    numbers = [name for name, array in together.items() if array.dtype.kind == "f"]
    return max(float(np.abs(together[name] - alone[name]).max()) for name in numbers)


def served(bundle: Artifact, inputs: Inputs, *, batch_max: int | None = None) -> dict[str, Array]:
    """What the runtime answers: the same code, tokenizer and graph that will serve the artifact."""

    async def ask() -> dict[str, Array]:
        parts = []
        async with _opened(bundle, batch_max=batch_max) as runtime:
            count = len(next(iter(inputs.values())))
            with progress("evaluate", count) as advance:
                for start in range(0, count, _ROWS_AT_ONCE):
                    piece = {name: array[start : start + _ROWS_AT_ONCE] for name, array in inputs.items()}
                    parts.append(await _ask(runtime, piece))
                    advance(min(_ROWS_AT_ONCE, count - start))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    return asyncio.run(ask())


async def _ask(runtime: Predictor, inputs: Inputs) -> dict[str, Array]:
    arrays = {name: np.asarray(it) for name, it in inputs.items()}
    reply = await runtime.infer(InferRequest(arrays, deadline_s=SystemClock().now_s() + _CALL_S_MAX))
    return dict(reply.outputs)


class _opened:
    """The bundle's runtime, as the gateway would open it, on one thread."""

    def __init__(self, bundle: Artifact, *, batch_max: int | None = None) -> None:
        site = Site(model=bundle.manifest.name, replica="evaluation", state=bundle.path, shelf=Shelf(bundle.path))
        self._runtime = Onnx(artifact=str(bundle.path), provider="cpu", batch_max=batch_max).build(site)

    async def __aenter__(self) -> Predictor:
        await self._runtime.open()
        return self._runtime

    async def __aexit__(self, *_: object) -> None:
        await self._runtime.aclose()


def as_generator(bundle: Artifact, base: object) -> Generator:
    """A bundle as torch runs it; an adapter on the weights of `base`."""
    if bundle.manifest.format == "adapter":
        from training.llm import lora

        assert isinstance(base, Generator)
        return base.wearing(lora.read(bundle.path))
    import transformers  # seconds, which only generators need

    network = transformers.AutoModelForCausalLM.from_pretrained(bundle.path, dtype="auto", local_files_only=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(bundle.path, local_files_only=True)
    return Generator(network.eval(), tokenizer, tokens_max=bundle.manifest.tokens_max or tokenizer.model_max_length)
