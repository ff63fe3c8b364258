"""The stage `train` by several processes, under torchrun or Ray: the same recipe, the same steps.

`fit` is asked by the run, `learn` is what each process does. One that is killed takes the others down; all of them are
then started again, and go on from the last checkpoint.

The weights are those of one process but for the order of sums (a test holds them to 1e-5), unless the model drops out:
each process then drops what it likes.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from runtimes.environment import EnvironmentFault, Environments
from training.catalogue import with_files
from training.console import state
from training.errors import Interrupted, RecipeError, TrainingError
from training.progress import StderrHandler
from training.run import Run
from training.spec import Recipe
from training.spec.trainers import Gradient

LOG = logging.getLogger("training")

RESTARTS_MAX = 3
STUCK_S_MAX = 600.0
"""How long one waits for the others before it gives up."""
_LOOK_S = 0.1
_PRODUCT = "joined.pt"
_REFUSAL = "joined.error"


def fit(recipe: Recipe, run: Run, *, workers: int, ray: bool = False) -> Any:
    """The trained model. Raises TrainingError if the processes fail more often than they are started again."""
    if not isinstance(recipe.trainer, Gradient):
        raise RecipeError("--workers, --ray: only trainer.kind = 'gradient' learns in several processes")
    command = _by_ray(run.folder, workers) if ray else _by_torchrun(run.folder, workers)
    product, refusal = run.folder / _PRODUCT, run.folder / _REFUSAL
    for left in (product, refusal):
        left.unlink(missing_ok=True)
    env = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    LOG.info("train: by %s, %d at once", "Ray" if ray else "torchrun", workers)
    for _ in range(1 + RESTARTS_MAX):
        status = _ended(command, env, run)
        if refusal.exists():
            raise TrainingError(refusal.read_text("utf-8"))
        if status == 0:
            model = torch.load(product, weights_only=False)  # our own, written a moment ago
            product.unlink()
            return model
        if run.stopping:
            raise Interrupted("stopped in the stage 'train'; go on with --resume")
        LOG.warning("train: a process has ended; all of them go on from the last checkpoint")
    raise TrainingError(f"the processes that were to train have failed {1 + RESTARTS_MAX} times; --resume tries again")


def _by_torchrun(folder: Path, workers: int) -> list[str]:
    # torchrun would start them again itself; in the set-up of gloo they then waited for each other for ever.
    return [
        *(sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--max-restarts=0"),
        *(f"--nproc-per-node={workers}", "-m", "training.distributed", str(folder)),
    ]


def _by_ray(folder: Path, workers: int) -> list[str]:
    try:
        python = Environments(state()).python("ray")
    except EnvironmentFault as fault:
        raise TrainingError(f"--ray: {fault}") from fault
    return [str(python), "-P", "-m", "training.on_ray", str(folder.absolute()), str(workers)]


def _ended(command: Sequence[str], env: Mapping[str, str], run: Run) -> int:
    """Its exit status; it is ended if somebody wants to stop."""
    with subprocess.Popen(command, env=env) as team:  # noqa: S603 - no part is anybody's input
        try:
            while team.poll() is None and not run.stopping:
                time.sleep(_LOOK_S)
        finally:
            team.terminate()  # which does nothing once it has ended; torchrun and Ray take theirs with them
        return team.wait()


def learn(folder: Path) -> None:
    """One process's part. torch.distributed has been set up."""
    recipe = msgspec.json.decode((folder / "recipe.json").read_bytes(), type=Recipe)
    assert isinstance(recipe.trainer, Gradient)
    torch.set_num_threads(1)
    run = Run.within(folder, "train", seed=recipe.seed)
    first = dist.get_rank() == 0
    told = StderrHandler()
    told.setFormatter(logging.Formatter("%(relativeCreated)7.0f ms  %(message)s"))
    LOG.addHandler(told)
    LOG.propagate = False  # Ray has a handler of its own
    LOG.setLevel(logging.INFO if first else logging.WARNING)
    try:
        with run.logged():
            rows = with_files(recipe).data.load()
            torch.manual_seed(run.derived("stage", "train"))
            model = recipe.trainer.fit(recipe.model.build(rows), rows.train, run)
        if first:
            run.write(folder / _PRODUCT, lambda draft: torch.save(model, draft))
        dist.barrier()
    except TrainingError as error:
        text = str(error)  # it would be the same again
        run.write(folder / _REFUSAL, lambda draft: draft.write_text(text, "utf-8"))
        raise


def main(folder: Path) -> None:
    """Under torchrun, which has set this process's place in the environment."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # nothing of this leaves the machine
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(seconds=STUCK_S_MAX))
    try:
        learn(folder)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
