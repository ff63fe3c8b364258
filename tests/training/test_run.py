"""A run's folder: what was done is not done again, and what was interrupted ends with the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch

from runtimes.artifact import Shelf
from training import recipe as recipes
from training.errors import Diverged, Interrupted, RecipeError
from training.run import Run
from training.spec import Recipe

Make = Callable[..., Recipe]
GRADIENT = {"kind": "gradient", "epochs": 3, "rate": 1e-3, "batch": 4, "head_rate": 1e-2, "checkpoint_s": 1e-9}
KILLED = Path(__file__).parent / "killed.py"
ROOT = Path(recipes.__file__).parents[1]
LOOSE = {"accuracy_min": 0.0}


def opened(folder: Path, **how: object) -> Run:
    run = Run(folder, seed=0)
    run.open(b"{}", **how).__enter__()  # type: ignore[arg-type]
    return run


def test_a_stage_is_done_once(tmp_path: Path) -> None:
    made = []
    for how in ({}, {"resume": True}, {"resume": True}):
        with Run(tmp_path, seed=0).open(b"{}", **how) as run:  # type: ignore[arg-type]
            assert run.stage("one", lambda: made.append(1) or {"a": torch.ones(2)})["a"].tolist() == [1, 1]
    assert len(made) == 1


def test_without_resume_everything_starts_over_and_from_keeps_what_is_before(tmp_path: Path) -> None:
    made: list[str] = []

    def all_stages(**how: object) -> None:
        with Run(tmp_path, seed=0).open(b"{}", **how) as run:  # type: ignore[arg-type]
            for name in ("one", "two", "three"):
                run.stage(name, lambda name=name: made.append(name) or name)  # type: ignore[misc]

    all_stages()
    all_stages()
    all_stages(start="two")
    assert made == ["one", "two", "three"] * 2 + ["two", "three"]
    with pytest.raises(RecipeError, match="this recipe has done one, two, three"):
        all_stages(start="four")


def test_a_product_that_was_changed_is_not_believed(tmp_path: Path) -> None:
    with Run(tmp_path, seed=0).open(b"{}") as run:
        run.stage("one", lambda: 1)
    with (tmp_path / "stages" / "one.pt").open("ab") as file:
        file.write(b"x")
    with Run(tmp_path, seed=0).open(b"{}", resume=True) as run, pytest.raises(RecipeError, match="--from one"):
        run.stage("one", lambda: 2)


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    with Run(tmp_path, seed=0).open(b"{}"), pytest.raises(RecipeError, match="another process"):
        opened(tmp_path)


def test_measurements_after_the_checkpoint_are_forgotten(tmp_path: Path) -> None:
    with Run(tmp_path, seed=0).open(b"{}") as run:
        for step in (1, 2, 3):
            run.note(step=step, loss=0.5)
        run.rewind(2)
        assert [it["step"] for it in run.metrics()] == [1, 2]
        with (tmp_path / "metrics.jsonl").open("ab") as file:
            file.write(b'{"stage": "", "step": 9')  # killed while writing
        assert [it["step"] for it in run.metrics()] == [1, 2]


def fine_tuned(classify: Make, **changes: object) -> Recipe:
    return classify(trainer=GRADIENT | changes, gate=LOOSE)


def digests(shelf: Shelf) -> dict[str, str]:
    return shelf.resolve("tiny").manifest.files


def test_an_interrupted_run_goes_on_to_the_bit(
    classify: Make, tmp_path: Path, stop_at_the_third: Callable[[], list[int]]
) -> None:
    recipe = fine_tuned(classify)
    recipes.run(recipe, Shelf(tmp_path / "one"), tmp_path / "runs")
    saved = stop_at_the_third()
    with pytest.raises(Interrupted, match="--resume"):
        recipes.run(recipe, Shelf(tmp_path / "two"), tmp_path / "others")
    assert saved == [1, 2, 3]
    assert Shelf(tmp_path / "two").names() == []
    recipes.run(recipe, Shelf(tmp_path / "two"), tmp_path / "others", resume=True)
    assert saved[3] == 4
    assert digests(Shelf(tmp_path / "two")) == digests(Shelf(tmp_path / "one"))
    [first], [second] = ([*(tmp_path / it).glob("tiny-*/metrics.jsonl")] for it in ("runs", "others"))
    assert first.read_text() == second.read_text()


def test_a_run_that_is_killed_in_every_stage_ends_with_the_same_bytes(
    classify: Make, base_folder: Path, tmp_path: Path
) -> None:
    recipe = fine_tuned(classify, epochs=1)
    recipes.run(recipe, Shelf(tmp_path / "one"), tmp_path / "runs")
    file = tmp_path / "recipe.json"
    file.write_bytes(msgspec.json.encode(recipe))
    done = subprocess.run(
        [sys.executable, KILLED, str(file), str(tmp_path / "two"), str(tmp_path / "others")],
        capture_output=True, text=True, check=False, timeout=300,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{base_folder}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    killed = done.stdout.split()
    assert {"train", "before", "compress-1", "package", "after"} <= {*killed}
    assert {*killed} & {"copying", "published", "promoted"}
    first, second = (Shelf(tmp_path / it).resolve("tiny@stable").manifest for it in ("one", "two"))
    assert (first.version, first.files) == (second.version, second.files)
    assert [it.name for it in (tmp_path / "two" / "tiny").glob(".incoming-*")] == []


@pytest.mark.parametrize(
    "changes",
    [
        {"lora": {"rank": 2, "alpha": 4}},
        {"probe": {}},
        {"validation": 0.3, "keep": "best", "patience": 2},
        {"optimizer": "sgd", "momentum": 0.9, "schedule": "onecycle", "smoothing": 0.1, "balanced": True},
    ],
    ids=lambda it: next(iter(it)),
)
def test_every_way_of_learning_ends_with_an_artifact(
    classify: Make, tmp_path: Path, changes: dict[str, object]
) -> None:
    manifest = recipes.run(fine_tuned(classify, **changes), Shelf(tmp_path / "shelf"), tmp_path / "runs")
    assert manifest.labels == ("delivery", "payment")
    [page] = (tmp_path / "runs").glob("tiny-*/report.html")
    assert "<svg" in page.read_text()


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_step(classify: Make, tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    with pytest.raises(Diverged, match=r"at step [1-9]"):
        recipes.run(fine_tuned(classify, rate=1e30, clip=None, decay=0), shelf, tmp_path / "runs")
    assert shelf.names() == []
    [state] = (tmp_path / "runs").glob("tiny-*/checkpoint.pt")
    weights = torch.load(state, weights_only=False)[1]["model"]
    assert all(torch.isfinite(it).all() for it in weights.values())
