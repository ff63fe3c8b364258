"""The documents are true: what the code has, they name; what they show, runs or loads."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import msgspec
import pytest

import gateway.edge.admin
import gateway.errors
from gateway.config import Config, load
from gateway.edge.openai import DECODERS
from gateway.edge.schema import OIP, openapi

ROOT = Path(__file__).parents[2]
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text()
README = (ROOT / "README.md").read_text()


def error_classes(base: type) -> list[type]:
    return [base, *(found for child in base.__subclasses__() for found in error_classes(child))]


@pytest.mark.parametrize("error", error_classes(gateway.errors.GatewayError), ids=lambda error: error.__name__)
def test_every_error_code_is_in_the_table_beside_its_status(error):
    rows = [row for row in ARCHITECTURE.splitlines() if row.startswith("|") and f"`{error.code}`" in row]
    assert [row for row in rows if str(error.status) in row.split("|")[1]], error.code


def test_the_error_tree_in_the_docstring_names_every_class_with_its_status():
    drawn = dict(re.findall(r"[├└]── (\w+) (\d{3})", gateway.errors.__doc__))
    known = [error for error in error_classes(gateway.errors.GatewayError)[1:] if error.__module__ == "gateway.errors"]
    defined = {error.__name__: str(error.status) for error in known}
    assert drawn == defined


def test_every_metric_is_named_in_the_architecture():
    named = set(re.findall(r'"(headrace_[a-z_]+)"', (ROOT / "gateway/metrics.py").read_text()))
    named |= set(re.findall(r'"(headrace_[a-z_]+)"', (ROOT / "gateway/edge/admin.py").read_text()))
    assert named
    assert {name for name in named if f"`{name}`" not in ARCHITECTURE} == set()


def test_the_openapi_document_lists_every_route_the_gateway_serves():
    assert set(openapi()["paths"]) == {*DECODERS, "/v1/models", "/v1/models/{model}", *OIP}


@pytest.mark.parametrize("path", sorted((ROOT / "deploy").glob("*.toml")), ids=lambda path: path.name)
def test_every_shipped_configuration_loads(path):
    assert load(path).models


def test_the_configurations_in_the_readme_load(tmp_path):
    blocks = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        (tmp_path / "readme.toml").write_text(block)
        assert load(tmp_path / "readme.toml").models


def test_the_changelog_and_the_package_agree_on_the_version():
    newest = re.search(r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert newest is not None
    assert newest.group(1) == version


def test_the_readme_draws_every_module_that_there_is():
    drawn = set(re.findall(r"([\w.-]+\.py)", README.partition("## The tree")[2]))
    packages = ("gateway", "runtimes", "training", "loadtests")
    present = {path.name for package in packages for path in (ROOT / package).rglob("*.py")} - {"__init__.py"}
    present -= {path.name for path in (ROOT / "gateway/migrations").rglob("*.py")}
    assert present - drawn == set()


def test_links_between_documents_lead_somewhere():
    for document in ROOT.glob("*.md"):
        for link in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            if not link.startswith("http"):
                assert (ROOT / link).exists(), f"{document.name} links to {link}"


def test_every_configuration_field_has_a_line_that_explains_it():
    """A field's docstring is its documentation: it must be there, or its struct's must tell of it."""

    def fields(struct: type) -> list[tuple[type, str]]:
        info = msgspec.inspect.type_info(struct)
        own = [(struct, field.name) for field in info.fields]
        inner = [kind.cls for field in info.fields for kind in structs_in(field.type)]
        return own + [found for child in inner for found in fields(child)]

    def structs_in(kind: object) -> list[msgspec.inspect.StructType]:
        if isinstance(kind, msgspec.inspect.StructType):
            return [kind]
        parts = [*getattr(kind, "types", ()), getattr(kind, "item_type", None)]
        return [found for part in parts if part is not None for found in structs_in(part)]

    described: dict[type, set[str]] = {}
    for struct, _ in fields(Config):
        source = Path(sys.modules[struct.__module__].__file__).read_text()
        body = next(n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ClassDef) and n.name == struct.__name__)
        described[struct] = {
            line.target.id
            for line, after in zip(body.body, body.body[1:], strict=False)
            if isinstance(line, ast.AnnAssign) and isinstance(after, ast.Expr)
        }
    silent = {f"{struct.__name__}.{name}" for struct, name in fields(Config) if name not in described[struct]}
    assert silent <= SELF_EXPLAINING


#: Fields whose name, type and struct already say everything.
SELF_EXPLAINING = {
    "Bounds.connections_max", "Bounds.headers_max", "Bounds.body_bytes_max", "Bounds.body_s_max",
    "Bounds.json_depth_max", "Bounds.choices_max", "Config.models", "Config.server", "Config.state", "Config.trace",
    "Config.money", "Model.name", "Model.replicas", "Server.bounds", "State.path",
}  # fmt: skip


@pytest.mark.parametrize("module", ["gateway", "training", "loadtests"])
def test_help_reads_without_a_traceback(module):
    shown = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert shown.returncode == 0
    assert "Usage" in shown.stdout
    assert "Traceback" not in shown.stderr


def test_starting_imports_nothing_heavy():
    """The gateway's process must stay small: engines and training have processes of their own."""
    code = (
        "import sys, gateway.__main__, gateway.app; "
        "print([name for name in "
        "('torch', 'vllm', 'onnxruntime', 'transformers', 'numpy', 'alembic', 'rich', 'fsspec') "
        "if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert shown.stdout.strip() == "[]"
