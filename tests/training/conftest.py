"""A base model so small that a whole run takes seconds: an untrained two-layer BERT in an installed package."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers

from training.run import Run
from training.spec import Recipe

WORDS = [
    *("where", "is", "my", "parcel", "the", "order", "has", "not", "arrived", "yet"),
    *("card", "payment", "was", "declined", "twice", "please", "pay", "help"),
]


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What holds the packages `tiny-base` and, the same without dropout, `sober-base`."""
    root = tmp_path_factory.mktemp("site")
    _package(root, "tiny", dropout=0.1)
    _package(root, "sober", dropout=0.0)
    return root


def _package(root: Path, name: str, *, dropout: float) -> None:
    model = root / f"{name}_base" / "model"
    model.mkdir(parents=True)
    (root / f"{name}_base" / "__init__.py").write_text("raise RuntimeError('only the files may be used')")
    (root / f"{name}_base-1.5.dist-info").mkdir()
    about = f"Metadata-Version: 2.1\nName: {name}-base\nVersion: 1.5\n"
    (root / f"{name}_base-1.5.dist-info" / "METADATA").write_text(about)
    vocabulary = {word: at for at, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_padding(length=24)
    tokenizer.enable_truncation(12)
    tokenizer.save(str(model / "tokenizer.json"))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    transformers.BertModel(config).save_pretrained(model)


@pytest.fixture
def base(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of the package."""
    monkeypatch.syspath_prepend(str(base_folder))
    assert str(base_folder) in sys.path
    return "tiny-base"


@pytest.fixture
def classify(base: str, tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe over 20 rows of two labels; keywords replace its fields; tables of the same kind are merged."""
    import msgspec

    rows = [
        *(f"where is my parcel {word},delivery" for word in WORDS[:10]),
        *(f"card payment declined {word},payment" for word in WORDS[:10]),
    ]
    file = tmp_path / "rows.csv"
    file.write_text("text,label\n" + "\n".join(rows))

    def make(**changes: object) -> Recipe:
        fields = {
            "name": "tiny",
            "about": "for tests",
            "data": {"kind": "text", "train": str(file)},
            "model": {"kind": "encoder", "package": base, "licence": "none", "tokens_max": 16},
            "trainer": {"kind": "probe"},
            "compress": [{"kind": "int8-dynamic"}],
            "gate": {"accuracy_min": 0.9, "accuracy_drop_max": 0.1},
        }
        for name, value in changes.items():
            kept = fields.get(name)
            merge = isinstance(kept, dict) and isinstance(value, dict) and "kind" in kept
            if merge and value.get("kind", kept["kind"]) == kept["kind"]:  # type: ignore[index,attr-defined]
                fields[name] = kept | value  # type: ignore[operator]
            else:
                fields[name] = value
        return msgspec.convert(fields, Recipe)

    return make


CHATML = (
    "{% for m in messages %}<|im_start|> {{ m.role }} : {{ m.content }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant : {% endif %}"
)


@pytest.fixture(scope="session")
def language_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal language model of two layers in an installed package, untrained, in Hugging Face's layout."""
    root = tmp_path_factory.mktemp("language")
    model = root / "tiny_language" / "model"
    model.mkdir(parents=True)
    (root / "tiny_language" / "__init__.py").write_text("raise RuntimeError('only the files may be used')")
    (root / "tiny_language-1.0.dist-info").mkdir()
    (root / "tiny_language-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: tiny-language\nVersion: 1.0\n"
    )
    words = ["[UNK]", "<|im_start|>", "<|im_end|>", ":", "user", "assistant", "yes", "no", *WORDS]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHATML,
    ).save_pretrained(model)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=2,
        pad_token_id=2,
        bos_token_id=None,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(model)
    return root


@pytest.fixture
def language(language_folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of the package."""
    monkeypatch.syspath_prepend(str(language_folder))
    return "tiny-language"


@pytest.fixture
def stop_at_the_third(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[int]]:
    """From when it is called, somebody presses Ctrl-C at the third checkpoint; returns the steps of all of them."""

    def begin() -> list[int]:
        kept, saved = Run.checkpoint, []

        def stop_soon(run: Run, state: dict[str, Any]) -> None:
            saved.append(state["step"])
            run._stopping = len(saved) == 3
            kept(run, state)

        monkeypatch.setattr(Run, "checkpoint", stop_soon)
        return saved

    return begin
