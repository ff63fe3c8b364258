"""What a bundle is asked beyond the recipe's own rows, because others were asked it too."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct


class Piqa(Struct, frozen=True, forbid_unknown_fields=True, tag="piqa", tag_field="kind"):
    """Which of two solutions fits a goal, asked as lm-evaluation-harness does: `piqa_acc`, `piqa_acc_norm`. The model
    that the recipe starts from is asked too; `piqa_acc_gain_low` and `piqa_acc_norm_gain_low` are the lower ends of the
    gain's 95 % intervals, by a paired bootstrap."""

    questions: str
    """The set's .jsonl file; `$HEADRACE_DATA/…` is below that folder."""
    labels: str
    rows_max: Annotated[int, Meta(ge=1)] | None = None
    """None: every row."""


Exam = Piqa
