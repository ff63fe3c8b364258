"""One ONNX file in ONNX Runtime: loaded under our rules, run on arrays. Blocking; any number of threads may run it."""

from __future__ import annotations

import mmap
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

import onnxruntime
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException

from runtimes.contract import Datatype, Invalid, Tensor, Unavailable
from runtimes.integrity import Rejected

if TYPE_CHECKING:
    from runtimes.contract import Array

Provider = Literal["auto", "cpu", "cuda"]


class Graph:
    """Raises Rejected for a file that cannot be loaded, Unavailable for a provider that cannot be had."""

    def __init__(self, file: Path, *, who: str, threads: int, provider: Provider) -> None:
        self.who = who
        self.independent = not _quantizes_while_running(file)
        """What it answers to a row is not moved by the rows beside it."""
        self._session = _session(file, who, threads=threads, provider=provider)
        self.cuda = self._session.get_providers()[0] == _CUDA
        self.inputs = tuple(_tensor(it, who) for it in self._session.get_inputs())
        self.axes: Mapping[str, tuple[int | str | None, ...]] = {
            it.name: tuple(it.shape) for it in (*self._session.get_inputs(), *self._session.get_outputs())
        }
        """Sizes of each tensor's axes, or the names that the graph has for those of any size."""
        # What is no tensor (a map, a sequence) has no place in any protocol.
        self.outputs = tuple(_tensor(it, who) for it in self._session.get_outputs() if _kind(it) in DATATYPES)

    def run(self, names: list[str], feed: Mapping[str, Array]) -> dict[str, Array]:
        """Raises Invalid if these inputs cannot be computed, Unavailable if something else went wrong."""
        try:
            found = self._run_bound(names, feed) if self.cuda else self._session.run(names, feed)
        except Exception as error:  # noqa: BLE001 - the library's errors have no common class
            # What the library says may quote the inputs, so only its kind is passed on.
            kind, shapes = type(error).__name__, {name: list(array.shape) for name, array in feed.items()}
            if isinstance(error, InvalidArgument | RuntimeException | Fail) and not _NO_MEMORY.search(str(error)):
                raise Invalid(f"{self.who} cannot compute inputs like these, {shapes} ({kind})") from None
            raise Unavailable(f"{self.who} failed on {shapes} ({kind})") from None
        return dict(zip(names, found, strict=True))

    def _run_bound(self, names: list[str], feed: Mapping[str, Array]) -> list[Array]:
        """Copied to the device and back once, and nothing in between."""
        binding = self._session.io_binding()
        for name, array in feed.items():
            binding.bind_cpu_input(name, array)
        for name in names:
            binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        copied: list[Array] = binding.copy_outputs_to_cpu()
        return copied


DATATYPES: Mapping[str, Datatype] = MappingProxyType(
    {
        "bool": "BOOL",
        "uint8": "UINT8",
        "uint16": "UINT16",
        "uint32": "UINT32",
        "uint64": "UINT64",
        "int8": "INT8",
        "int16": "INT16",
        "int32": "INT32",
        "int64": "INT64",
        "float16": "FP16",
        "float": "FP32",
        "double": "FP64",
        "string": "BYTES",
    }
)
"""ONNX's name → the protocol's."""

_CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"
_NO_MEMORY = re.compile("alloc|out of memory|CUDA|CUBLAS|CUDNN", re.IGNORECASE)
_DYNAMIC = re.compile(rb"DynamicQuantize(?:Linear|MatMul|LSTM)")


def _session(file: Path, who: str, *, threads: int, provider: Provider) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # lesser messages may quote inputs
    # Waiting threads would otherwise spin, which costs the rest of the machine more than it gains.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers = _providers(provider)
    try:
        session = onnxruntime.InferenceSession(file, options, providers=providers)
    except Exception as error:  # the library's errors have no common class
        raise Rejected(f"{who}: {file.name} cannot be loaded ({error})") from error
    if provider == "cuda" and session.get_providers()[0] != _CUDA:
        raise Unavailable(f"{who}: CUDA was asked for and could not be initialised; check driver and libraries")
    return session


def _providers(provider: Provider) -> list[str]:
    has_cuda = _CUDA in onnxruntime.get_available_providers()
    if provider == "cuda" and not has_cuda:
        raise Unavailable("CUDA was asked for, but this onnxruntime has none; install headrace[cuda]")
    return [_CUDA, _CPU] if has_cuda and provider != "cpu" else [_CPU]


def _tensor(it: onnxruntime.NodeArg, who: str) -> Tensor:
    kind = _kind(it)
    if kind not in DATATYPES:
        raise Rejected(f"{who}: the graph takes `{it.name}` as {it.type}, which no protocol has; export it otherwise")
    return Tensor(it.name, DATATYPES[kind], tuple(axis if isinstance(axis, int) else -1 for axis in it.shape))


def _kind(it: onnxruntime.NodeArg) -> str:
    found: str = it.type.removeprefix("tensor(").removesuffix(")")
    return found


def _quantizes_while_running(file: Path) -> bool:
    """Whether activations are scaled by what else is in the batch."""
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return _DYNAMIC.search(content) is not None
