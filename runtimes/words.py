"""The ids of short, plain texts, put together from those of their words, which are looked up.

BERT's tokenizers (Devlin et al. 2019, with WordPiece) take each word by itself, so what the library has made of one
holds wherever it stands. Behind a model's run, which has emptied the caches, a look-up costs a tenth of tokenizing.
"""

from __future__ import annotations

import re

from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

#: What the normalizer leaves as it is but for its case, and takes blanks for blanks in. Special tokens have a `[`.
PLAIN = re.compile(r"[\t\n\r -Z\\-~]*")
#: As the pre-tokenizer has it: a run of letters and digits, or one of anything else that is no blank.
WORD = re.compile(r"[A-Za-z0-9]+|[!-/:-@\\-`{-~]")
#: Words whose pieces are kept, then all are forgotten, since the frequent ones are soon known again; and how long such
#: a word may be, because each of its letters may be a piece.
WORDS_MAX = 8_192
WORD_CHARS_MAX = 24


class Words:
    """Safe for threads."""

    def __init__(self, model: WordPiece, *, lowercase: bool, head: list[int], tail: list[int]) -> None:
        self._model = model
        self._lowercase = lowercase
        self._head = head
        self._tail = tail
        self._known: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int] | None:
        """All of them, whatever the tokenizer would cut off; None if the text is not plain."""
        if not PLAIN.fullmatch(text):
            return None
        found = self._head.copy()
        for word in WORD.findall(text.lower() if self._lowercase else text):
            found += self._known.get(word) or self._learn(word)
        found += self._tail
        return found

    def _learn(self, word: str) -> list[int]:
        pieces = [token.id for token in self._model.tokenize(word)]
        if len(word) <= WORD_CHARS_MAX:
            if len(self._known) >= WORDS_MAX:
                self._known.clear()
            self._known[word] = pieces
        return pieces


def words_of(tokenizer: Tokenizer) -> Words | None:
    """None if it is not known to work by words."""
    normalizer, model = tokenizer.normalizer, tokenizer.model
    if not (
        isinstance(normalizer, BertNormalizer)
        and normalizer.clean_text
        and isinstance(tokenizer.pre_tokenizer, BertPreTokenizer)
        and isinstance(model, WordPiece)
        and all("[" in token.content for token in tokenizer.get_added_tokens_decoder().values())
    ):
        return None
    if tokenizer.token_to_id(model.unk_token) is None:
        return None  # it takes no word that it does not know
    # What it puts around a text is seen around one of a single word, which it must have in it once.
    whole = tokenizer.encode("a")
    bare = [token.id for token in model.tokenize("a")]
    added = whole.special_tokens_mask
    head = (*added, 0).index(0)
    tail = head + len(bare)
    if whole.ids[head:tail] != bare or 0 in added[tail:]:
        return None
    return Words(model, lowercase=normalizer.lowercase, head=whole.ids[:head], tail=whole.ids[tail:])
