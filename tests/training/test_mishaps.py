"""A full disk, too little memory, signals, damaged files: said clearly, nothing published, nothing lost."""

from __future__ import annotations

import logging
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from runtimes.artifact import Artifact, Manifest, Shelf
from training import __main__ as command
from training import distributed
from training import recipe as recipes
from training.errors import DataError, Diverged, Interrupted, RecipeError, of_disk, of_memory
from training.run import Run
from training.spec import Recipe
from training.spec.data import Pairs

LOG = logging.getLogger("training")


@contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process can grow: the kernel refuses each write, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def unexpected() -> int:
    raise AssertionError("it was done before")


@pytest.mark.parametrize(
    "write",
    [
        lambda run: run.checkpoint({"step": 2}),
        lambda run: run.note(step=2),
        lambda run: run.stage("two", lambda: torch.ones(1000)),
        lambda _: LOG.warning("a line"),
    ],
    ids=["checkpoint", "metrics", "stage", "log"],
)
def test_a_full_disk_ends_the_run_and_loses_nothing(tmp_path: Path, write: Callable[[Run], None]) -> None:
    with Run(tmp_path, seed=0).open(b"{}") as run:
        run.stage("one", lambda: 1)
        run.stage_name = "two"
        run.note(step=1)
        run.checkpoint({"step": 1})
        with full_disk(), pytest.raises(OSError, match="File too large") as failed:
            write(run)
    assert Path(failed.value.filename).is_relative_to(tmp_path)
    assert [it.name for it in tmp_path.rglob(".*")] == [".lock"]
    with Run(tmp_path, seed=0).open(b"{}", resume=True) as run:

        def rest() -> int:
            assert run.kept() == {"step": 1}
            run.note(step=2)
            return 2

        assert (run.stage("one", unexpected), run.stage("two", rest)) == (1, 2)
        assert [it["step"] for it in run.metrics()] == [1, 2]


def test_a_line_that_was_cut_off_does_not_spoil_the_next_one(tmp_path: Path) -> None:
    with Run(tmp_path, seed=0).open(b"{}") as run:
        run.note(step=1)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"stage": "", "st')
    with Run(tmp_path, seed=0).open(b"{}", resume=True) as run:
        run.note(step=2)
        assert [it["step"] for it in run.metrics()] == [1, 2]


