"""How a vLLM of our own is started: its options, its environment, where its sockets are.

Its API listens on a Unix socket only, in a folder that is closed to others, and what its processes say among themselves
stays on loopback: nobody but this user's processes can reach it. On a CPU it runs without compilation, because that
costs minutes at each start and gains at most a fifth, and with the model in the engine's process instead of a worker's,
which saves a third of the start and half a gigabyte.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from runtimes.artifact import Artifact, Folder, Hub
from runtimes.contract import Site
from runtimes.environment import Environment
from runtimes.process import ENVIRONMENT_KEPT, Command, environment

if TYPE_CHECKING:
    from runtimes.vllm import Vllm

MODULE = "vllm.entrypoints.launchers.api_server.entry"
"""The `vllm` command does not work in the CPU distribution, which has another name."""

HUB_ENVIRONMENT = ("HF_HOME", "HF_TOKEN", "HF_ENDPOINT", "HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy")
"""What an engine that fetches its model gets to see in addition."""

REFUSED = frozenset(
    {
        # Headrace sets these itself.
        *("--model", "--served-model-name", "--uds", "--host", "--port", "--grpc", "--grpc-port", "--api-key"),
        "--runner",
        *("--config", "--load-format", "--max-model-len", "--max-num-seqs", "--kv-cache-memory-bytes", "--dtype"),
        *("--enable-lora", "--lora-modules", "--max-loras", "--max-lora-rank"),
        *("--tool-call-parser", "--enable-auto-tool-choice", "--allowed-media-domains", "--headless"),
        # These let a model's author or a request run code or read files here.
        *("--trust-remote-code", "--trust-request-chat-template", "--allowed-local-media-path"),
        *("--tool-parser-plugin", "--reasoning-parser-plugin", "--middleware", "--logits-processors"),
        *("--worker-cls", "--worker-extension-cls", "--scheduler-cls", "--io-processor-plugin"),
        # Prompts and completions are in no log.
        *("--enable-log-requests", "--enable-log-outputs", "--enable-log-deltas"),
    }
)


def command(
    spec: Vllm,
    site: Site,
    model: Artifact | Folder | Hub,
    engine: Environment,
    python: Path,
    *,
    socket: Path,
) -> Command:
    """How to start vLLM for this. A pure function, but for what it inherits of the environment."""
    hub = isinstance(model, Hub)
    where = model.id if isinstance(model, Hub) else str(model.path)
    options = {
        "--model": where,
        "--served-model-name": site.model,
        "--uds": str(socket),
        "--load-format": "safetensors",
        "--max-model-len": str(spec.tokens_max or "auto"),
        "--max-num-seqs": str(spec.running_max),
        # Otherwise the engine would fetch whatever URL a client puts into a message.
        "--allowed-media-domains": "none.invalid",
        "--uvicorn-log-level": "warning",
    }
    flags = ["--disable-uvicorn-access-log", "--disable-fastapi-docs", "--enable-prompt-tokens-details"]
    env = {
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_COLOR": "1",
        "TMPDIR": str(socket.parent),
        # Holds what vLLM finds out about a model's class, which takes it 10 s the first time.
        "VLLM_CACHE_ROOT": str(site.state.absolute() / "cache" / "vllm"),
    }
    if not hub:
        env["HF_HUB_OFFLINE"] = "1"
    if engine.device == "cpu":
        options["--dtype"] = spec.dtype if spec.dtype != "auto" else cpu_dtype(model)
        options["--kv-cache-memory-bytes"] = str(spec.kv_cache_bytes or 512 << 20)
        options["--block-size"] = "32"  # the least it takes: prompts are reused in whole blocks
        options["--distributed-executor-backend"] = "uni"
        flags.append("--enforce-eager")
        env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # else "uni" becomes "mp" on a CPU
        # Else the first call with `prompt_logprobs` compiles for half a minute while every other call waits.
        env["TORCHDYNAMO_DISABLE"] = "1"
        env["OMP_NUM_THREADS"] = str(spec.threads or max(1, cores() - 1))
    else:
        options["--dtype"] = spec.dtype
        if spec.kv_cache_bytes is not None:
            options["--kv-cache-memory-bytes"] = str(spec.kv_cache_bytes)
    if spec.task != "generate":
        options["--runner"] = "pooling"
    elif spec.tool_parser is not None:
        options["--tool-call-parser"] = spec.tool_parser
        flags.append("--enable-auto-tool-choice")
    if spec.adapters:
        flags.append("--enable-lora")
        options["--max-lora-rank"] = str(spec.adapter_rank_max)
        # In one batch: each of them, and one more while calls still end on the version before.
        options["--max-loras"] = str(len(spec.adapters) + 1)
        # By those who reach the socket, which is nobody but the gateway; it loads what it has verified.
        env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
    kept = (*ENVIRONMENT_KEPT, "CUDA_VISIBLE_DEVICES", *(HUB_ENVIRONMENT if hub else ()))
    # -P: modules come from the engine's environment, never from the folder the gateway was started in.
    argv = [str(python), "-P", "-m", MODULE, *(part for pair in options.items() for part in pair), *flags]
    return Command((*argv, *spec.args), environment(env, kept=kept), socket.parent)


def cpu_dtype(model: Artifact | Folder | Hub) -> str:
    """Unquantized bfloat16 has no instructions on most CPUs and is four times slower than float32; quantized
    weights are computed by integer instructions and are fastest, some only right, beside bfloat16."""
    if isinstance(model, Hub):
        return "auto"
    return "bfloat16" if quantized(model) else "float32"


def quantized(model: Artifact | Folder | Hub) -> bool:
    """Whether its weights are; of one that is still to be fetched nobody knows."""
    if isinstance(model, Hub):
        return False
    return "quantization_config" in msgspec.json.decode((model.path / "config.json").read_bytes(), type=dict[str, Any])


def cores() -> int:
    """Physical cores this process may use; threads of one core share its arithmetic."""
    siblings = set()
    for cpu in os.sched_getaffinity(0):
        try:
            listed = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
        except FileNotFoundError:
            listed = str(cpu)
        siblings.add(listed)
    return len(siblings)
