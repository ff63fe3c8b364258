"""Pictures of a run, as SVG that stands in a page without a network. The same numbers give the same bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from training.contract import Array
from training.evaluation.measures import ECE_BINS

mpl.rcParams.update(
    {
        "svg.hashsalt": "headrace", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9,
        "axes.spines.top": False, "axes.spines.right": False, "axes.prop_cycle": mpl.cycler(color=("#0b6e99", "#c2571a",
        "#4b8b3b", "#7a5195")),
    }
)  # fmt: skip

_LABELS_MAX = 30
"""Labels that a confusion matrix names along its edges."""


def curves(metrics: Sequence[dict[str, Any]], names: Sequence[str], title: str) -> str:
    """Measurements by epoch, one line per name."""
    figure, axes = _figure(4.6, 2.8)
    for name in names:
        points = [(it["epoch"], it[name]) for it in metrics if name in it]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=2.5, label=name.replace("_", " "))
    axes.set_xlabel("epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title(title, loc="left")
    axes.legend(frameon=False)
    return _svg(figure)


def confusion(wanted: Array, found: Array, labels: Sequence[str]) -> str:
    """Rows of each label by what was answered, as shares of the row."""
    counts = np.zeros((len(labels), len(labels)))
    np.add.at(counts, (wanted, found), 1)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = 3.4 if len(labels) <= 12 else 5.6
    figure, axes = _figure(size + 0.8, size)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(labels) <= _LABELS_MAX:
        axes.set_xticks(range(len(labels)), labels, rotation=90)
        axes.set_yticks(range(len(labels)), labels)
    if len(labels) <= 12:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                shade = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, f"{count:.0f}", ha="center", va="center", color=shade, fontsize=7)
    axes.set_xlabel("answered")
    axes.set_ylabel("true")
    figure.colorbar(image, ax=axes, fraction=0.04)
    return _svg(figure)


def reliability(confidence: Array, right: Array) -> str:
    """How often answers of each confidence are right; the line is what they should be."""
    bins = np.minimum((confidence * ECE_BINS).astype(int), ECE_BINS - 1)
    counts = np.bincount(bins, minlength=ECE_BINS)
    there = counts > 0
    figure, axes = _figure(3.4, 3.2)
    axes.plot([0, 1], [0, 1], color="#999", linewidth=0.8)
    means = np.bincount(bins, confidence, ECE_BINS)[there] / counts[there]
    shares = np.bincount(bins, right, ECE_BINS)[there] / counts[there]
    axes.plot(means, shares, marker="o", markersize=3)
    axes.bar(
        (np.arange(ECE_BINS) + 0.5) / ECE_BINS, counts / counts.sum(), width=0.9 / ECE_BINS, color="#0b6e99", alpha=0.15
    )
    axes.set_xlabel("confidence (bars: share of the rows)")
    axes.set_ylabel("right")
    return _svg(figure)


def spread(wanted: Array, found: Array) -> str:
    """What was predicted where each rating was given: the median, and a bar from the 10th to the 90th percentile."""
    steps = np.unique(np.round(wanted * 2) / 2)
    parts = [found[np.abs(wanted - step) < 0.25] for step in steps]
    low, middle, high = np.array([np.percentile(it, (10, 50, 90)) for it in parts]).T
    figure, axes = _figure(3.6, 3.2)
    axes.plot([steps.min(), steps.max()], [steps.min(), steps.max()], color="#999", linewidth=0.8)
    axes.errorbar(steps, middle, (middle - low, high - middle), marker="o", markersize=3, linestyle="none")
    axes.set_xlabel("given")
    axes.set_ylabel("predicted")
    return _svg(figure)


def ranks(hits: Array) -> str:
    """Share of the users whose item at each rank was one that they liked; `hits` bool [users, ranks]."""
    figure, axes = _figure(3.6, 3.2)
    axes.plot(np.arange(1, hits.shape[1] + 1), hits.mean(0), marker="o", markersize=2.5)
    axes.set_ylim(0)
    axes.set_xlabel("rank")
    axes.set_ylabel("liked")
    return _svg(figure)


def tradeoff(curve: Array, chosen: tuple[float, float]) -> str:
    """What refusing costs: of the rows with a label, those answered and right, by those without one that are refused,
    [thresholds, 2]; the dot is the threshold as it is served."""
    figure, axes = _figure(3.8, 3.2)
    axes.plot(curve[:, 1], curve[:, 0])
    axes.plot(chosen[1], chosen[0], marker="o", color="#c2571a")
    axes.set_xlabel("outside: refused")
    axes.set_ylabel("inside: answered and right")
    axes.set_ylim(max(0.0, chosen[0] - 0.2), 1)
    return _svg(figure)


def alarms(sets: Mapping[str, Array], flagged: Array, title: str) -> str:
    """What catching more costs: false alarms on each set of rows without the flag, by the share of those with it that
    is found. All are scores; a line is drawn over their thresholds, and the dots are one half."""
    figure, axes = _figure(4.2, 3.2)
    least = np.quantile(flagged, np.linspace(0, 0.5, 101))
    found = [(flagged >= it).mean() for it in least]
    for name, scores in sets.items():
        [line] = axes.plot(found, [100 * (scores >= it).mean() for it in least], label=name)
        axes.plot((flagged >= 0.5).mean(), 100 * (scores >= 0.5).mean(), marker="o", color=line.get_color())
    axes.set_xlabel("recall")
    axes.set_ylabel("false alarms in %")
    axes.set_ylim(-0.3, 12)
    axes.set_title(title, loc="left")
    axes.legend(frameon=False)
    return _svg(figure)


def bars(names: Sequence[str], before: Sequence[float], after: Sequence[float], title: str) -> str:
    """The same measures before and after."""
    figure, axes = _figure(4.6, 2.8)
    at = np.arange(len(names))
    for offset, values, label in ((-0.2, before, "before"), (0.2, after, "after")):
        drawn = axes.bar(at + offset, values, 0.38, label=label)
        axes.bar_label(drawn, fmt="%.3g", fontsize=7)
    axes.set_xticks(at, [it.replace("_", " ") for it in names])
    axes.set_title(title, loc="left")
    figure.legend(loc="outside right upper", frameon=False)  # not on a bar
    return _svg(figure)


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _svg(figure: Figure) -> str:
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None}, transparent=True)
    text = drawn.getvalue()
    return text[text.index("<svg") :]