@pytest.mark.parametrize("resume", [{"resume": True}, {"start": "two"}], ids=["resume", "from"])
@pytest.mark.parametrize(
    "damage",
    [b'{"stage": "on\xff', b"\0\0\0", b'"stage"', b"{}", b"{" * 100_000],
    ids=["cut", "0", "text", "{}", "deep"],
)
def test_a_damaged_line_of_the_measurements_is_left_out_and_said(
    tmp_path: Path, damage: bytes, resume: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with Run(tmp_path, seed=0).open(b"{}") as run:
        run.stage("one", lambda: 1)
        run.stage("two", lambda: 2)
        run.note(step=1)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(damage + b"\n")
    with Run(tmp_path, seed=0).open(b"{}", **resume) as run:
        run.note(step=2)
        assert [it["step"] for it in run.metrics()] == [1, 2]
    assert "metrics.jsonl: 1 damaged lines are left out" in caplog.text


def test_what_a_stage_left_and_is_gone_is_to_be_made_again(tmp_path: Path) -> None:
    with Run(tmp_path, seed=0).open(b"{}") as run:
        run.stage("one", lambda: 1)
    (tmp_path / "stages" / "one.pt").unlink()
    with (
        Run(tmp_path, seed=0).open(b"{}", resume=True) as run,
        pytest.raises(RecipeError, match=r"one\.pt is gone.*--from one"),
    ):
        run.stage("one", unexpected)


def test_a_disk_that_is_full_while_publishing_leaves_no_half_of_an_artifact(
    classify: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf, publish = Shelf(tmp_path / "shelf"), Shelf.publish

    def on_a_full_disk(*arguments: object) -> Manifest:
        with full_disk():
            return publish(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(Shelf, "publish", on_a_full_disk)
        with pytest.raises(OSError, match="File too large") as failed:
            recipes.run(classify(), shelf, tmp_path / "runs")
    assert Path(failed.value.filename).is_relative_to(shelf.root), "it is the shelf's disk that is full, not the run's"
    assert [it for it in shelf.root.rglob("*") if it.is_file() and it.name != ".lock"] == []
    manifest = recipes.run(classify(), shelf, tmp_path / "runs", resume=True)
    found = shelf.resolve("tiny@stable")
    assert isinstance(found, Artifact)
    assert found.manifest == manifest


def test_sigterm_is_ctrl_c_and_both_have_their_old_meaning_afterwards(tmp_path: Path) -> None:
    before = [signal.getsignal(it) for it in (signal.SIGINT, signal.SIGTERM)]
    for signum in (signal.SIGINT, signal.SIGTERM):
        with Run(tmp_path, seed=0).open(b"{}", resume=True) as run:
            os.kill(os.getpid(), signum)
            with pytest.raises(Interrupted, match="go on with --resume"):
                run.checkpoint({"step": 1})
            assert run.kept() == {"step": 1}
    assert [signal.getsignal(it) for it in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ends a program, which it does not in what a shell has started with `&`."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_the_second_ctrl_c_does_not_wait(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Run(tmp_path, seed=0).open(b"{}") as run:
        os.kill(os.getpid(), signal.SIGINT)
        assert run.stopping
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()


def test_whoever_wants_to_stop_need_not_wait_for_processes_that_train_together(tmp_path: Path) -> None:
    with Run(tmp_path, seed=0).open(b"{}") as run:
        os.kill(os.getpid(), signal.SIGTERM)
        assert distributed._ended(["sleep", "1000"], os.environ, run) == -signal.SIGTERM


def test_damaged_files_of_a_run_are_named(tmp_path: Path) -> None:
    with Run(tmp_path, seed=0).open(b"{}") as run:
        run.checkpoint({"step": 1})
        (tmp_path / "checkpoint.pt").write_bytes(b"PK and no more")
        with pytest.raises(RecipeError, match=r"checkpoint\.pt is damaged: remove it"):
            run.kept()
    (tmp_path / "run.json").write_bytes(b"{")
    with pytest.raises(RecipeError, match=r"run\.json is damaged"), Run(tmp_path, seed=0).open(b"{}", resume=True):
        pass


def test_too_little_memory_is_recognised_however_it_is_said() -> None:
    with pytest.raises(RuntimeError) as torch_s:
        torch.empty(10**15)
    assert of_memory(torch_s.value)
    assert of_memory(MemoryError())
    assert not of_memory(RuntimeError("shapes do not fit"))


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (MemoryError(), 1, "smaller trainer.batch"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] can't allocate memory"), 1, "smaller trainer.batch"),
        (OSError(28, "No space left on device", "/runs/x"), 1, "/runs/x: No space left on device; what was done is"),
        (PermissionError(13, "Permission denied", "/runs"), 1, "/runs: Permission denied; what was done is kept"),
        (Diverged("the loss is nan at step 3"), 1, "the loss is nan at step 3"),
        (Interrupted("stopped in the stage 'train'"), 130, "stopped in the stage 'train'"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=lambda it: type(it).__name__ if isinstance(it, BaseException) else "",
)
def test_the_command_says_what_went_wrong_and_ends_with_a_code(
    error: BaseException, code: int, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(recipes, "run", fail)
    found, message = ended(["run", "support-intent"], monkeypatch, capsys)
    assert found == code
    assert says in message


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("run", "what was done is kept: {}, and go on with --resume; HEADRACE_STATE"),
        ("promote", "Y; {}, and try again; HEADRACE_STATE and --shelf"),
    ],
)
@pytest.mark.parametrize(
    ("code", "remedy"), [(28, "make room"), (30, "make it writable"), (2, "see that it is there and whole")]
)
def test_what_is_to_be_done_about_a_disk_fits_it_and_the_command(
    command: str, says: str, code: int, remedy: str
) -> None:
    found = of_disk(OSError(code, "Y", "/x"), command)
    assert found.startswith("/x: Y; ")
    assert says.format(remedy) in found


def ended(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and what the command says."""
    monkeypatch.setattr(sys, "argv", ["headrace-train", *arguments])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    shown = capsys.readouterr()
    assert shown.out == ""
    if isinstance(stopped.value.code, str):
        return 1, stopped.value.code
    return int(stopped.value.code or 0), shown.err


@pytest.mark.parametrize("arguments", [["run", "support-intent"], ["show"]], ids=lambda it: it[0])
@pytest.mark.parametrize("given", [[], ["--shelf", "file"], ["--shelf", "file/below"], ["--shelf", "nowhere"]])
def test_a_shelf_that_cannot_be_one_is_refused_at_the_start(
    arguments: list[str],
    given: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("state", "file"):
        Path(name).write_text("a file, where a folder should be")
    Path("nowhere").symlink_to("/nowhere")
    monkeypatch.setenv("HEADRACE_STATE", str(tmp_path / "state"))
    code, message = ended([*arguments, *given], monkeypatch, capsys)
    assert code == 1
    file = given[1].partition("/")[0] if given else "state"
    assert f"{tmp_path}/{file} is not a folder, so " in message


@pytest.mark.parametrize(
    ("setting", "says"),
    [("trainer.epoch=3", "unknown field `epoch` - at `$.trainer`"), ("data.colum=x", "unknown field `colum`")],
)
def test_an_unknown_field_of_a_recipe_is_named_with_its_path(
    setting: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, message = ended(["run", "support-intent", "--set", setting], monkeypatch, capsys)
    assert code == 1
    assert says in message


def test_a_run_does_not_go_on_with_other_rows(classify: Callable[..., Recipe], tmp_path: Path) -> None:
    with Run(tmp_path / "run", seed=0).open(b"{}") as run:
        run.stage("data", lambda: "the fingerprint of other rows")
        with pytest.raises(DataError, match="not those that this run began with"):
            recipes.make(classify(), "hash", Shelf(tmp_path / "shelf"), run)


def test_a_trainer_without_rows_is_refused(classify: Callable[..., Recipe], tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("left,right,similarity\na,b,1\n")
    recipe = msgspec.structs.replace(classify(gate={}), data=Pairs(test=str(tmp_path / "pairs.csv")))
    with pytest.raises(DataError, match="no rows to train with"):
        recipes.run(recipe, Shelf(tmp_path / "shelf"), tmp_path / "runs")
