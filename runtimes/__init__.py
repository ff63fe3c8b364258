"""Runtimes: each knows how to run a model. None knows tenants, quotas or the HTTP server in front.

A Spec is a runtime's configuration, and `Spec.build(site)` makes the runtime; `kind` in the config tells them apart.
Importing this package imports none of the libraries that run models.
"""

from runtimes.echo import Echo
from runtimes.onnx import Onnx

Spec = Echo | Onnx


def specs() -> tuple[type, ...]:
    """Every Spec that a config may name: ours, and those that installed distributions offer under the entry point group
    `headrace.runtimes`, each a msgspec Struct with its own `kind` as the tag and a `build(site)`."""
    from importlib.metadata import entry_points

    return (Echo, Onnx, *(found.load() for found in entry_points(group="headrace.runtimes")))
