"""N-grams of words or characters, each counted and weighed, and a linear layer on top: one graph, behind a tokenizer
that takes a text apart as scikit-learn does."""

from __future__ import annotations

from collections.abc import Sequence

import tokenizers
from tokenizers import Regex, normalizers, pre_tokenizers, processors
from torch import Tensor, nn

from training.contract import Array, Classes, Flags, Inputs, Rows
from training.errors import RecipeError
from training.models.encoder import TextModel
from training.models.ngrams import TfIdf
from training.spec.models import Ngrams

_PAD, _UNKNOWN, _START = _SPECIAL = ("[PAD]", "[UNK]", "[START]")
_TOKENS_MAX = 1 << 20
"""Different words or characters; rarer ones are unknown."""


class Bag(TextModel):
    """See the module."""

    task = "classify"
    names_out = ("scores", "logits")

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        tfidf: TfIdf,
        labels: Sequence[str],
        *,
        exclusive: bool,
        tokens_max: int,
        truncate: bool,
    ) -> None:
        super().__init__(tokenizer, tokens_max=tokens_max, truncate=truncate)
        self.tfidf = tfidf
        self.labels = tuple(labels)
        self.exclusive = exclusive
        """As of an encoder's Classifier."""
        self.linear = nn.Linear(len(tfidf.pool), len(labels))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Token ids and mask [n, tokens] → scores [n, labels], and the logits behind them."""
        logits = self.linear(self.tfidf(input_ids * attention_mask))
        return logits.softmax(-1) if self.exclusive else logits.sigmoid(), logits

    def head(self) -> Sequence[nn.Parameter]:
        return [*self.linear.parameters()]

    def weights(self, inputs: Inputs) -> Array:
        """TF-IDF of these rows, float32 [n, n-grams]: mostly zeros, so not of many at once."""
        ids, mask = self.feed(inputs)
        found: Array = self.tfidf(ids * mask).numpy()
        return found


def build(spec: Ngrams, rows: Rows) -> Bag:
    """With the n-grams of the training rows, and a linear layer that is new."""
    targets = rows.train.targets
    if not isinstance(targets, Classes | Flags) or "text" not in rows.train.inputs:
        raise RecipeError("the model 'ngrams' is for texts with labels")
    texts = rows.train.inputs["text"]
    tokenizer = _tokenizer(spec, texts)
    tokenizer.enable_truncation(spec.tokens_max)
    # Without the token that begins each text: it says nothing.
    encoded = [it.ids[1:] for it in tokenizer.encode_batch(list(texts))]
    tokenizer.no_truncation()
    tfidf = TfIdf(encoded, shortest=spec.least, longest=spec.most, rows_min=spec.rows_min)
    model = Bag(
        tokenizer,
        tfidf,
        targets.labels,
        exclusive=isinstance(targets, Classes),
        tokens_max=spec.tokens_max,
        truncate=spec.truncate,
    )
    model.eval()
    return model


def _tokenizer(spec: Ngrams, texts: Array) -> tokenizers.Tokenizer:
    """Words of two letters or more, or single characters with blanks in a row as one; in lower case. A text begins with
    a token of its own, so that one without any word is still answered."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({}, unk_token=_UNKNOWN))
    if spec.unit == "word":
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w\w+"), behavior="removed", invert=True)
    else:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Lowercase(), normalizers.Replace(Regex(r"\s\s+"), " ")]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    trainer = tokenizers.trainers.WordLevelTrainer(
        vocab_size=_TOKENS_MAX, special_tokens=[*_SPECIAL], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_START} $A", special_tokens=[(_START, tokenizer.token_to_id(_START))]
    )
    assert tokenizer.token_to_id(_PAD) == 0
    return tokenizer
