"""What can go wrong on the way from rows to shelf. Each message says what, where, and what to do.

TrainingError
├── RecipeError   the recipe cannot be used, or does not fit its data
├── DataError     a row, or a file of rows, cannot be used
├── Diverged      the loss is no longer a number
├── Interrupted   stopped by whoever runs it; a checkpoint is kept
└── GateFailed    not good enough, so nothing was published
"""

from __future__ import annotations

import errno


class TrainingError(Exception):
    """Any of the below; nothing has been published."""


class RecipeError(TrainingError, ValueError):
    """The recipe, or what it asks of its data, cannot be done."""


class DataError(TrainingError, ValueError):
    """Names the file, and the row where it is one row's fault."""


class Diverged(TrainingError):
    """Names the step; the last good checkpoint is kept."""


class Interrupted(TrainingError):
    """The run can be continued."""


class GateFailed(TrainingError):
    """Names every rule that does not hold, and by how much."""


def of_memory(error: BaseException) -> bool:
    """Whether there was too little of it: Python's way to say so, torch's, or ONNX Runtime's."""
    says = str(error).casefold()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and any(it in says for it in ("out of memory", "not enough memory", "allocate memory"))
    )


_REMEDIES = (
    ({errno.ENOSPC, errno.EDQUOT, errno.EFBIG}, "make room"),
    ({errno.EACCES, errno.EPERM, errno.EROFS}, "make it writable"),
)


def of_disk(error: OSError, command: str = "") -> str:
    """What failed, and what to do about it when that command was under way."""
    remedy = next((remedy for codes, remedy in _REMEDIES if error.errno in codes), "see that it is there and whole")
    on = f"what was done is kept: {remedy}, and go on with --resume" if command == "run" else f"{remedy}, and try again"
    return (
        f"{error.filename or 'the disk'}: {error.strerror or error}; {on}; HEADRACE_STATE and --shelf name other places"
    )
