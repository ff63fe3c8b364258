"""`headrace engine`: what runs models in environments of their own."""

from __future__ import annotations

import sys

from cyclopts import App

from gateway.console import (
    COMMON,
    Common,
    print_json,
    print_table,
    progress,
    tell,
)
from gateway.home import state_of

EXAMPLES = """
Examples:

    headrace engine install triton
    headrace engine install vllm --torch-index https://download.pytorch.org/whl/cpu
"""
ENGINE = App(name="engine", help="Install and remove engines, each on its own.", help_epilogue=EXAMPLES)


@ENGINE.command(name="install")
def engine_install(
    name: str, /, *, version: str | None = None, torch_index: str | None = None, common: Common = COMMON
) -> None:
    """Install an engine, or finish an interrupted installation.

    Parameters
    ----------
    name
        vllm for language models, triton for classifiers, train for making models, compress for making language models
        small, ray for training with Ray.
    version
        Which version, if not the one this release was tested with.
    torch_index
        Package index for torch, e.g. https://download.pytorch.org/whl/cpu.
    """
    from runtimes.environment import Environments

    with progress(sys.stderr) as say:
        made = Environments(state_of(common)).install(name, version=version, torch_index=torch_index, say=say)
    tell(common, made, f"{made.name} {made.version} ({made.device}) is installed")


@ENGINE.command(name="list")
def engine_list(common: Common = COMMON) -> None:
    """Show installed engines."""
    from runtimes.environment import Environments

    made = Environments(state_of(common)).list()
    if common.json:
        print_json(made)
        return
    print_table(["engine", "version", "device"], [(it.name, it.version, it.device) for it in made])


@ENGINE.command(name="remove")
def engine_remove(name: str, version: str, /, *, common: Common = COMMON) -> None:
    """Delete an installed engine."""
    from runtimes.environment import Environments

    Environments(state_of(common)).remove(name, version)
    tell(common, {"removed": name, "version": version}, f"removed {name} {version}")
