import ast
from pathlib import Path

import msgspec
import pytest

from runtimes import triton_command
from runtimes.artifact import Artifact, Shelf
from runtimes.triton_command import CODE, Served, command, config, served, stub
from tests import tiny

SERVED = Served(artifact="/a", version="0" * 12, task="classify", threads=2, batch_max=1)


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """An environment with the files that a start looks for."""
    server = tmp_path / "triton-0.7.0" / "lib" / "python3.11" / "site-packages" / "pytriton" / "tritonserver"
    backend, stubs = server / "backends" / "python", server / "python_backend_stubs" / "3.11"
    for folder in (backend, stubs):
        folder.mkdir(parents=True)
    (backend / "libtriton_python.so").touch()
    (backend / "triton_python_backend_utils.py").touch()
    (stubs / "triton_python_backend_stub").touch()
    return tmp_path / "triton-0.7.0"


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "cls-0"
    folder.mkdir(parents=True)
    return folder


def test_what_is_served_is_what_the_manifest_says(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    (tmp_path / "folder").mkdir()
    tiny.publish(shelf, tmp_path / "folder")
    artifact = shelf.resolve("tiny")
    found = served(artifact, threads=2, batch_max=4)
    assert isinstance(artifact, Artifact)
    assert (found.labels, found.task, found.version) == (tiny.LABELS, "classify", artifact.manifest.version)
    assert found.artifact == str(artifact.path)


def test_the_queue_has_no_rules_but_the_gateways() -> None:
    text = config(SERVED)
    assert not any(it in text for it in ("priority", "timeout", "queue_size", "delay", "policy"))


def test_labels_of_any_spelling_survive_the_configuration() -> None:
    awkward = msgspec.structs.replace(SERVED, labels=('a "quoted"', "back\\slash", "ümlaut ☃", "new\nline", "{brace}"))
    [line] = [it for it in config(awkward).splitlines() if "string_value" in it]
    # Its escapes are a subset of Python's.
    quoted = line[line.index("string_value: ") + len("string_value: ") : line.rindex(" } }")]
    assert msgspec.json.decode(ast.literal_eval(quoted), type=Served) == awkward


def test_the_scratch_folder_is_all_that_a_start_needs(engine: Path, scratch: Path) -> None:
    command(SERVED, engine, scratch).fill(scratch)
    assert (scratch / "models" / "model" / "config.pbtxt").read_text() == config(SERVED)
    assert (scratch / "models" / "model" / "1" / "model.py").read_text() == CODE.format(lib=str(scratch / "lib"))
    assert [it.name for it in (scratch / "lib").iterdir()] == ["runtimes"]
    assert (scratch / "lib" / "runtimes" / "session.py").is_file()
    assert all(it.resolve().is_relative_to(engine.resolve()) for it in (scratch / "backends" / "python").iterdir())
    assert (scratch / "backends" / "python" / "triton_python_backend_stub").exists()


def test_it_listens_on_its_socket_only(engine: Path, scratch: Path) -> None:
    argv = command(SERVED, engine, scratch).argv
    assert {"--allow-http=false", "--allow-metrics=false", f"--grpc-address=unix:{scratch}/grpc"} <= set(argv)


def test_models_see_nothing_of_the_gateways_environment_but_what_is_kept(
    engine: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXAMPLE_API_KEY", "secret")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    env = command(SERVED, engine, scratch).env
    assert not {"EXAMPLE_API_KEY", "PYTHONPATH"} & env.keys()
    assert env["PATH"].startswith(f"{engine / 'bin'}:")


def test_the_stub_is_the_one_for_the_environments_python(engine: Path) -> None:
    packages = engine / "lib" / "python3.11" / "site-packages"
    assert stub(packages / "pytriton" / "tritonserver", packages).is_file()


def test_what_a_killed_server_left_in_shared_memory_goes_before_the_next_start(
    engine: Path, scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_command, "SHARED_MEMORY", tmp_path)
    made = command(SERVED, engine, scratch)
    [option] = [it for it in made.argv if "shm-region-prefix-name" in it]
    left, others = tmp_path / f"{option.rpartition('=')[2]}1234", tmp_path / "headrace_other"
    left.touch()
    others.touch()
    made.fill(scratch)
    assert (left.exists(), others.exists()) == (False, True)
