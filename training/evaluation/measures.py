"""Measures: pure functions of what was put out and what was wanted.

one label a row      accuracy, macro_f1, log_loss in nats, ece (15 bins of equal width, https://arxiv.org/abs/1706.04599),
                     and for two labels auc, of the second one; where wrong answers have a cost, the mean of it, each
                     row being answered with what costs least by its scores
a label for refusing  on top of that, see `training.evaluation.scope`
any number of labels auprc, auc and macro_f1 at 0.5: means over the labels with 40 known positives or more; of each such
                     label auprc_LABEL, auc_LABEL and recall_LABEL at 0.5, and of every label with known negatives
                     false_alarms_LABEL, the share of them that reaches 0.5
ratings              rmse, mae
choices              recall_20 and ndcg_20 of what the user liked among the first 20 items, means over the users who
                     liked any; coverage, the share of the items liked by anyone that somebody is shown there
pairs of texts       spearman, the rank correlation of cosine and wanted similarity
answers              nll in nats per token
two answers          preference_accuracy, how often the better one is the likelier, and of the model without its adapter
                     preference_accuracy_base; reward_accuracy, how often the better one gained more on that, and
                     reward_margin, how much more, in nats
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from training.contract import (
    Answers,
    Array,
    Choices,
    Classes,
    Examples,
    Flags,
    Preferred,
    Scoped,
    Scores,
    Targets,
    Values,
)
from training.evaluation import scope

MEASURES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "Classes": ("accuracy", "macro_f1", "log_loss", "ece", "auc", "cost"),
        "Scoped": ("accuracy", "macro_f1", "log_loss", "ece", *scope.NAMES),
        "Flags": ("auprc", "auc", "macro_f1"),
        "rating": ("rmse", "mae"),
        "similarity": ("spearman", "cosine_to_fp32", "cosine_to_fp32_least"),
        "Choices": ("recall_20", "ndcg_20", "coverage"),
        "Answers": ("nll",),
        "Preferred": ("preference_accuracy", "preference_accuracy_base", "reward_accuracy", "reward_margin"),
    }
)
"""Kind of target → what is measured."""

LESS_IS_BETTER = frozenset({"log_loss", "ece", "cost", "rmse", "mae", "nll"})

OF_EACH_FLAG = ("auprc", "auc", "recall", "false_alarms")

POSITIVES_MIN = 40
"""Known positives that a label needs before anything is claimed of it."""
ECE_BINS = 15
_TOP = 20


def names(examples: Examples) -> set[str]:
    """Everything that may be measured of such rows; what there are too few rows for is not."""
    targets = examples.targets
    found = {*MEASURES[kind(targets)]}
    if isinstance(targets, Flags):
        found |= {f"{name}_{label}" for name in OF_EACH_FLAG for label in targets.labels}
    slices = [f"[{column}={value}]" for column, values in examples.slices.items() for value in set(values)]
    return found | {f"{name}{part}" for name in found for part in slices}


def kind(targets: Targets) -> str:
    """Key of MEASURES."""
    return targets.meaning if isinstance(targets, Values) else type(targets).__name__


def measure(targets: Targets, outputs: Mapping[str, Array]) -> Scores:
    """Every measure that such targets have, from the model's outputs [n, …]."""
    match targets:
        case Scoped():
            return classes(targets, outputs["scores"]) | scope.scope(targets, outputs["scores"])
        case Classes():
            return classes(targets, outputs["scores"])
        case Flags():
            return flags(targets, outputs["scores"])
        case Values(meaning="rating"):
            error = outputs["value"].ravel() - targets.values
            return {"rmse": float(np.sqrt(np.mean(error**2))), "mae": float(np.mean(np.abs(error)))}
        case Values():
            cosine = (outputs["left"] * outputs["right"]).sum(1)
            return {"spearman": spearman(cosine, targets.values)}
        case Choices():
            return choices(targets, outputs["item"])
        case Answers():
            return {"nll": float(outputs["nll"].sum() / outputs["tokens"].sum())}
        case Preferred():
            return preferred(outputs)
    raise TypeError(f"nothing is known to measure of {type(targets).__name__}")


def classes(targets: Classes, scores: Array) -> Scores:
    """`scores` [n, labels], each row a distribution."""
    best = scores.argmax(1)
    right = best == targets.index
    chosen = scores[np.arange(len(scores)), targets.index]
    found = {
        "accuracy": float(right.mean()),
        "macro_f1": macro_f1(best, targets.index, len(targets.labels)),
        "log_loss": float(-np.log(np.maximum(chosen, 1e-12)).mean()),
        "ece": ece(scores.max(1), right),
    }
    if len(targets.labels) == 2:
        found["auc"] = auc(scores[:, 1], targets.index == 1)
    if targets.costs:
        # What costs least to answer is what would cost most to miss, each weighed by how likely it is.
        losses = np.array(targets.costs)
        answered = (scores * losses).argmax(1)
        found["cost"] = float(np.where(answered == targets.index, 0, losses[targets.index]).mean())
    return found


