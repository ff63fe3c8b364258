"""Several processes learn what one does, also when one of them is killed on the way."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from runtimes.artifact import Shelf
from runtimes.environment import Environments
from training import recipe as recipes
from training.console import state
from training.errors import RecipeError
from training.spec import Recipe
from training.trainers.team import Team

Make = Callable[..., Recipe]
LATE_S = 600.0


def ray_is_there() -> bool:
    return any(it.name == "ray" for it in Environments(state()).list())


needs_ray = pytest.mark.skipif(
    not ray_is_there(),
    reason="the environment `ray`, 1.9 GB and so not for every CI run, is missing: `headrace engine install ray`",
)


def sober(classify: Make, **trainer: object) -> Recipe:
    gradient = {"kind": "gradient", "epochs": 8, "rate": 1e-3, "batch": 5, "checkpoint_s": 1e-9} | trainer
    model = {"package": "sober-base", "noise": {"typos": 0.1, "words_dropped": 0.1}}
    return classify(trainer=gradient, model=model, gate={"accuracy_min": 0.0}, compress=[])


def trained(runs: Path) -> dict[str, torch.Tensor]:
    [file] = runs.glob("*/stages/train.pt")
    found: dict[str, torch.Tensor] = torch.load(file, weights_only=False).state_dict()
    return found


def processes(runs: Path) -> Iterator[int]:
    """Who could be killed: torchrun's second, known by its rank, or any of Ray's, known by where it was sent to."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
            of_ray = command.startswith(b"ray::RayTrainWorker") and (process / "cwd").readlink() == runs.parent
        except OSError:
            continue
        if of_ray or (str(runs).encode() in command and b"\0RANK=1\0" in environment):
            yield int(process.name)


def kill_one(runs: Path, killed: list[int]) -> None:
    """Once there is a checkpoint."""
    give_up_s = time.monotonic() + LATE_S
    while not killed and time.monotonic() < give_up_s:
        time.sleep(0.002)
        if any(runs.glob("*/checkpoint.pt")) and (found := [*processes(runs)]):
            os.kill(found[0], signal.SIGKILL)
            killed.append(found[0])


@pytest.mark.parametrize("ray", [False, pytest.param(True, marks=needs_ray)], ids=["torchrun", "ray"])
def test_two_processes_of_which_one_is_killed_end_where_one_process_does(
    classify: Make, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray: bool
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{Path(recipes.__file__).parents[1]}:{base_folder}")
    monkeypatch.setenv("HEADRACE_STATE", str(state().absolute()))
    monkeypatch.chdir(tmp_path)
    recipe = sober(classify)
    recipes.run(recipe, Shelf(tmp_path / "one"), tmp_path / "alone")
    killed: list[int] = []
    killer = threading.Thread(target=kill_one, args=(tmp_path / "both", killed))
    killer.start()
    recipes.run(recipe, Shelf(tmp_path / "two"), tmp_path / "both", workers=2, ray=ray)
    killer.join()
    assert len(killed) == 1
    [log] = (tmp_path / "both").glob("*/log.txt")
    assert "going on after step" in log.read_text()
    alone, both = trained(tmp_path / "alone"), trained(tmp_path / "both")
    for name, weights in alone.items():
        torch.testing.assert_close(both[name], weights, atol=1e-5, rtol=1e-4)


def test_only_descent_is_shared(classify: Make, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--workers"):
        recipes.run(classify(), Shelf(tmp_path / "shelf"), tmp_path / "runs", workers=2)


def test_every_row_of_a_batch_is_somebodys_and_counts_once() -> None:
    chosen = np.arange(10, 15)
    teams = [Team() for _ in range(7)]
    for rank, team in enumerate(teams):
        team.rank, team.size = rank, 7
    shares = [team.share(chosen) for team in teams]
    assert sorted(np.concatenate([own for own, counts in shares if counts])) == [*chosen]
    assert [len(own) for own, _ in shares] == [1] * 7
