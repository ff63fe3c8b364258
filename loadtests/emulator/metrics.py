"""The emulator's counters in Prometheus' text format, named as vLLM names its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loadtests.emulator.server import Emulator


def metrics(emulator: Emulator) -> bytes:
    """What a scraper gets."""
    waiting, cache = emulator.pacer.waiting, emulator.pacer.cache
    gauges: dict[str, float] = {
        "num_requests_running": emulator.running - waiting,
        "num_requests_waiting": waiting,
        "kv_cache_usage_perc": emulator.pacer.kv_usage,
    }
    counters: dict[str, float] = {
        "prompt_tokens_total": emulator.prompt_tokens,
        "generation_tokens_total": emulator.made,
        "prefix_cache_queries_total": cache.queried_tokens if cache else 0,
        "prefix_cache_hits_total": cache.hit_tokens if cache else 0,
    }
    lines = [*_family("gauge", gauges), *_family("counter", counters), "# TYPE vllm:request_success_total counter"]
    reasons = {"stop": emulator.finished, "abort": emulator.aborted, "error": emulator.faulted.total()}
    lines += [
        _line("request_success_total", count, f',finished_reason="{reason}"') for reason, count in reasons.items()
    ]
    return "\n".join([*lines, ""]).encode()


def _family(kind: str, figures: dict[str, float]) -> list[str]:
    return [line for name, figure in figures.items() for line in (f"# TYPE vllm:{name} {kind}", _line(name, figure))]


def _line(name: str, figure: float, label: str = "") -> str:
    return f'vllm:{name}{{engine="0",model_name="emulated"{label}}} {figure}'