def with_slices(examples: Examples, outputs: Mapping[str, Array]) -> Scores:
    """Every measure, and the same of each slice: `<measure>[<column>=<value>]`."""
    scores = measure(examples.targets, outputs)
    for column, values in examples.slices.items():
        for value in sorted(set(values)):
            chosen = np.nonzero(values == value)[0]
            part = measure(examples.targets.take(chosen), {name: array[chosen] for name, array in outputs.items()})
            scores |= {f"{name}[{column}={value}]": number for name, number in part.items()}
    return scores


def flags(targets: Flags, scores: Array) -> Scores:
    """`scores` [n, labels], each a probability of its own."""
    found: Scores = {}
    columns = []
    for at, label in enumerate(targets.labels):
        known = ~np.isnan(targets.values[:, at])
        wanted, given = targets.values[known, at] == 1, scores[known, at]
        flagged = given >= 0.5
        if not wanted.all():
            found[f"false_alarms_{label}"] = float(flagged[~wanted].mean())
        if wanted.sum() >= POSITIVES_MIN and not wanted.all():
            hits = (wanted & flagged).sum()
            f1 = 2 * hits / (wanted.sum() + flagged.sum())
            columns.append((auprc(given, wanted), auc(given, wanted), f1))
            of_label = (*columns[-1][:2], hits / wanted.sum())
            found |= {f"{name}_{label}": float(it) for name, it in zip(OF_EACH_FLAG, of_label, strict=False)}
    if columns:
        found |= {name: float(it) for name, it in zip(MEASURES["Flags"], np.mean(columns, axis=0), strict=True)}
    return found


def preferred(outputs: Mapping[str, Array]) -> Scores:
    """`chosen` and `rejected` [n], logarithms of probabilities; rewards are what was gained on the base's."""
    ends = ("", "_base") if "chosen_base" in outputs else ("",)
    found = {
        f"preference_accuracy{end}": float((outputs[f"chosen{end}"] > outputs[f"rejected{end}"]).mean()) for end in ends
    }
    if "chosen_base" in outputs:
        chosen, rejected = (outputs[name] - outputs[f"{name}_base"] for name in ("chosen", "rejected"))
        found |= {
            "reward_accuracy": float((chosen > rejected).mean()),
            "reward_margin": float((chosen - rejected).mean()),
        }
    return found


def choices(targets: Choices, items: Array) -> Scores:
    """`items` [n, 20 or more], the best first."""
    gains = 1 / np.log2(np.arange(2, _TOP + 2))
    recalls, ndcgs = [], []
    liked = targets.liked()
    shown = items[:, :_TOP]
    for wanted, found in zip(liked, shown.tolist(), strict=True):
        if wanted:
            hits = np.array([it in wanted for it in found])
            recalls.append(hits.sum() / len(wanted))
            ndcgs.append(gains[hits].sum() / gains[: len(wanted)].sum())
    known = frozenset().union(*liked)
    if not known:
        return {}
    return {
        "recall_20": float(np.mean(recalls)),
        "ndcg_20": float(np.mean(ndcgs)),
        "coverage": len(known & set(shown.ravel().tolist())) / len(known),
    }


def macro_f1(predicted: Array, wanted: Array, labels: int) -> float:
    """Mean over the labels, of those wanted or predicted, of 2·hits / (predicted + wanted)."""
    hits = np.bincount(wanted[predicted == wanted], minlength=labels)
    both = np.bincount(predicted, minlength=labels) + np.bincount(wanted, minlength=labels)
    there = both > 0
    return float((2 * hits[there] / both[there]).mean())


def ece(confidence: Array, right: Array) -> float:
    """Expected calibration error: how far, on average over the rows, what a model believes is from how often that is
    right."""
    bins = np.minimum((confidence * ECE_BINS).astype(int), ECE_BINS - 1)
    gap = np.bincount(bins, confidence, ECE_BINS) - np.bincount(bins, right, ECE_BINS)
    return float(np.abs(gap).sum() / len(confidence))


def auc(scores: Array, positive: Array) -> float:
    """Chance that a positive row is scored above a negative one, ties half; NaN if there are not both."""
    count = int(positive.sum())
    if count in (0, len(positive)):
        return float("nan")
    above = ranks(scores)[positive].sum() - count * (count + 1) / 2
    return float(above / (count * (len(positive) - count)))


def auprc(scores: Array, positive: Array) -> float:
    """Average precision: the sum over falling thresholds of precision times gained recall."""
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(positive[order])
    ends = np.append(np.nonzero(np.diff(scores[order]))[0], len(order) - 1)  # equal scores are one threshold
    recall = hits[ends] / hits[-1]
    return float((np.diff(recall, prepend=0.0) * hits[ends] / (ends + 1)).sum())


def spearman(left: Array, right: Array) -> float:
    """Pearson's correlation of the ranks; ties share their mean rank."""
    return float(np.corrcoef(ranks(left), ranks(right))[0, 1])


def ranks(values: Array) -> Array:
    """From one; ties share their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    found: Array = np.asarray(last - (counts - 1) / 2)[inverse]
    return found
