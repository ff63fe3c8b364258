"""Ids from words must be the library's, text for text, or none."""

from __future__ import annotations

import string
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer, Lowercase, Sequence
from tokenizers.pre_tokenizers import BertPreTokenizer, Whitespace
from tokenizers.processors import BertProcessing, TemplateProcessing

from runtimes import words
from runtimes.words import Words, words_of

PIECES = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "re", "set", "##set", "##s", "Pass", "pass", "##word", "##W", "é"),
    *string.ascii_letters[:40],
    *(f"##{letter}" for letter in "abcdefgh0123"),
    *"0123456789!\"#$%&'()*+,-./:;<=>?@]^_`{|}~\\",
]
VOCABULARY = {piece: index for index, piece in enumerate(PIECES)}


def bert(
    *, lowercase: bool = True, clean_text: bool = True, special: tuple[str, ...] = ("[MASK]", "[SEP]")
) -> Tokenizer:
    tokenizer = Tokenizer(WordPiece(VOCABULARY, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=lowercase, clean_text=clean_text)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def words_in(tokenizer: Tokenizer) -> Words:
    found = words_of(tokenizer)
    assert found is not None
    return found


UNCASED, CASED = bert(), bert(lowercase=False)
WORDS = {id(it): words_in(it) for it in (UNCASED, CASED)}
PLAIN = st.text(st.sampled_from("\t\n\r" + "".join(set(string.printable) - set("[\x0b\x0c"))), max_size=120)


@pytest.mark.parametrize("tokenizer", [UNCASED, CASED])
@settings(max_examples=400)
@given(PLAIN)
@example("")
@example(" \n")
@example("Reset PASSWORD, pass_word re-set! 0x1f\\]^`")
@example("a" * 101 + " a")
def test_a_plain_text_has_the_librarys_ids(tokenizer: Tokenizer, text: str) -> None:
    assert WORDS[id(tokenizer)].ids(text) == tokenizer.encode(text).ids


@pytest.mark.parametrize("tokenizer", [UNCASED, CASED])
@settings(max_examples=400)
@given(st.one_of(st.text(max_size=40), st.text(st.sampled_from("aB é\x00\x0b\x0c\x1f\x7f\x85\xad[]MASK中\u2028"))))
@example("pass[MASK]word")
@example("re\x00set")
@example("\u0130a")
def test_any_other_text_has_none_or_the_librarys(tokenizer: Tokenizer, text: str) -> None:
    assert WORDS[id(tokenizer)].ids(text) in (None, tokenizer.encode(text).ids)


@pytest.mark.parametrize("text", ["[", "re\x00set", "a\x0bb", "a\x7fb", "é", "\u2028"])
def test_what_the_library_may_take_otherwise_is_left_to_it(text: str) -> None:
    assert words_in(UNCASED).ids(text) is None


def changed(**parts: Any) -> Tokenizer:
    tokenizer = bert()
    for name, value in parts.items():
        setattr(tokenizer, name, value)
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer",
    [
        changed(normalizer=Lowercase()),
        changed(normalizer=Sequence([BertNormalizer()])),
        changed(pre_tokenizer=Whitespace()),
        changed(post_processor=TemplateProcessing(single="$A [SEP] $A", special_tokens=[("[SEP]", 3)])),
        bert(clean_text=False),
        bert(special=("secret",)),
        changed(model=WordPiece({"b": 0}, unk_token="[UNK]")),
    ],
)
def test_what_works_otherwise_has_no_words(tokenizer: Tokenizer) -> None:
    assert words_of(tokenizer) is None


def test_what_is_cut_off_from_a_word_is_not_taken_for_its_frame() -> None:
    tokenizer = bert()
    tokenizer.enable_truncation(2)
    assert words_of(tokenizer) is None


def test_other_ways_to_frame_a_text_are_seen() -> None:
    for post_processor in (
        BertProcessing(("[SEP]", 3), ("[CLS]", 2)),
        TemplateProcessing(single="$A", special_tokens=[]),
    ):
        tokenizer = changed(post_processor=post_processor)
        assert words_in(tokenizer).ids("pass word") == tokenizer.encode("pass word").ids


def test_words_are_forgotten_rather_than_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "WORDS_MAX", 3)
    known = words_in(UNCASED)
    for text in ("a b c", "d e f g", "a b c d e f g", "a" * 25):
        assert known.ids(text) == UNCASED.encode(text).ids
        assert 0 < len(known._known) <= 3
    assert "a" * 25 not in known._known
