"""Text token reduction: which tokens of a caption stay where it is longer than the tower takes.

    text_reduction: {name: truncate}                         the first ones
    text_reduction: {name: random}                           any, in their order
    text_reduction: {name: block}                            neighbours
    text_reduction: {name: syntax, tags: vocabulary}         nouns, adjectives, verbs first
    text_reduction: {name: frequency, threshold: 1.0e-6}     rare words first
    text_reduction: {name: block, num_tokens: 16}            16 tokens, at their own positions

The special tokens around a text stay, whatever is removed between them. By default a text is cut to
`context_length` and closes up: its tokens stand at positions 0, 1, ... as in CLIPA
(arXiv:2305.07017) and CLIPF (arXiv:2412.16148). With `num_tokens` below `context_length` the tower
is as long as ever but sees that many tokens, gathered after their own positions were added; in
evaluation it sees all.

Every variant gives each token a key, drawn by hash(seed, position) where it draws; the smallest
keys stay, ties leftmost first (the published code sorts unstably, which differs between machines).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import Field

from configs import draws
from configs.registry import Registry, Variant

NumTokens = Annotated[int, Field(ge=3)]
Threshold = Annotated[float, Field(gt=0, lt=1)]
Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]


class Text(NamedTuple):
    """One caption as a tokenizer gives it, with its special tokens."""

    ids: Sequence[int]
    num_head: int  # special tokens before the text
    num_tail: int  # and after it
    # Where a reduction needs them: the number of the word of each token in between, the words.
    word: Sequence[int] = ()
    words: Sequence[str] = ()

    @property
    def between(self) -> Int64Array:
        """The ids without the special tokens."""
        return np.asarray(self.ids[self.num_head : len(self.ids) - self.num_tail])


class Vocabulary(NamedTuple):
    """What the keys of tokens are made of: by token id, where a variant needs it."""

    rank: npt.NDArray[np.int8] | None = None  # of each entry's part of speech, 1 to 4
    removal: Float64Array | None = None  # probability that a word is masked


class TokenKeys(Protocol):
    """Gives the tokens of one text, without its special tokens, their keys [n]."""

    @property
    def needs(self) -> frozenset[str]:
        """What the keys are made of: of `rank`, `removal`, `words`."""
        ...

    def __call__(
        self, text: Text, drawn: Float64Array, room: int, vocabulary: Vocabulary
    ) -> Float64Array:
        """Return the keys; `drawn` [n] is uniform in [0, 1), `room` is how many may stay."""
        ...


class TextReductionSection(Variant):
    """What every text reduction has in common."""

    common: ClassVar[frozenset[str]] = frozenset({"name", "num_tokens"})

    num_tokens: NumTokens | None = None  # null: all that context_length holds


text_reductions: Registry[TokenKeys] = Registry("text_reduction", base=TextReductionSection)


@dataclass(frozen=True)
class _First:
    needs: frozenset[str] = frozenset()

    def __call__(
        self, text: Text, drawn: Float64Array, room: int, vocabulary: Vocabulary
    ) -> Float64Array:
        return np.arange(len(drawn), dtype=np.float64)


@dataclass(frozen=True)
class _Random:
    needs: frozenset[str] = frozenset()

    def __call__(
        self, text: Text, drawn: Float64Array, room: int, vocabulary: Vocabulary
    ) -> Float64Array:
        return drawn


@dataclass(frozen=True)
class _Block:
    needs: frozenset[str] = frozenset()

    def __call__(
        self, text: Text, drawn: Float64Array, room: int, vocabulary: Vocabulary
    ) -> Float64Array:
        first = int(drawn[0] * (len(drawn) - room + 1))
        number = np.arange(len(drawn))
        return np.where((number >= first) & (number < first + room), 0.0, 1.0)


@dataclass(frozen=True)
class _VocabularySyntax:
    needs: frozenset[str] = frozenset({"rank"})

    def __call__(
        self, text: Text, drawn: Float64Array, room: int, vocabulary: Vocabulary
    ) -> Float64Array:
        assert vocabulary.rank is not None
        return vocabulary.rank[text.between].astype(np.float64)


@dataclass(frozen=True)
class _CaptionSyntax:
    needs: frozenset[str] = frozenset({"words"})

    def __call__(
        self, text: Text, drawn: Float64Array, room: int, vocabulary: Vocabulary
    ) -> Float64Array:
        from pretrain.reduction.speech import ranks_in_caption

        rank = ranks_in_caption(tuple(text.words))
        kept = np.zeros(len(rank), dtype=bool)
        kept[np.argsort(rank, kind="stable")[:room]] = True  # `room` words, then cut at the end
        return np.where(kept[np.asarray(text.word)], 0.0, 1.0)


@dataclass(frozen=True)
class FrequencyKeys:
    """CLIPF's: what is likely to be masked minus the draw."""

    threshold: float
    needs: frozenset[str] = frozenset({"removal"})

    def __call__(
        self, text: Text, drawn: Float64Array, room: int, vocabulary: Vocabulary
    ) -> Float64Array:
        """Return p - u of each token [n]."""
        assert vocabulary.removal is not None
        key: Float64Array = vocabulary.removal[text.between] - drawn
        return key


@text_reductions.register("truncate")
def truncate() -> TokenKeys:
    """Keep the first tokens (CLIP; CLIPA's truncation, arXiv:2305.07017)."""
    return _First()


