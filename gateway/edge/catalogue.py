"""What the Open Inference Protocol tells of models: the same for both of its doors, named as its messages are."""

from __future__ import annotations

from typing import Any, NamedTuple

from gateway.alias import Alias
from gateway.call import Principal, covered
from gateway.errors import EngineUnavailable, Forbidden, NotFound, Unsupported
from gateway.pipeline import Pipeline
from gateway.replica import Replica, State
from gateway.target import Target
from runtimes.contract import Tensor
from runtimes.dialect import generation
from runtimes.dialect.elements import Message

Json = dict[str, Any]

#: The routes by which its calls are made, as keys' scopes and records name them.
TENSORS, COMPLETIONS = "/v2/infer", "/v1/completions"
#: What a model is versioned by where nothing better is known; also what asks for no version in particular.
VERSION = "1"
#: Of the protocol, by Triton's names for them.
EXTENSIONS = (
    *("binary_tensor_data", "classification", "parameters", "generate"),
    *("model_configuration", "model_repository", "statistics"),
)


class Facts(NamedTuple):
    """What is to be known of a model that is up."""

    versions: tuple[str, ...]
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
        """Whether it makes text of text, or some of an alias's models do; False of one that does not exist."""
        found = self.pipeline.route.get(model)
        return found is not None and any(map(_generates, found.replicas))

    def asks_generator(self, model: str, message: Message) -> bool:
        """Whether the message is for a model that makes text of text: an alias may stand for others beside it."""
        found = self.pipeline.route.get(model)
        kinds = set() if found is None else set(map(_generates, found.replicas))
        return kinds == {True} or (
            True in kinds and any(part.name == generation.INPUTS[0].name for part in message.parts)
        )

    def require_version(self, model: str, version: str, principal: Principal) -> str:
        """What the model is to be asked for: the version, if it has several, else nothing. Raises NotFound unless the
        model, if the caller may know of it, has this one."""
        found = self.pipeline.route.get(model)
        if not version or found is None or not covered(principal.models, model):
            return ""
        numbered = not isinstance(found, Alias) and any(map(_is_numbered, found.replicas))
        ready = (replica for replica in found.replicas if replica.state is State.ready)
        known = {it for replica in ready for it in _versions(found, replica)}
        if known and version not in known and (version != VERSION or numbered):
            told = ", ".join(sorted(known, key=lambda it: (len(it), it)))
            raise NotFound(f"Model {model!r} has no version {version[:64]!r}; it has {told}.", param="version")
        return version if numbered else ""

    def model_ready(self, model: str, version: str, principal: Principal) -> bool:
        """Raises NotFound, Forbidden."""
        return _up(self._named(model, version, principal))

    def metadata(self, model: str, version: str, principal: Principal) -> Json:
        """Raises NotFound, Forbidden, EngineUnavailable; Unsupported if it speaks neither tensors nor text."""
        facts = self._facts(model, version, principal)
        return {
            "name": model,
            "versions": list(facts.versions),
            "platform": facts.platform,
            "inputs": [{"name": it.name, "datatype": it.datatype, "shape": list(it.told)} for it in facts.inputs],
            "outputs": [{"name": it.name, "datatype": it.datatype, "shape": list(it.told)} for it in facts.outputs],
        }

    def config(self, model: str, version: str, principal: Principal) -> Json:
        """As much of Triton's model configuration as means something here. `max_batch_size` is 0 because shapes are
        told whole, the batch's axis included. Raises as `metadata` does."""
        facts = self._facts(model, version, principal)
        return {
            "name": model,
            "platform": facts.platform,
            "backend": facts.platform.partition("_")[0],
            "max_batch_size": 0,
            "input": [_tensor(it) for it in facts.inputs],
            "output": [_tensor(it) for it in facts.outputs],
            "model_transaction_policy": {"decoupled": facts.generates},
        }

    def index(self, principal: Principal, *, ready: bool) -> list[Json]:
        """Models and aliases that the caller may use; with `ready`, only those that are up."""
        found = []
        for it in self.pipeline.route.visible(principal):
            up = [replica for replica in it.replicas if replica.state is State.ready]
            if up:
                version = _versions(it, up[0])[-1]
                found.append({"name": it.name, "version": version, "state": "READY", "reason": ""})
            elif not ready:
                reason = "; ".join(replica.reason for replica in it.replicas)
                found.append({"name": it.name, "version": "", "state": "UNAVAILABLE", "reason": reason})
        return found

    def statistics(self, model: str, version: str, principal: Principal) -> list[Json]:
        """Of one model, of those of an alias, or of all that the caller may use; of this process, since it began. Times
        are those of whole calls. Raises NotFound, Forbidden."""
        found = [self._named(model, version, principal)] if model else self.pipeline.route.visible(principal)
        targets = {it.name: it for them in found for it in (them.targets if isinstance(them, Alias) else (them,))}
        return [self._statistics(target) for target in targets.values()]

    def refuse_control(self) -> Forbidden:
        """Why no model is loaded or unloaded from here."""
        return Forbidden("Models are named in the gateway's configuration; they are not loaded or unloaded by clients.")

    def _statistics(self, target: Target) -> Json:
        per = self.pipeline.trace.metrics.models[target.name]
        calls: dict[str, int] = {}
        for (_, outcome), number in per.calls.items():
            calls[outcome] = calls.get(outcome, 0) + number
        served = calls.get("served", 0)
        batches = [sum(batched.rows.counts) for it in target.replicas if (batched := it.batched)]
        apart, none = {"count": per.computed, "ns": 0}, {"count": 0, "ns": 0}
        return {
            "name": target.name,
            # Of all that it had: promotions do not begin the counts anew. And Triton's perf_analyzer wants a number.
            "version": VERSION,
            "last_inference": int(per.last_at_s * 1e3),
            # Row by row, as Triton counts; who generates has no rows.
            "inference_count": per.served_items or served,
            "execution_count": sum(batches) if batches else served,
            "inference_stats": {
                "success": {"count": served, "ns": int(per.served_s * 1e9)},
                "fail": {"count": sum(calls.values()) - served, "ns": int((per.total_s.sum - per.served_s) * 1e9)},
                "queue": {"count": sum(per.queue_s.counts), "ns": int((per.queue_s.sum + per.inner_queue_s) * 1e9)},
                # What goes in and out of a model is not told apart from it; Triton's tools want the counts alike.
                "compute_input": apart,
                "compute_infer": {"count": per.computed, "ns": int(per.compute_s * 1e9)},
                "compute_output": apart,
                "cache_hit": none,
                "cache_miss": none,
            },
            "batch_stats": [],
        }

    def _named(self, model: str, version: str, principal: Principal) -> Target | Alias:
        found = self.pipeline.route.get(model)
        if found is None:
            raise self.pipeline.route.unknown(model, principal)
        self.pipeline.tenants.authorize_model(principal, model)
        self.require_version(model, version, principal)
        return found

    def _facts(self, model: str, version: str, principal: Principal) -> Facts:
        """Of an alias: its first model's that is up."""
        found = self._named(model, version, principal)
        for replica in found.replicas:
            if replica.state is State.ready:
                return _facts(found, replica)
        states = ", ".join(f"{replica.name} is {replica.state}" for replica in found.replicas)
        raise EngineUnavailable(f"No engine of model {model!r} is up ({states}); retry later.", retry_after_s=2.0)


