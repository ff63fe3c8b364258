"""Questions and the answers hoped for."""

from __future__ import annotations

from collections.abc import Sequence

from training.contract import Answers, Examples, Rows, strings
from training.data import split, tables
from training.errors import DataError
from training.spec.data import Turns

Turn = tuple[str, str]


def load(spec: Turns) -> Rows:
    """Read the files that the recipe names. A prompt that is in both parts stays in the test part only."""
    train = _turns(spec.train, spec) if spec.train else []
    test = _turns(spec.test, spec) if spec.test else []
    if train and not test:
        test = [it for it in train if split.held_out(it[0], spec.test_share)]
    if not test:
        raise DataError("there are no rows to test with: set data.test, or give data.train more rows")
    train, leaked = split.apart(train, test, lambda it: it[0])
    notes = [f"{leaked} training rows are also in the test part and were left out"] if leaked and spec.test else []
    kept = [*dict.fromkeys(train)]
    if len(kept) < len(train):
        notes.append(f"{len(train) - len(kept)} training rows repeat another and were left out")
    return Rows(_examples(kept), _examples(test), tuple(notes))


def _turns(file: str, spec: Turns) -> list[Turn]:
    records = tables.read(file, encoding=spec.encoding)
    tables.columns(records, ("prompt", "answer"), file=file)
    return [
        (
            tables.text(it, "prompt", file=file, number=number),
            tables.text(it, "answer", file=file, number=number),
        )
        for number, it in enumerate(records, 1)
    ]


def _examples(turns: Sequence[Turn]) -> Examples:
    return Examples({"prompt": strings([it[0] for it in turns])}, Answers(strings([it[1] for it in turns])))
