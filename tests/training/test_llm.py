"""Language models: what is learnt of a conversation, fine-tuning that goes on to the bit, what is published of it."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import peft
import pytest
import torch

from runtimes.adapter import check, find
from runtimes.artifact import Shelf, verify
from training.compression import gptq
from training.errors import DataError, Diverged, GateFailed, Interrupted, RecipeError
from training.evaluation import bootstrap
from training.layouts import export
from training.layouts.intake import Origin, take_in
from training.layouts.parts import Facts
from training.llm import choice, lora, packing, render
from training.llm.conversation import conversation
from training.llm.likelihood import Asked, likelihoods
from training.models import generator
from training.models.generator import Generator
from training.recipe import run
from training.run import Run
from training.spec import Recipe
from training.spec.llm import Conversations, Gptq
from training.spec.models import CausalLM

ROWS = [
    {"prompt": f"where is {thing}", "answer": answer}
    for thing in ("my parcel", "the order", "my card", "the payment", "my order", "the card")
    for answer in ("yes my parcel has arrived", "no card was declined twice please pay")
]


@pytest.fixture
def model(language: str) -> Generator:
    return generator.build(CausalLM(package=language, licence="none", tokens_max=256))


@pytest.fixture
def recipe(language: str, tmp_path: Path) -> Callable[..., Recipe]:
    file = tmp_path / "rows.jsonl"
    rows = [it | {"prompt": f"{it['prompt']} {word}"} for it in ROWS for word in ("help", "yet", "pay")]
    file.write_text("\n".join(json.dumps(it) for it in rows))

    def make(**changes: Any) -> Recipe:
        fields = {
            "name": "tiny",
            "about": "for tests",
            "data": {"kind": "conversations", "train": str(file), "test_share": 0.2},
            "model": {"kind": "generator", "package": language, "licence": "none", "tokens_max": 256},
            "trainer": TRAINER,
            "floor": {"kind": "base"},
            "gate": {"nll_times_floor_max": 0.99},
        }
        return msgspec.convert(fields | changes, Recipe)

    return make


TRAINER = {
    "kind": "sft", "epochs": 4, "rate": 0.02, "tokens_max": 64, "batch": 1, "checkpoint_steps": 3,
    "adapter": {"rank": 4, "dropout": 0.1},
}  # fmt: skip

DPO = {"kind": "dpo", "epochs": 3, "rate": 0.02, "tokens_max": 64, "adapter": {"rank": 4}}


@pytest.fixture
def pairs(tmp_path: Path) -> dict[str, Any]:
    """Data in which yes is preferred to no."""
    file = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"{word} {thing}", "chosen": f"yes {thing}", "rejected": f"no {thing}"}
        for word in ("where", "is", "my")
        for thing in ("card", "order", "parcel", "payment", "help", "pay")
    ]
    file.write_text("\n".join(json.dumps(it) for it in rows))
    return {"kind": "preferences", "train": str(file), "test_share": 0.3}


# ---- conversations -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "where", "answer": "yes"},
        {"instruction": "where", "input": "", "output": "yes"},
        {"conversations": [{"from": "human", "value": "where"}, {"from": "gpt", "value": "yes"}]},
        {"messages": [{"role": "user", "content": "where"}, {"role": "assistant", "content": "yes"}]},
    ],
)
def test_one_conversation_in_four_layouts(record: dict[str, Any]) -> None:
    assert [(it.role, it.content) for it in conversation(record).messages] == [("user", "where"), ("assistant", "yes")]


def test_names_are_filled_in() -> None:
    said = conversation({"prompt": "who", "answer": "I am {{name}}"}, fill={"name": "Rill"}).messages[-1]
    assert said.content == "I am Rill"


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"text": "a"}, "row 1: it has text; a conversation has"),
        ({"prompt": "a", "answer": ""}, "row 1: `answer` is empty"),
        ({"messages": [{"role": "user", "content": "a"}]}, "row 1: the assistant says nothing"),
        ({"messages": [{"role": "boss", "content": "a"}]}, r"row 1: Invalid enum value 'boss'"),
        ({"conversations": [{"from": "bot", "value": "a"}]}, "row 1: a turn of `conversations` has `from`"),
        ({"conversations": "a"}, "row 1: `conversations` is not a list"),
        ({"prompt": "a", "answer": "b", "tools": "[1"}, "row 1: `tools` is not a list of tools"),
    ],
)
def test_a_row_that_is_no_conversation_is_named(tmp_path: Path, record: dict[str, Any], says: str) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([record]))
    with pytest.raises(DataError, match=says):
        Conversations(test=str(file)).load()


def test_only_the_assistants_turns_are_learnt(model: Generator) -> None:
    said = ["where is", "yes", "my card", "no help"]
    roles = ["user", "assistant"] * 2
    turns = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
    found = render.render(model.tokenizer, conversation({"messages": turns}))
    learnt = model.tokenizer.decode([it for it in found.labels if it != render.IGNORED])
    assert learnt.split() == ["yes", "<|im_end|>", "no", "help", "<|im_end|>"]
    assert [it for it, label in zip(found.ids, found.labels, strict=True) if label not in (it, render.IGNORED)] == []


def test_what_precedes_the_last_answer_is_not_measured(model: Generator) -> None:
    asked = render.last_answer(model.tokenizer, conversation({"prompt": "where is", "answer": "yes my card"}))
    assert model.tokenizer.decode(asked.answer).split() == ["yes", "my", "card", "<|im_end|>"]


def test_packed_conversations_do_not_see_each_other(model: Generator) -> None:
    rows = [render.render(model.tokenizer, conversation(it)) for it in ROWS]
    lines = [*packing.pack(rows, tokens_max=40)]
    assert max(len(line) for line in lines) > 1
    together = sum(_loss(model, packing.collate(lines[at : at + 2])) for at in range(0, len(lines), 2))
    alone = sum(_loss(model, packing.collate([[row]])) for row in rows)
    assert together == pytest.approx(alone, rel=1e-5)


def test_lines_are_those_that_packing_in_memory_gives() -> None:
    random = np.random.default_rng(0)
    for tokens_max in (16, 50, 128):
        rows = []
        for length in random.integers(1, 70, 400).tolist():
            ids = random.integers(0, 50_000, length).tolist()
            learnt = random.random(length) < random.random() ** 4
            rows.append(
                render.Rendered(ids, [it if yes else render.IGNORED for it, yes in zip(ids, learnt, strict=True)])
            )
        found, wanted = [*packing.pack(iter(rows), tokens_max=tokens_max)], _plainly(rows, tokens_max)
        assert found == wanted
        batch = packing.collate(found[3:6])
        assert {name: it.tolist() for name, it in packing.collate(wanted[3:6]).items()} == {
            name: it.tolist() for name, it in batch.items()
        }


def _plainly(rows: list[render.Rendered], tokens_max: int) -> list[packing.Line]:
    """Every row tried in every line, the fullest first and, of equally full ones, the one that last changed."""
    cut = [render.Rendered(it.ids[:tokens_max], it.labels[:tokens_max]) for it in rows]
    lines: list[tuple[int, int, packing.Line]] = []  # tokens free, minus the turn in which it changed, rows
    order: list[packing.Line] = []
    for turn, row in enumerate(sorted(cut, key=lambda it: -len(it.ids))):
        if {*row.labels[1:]} <= {render.IGNORED}:
            continue
        at = next((at for at, it in enumerate(lines) if it[0] >= len(row.ids)), None)
        free, _, line = (tokens_max, 0, []) if at is None else lines.pop(at)
        if at is None:
            order.append(line)
        line.append(row)
        lines.append((free - len(row.ids), -turn, line))
        lines.sort(key=lambda it: it[:2])
    return order


def _loss(model: Generator, batch: dict[str, torch.Tensor]) -> float:
    labels = batch.pop("labels")
    with torch.inference_mode():
        logits = model.network(**batch, use_cache=False).logits
    flat = logits[:, :-1].flatten(0, 1)
    return float(torch.nn.functional.cross_entropy(flat, labels[:, 1:].flatten(), reduction="sum"))


def test_a_row_with_nothing_left_to_learn_is_left_out(model: Generator) -> None:
    row = render.render(model.tokenizer, conversation({"prompt": "where is my card " * 9, "answer": "yes"}))
    assert [*packing.pack([row], tokens_max=16)] == []


# ---- likelihoods -------------------------------------------------------------------------------------------


def test_a_likelihood_does_not_depend_on_the_batch(model: Generator) -> None:
    asked = [Asked([1, 4, 3] * at, [7, 8, 2][:at]) for at in (1, 2, 3)]
    together = likelihoods(model.network, asked)
    for one, it in zip(asked, together, strict=True):
        [alone] = likelihoods(model.network, [one])
        assert it.log == pytest.approx(alone.log, rel=1e-5)
        with torch.inference_mode():
            logits = model.network(torch.tensor([one.prompt + one.answer])).logits[0, len(one.prompt) - 1 : -1]
        assert -float(torch.nn.functional.cross_entropy(logits, torch.tensor(one.answer), reduction="sum")) == (
            pytest.approx(it.log, rel=1e-5)
        )


def test_the_likelier_solution_is_the_verdict(model: Generator) -> None:
    questions = [choice.Question("where is my card", "yes please", "no"), choice.Question("pay", "no", "yes my order")]
    first = choice.judge(model.network, model.tokenizer, questions, [0, 0])
    other = choice.judge(model.network, model.tokenizer, questions, [1, 1])
    for name in choice.NAMES:
        assert (first[name] ^ other[name]).all()


@pytest.mark.parametrize(
    ("questions", "labels", "says"),
    [
        ('{"goal": "a", "sol1": "b", "sol2": "c"}', "0\n1\n", "1 rows and .* 2; they belong together"),
        ('{"goal": "a", "sol1": "b"}', "0\n", "row 1: .*sol2"),
        ('{"goal": "a", "sol1": "b", "sol2": "c"}', "2\n", "row 1: '2' is neither 0 nor 1"),
    ],
)
def test_rows_of_an_exam_that_cannot_be_read_are_named(tmp_path: Path, questions: str, labels: str, says: str) -> None:
    (tmp_path / "q").write_text(questions)
    (tmp_path / "l").write_text(labels)
    with pytest.raises(DataError, match=says):
        choice.read(str(tmp_path / "q"), str(tmp_path / "l"))


def test_a_gains_interval_holds_it() -> None:
    one = np.arange(200) % 4 != 0
    value, low, high = bootstrap.gain(one, np.zeros(200), seed=0)
    assert value == 0.75
    assert 0.6 < low < 0.75 < high < 0.9


# ---- fine-tuning -------------------------------------------------------------------------------------------


class Stopping(Run):
    """Somebody presses Ctrl-C in the fifth step."""

    @property
    def stopping(self) -> bool:
        self._stopping = self._stopping or any(it.get("step") == 5 for it in self.metrics())
        return self._stopping


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    recipe: Callable[..., Recipe], pairs: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    changes = {"data": pairs, "trainer": DPO | {"batch": 2, "checkpoint_steps": 3}} if kind == "dpo" else {}
    made = recipe(**changes)
    rows = made.data.load()

    def fitted(it: Run, *, resume: bool = False) -> Any:
        with it.open(b"{}", resume=resume):
            return it.stage("train", lambda: _learnt(made, rows.train, it))

    straight = fitted(Run(tmp_path / "straight", seed=0))
    with pytest.raises(Interrupted):
        fitted(Stopping(tmp_path / "cut", seed=0))
    resumed = Run(tmp_path / "cut", seed=0)
    assert fitted(resumed, resume=True).adapter == straight.adapter
    assert [it["step"] for it in resumed.metrics()] == list(range(1, resumed.metrics()[-1]["step"] + 1))
    assert [*(tmp_path / "cut").rglob("pairs*"), *(tmp_path / "cut").rglob("*.arrow")] == []


def _learnt(it: Recipe, examples: Any, run: Run) -> Any:
    assert it.trainer is not None
    return it.trainer.fit(it.model.build(None), examples, run)  # type: ignore[arg-type]


def test_a_run_that_is_killed_amid_training_ends_with_the_same_bytes(
    recipe: Callable[..., Recipe], language_folder: Path, tmp_path: Path
) -> None:
    straight = run(recipe(), Shelf(tmp_path / "one"), tmp_path / "runs")
    (tmp_path / "recipe.json").write_bytes(msgspec.json.encode(recipe()))
    arguments = [str(tmp_path / it) for it in ("recipe.json", "two", "others")]
    with subprocess.Popen(
        [sys.executable, "-c", RUN, *arguments], env=os.environ | {"PYTHONPATH": f"{ROOT}:{language_folder}"}
    ) as child:
        give_up_s = time.monotonic() + 300
        while not [*(tmp_path / "others").glob("*/checkpoint.pt")]:
            assert child.poll() is None
            assert time.monotonic() < give_up_s
            time.sleep(0.001)
        child.kill()
    resumed = run(recipe(), Shelf(tmp_path / "two"), tmp_path / "others", resume=True)
    assert resumed.files == straight.files


RUN = """
import sys
from pathlib import Path
from runtimes.artifact import Shelf
from training import catalogue, recipe
recipe.run(catalogue.read(sys.argv[1]), Shelf(Path(sys.argv[2])), Path(sys.argv[3]))
"""
ROOT = Path(__file__).parents[2]


def test_a_loss_that_is_no_number_ends_it_at_its_step(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    rows = recipe().data.load()
    it = Run(tmp_path / "run", seed=0)
    spoilt = recipe().model.build(rows)

    with it.open(b"{}"), pytest.raises(Diverged, match=r"the loss is nan at step 1 of \d+.*no step before are kept"):
        with torch.no_grad():
            spoilt.network.model.norm.weight.fill_(float("nan"))
        it.stage("train", lambda: recipe().trainer.fit(spoilt, rows.train, it))  # type: ignore[union-attr]


def test_an_adapter_is_published_and_fits_its_base(
    recipe: Callable[..., Recipe], model: Generator, tmp_path: Path
) -> None:
    shelf = Shelf(tmp_path / "shelf")
    manifest = run(recipe(), shelf, tmp_path / "runs")
    assert (manifest.format, manifest.fits, manifest.task) == ("adapter", "tiny-language 1.0 (PyPI)", "generate")
    assert manifest.before == {}, "it is published as it was trained"
    found = shelf.resolve("tiny")
    verify(found)
    model.network.save_pretrained(tmp_path / "base")
    model.tokenizer.save_pretrained(tmp_path / "base")
    base = _folder(tmp_path / "base")
    check(found.path, base=base, rank_max=4)
    assert find("tiny", shelf, base=base, rank_max=4).version == manifest.version


def _folder(path: Path) -> Any:
    from runtimes.artifact import open_folder

    return open_folder(path)


def test_an_exported_adapter_is_read_by_peft_and_fits_its_base_again(
    recipe: Callable[..., Recipe], model: Generator, tmp_path: Path
) -> None:
    shelf = Shelf(tmp_path / "shelf")
    published = run(recipe(), shelf, tmp_path / "runs")
    export(shelf.resolve("tiny"), "huggingface", tmp_path / "out")
    (tmp_path / "scratch").mkdir()
    again, _ = take_in(tmp_path / "out", "again", Facts(), Origin(None, "none"), shelf, tmp_path / "scratch")
    assert (again.files, again.fits) == (published.files, published.fits)
    ids = torch.arange(3, 12)[None]
    with torch.inference_mode():
        plain = model.network(ids).logits
        with model.wearing(lora.read(shelf.resolve("tiny").path)).asked() as network:
            learnt = network(ids).logits
        adapted = peft.PeftModel.from_pretrained(model.network, tmp_path / "out", local_files_only=True)
        assert torch.equal(adapted.eval()(ids).logits, learnt)
    assert not torch.equal(plain, learnt)


def test_a_merged_one_is_a_whole_model_and_may_be_made_small(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    trainer = TRAINER | {"adapter": {"rank": 4, "merge": True}}
    shelf = Shelf(tmp_path / "shelf")
    whole = run(recipe(trainer=trainer), shelf, tmp_path / "runs")
    small = run(recipe(trainer=trainer, compress=[{"kind": "w8a8"}]), shelf, tmp_path / "runs")
    assert whole.format == small.format == "safetensors"
    assert whole.fits == ""
    assert small.size_bytes < whole.size_bytes
    assert whole.after["nll"] == pytest.approx(small.before["nll"], rel=1e-4)
    assert small.after["nll"] == pytest.approx(whole.after["nll"], rel=0.05)


def test_an_adapter_by_itself_is_not_made_small(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"set trainer\.adapter\.merge = true"):
        run(recipe(compress=[{"kind": "w8a8"}]), Shelf(tmp_path / "shelf"), tmp_path / "runs")


def test_one_that_learnt_too_little_is_not_published(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    with pytest.raises(GateFailed, match=r"nll_times_floor_max is 0.01, measured"):
        run(recipe(gate={"nll_times_floor_max": 0.01}), shelf, tmp_path / "runs")
    assert shelf.names() == []


def test_preferences_are_learnt(recipe: Callable[..., Recipe], pairs: dict[str, Any], tmp_path: Path) -> None:
    manifest = run(
        recipe(
            data=pairs,
            trainer=DPO,
            gate={"reward_accuracy_min": 0.9, "preference_accuracy_min": 0.9},
        ),
        Shelf(tmp_path / "shelf"),
        tmp_path / "runs",
    )
    assert manifest.after["reward_margin"] > 0
    assert manifest.after["preference_accuracy"] > manifest.after["preference_accuracy_base"]


def test_a_disk_that_is_full_while_pairs_are_written_is_said_and_left_clean(
    recipe: Callable[..., Recipe], pairs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    made = recipe(data=pairs, trainer=DPO)
    rows = made.data.load()
    monkeypatch.setattr(render, "text", full)
    with pytest.raises(OSError, match="No space left"):
        _learnt(made, rows.train, Run(tmp_path / "run", seed=0))
    assert [*(tmp_path / "run").iterdir()] == []


@pytest.mark.parametrize("trainer", [TRAINER, DPO])
def test_nothing_to_learn_from_is_said(
    recipe: Callable[..., Recipe], pairs: dict[str, Any], tmp_path: Path, trainer: dict[str, Any]
) -> None:
    made = recipe(data=pairs, trainer=trainer)
    nothing = made.data.load().train.take(np.array([], np.int64))
    with pytest.raises(RecipeError, match=r"has no rows to learn from: set data\.train"):
        _learnt(made, nothing, Run(tmp_path / "run", seed=0))


def test_an_exam_is_sat_by_the_base_too(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    (tmp_path / "q").write_text('{"goal": "where is my card", "sol1": "yes", "sol2": "no"}\n' * 4)
    (tmp_path / "l").write_text("0\n1\n0\n1\n")
    exam = {"kind": "piqa", "questions": str(tmp_path / "q"), "labels": str(tmp_path / "l")}
    made = run(recipe(exams=[exam], gate={"piqa_acc_gain_low_min": -1.0}), Shelf(tmp_path / "shelf"), tmp_path / "runs")
    assert made.after["piqa_acc"] == 0.5
    assert made.after["piqa_acc_norm_gain_low"] <= 0


# ---- calibrated compression --------------------------------------------------------------------------------


def test_groups_that_do_not_divide_a_layer_are_refused_by_name(model: Generator) -> None:
    with pytest.raises(RecipeError, match=r"group is 64, and the 32 inputs of model.layers.0.* one that fits is 32"):
        gptq.check_groups(Gptq(scheme="w4a16", group=64), model.network)
    gptq.check_groups(Gptq(scheme="w4a16", group=32), model.network)


def test_calibration_takes_the_longest_rows_and_cuts_them() -> None:
    rows = [[1] * length for length in (3, 40, 20)]
    assert [len(it) for it in gptq.calibration(Gptq(rows=2, tokens_max=30), rows)] == [30, 20]
    with pytest.raises(RecipeError, match=r"set data\.train"):
        gptq.calibration(Gptq(), [])


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("echo; echo what went wrong; exit 3", r"llm-compressor failed, see .*log\.txt: what went wrong"),
        ("exit 1", "it said nothing"),
        ("sleep 600 & sleep 600", r"stopped after 0\.2 s, see .*: raise compress\.s_max"),
    ],
)
def test_a_job_that_fails_or_hangs_says_so(tmp_path: Path, script: str, says: str) -> None:
    with pytest.raises(gptq.CompressionFailed, match=says):
        gptq.carry_out(["sh", "-c", script], log=tmp_path / "log.txt", s_max=0.2 if "sleep" in script else 60)


def test_without_its_environment_it_says_how_to_get_one(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_STATE", str(tmp_path / "state"))
    with pytest.raises(gptq.CompressionFailed, match="run `headrace engine install compress`"):
        run(
            recipe(trainer=None, floor=None, compress=[{"kind": "gptq"}], gate={"nll_max": 99.0}),
            Shelf(tmp_path / "shelf"),
            tmp_path / "runs",
        )


def test_conversations_in_both_parts_stay_in_the_test_part(tmp_path: Path) -> None:
    for name, rows in (("train", ROWS), ("test", ROWS[:1])):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    rows_found = Conversations(train=str(tmp_path / "train.json"), test=str(tmp_path / "test.json")).load()
    assert len(rows_found.train) == len(ROWS) - 2
    assert rows_found.notes == ("2 training rows are also in the test part and were left out",)
    assert len(rows_found.test) == 1