def _up(it: Target | Alias) -> bool:
    return any(replica.state is State.ready for replica in it.replicas)


def _generates(replica: Replica) -> bool:
    return replica.generator is not None and COMPLETIONS in replica.generator.routes


def _is_numbered(replica: Replica) -> bool:
    """Its versions are models of their own, on a server elsewhere."""
    return replica.generator is None and bool(replica.predictor.versions)


def _versions(it: Target | Alias, replica: Replica) -> tuple[str, ...]:
    """Those that may be asked for, the one that answers by itself last. Which of its models answers an alias's call is
    not for the caller to say, so it has no version but the one that asks for none."""
    if isinstance(it, Alias) or replica.generator is not None:
        return (VERSION,)
    return replica.predictor.versions or (replica.predictor.version or VERSION,)


def _facts(it: Target | Alias, replica: Replica) -> Facts:
    versions = _versions(it, replica)
    if _generates(replica):
        return Facts(versions, replica.kind, generation.INPUTS, generation.OUTPUTS, generates=True)
    if replica.generator is not None:
        known = ", ".join(sorted(replica.generator.routes))
        raise Unsupported(f"Model {it.name!r} answers {known}, not the Open Inference Protocol.", param="model")
    predictor = replica.predictor
    return Facts(versions, predictor.platform, predictor.inputs, predictor.outputs, generates=False)


def _tensor(tensor: Tensor) -> Json:
    kind = "STRING" if tensor.datatype == "BYTES" else tensor.datatype
    known: Json = {"name": tensor.name, "data_type": f"TYPE_{kind}", "dims": list(tensor.told)}
    return known | {"optional": True} if tensor.optional else known