@text_reductions.register("random")
def random() -> TokenKeys:
    """Keep tokens uniformly at random, in their order (CLIPA, arXiv:2305.07017)."""
    return _Random()


@text_reductions.register("block")
def block() -> TokenKeys:
    """Keep neighbours that start anywhere, uniformly (CLIPA, arXiv:2305.07017)."""
    return _Block()


@text_reductions.register("syntax")
def syntax(*, tags: Literal["vocabulary", "caption"] = "vocabulary") -> TokenKeys:
    """Keep nouns first, then adjectives, then verbs, then the rest (CLIPA, arXiv:2305.07017).

    `vocabulary`: each token has the tag of its vocabulary entry alone (CLIPA's JAX code, its
    published v2 models). `caption`: words are tagged in their caption, as many words stay as there
    is room for tokens, and what is still too long is cut at its end (CLIPA's torch code).
    """
    return _VocabularySyntax() if tags == "vocabulary" else _CaptionSyntax()


@text_reductions.register("frequency")
def frequency(*, threshold: Threshold = 1.0e-6) -> TokenKeys:
    """Keep the tokens with the largest u - p, u uniform, p = 1 - sqrt(threshold / frequency).

    CLIPF (arXiv:2412.16148): frequent words are masked, as word2vec's subsampling does. The
    frequency is a token's share of the tokens of the dataset's captions.
    """
    return FrequencyKeys(threshold)


def removal_probabilities(counts: Int64Array, threshold: float) -> Float64Array:
    """Return p = max(0, 1 - sqrt(threshold / f)) of each token; f is its share of the counts."""
    share = counts / max(1, counts.sum())
    with np.errstate(divide="ignore"):
        removal: Float64Array = np.maximum(0.0, 1.0 - np.sqrt(threshold / share))
    return removal


def cut_at_end(
    ids: Sequence[Sequence[int]], context_length: int, *, pad_id: int, tail: Sequence[int]
) -> Int64Array:
    """Return [n, context_length] int64: each text cut at its end, padded with `pad_id`.

    `tail` are the special tokens that end every text of `ids`; a text that is cut keeps them.
    """
    out = np.full((len(ids), context_length), pad_id, dtype=np.int64)
    for row, text in zip(out, ids, strict=True):
        length = len(text)
        if length <= context_length:
            row[:length] = text
        else:
            row[:] = text[:context_length]
            if tail:
                row[-len(tail) :] = tail
    return out


def kept_tokens(
    text: Text, length: int, keys: TokenKeys, drawn: Float64Array, vocabulary: Vocabulary
) -> Int64Array:
    """Return the indices, ascending, of the tokens of one text that stay: at most `length`."""
    size = len(text.ids)
    if size <= length:
        return np.arange(size)
    room = max(0, length - text.num_head - text.num_tail)
    between = size - text.num_head - text.num_tail
    key = keys(text, drawn[:between], room, vocabulary)
    chosen = np.sort(np.argsort(key, kind="stable")[:room]) + text.num_head
    head, tail = np.arange(text.num_head), np.arange(size - text.num_tail, size)
    return np.concatenate([head, chosen, tail])[:length].astype(np.int64)


class Reduced(NamedTuple):
    """Texts as the tower takes them."""

    token_bL: Int64Array
    kept_bK: npt.NDArray[np.int16] | None  # positions that the tower keeps; None: all


@dataclass(frozen=True)
class TextReduction:
    """The text reduction of a stage, with what its keys are made of; travels to the workers."""

    keys: TokenKeys
    num_tokens: int | None = None
    vocabulary: Vocabulary = field(default_factory=Vocabulary)

    def __call__(
        self, texts: Sequence[Text], length: int, *, pad_id: int, seed: int, positions: Int64Array
    ) -> Reduced:
        """Reduce the texts of the samples at global `positions` [b] for `length` positions."""
        token_bL = np.full((len(texts), length), pad_id, dtype=np.int64)
        num_kept = self.num_tokens or length
        kept_bK = np.tile(np.arange(num_kept, dtype=np.int16), (len(texts), 1))
        for row, (text, position) in enumerate(zip(texts, positions.tolist(), strict=True)):
            if self.num_tokens is not None:
                text = _cut(text, length)  # what is kept stands at positions of the tower
            size = len(text.ids)
            ids = np.asarray(text.ids)
            if size > num_kept:
                drawn = draw(seed, position, size)
                chosen = kept_tokens(text, num_kept, self.keys, drawn, self.vocabulary)
                kept_bK[row] = chosen
                ids = ids if self.num_tokens is not None else ids[chosen]
            token_bL[row, : len(ids)] = ids
        return Reduced(token_bL, kept_bK if self.num_tokens is not None else None)


def _cut(text: Text, length: int) -> Text:
    """Return the text cut at its end to `length` tokens, special ones kept."""
    if len(text.ids) <= length:
        return text
    kept = kept_tokens(text, length, _First(), np.zeros(len(text.ids)), Vocabulary())
    room = max(0, length - text.num_head - text.num_tail)
    return text._replace(ids=[text.ids[i] for i in kept], word=text.word[:room])


def draw(seed: int, position: int, num_tokens: int) -> Float64Array:
    """Return the draws [num_tokens] of the text at a global position."""
    return draws.uniform(seed, "reduction/text", position, np.arange(num_tokens))
