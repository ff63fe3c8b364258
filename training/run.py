"""A run's folder: what each stage made, so that a run that was killed goes on where it was.

    <runs>/<name>-<recipe hash>/
      recipe.json      what was asked for
      run.json         stage → hash of what it made; a stage is done when it stands here
      stages/          what they made; the run's own, read by nobody else
      checkpoint.pt    of the stage under way
      metrics.jsonl    one line per measurement: stage, step, and numbers
      log.txt          everything that was said
      report.html      see `training.report`

Each stage starts from what the ones before it left on disk and from random numbers of its own, also in a run that
nothing interrupted: so that one that was killed ends with the same bytes.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import pickle
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from runtimes.integrity import digest, writing
from training.errors import Interrupted, RecipeError

LOG = logging.getLogger("training")

T = TypeVar("T")

_RECORD = "run.json"


class Record(msgspec.Struct):
    """What `run.json` holds."""

    stages: dict[str, str]
    """Stage → hash of its product, in the order in which they were done."""


class Run:
    """One at a time: raises RecipeError if another process has the folder."""

    def __init__(self, folder: Path, *, seed: int) -> None:
        self.folder = folder
        self.seed = seed
        self.stage_name = ""
        self._record = Record({})
        self._stopping = False

    @classmethod
    def within(cls, folder: Path, stage: str, *, seed: int) -> Run:
        """For a process that another one, which has the folder, lets do part of the stage."""
        run = cls(folder, seed=seed)
        run.stage_name = stage
        return run

    @contextmanager
    def open(self, recipe: bytes, *, resume: bool = False, start: str | None = None) -> Iterator[Run]:
        """Have the folder, its log, Ctrl-C and SIGTERM until the block ends. Afresh, unless `resume`, or from the
        stage `start` on."""
        (self.folder / "stages").mkdir(parents=True, exist_ok=True, mode=0o700)
        with (self.folder / ".lock").open("wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RecipeError(f"another process is running this recipe in {self.folder}; wait for it") from None
            self._prepare(recipe, resume=resume, start=start)
            with self.logged(), self._stoppable():
                yield self

    def stage(self, name: str, make: Callable[[], T]) -> T:
        """What the stage makes, or made before. Anything that torch can save."""
        import torch

        self.stage_name = name
        file = self.folder / "stages" / f"{name}.pt"
        if name in self._record.stages:
            LOG.info("%s: done before", name)
        else:
            self._check_stop()
            torch.manual_seed(self.derived("stage", name))
            # One thread: two of them on a shared machine wait for each other and halve the speed.
            torch.set_num_threads(1)
            made = make()
            self.write(file, lambda draft: _save(made, draft))
            self._finish(name, digest(file))
        product: T = self._read(name, self._record)
        return product

    def product(self, stage: str) -> Any:
        """What a stage of this run made; the run need not be open. Raises RecipeError if it is not there."""
        record = self._recorded()
        if stage not in record.stages:
            raise RecipeError(f"{self.folder} has not done the stage {stage!r}")
        return self._read(stage, record)

    def derived(self, *what: object) -> int:
        """A seed for this and nothing else: below 2^63, the same in every run of the recipe."""
        text = msgspec.json.encode([self.seed, self.stage_name, *what])
        return int.from_bytes(hashlib.sha256(text).digest()[:8]) >> 1

    def checkpoint(self, state: dict[str, Any]) -> None:
        """Keep this of the stage under way. Raises Interrupted if somebody wants to stop: now is the time."""
        self.write(self.folder / "checkpoint.pt", lambda draft: _save([self.stage_name, state], draft))
        self._check_stop()

    def kept(self) -> dict[str, Any] | None:
        """The latest checkpoint of the stage under way."""
        import torch

        file = self.folder / "checkpoint.pt"
        if not file.exists():
            return None
        try:
            stage, state = torch.load(file, weights_only=False)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise RecipeError(f"{file} is damaged: remove it, and --resume begins this stage anew") from error
        return state if stage == self.stage_name else None

    @property
    def stopping(self) -> bool:
        """Somebody pressed Ctrl-C: make a checkpoint soon."""
        return self._stopping

    def note(self, **values: Any) -> None:
        """Add a measurement to `metrics.jsonl`."""
        place = self.folder / "metrics.jsonl"
        with writing(place), place.open("ab") as file:
            file.write(msgspec.json.encode({"stage": self.stage_name} | values) + b"\n")

    def rewind(self, step: int) -> None:
        """Forget the measurements of this stage after that step: they will be made again."""
        lines = self.metrics()
        kept = [it for it in lines if it["stage"] != self.stage_name or it.get("step", 0) <= step]
        if len(kept) < len(lines):
            content = b"".join(msgspec.json.encode(it) + b"\n" for it in kept)
            self.write(self.folder / "metrics.jsonl", lambda draft: draft.write_bytes(content))

    def metrics(self) -> list[dict[str, Any]]:
        """All measurements so far. A last line that was being written when the run was killed is none."""
        file = self.folder / "metrics.jsonl"
        if not file.exists():
            return []
        lines = file.read_bytes().split(b"\n")[:-1]
        return [msgspec.json.decode(it) for it in lines]

    def scratch(self, name: str) -> Path:
        """An empty folder, gone when the next stage asks for one of that name."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def _read(self, stage: str, record: Record) -> Any:
        import torch

        file = self.folder / "stages" / f"{stage}.pt"
        if not file.exists():
            raise RecipeError(f"{file} is gone, which the stage {stage!r} left; run it again with --from {stage}")
        if digest(file) != record.stages[stage]:
            raise RecipeError(f"{file} is not what the stage {stage!r} left; run it again with --from {stage}")
        return torch.load(file, weights_only=False)  # our own, proven by its hash

    def _prepare(self, recipe: bytes, *, resume: bool, start: str | None) -> None:
        found = self._recorded()
        if start is not None:
            if start not in found.stages:
                done = ", ".join(found.stages) or "no stage"
                raise RecipeError(f"--from {start}: this recipe has done {done} in {self.folder}")
            names = [*found.stages]
            self._record = Record({name: found.stages[name] for name in names[: names.index(start)]})
        elif resume:
            self._record = found
        if not resume:
            for file in ("checkpoint.pt",) if start else ("checkpoint.pt", "metrics.jsonl", "log.txt"):
                (self.folder / file).unlink(missing_ok=True)
        if found.stages and not self._record.stages and not resume:
            LOG.info("run: starting over; --resume would have gone on after the stage %r", [*found.stages][-1])
        self.write(self.folder / "recipe.json", lambda draft: draft.write_bytes(recipe))
        self._mend_metrics()
        self._save()

    def _recorded(self) -> Record:
        file = self.folder / _RECORD
        if not file.exists():
            return Record({})
        try:
            return msgspec.json.decode(file.read_bytes(), type=Record)
        except msgspec.DecodeError as error:
            raise RecipeError(f"{file} is damaged ({error}); remove {self.folder} and start over") from error

    def _mend_metrics(self) -> None:
        """Take away a last line that was being written when a run ended, or the next one would go on in it; and what a
        disk has damaged: only plots are made of them."""
        file = self.folder / "metrics.jsonl"
        if not file.exists():
            return
        *lines, cut = file.read_bytes().split(b"\n")
        kept = [it for it in lines if _is_measurement(it)]
        if len(kept) < len(lines):
            LOG.warning("%s: %d damaged lines are left out, and out of the plots", file, len(lines) - len(kept))
        if cut or len(kept) < len(lines):
            self.write(file, lambda draft: draft.write_bytes(b"".join(it + b"\n" for it in kept)))

    def _finish(self, name: str, hashed: str) -> None:
        self._record.stages[name] = hashed
        self._save()
        (self.folder / "checkpoint.pt").unlink(missing_ok=True)

    def _save(self) -> None:
        content = msgspec.json.format(msgspec.json.encode(self._record), indent=2)
        self.write(self.folder / _RECORD, lambda draft: draft.write_bytes(content))

    def write(self, file: Path, write: Callable[[Path], object]) -> None:
        """All of it or nothing, also after a power cut or on a full disk."""
        draft = file.with_name(f".{file.name}")
        try:
            with writing(file):
                write(draft)
                with draft.open("rb") as opened:
                    os.fsync(opened.fileno())
                draft.replace(file)
        finally:
            draft.unlink(missing_ok=True)

    @contextmanager
    def logged(self) -> Iterator[None]:
        """What is said meanwhile stands in `log.txt` too."""
        handler = _LogFile(self.folder / "log.txt", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s"))
        level = LOG.level
        LOG.addHandler(handler)
        LOG.setLevel(logging.INFO)
        try:
            yield
        finally:
            LOG.setLevel(level)
            LOG.removeHandler(handler)
            handler.close()

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        """The first Ctrl-C or SIGTERM asks for a checkpoint, the second one does not wait for it."""
        previous: dict[int, Any] = {}

        def restore() -> None:
            for signum, handler in previous.items():
                signal.signal(signum, handler)

        def stop(signum: int, frame: object) -> None:
            self._stopping = True
            restore()

        try:
            for signum in (signal.SIGINT, signal.SIGTERM):
                previous[signum] = signal.signal(signum, stop)
        except ValueError:  # not the main thread: whoever runs it so has their own way to stop
            yield
            return
        try:
            yield
        finally:
            restore()

    def _check_stop(self) -> None:
        if self._stopping:
            raise Interrupted(f"stopped in the stage {self.stage_name!r}; go on with --resume")


class _LogFile(logging.FileHandler):
    """One that a full disk ends the run of, like any other file of it."""

    def handleError(self, record: logging.LogRecord) -> None:
        with writing(Path(self.baseFilename)):
            raise


def _is_measurement(line: bytes) -> bool:
    try:
        return "stage" in msgspec.json.decode(line, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return False


def _save(value: Any, draft: Path) -> None:
    """As torch does it, but where the disk is what fails, with the disk's own error."""
    import torch

    with draft.open("wb") as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
