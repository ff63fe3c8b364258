"""What is asked of Ray, and what is made of its answer. Ray itself is in `test_distributed`, where it is installed."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest
import torch

from runtimes.artifact import Shelf
from runtimes.environment import PLANS, Environment
from training import on_ray
from training import recipe as recipes
from training.__main__ import app
from training.errors import RecipeError, TrainingError
from training.spec import Recipe

Make = Callable[..., Recipe]
GRADIENT = {"kind": "gradient", "epochs": 4, "rate": 1e-3, "batch": 5}


class FakeRay:
    """Writes down what it is asked for, instead of doing it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: dict[str, Any] = {}
        self.environment: dict[str, str] = {}
        self.open = False
        ray, train, torch_ = ModuleType("ray"), ModuleType("ray.train"), ModuleType("ray.train.torch")
        ray.__dict__.update(init=self.init, LoggingConfig=dict)
        train.__dict__.update(FailureConfig=dict, RunConfig=dict, ScalingConfig=dict)
        torch_.__dict__.update(TorchConfig=dict, TorchTrainer=self.trainer)
        for module in (ray, train, torch_):
            monkeypatch.setitem(sys.modules, module.__name__, module)

    def init(self, **asked: Any) -> FakeRay:
        self.asked |= asked
        self.environment = dict(os.environ)
        return self

    def __enter__(self) -> None:
        self.open = True

    def __exit__(self, *_: object) -> None:
        self.open = False

    def trainer(self, learn: Callable[[Any], None], **asked: Any) -> FakeRay:
        self.asked |= {"learn": learn} | asked
        return self

    def fit(self) -> None:
        assert self.open


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    known = {name: it for name, it in os.environ.items() if name != "RAY_ADDRESS"}
    monkeypatch.setattr(os, "environ", known)
    return FakeRay(monkeypatch)


def test_a_ray_of_our_own_is_on_loopback_and_tells_nobody(fake: FakeRay, tmp_path: Path) -> None:
    on_ray.main(tmp_path, 3)
    assert fake.asked["address"] == "local"
    assert (fake.asked["num_cpus"], fake.asked["scaling_config"]) == (3, {"num_workers": 3})
    assert fake.asked["include_dashboard"] is False
    assert fake.environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
    assert fake.environment["GLOO_SOCKET_IFNAME"] == "lo"
    assert fake.environment["RAY_USAGE_STATS_ENABLED"] == "0"
    assert (fake.environment["RAY_AUTH_MODE"], len(fake.environment["RAY_AUTH_TOKEN"])) == ("token", 64)
    assert not fake.open
    assert not Path(fake.asked["_temp_dir"]).exists()


def test_a_cluster_that_is_named_is_used_as_it_is(
    fake: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "RAY_ADDRESS", "10.0.0.1:6379")
    on_ray.main(tmp_path, 2)
    assert "address" not in fake.asked
    assert "num_cpus" not in fake.asked
    assert fake.environment.keys().isdisjoint({"RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"})
    assert fake.environment["RAY_USAGE_STATS_ENABLED"] == "0"


def test_a_process_of_rays_learns_where_it_was_asked_for(
    fake: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "HEADRACE_DATA", "/data")
    monkeypatch.setitem(os.environ, "HEADRACE_KEY", "secret")
    monkeypatch.chdir(tmp_path)
    on_ray.main(tmp_path / "run", 2)
    assert "secret" not in str(fake.asked)
    del os.environ["HEADRACE_DATA"]
    monkeypatch.chdir("/")
    seen: list[tuple[Path, str, Path]] = []
    monkeypatch.setattr(on_ray, "learn", lambda folder: seen.append((folder, os.environ["HEADRACE_DATA"], Path.cwd())))
    fake.asked["learn"](fake.asked["train_loop_config"])
    assert seen == [(tmp_path / "run", "/data", tmp_path)]


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADRACE_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


def installed(state: Path, code: str) -> None:
    """An environment `ray` whose Python does this whatever it is told to run."""
    plan = PLANS["ray", "cpu"]
    home = state / "engines" / f"ray-{plan.version}"
    (home / "bin").mkdir(parents=True)
    made = Environment("ray", plan.version, "cpu", plan.digest(), {}, 0.0)
    (home / ".ready").write_bytes(msgspec.json.encode(made))
    (home / "code.py").write_text(code)
    python = home / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {home / "code.py"} "$@"\n')
    python.chmod(0o755)


LEARN = """
import sys, tempfile
from pathlib import Path
import torch.distributed as dist
from training.distributed import learn

assert sys.argv[1:4] == ["-P", "-m", "training.on_ray"] and sys.argv[5] == "1", sys.argv
with tempfile.TemporaryDirectory() as folder:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
    learn(Path(sys.argv[4]))
    dist.destroy_process_group()
"""


def test_a_run_takes_up_what_ray_has_learnt(
    classify: Make, base_folder: Path, state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{Path(recipes.__file__).parents[1]}:{base_folder}")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    installed(state, LEARN)
    recipe = classify(trainer=GRADIENT, gate={"accuracy_min": 0.0}, compress=[])
    recipes.run(recipe, Shelf(tmp_path / "one"), tmp_path / "alone")
    recipes.run(recipe, Shelf(tmp_path / "two"), tmp_path / "other", ray=True)
    alone, other = (
        torch.load(next((tmp_path / it).glob("*/stages/train.pt")), weights_only=False).state_dict()
        for it in ("alone", "other")
    )
    assert all(torch.equal(other[name], weights) for name, weights in alone.items())
    [log] = (tmp_path / "other").glob("*/log.txt")
    assert "train: by Ray, 1 at once" in log.read_text()


def test_without_rays_environment_the_command_that_makes_it_is_named(
    classify: Make, state: Path, tmp_path: Path
) -> None:
    recipe = classify(trainer=GRADIENT)
    with pytest.raises(TrainingError, match="--ray: ray is not installed: run `headrace engine install ray`"):
        recipes.run(recipe, Shelf(tmp_path / "shelf"), tmp_path / "runs", ray=True)
    assert Shelf(tmp_path / "shelf").names() == []


def test_what_fails_again_and_again_ends(classify: Make, state: Path, tmp_path: Path) -> None:
    installed(state, "raise SystemExit(1)")
    recipe = classify(trainer=GRADIENT)
    with pytest.raises(TrainingError, match="have failed 4 times; --resume tries again"):
        recipes.run(recipe, Shelf(tmp_path / "shelf"), tmp_path / "runs", ray=True)


def test_what_no_descent_can_do_ray_cannot(classify: Make, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"--ray: only trainer\.kind = 'gradient'"):
        recipes.run(classify(), Shelf(tmp_path / "shelf"), tmp_path / "runs", ray=True)


def test_the_command_says_by_whom(classify: Make, state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def carry_out(*_: object, **options: Any) -> None:
        asked.update(options)
        raise TrainingError("enough")

    monkeypatch.setattr(recipes, "run", carry_out)
    (tmp_path / "recipe.json").write_bytes(msgspec.json.encode(classify()))
    with pytest.raises(TrainingError, match="enough"):
        app(["run", str(tmp_path / "recipe.json"), "--ray", "--workers", "3"], result_action="return_value")
    assert (asked["ray"], asked["workers"]) == (True, 3)
