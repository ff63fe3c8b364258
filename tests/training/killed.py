"""Runs a recipe again and again, killed each time it has just done a stage for the first time, until a run ends by
itself: `python killed.py RECIPE SHELF RUNS`. Prints the stages after which it was killed.

A process of its own, which imports everything once and then forks: a fork of pytest's would inherit its threads.
"""

import os
import signal
import sys
import time
from pathlib import Path

import msgspec
import transformers

from runtimes.artifact import Shelf
from training import catalogue, data, evaluation, export, package, plots, report
from training import recipe as recipes
from training.compression import dynamic_int8
from training.evaluation import folds, scoring
from training.models import encoder
from training.trainers import gradient

ONCE = (transformers, data, evaluation, export, package, plots, report, dynamic_int8, folds, scoring, encoder, gradient)
"""Imported here so that no child has to."""


def main(recipe: str, shelf: Path, runs: Path) -> None:
    killed: list[str] = []
    while True:
        child = os.fork()
        if child == 0:
            recipes.run(catalogue.read(recipe), Shelf(shelf), runs, resume=True)
            os._exit(0)
        status = None
        while status is None:
            fresh = [it for it in [*stages(runs), *published(shelf)] if it not in killed]
            if fresh:
                os.kill(child, signal.SIGKILL)
                killed.append(fresh[0])
            ended, found = os.waitpid(child, 0 if fresh else os.WNOHANG)
            status = found if ended else None
            time.sleep(0.0005)
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL, status
    print(*killed)


def stages(runs: Path) -> list[str]:
    return [name for file in runs.glob("*/run.json") for name in msgspec.json.decode(file.read_bytes())["stages"]]


def published(shelf: Path) -> list[str]:
    """The steps of publishing and promoting."""
    steps = {"copying": "*/.incoming-*", "published": "*/*/manifest.json", "promoted": "*/aliases.json"}
    return [name for name, pattern in steps.items() if any(shelf.glob(pattern))]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
