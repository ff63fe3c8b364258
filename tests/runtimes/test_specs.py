import subprocess
import sys
from pathlib import Path
from typing import get_args

import msgspec

from runtimes import Spec


def test_a_config_names_each_runtime_by_its_kind() -> None:
    kinds = {
        "echo": {},
        "onnx": {"artifact": "a"},
        "triton": {"artifact": "a"},
        "vllm": {"artifact": "a"},
        "remote": {"url": "http://127.0.0.1/v1"},
    }
    found = [msgspec.convert({"kind": kind, **fields}, Spec) for kind, fields in kinds.items()]
    assert all(spec.slots >= 1 for spec in found)
    assert set(get_args(Spec)) == {type(spec) for spec in found}


def test_importing_the_runtimes_imports_no_library_that_runs_models() -> None:
    heavy = {"numpy", "onnxruntime", "torch", "tokenizers", "transformers", "vllm", "httpx", "grpc", "google.protobuf"}
    code = f"import sys, runtimes; print(sorted({heavy} & sys.modules.keys()))"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
