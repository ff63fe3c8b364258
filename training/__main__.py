"""The `headrace-train` command: nothing but argument reading and what is printed."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import sys
from typing import Annotated, NoReturn

import msgspec
from cyclopts import App, Parameter, validators

from runtimes.integrity import ShelfFault
from training import catalogue, exchange_command, shelf_command
from training.console import AsJson, Where, shelf_at, state
from training.errors import Interrupted, RecipeError, TrainingError, of_disk, of_memory
from training.progress import StderrHandler


def examples(*lines: str) -> str:
    return "\nExamples:\n\n" + "".join(f"    headrace-train {line}\n" for line in lines)


app = App(
    name="headrace-train",
    help="Make the artifacts that Headrace serves, measure them, promote them.",
    help_format="plaintext",
    help_epilogue=examples(
        "run support-intent --set name=mine --set data.train=rows.csv",
        "run digits-cnn --resume",
        "compare mine@stable mine@0123456789ab",
        "promote mine@0123456789ab --as stable",
        "export mine ./mine --to triton",
    ),
)
for command, example in (
    (shelf_command.show, "show support-intent@stable"),
    (shelf_command.compare, "compare mine@stable mine@0123456789ab"),
    (shelf_command.promote, "promote mine@0123456789ab --as stable"),
    (shelf_command.rollback, "rollback mine"),
    (exchange_command.export, "export mine ./mine --to triton"),
    (exchange_command.import_, "import ./mine --name mine --as stable"),
    (exchange_command.gc, "gc --yes"),
):
    app.command(command, name=example.partition(" ")[0], help_epilogue=examples(example))

Settings = Annotated[
    tuple[str, ...],
    Parameter(name="--set", negative="", show_default=False, help="section.field=value, any number of times."),
]


@app.command(
    help_epilogue=examples(
        "run support-intent --set name=mine --set data.train=rows.csv",
        "run intent --from after",
        "run digits-cnn --workers 2 --resume",
        "run mine.toml --base mine@stable --set data.train=new.csv",
    )
)
def run(
    recipe: str,
    /,
    *,
    set_: Settings = (),
    shelf: Where = None,
    json_: AsJson = False,
    if_missing: Annotated[bool, Parameter(negative="", help="Do nothing if this recipe's artifact is there.")] = False,
    resume: Annotated[bool, Parameter(negative="", help="Go on where this recipe was stopped or killed.")] = False,
    base: Annotated[
        str | None, Parameter(help="Go on from this artifact (NAME@ALIAS), with some of its old rows.")
    ] = None,
    workers: Annotated[
        int, Parameter(validator=validators.Number(gte=1, lte=64), help="Processes that train together (torchrun).")
    ] = 1,
    ray: Annotated[
        bool, Parameter(negative="", help="They are Ray's: of a Ray here, or of the cluster at $RAY_ADDRESS.")
    ] = False,
    from_: Annotated[str | None, Parameter(name="--from", help="Keep what was made before this stage.")] = None,
) -> None:
    """Make an artifact: train, compress, measure, and if the gate holds publish and promote it.

    RECIPE is a shipped recipe's name (see `recipes`) or the path of a TOML file. What a run makes on the way, its log
    and its report are in $HEADRACE_STATE/runs. Ctrl-C leaves a checkpoint.
    """
    if resume and from_:
        raise RecipeError("--resume goes on with what is there, --from makes part of it anew: give one of them")
    place = shelf_at(shelf)
    if base is not None:
        found = place.describe(base)
        set_ = (*set_, f"continual.base={found.name}@{found.version}")
    wanted = catalogue.read(recipe, set_)
    manifest = catalogue.made(wanted, place) if if_missing else None
    if manifest is None:
        place.check(wanted.name)  # what stops its promotion must not cost a run
        _need_torch()
        from training.recipe import run as carry_out

        manifest = carry_out(wanted, place, state() / "runs", resume=resume, start=from_, workers=workers, ray=ray)
    shelf_command.print_manifest(manifest, place, as_json=json_)


@app.command(help_epilogue=examples("tune support-intent --trials 30"))
def tune(
    recipe: str,
    /,
    *,
    trials: Annotated[
        int, Parameter(validator=validators.Number(gte=1), help="So many in all; earlier ones count.")
    ] = 20,
    set_: Settings = (),
    json_: AsJson = False,
) -> None:
    """Look for better settings of a recipe, as its [tuning] table says, on a part of its training rows.

    Prints them as `--set` of `run` takes them.
    """
    wanted = catalogue.read(recipe, set_)
    _need_torch()
    from training.tuning import tune as look

    best = look(wanted, state() / "runs", trials=trials)
    if json_:
        print(msgspec.json.encode(best).decode())
        return
    print(f"best of {best.trials} trials: {wanted.tuning.measure if wanted.tuning else ''} {best.value:.4f}")
    print(" ".join(f"--set {field}={value}" for field, value in best.settings.items()))


@app.command(help_epilogue=examples("recipes --json"))
def recipes(*, json_: AsJson = False) -> None:
    """List the recipes that come with the package."""
    found = [catalogue.read(name) for name in catalogue.shipped()]
    if json_:
        print(json.dumps([{"name": it.name, "about": it.about} for it in found]))
        return
    for it in found:
        print(f"{it.name:<22}{it.about}")


def main() -> None:
    logging.basicConfig(
        handlers=[StderrHandler()], format="%(relativeCreated)7.0f ms  %(message)s", level=logging.WARNING
    )
    try:
        app(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has gone, e.g. `head`; writing at exit must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Interrupted as stopped:
        print(f"headrace-train: {stopped}", file=sys.stderr)
        sys.exit(130)
    except (TrainingError, ShelfFault) as error:
        sys.exit(f"headrace-train: {error}")
    except OSError as error:
        sys.exit(f"headrace-train: {of_disk(error, *sys.argv[1:2])}")
    except (MemoryError, RuntimeError) as error:
        if not of_memory(error):
            raise
        sys.exit(
            "headrace-train: out of memory; nothing is published, what was done is kept. A smaller trainer.batch or "
            "model.tokens_max needs less while learning, fewer rows in data.train while reading"
        )


def _need_torch() -> None:
    """Return in an environment that can train, and is set up for it."""
    if importlib.util.find_spec("torch") is None:
        _elsewhere()
    # Everything is on this disk already; nothing may go and look for it on a hub.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")  # its bars tear our lines apart
    logging.getLogger("training").setLevel(logging.INFO)


def _elsewhere() -> NoReturn:
    """Start over in the managed training environment, which has torch."""
    from runtimes.environment import EnvironmentFault, Environments

    try:
        python = Environments(state()).python("train")
    except EnvironmentFault as error:
        sys.exit(f"headrace-train: {error}")
    # -P: a file that happens to lie in the working folder must not stand in for a package.
    os.execv(python, [str(python), "-P", "-m", "training", *sys.argv[1:]])  # noqa: S606 - no shell is what is meant


if __name__ == "__main__":
    main()
