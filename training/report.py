"""A run on one page: what was asked for, what came out, and pictures of both. Opens without a network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

import msgspec
import numpy as np

from training import plots
from training.contract import Array, Choices, Classes, Flags, Rows, Scoped, Scores, Values
from training.evaluation import scope
from training.evaluation.gate import Evidence, Finding
from training.evaluation.measures import POSITIVES_MIN
from training.evaluation.scoring import Measured
from training.run import Run
from training.spec import Recipe

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1c2430 }
h1 { margin-bottom: 0 } h2 { margin-top: 2rem } table { border-collapse: collapse } figure { margin: 0 }
th, td { padding: .2rem .8rem .2rem 0; text-align: right; border-bottom: 1px solid #e3e7ec }
th:first-child, td:first-child { text-align: left } .no { color: #b3261e; font-weight: 600 }
.plots { display: flex; flex-wrap: wrap; gap: 1.5rem }
pre { background: #f5f7f9; padding: .8rem; overflow-x: auto; font-size: 12px }
"""

_COMPARED = (
    *("accuracy", "inside", "outside_recall", "auroc", "macro_f1", "auc", "auprc"),
    *("rmse", "mae", "recall_20", "ndcg_20", "spearman", "nll"),
)


def write(
    run: Run,
    recipe: Recipe,
    rows: Rows,
    before: Measured,
    after: Measured,
    evidence: Evidence,
    findings: Sequence[Finding],
) -> None:
    """Write `report.html` into the run's folder; overwrites an older one."""
    failed = [it for it in findings if not it.holds]
    verdict = "the gate holds" if not failed else "the gate does not hold: nothing was published"
    parts = [
        f"<h1>{escape(recipe.name)}</h1><p>{escape(recipe.about)}<br>{len(rows.train):,} rows to train, "
        f"{len(rows.test):,} to test; seed {recipe.seed}; {verdict}</p>",
        *(f"<p>Data: {escape(note)}</p>" for note in rows.notes),
        "<h2>Gate</h2>",
        _table(("rule", "bound", "measured", ""), (_finding(it) for it in findings)),
        "<h2>Before and after compression, and the floor</h2>",
        _table(("measure", "before", *evidence.steps, "after", "floor"), _measures(evidence)),
        '<div class="plots">',
        *(f"<figure>{it}</figure>" for it in _plots(run, rows, before, after)),
        "</div>",
    ]
    if isinstance(rows.test.targets, Classes):
        parts += ["<h2>Each label, after</h2>", _labels(rows.test.targets, after.outputs["scores"])]
    parts += [
        "<h2>Recipe</h2>",
        f"<pre>{escape(msgspec.json.format(msgspec.json.encode(recipe), indent=2).decode())}</pre>",
    ]
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(recipe.name)}</title>'
        f"<style>{_STYLE}</style><body>{''.join(parts)}</body></html>"
    )
    (run.folder / "report.html").write_text(page, "utf-8")


def _finding(it: Finding) -> tuple[str, ...]:
    value = "nothing to compare with" if it.value is None else f"{it.value:.4g}"
    return (escape(it.rule), f"{it.bound:g}", value, "holds" if it.holds else '<span class="no">does not hold</span>')


def _measures(evidence: Evidence) -> Iterable[tuple[str, ...]]:
    tables: tuple[Scores, ...] = (evidence.before, *evidence.steps.values(), evidence.after, evidence.floor)
    for name in dict.fromkeys(name for table in tables for name in table):
        yield (escape(name), *(f"{table[name]:.5g}" if name in table else "" for table in tables))


def _plots(run: Run, rows: Rows, before: Measured, after: Measured) -> Iterable[str]:
    metrics = [it for it in run.metrics() if "epoch" in it and it["stage"] == "train"]  # not those of the folds
    drawn: tuple[tuple[tuple[str, ...], str], ...] = (
        (("loss", "validation_loss"), "Loss"),
        (("validation_accuracy", "validation_macro_f1"), "Validation"),
    )
    for names, title in drawn:
        there = [name for name in names if any(name in it for it in metrics)]
        if there:
            yield plots.curves(metrics, there, title)
    targets = rows.test.targets
    if isinstance(targets, Classes):
        scores = after.outputs["scores"]
        best = scores.argmax(1)
        yield plots.confusion(targets.index, best, targets.labels)
        yield plots.reliability(scores.max(1), best == targets.index)
    if isinstance(targets, Values) and targets.meaning == "rating":
        yield plots.spread(targets.values, after.outputs["value"])
    if isinstance(targets, Choices):
        pairs = zip(targets.liked(), after.outputs["item"].tolist(), strict=True)
        yield plots.ranks(np.array([[it in liked for it in items] for liked, items in pairs if liked]))
    if isinstance(targets, Scoped):
        scores = after.outputs["scores"]
        chosen = after.scores["inside"], after.scores["outside_recall"]
        yield plots.tradeoff(scope.tradeoff(targets, scores), chosen)
    if isinstance(targets, Flags):
        yield from _alarms(targets, rows.test.slices, after.outputs["scores"])
    compared = [it for it in _COMPARED if it in before.scores]
    if compared:
        yield plots.bars(
            compared, [before.scores[it] for it in compared], [after.scores[it] for it in compared], "Quality"
        )
    if after.scores.get("size_ratio", 1.0) != 1.0:  # something was made small
        multiples = ("size_ratio", "speedup_1", "speedup_8")
        yield plots.bars(multiples, [1.0] * 3, [after.scores[it] for it in multiples], "Size and speed, as multiples")


def _alarms(targets: Flags, slices: Mapping[str, Array], scores: Array) -> Iterable[str]:
    """Of each label with enough rows, over each part that has rows known to be without it."""
    for at, label in enumerate(targets.labels):
        given, values = scores[:, at], targets.values[:, at]
        if (values == 1).sum() >= POSITIVES_MIN:
            parts = {
                f"{value}": given[(values == 0) & (column == value)]
                for column in slices.values()
                for value in sorted(set(column))
            } or {"all": given[values == 0]}
            yield plots.alarms({name: it for name, it in parts.items() if len(it)}, given[values == 1], label)


def _labels(targets: Classes, scores: Array) -> str:
    best = scores.argmax(1)
    lines = []
    for at, label in enumerate(targets.labels):
        hits = int(((best == at) & (targets.index == at)).sum())
        wanted, found = int((targets.index == at).sum()), int((best == at).sum())
        lines.append((label, wanted, hits / max(1, found), hits / max(1, wanted), 2 * hits / max(1, wanted + found)))
    lines.sort(key=lambda it: it[4])
    return _table(
        ("label", "rows", "precision", "recall", "F1"),
        ((escape(name), f"{rows}", *(f"{it:.3f}" for it in numbers)) for name, rows, *numbers in lines),
    )


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for line in lines)
    return f"<table><tr>{''.join(f'<th>{escape(it)}</th>' for it in head)}</tr>{body}</table>"
