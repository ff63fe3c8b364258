"""What the Open Inference Protocol tells of models: the same for both of its doors, named as its messages are."""

from __future__ import annotations

from typing import Any, NamedTuple

from gateway.call import Principal, covered
from gateway.errors import EngineUnavailable, Forbidden, NotFound, Unsupported
from gateway.pipeline import Pipeline
from gateway.replica import Replica, State
from gateway.route import Target
from runtimes.contract import Tensor
from runtimes.dialect import generation

Json = dict[str, Any]

#: The routes by which its calls are made, as keys' scopes and records name them.
TENSORS, COMPLETIONS = "/v2/infer", "/v1/completions"
#: What a model is versioned by where nothing better is known; also what asks for no version in particular.
VERSION = "1"
#: Of the protocol, by Triton's names for them.
EXTENSIONS = ("binary_tensor_data", "parameters", "model_configuration", "model_repository", "statistics", "generate")


class Facts(NamedTuple):
    """What is to be known of a model that is up."""

    version: str
    platform: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    generates: bool


class Catalogue:
    """All models of this gateway, and each caller's view of them. `name` and `version` are the gateway's own."""

    def __init__(self, *, pipeline: Pipeline, version: str) -> None:
        self.pipeline = pipeline
        self.version = version

    @property
    def ready(self) -> bool:
        """Whether every model can answer, and the gateway means to go on."""
        targets = self.pipeline.route.targets.values()
        return not self.pipeline.leaving and all(map(_up, targets))

    def server(self) -> Json:
        return {"name": "headrace", "version": self.version, "extensions": list(EXTENSIONS)}

    def generates(self, model: str) -> bool:
        """Whether it makes text of text; False of one that does not exist."""
        target = self.pipeline.route.targets.get(model)
        return target is not None and _generates(target.replicas[0])

    def require_version(self, model: str, version: str, principal: Principal) -> None:
        """Raises NotFound unless the model, if the caller may know of it, has this version."""
        target = self.pipeline.route.targets.get(model)
        if version in ("", VERSION) or target is None or not covered(principal.models, model):
            return
        known = {_version(replica) for replica in target.replicas if replica.state is State.ready}
        if known and version not in known:
            raise NotFound(
                f"Model {model!r} has no version {version[:64]!r}; it has {', '.join(sorted(known))}.", param="version"
            )

    def model_ready(self, model: str, version: str, principal: Principal) -> bool:
        """Raises NotFound, Forbidden."""
        return _up(self._target(model, version, principal))

    def metadata(self, model: str, version: str, principal: Principal) -> Json:
        """Raises NotFound, Forbidden, EngineUnavailable; Unsupported if it speaks neither tensors nor text."""
        facts = self._facts(model, version, principal)
        return {
            "name": model,
            "versions": [facts.version],
            "platform": facts.platform,
            "inputs": [{"name": it.name, "datatype": it.datatype, "shape": list(it.shape)} for it in facts.inputs],
            "outputs": [{"name": it.name, "datatype": it.datatype, "shape": list(it.shape)} for it in facts.outputs],
        }

    def config(self, model: str, version: str, principal: Principal) -> Json:
        """As much of Triton's model configuration as means something here. `max_batch_size` is 0 because shapes are
        told whole, the batch's axis included. Raises as `metadata` does."""
        facts = self._facts(model, version, principal)
        inputs = [_tensor(it) for it in facts.inputs]
        if facts.generates:
            for it in inputs[1:]:
                it["optional"] = True
        return {
            "name": model,
            "platform": facts.platform,
            "backend": facts.platform.partition("_")[0],
            "max_batch_size": 0,
            "input": inputs,
            "output": [_tensor(it) for it in facts.outputs],
            "model_transaction_policy": {"decoupled": facts.generates},
        }

    def index(self, principal: Principal, *, ready: bool) -> list[Json]:
        """Models the caller may use; with `ready`, only those that are up."""
        found = []
        for target in self.pipeline.route.visible(principal):
            up = [replica for replica in target.replicas if replica.state is State.ready]
            if up:
                version = _version(up[0])
                found.append({"name": target.name, "version": version, "state": "READY", "reason": ""})
            elif not ready:
                reason = "; ".join(replica.reason for replica in target.replicas)
                found.append({"name": target.name, "version": "", "state": "UNAVAILABLE", "reason": reason})
        return found

    def statistics(self, model: str, version: str, principal: Principal) -> list[Json]:
        """Of one model, or of all that the caller may use; of this process, since it began. Times are those of whole
        calls, whatever came of them. Raises NotFound, Forbidden."""
        if model:
            return [self._statistics(self._target(model, version, principal))]
        return [self._statistics(target) for target in self.pipeline.route.visible(principal)]

    def refuse_control(self) -> Forbidden:
        """Why no model is loaded or unloaded from here."""
        return Forbidden("Models are named in the gateway's configuration; they are not loaded or unloaded by clients.")

    def _statistics(self, target: Target) -> Json:
        per = self.pipeline.trace.metrics.models[target.name]
        calls: dict[str, int] = {}
        for (_, outcome), number in per.calls.items():
            calls[outcome] = calls.get(outcome, 0) + number
        served = calls.get("served", 0)
        up = [replica for replica in target.replicas if replica.state is State.ready]
        return {
            "name": target.name,
            "version": _version(up[0]) if up else "",
            "inference_count": served,
            "execution_count": served,
            "inference_stats": {
                "success": {"count": served, "ns": int(per.total_s.sum * 1e9)},
                "fail": {"count": sum(calls.values()) - served, "ns": 0},
                "queue": {"count": sum(per.queue_s.counts), "ns": int(per.queue_s.sum * 1e9)},
            },
        }

    def _target(self, model: str, version: str, principal: Principal) -> Target:
        target = self.pipeline.route.find(model, principal)
        self.pipeline.tenants.authorize_model(principal, model)
        self.require_version(model, version, principal)
        return target

    def _facts(self, model: str, version: str, principal: Principal) -> Facts:
        target = self._target(model, version, principal)
        for replica in target.replicas:
            if replica.state is State.ready:
                return _facts(model, replica)
        states = ", ".join(f"{replica.name} is {replica.state}" for replica in target.replicas)
        raise EngineUnavailable(f"No engine of model {model!r} is up ({states}); retry later.", retry_after_s=2.0)


def _up(target: Target) -> bool:
    return any(replica.state is State.ready for replica in target.replicas)


def _generates(replica: Replica) -> bool:
    return replica.generator is not None and COMPLETIONS in replica.generator.routes


def _version(replica: Replica) -> str:
    return VERSION if replica.generator is not None else replica.predictor.version or VERSION


def _facts(model: str, replica: Replica) -> Facts:
    version = _version(replica)
    if _generates(replica):
        return Facts(version, replica.kind, generation.INPUTS, generation.OUTPUTS, generates=True)
    if replica.generator is not None:
        known = ", ".join(sorted(replica.generator.routes))
        raise Unsupported(f"Model {model!r} answers {known}, not the Open Inference Protocol.", param="model")
    it = replica.predictor
    return Facts(version, it.platform, it.inputs, it.outputs, generates=False)


def _tensor(tensor: Tensor) -> Json:
    kind = "STRING" if tensor.datatype == "BYTES" else tensor.datatype
    return {"name": tensor.name, "data_type": f"TYPE_{kind}", "dims": list(tensor.shape)}
