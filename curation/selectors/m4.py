"""Moment balancing (M4): a subset in which attributes are represented, and associated, as wanted.

I. Alabdulmohsin et al., "CLIP the Bias: How Useful is Balancing Data in Multimodal Learning?"
(arXiv:2403.04547). With s_k in {0, 1} the sensitive attributes and y_r the labels of a sample, each
sample gets a weight q in [0, Q] of mean eta, the nearest to eta for which

    |E[q (s_k - pi_k)]|      <= eps_R    representation: attribute k has its share pi_k
    |E[q (s_k - pi_k) y_r]|  <= eps_D    association: also among the samples with label r

(the solver: moments.py), and stays iff a draw of its own is below q.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field, model_validator

from configs import draws
from configs.errors import ConfigError, DataError
from configs.registry import Config
from curation.dedup.text import normalize_caption
from curation.filters.base import Judgement, first_reason, needs_for
from curation.filters.score import read_numbers
from curation.global_rules.base import GlobalRule, Pool, ShardPart, Solution, global_rules
from curation.selectors.clusters import Missing
from curation.selectors.cosines import Float64Array, IntArray
from curation.selectors.moments import Weights, balance_moments

NO_SCORE, REASON = "no score", "balanced away"
WEIGHT, DRAW, _PATTERN = "weight", "drawn", "_pattern"
_MAX_ATTRIBUTES = 62
_MAX_PATTERNS = 1_000_000
_UNKNOWN = -1
_TOLERANCE = 1e-6  # of a constraint
_WORD = re.compile(r"\w+")


class Attribute(Config):
    """Something that a sample has or has not: a number of at least `min`, or a word in its caption.

    `column` is one of the index (a score), a value of a rule before, or json.KEY. `words` are words
    or phrases, compared whole and without case.
    """

    attribute: str
    column: str | None = None
    min: float = 0.5
    words: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _one_of_them(self) -> Attribute:
        if (self.column is None) == (not self.words):
            raise ValueError(f"attribute {self.attribute!r}: give either `column` or `words`")
        for words in self.words:
            if not _tokens(words):
                raise ValueError(f"attribute {self.attribute!r}: {words!r} has no letter or digit")
        return self


class Sensitive(Attribute):
    """An attribute that shall have a share of the samples: pi_k."""

    share: Annotated[float, Field(ge=0, le=1)]


def has_attribute(samples: pa.Table, attribute: Attribute) -> tuple[npt.NDArray[np.bool_], ...]:
    """Return which samples have it, and of which that is not known."""
    if attribute.column is not None:
        numbers = read_numbers(samples, attribute.column)
        unknown = np.isnan(numbers)
        return ~unknown & (np.where(unknown, 0, numbers) >= attribute.min), unknown
    wanted = [f" {' '.join(_tokens(words))} " for words in attribute.words]
    texts = [f" {' '.join(_tokens(caption))} " for caption in samples["caption"].to_pylist()]
    has = np.array([any(words in text for words in wanted) for text in texts], np.bool_)
    return has, np.zeros(len(has), np.bool_)


def _tokens(text: str) -> list[str]:
    return _WORD.findall(normalize_caption(text))


class Moments:
    """The attributes of a job: patterns of samples, and terms of patterns."""

    def __init__(
        self, sensitive: tuple[Sensitive, ...], labels: tuple[Attribute, ...], among: str
    ) -> None:
        self.sensitive, self.labels, self._among = sensitive, labels, among
        self._all = (*sensitive, *labels)

    def patterns(self, samples: pa.Table) -> IntArray:
        """Return bit k of attribute k for each sample; -1 where one is not known."""
        found, unknown = np.zeros((2, samples.num_rows), np.int64)
        for at, attribute in enumerate(self._all):
            has, is_unknown = has_attribute(samples, attribute)
            found |= has.astype(np.int64) << at
            unknown |= is_unknown
        return np.where(unknown > 0, _UNKNOWN, found)

    def terms(self, patterns: IntArray) -> Float64Array:
        """Return a: s_k - pi_k, then (s_k - pi_k) y_r: [patterns, K + K R]."""
        bits = (patterns[:, None] >> np.arange(len(self._all))) & 1
        has, labels = bits[:, : len(self.sensitive)], bits[:, len(self.sensitive) :]
        excess = has - np.array([s.share for s in self.sensitive])
        if self._among == "any":
            excess = excess * has.any(axis=1, keepdims=True)
        both = (excess[:, :, None] * labels[:, None, :]).reshape(len(patterns), -1)
        terms: Float64Array = np.concatenate([excess, both], axis=1)
        return terms

    @property
    def names(self) -> list[str]:
        """Names of the terms."""
        pairs = [f"{s.attribute}, {y.attribute}" for s in self.sensitive for y in self.labels]
        return [*(s.attribute for s in self.sensitive), *pairs]


def _count(part: ShardPart, argument: None) -> tuple[list[int], list[int]]:
    patterns = part.emitted(_PATTERN)[_PATTERN].to_numpy()
    values, counts = np.unique(patterns[patterns != _UNKNOWN], return_counts=True)
    return values.tolist(), counts.tolist()


class M4:
    """See `m4`."""

    def __init__(
        self,
        moments: Moments,
        *,
        keep_fraction: float,
        bounds: tuple[float, float],
        max_weight: float,
        penalty: float,
        missing: Missing,
    ) -> None:
        self._moments, self._missing = moments, missing
        self._eta, self._top, self._penalty = keep_fraction, max_weight, penalty
        num_pairs = len(moments.sensitive) * len(moments.labels)
        self._bounds = np.array([bounds[0]] * len(moments.sensitive) + [bounds[1]] * num_pairs)
        attributes = (*moments.sensitive, *moments.labels)
        needs = [needs_for(a.column) for a in attributes if a.column]
        self.needs = frozenset().union(*(columns for columns, _ in needs))
        self.scored = frozenset().union(*(columns for _, columns in needs))
        self.emit_digest = f"m4 {[a.model_dump_json(exclude={'share'}) for a in attributes]}"
        self.solve_digest = ""  # what the section says, no files

    def emit(self, samples: pa.Table) -> dict[str, pa.Array]:
        """Return which attributes each sample has."""
        return {_PATTERN: pa.array(self._moments.patterns(samples))}

    def solve(self, pool: Pool) -> dict[str, Any]:
        """Count the patterns and find their weights."""
        counts: dict[int, int] = {}
        for _, (values, numbers) in pool.map(_count, None, step="count"):
            for value, number in zip(values, numbers, strict=True):
                counts[value] = counts.get(value, 0) + number
            if len(counts) > _MAX_PATTERNS:
                raise DataError(
                    f"m4: the samples have more than {_MAX_PATTERNS:,} different combinations of "
                    "attributes, which one process cannot balance. Give fewer labels."
                )
        if not counts:
            return {"weights": None, "num_unknown": pool.num_samples}
        patterns = np.array(sorted(counts), np.int64)
        totals = np.array([counts[p] for p in patterns.tolist()], np.float64)
        terms, shares = self._moments.terms(patterns), totals / totals.sum()
        solved = balance_moments(
            terms,
            shares,
            self._bounds,
            target=self._eta,
            max_weight=self._top,
            penalty=self._penalty,
        )
        q = solved.weights_of(terms)
        before, after = (shares[:, None] * terms).sum(axis=0), (shares * q) @ terms
        excess = np.maximum(np.abs(after) - self._bounds, 0)
        content = {
            "weights": [solved.multipliers.tolist(), solved.shift],
            "num_steps": solved.num_steps,
            "num_patterns": len(patterns),
            "num_unknown": pool.num_samples - int(totals.sum()),
            "mean_weight": float(shares @ q),
            "moments": {
                name: {"before": float(self._eta * b), "after": float(a), "bound": float(eps)}
                for name, b, a, eps in zip(
                    self._moments.names, before, after, self._bounds, strict=True
                )
            },
            "max_violation": float(excess.max()),
        }
        said = [] if solved.is_solved else ["the solver was stopped before it had converged"]
        if excess.max() > _TOLERANCE:
            names = zip(self._moments.names, np.abs(after), self._bounds, excess, strict=True)
            broken = [f"{n!r} is {a:.3g}, and {b:g} is the most" for n, a, b, e in names
                      if e > _TOLERANCE]  # fmt: skip
            said.append(
                f"not all constraints can be met (keep_fraction {self._eta:g} of this pool): "
                f"{'; '.join(broken)}"
            )
        return {**content, "warnings": said} if said else content

    def apply(self, part: ShardPart, solution: Solution) -> Judgement:
        """Draw each sample by its weight."""
        table = part.emitted(_PATTERN)
        patterns = table[_PATTERN].combine_chunks().to_numpy()
        unknown = patterns == _UNKNOWN
        weights = np.zeros(len(patterns))
        if solution.values["weights"] and not unknown.all():
            multipliers, shift = solution.values["weights"]
            solved = Weights(np.array(multipliers), shift, self._eta, self._top, 0, True)
            distinct, at = np.unique(patterns[~unknown], return_inverse=True)
            weights[~unknown] = solved.weights_of(self._moments.terms(distinct))[at]
        words = draws.uid_words(table["uid"].to_pylist())
        drawn = draws.uniform(part.seed, "m4/draw", *words)
        values = {WEIGHT: pa.array(weights, mask=unknown), DRAW: pa.array(drawn)}
        lacks = unknown if self._missing == "drop" else np.zeros(len(unknown), np.bool_)
        goes = ~unknown & (drawn >= weights)
        return Judgement(values, first_reason(len(goes), [(NO_SCORE, lacks), (REASON, goes)]))


@global_rules.register("m4")
def m4(
    *,
    sensitive: Annotated[tuple[Sensitive, ...], Field(min_length=1)],
    labels: tuple[Attribute, ...] = (),
    keep_fraction: Annotated[float, Field(gt=0, le=1)],
    max_representation_bias: Annotated[float, Field(ge=0)] = 0.01,
    max_association_bias: Annotated[float, Field(ge=0)] = 0.01,
    max_weight: Annotated[float, Field(gt=0, le=1)] = 1.0,
    penalty: Annotated[float, Field(gt=0)] = 100.0,
    among: Literal["all", "any"] = "all",
    missing: Missing = "keep",
) -> GlobalRule:
    """Draw a subset in which sensitive attributes have their shares, also beside each label.

    `sensitive`: attributes with the `share` pi that each shall have; `labels`: attributes beside
    which they shall have it too. An attribute is a number (`column`, `min`) or `words` of the
    caption. `among: any` asks for the shares among the samples that have any of the sensitive
    attributes, and leaves the others alone; all is the paper's. `keep_fraction` eta is the mean
    weight, `max_weight` Q the largest, and a weight is the probability to stay. The bounds eps are
    those of the moments above; where not all can be met, each unit of violation costs `penalty` V,
    and the solution says how much is violated.

    Values: `weight`, and what was `drawn`. A sample of whose attributes one is not known (it has
    no number) is dropped as "no score" (missing: drop), or stays beside the balance.
    """
    if len(sensitive) + len(labels) > _MAX_ATTRIBUTES:
        raise ConfigError(
            f"m4: {len(sensitive) + len(labels)} attributes; {_MAX_ATTRIBUTES} at most."
        )
    twice = [
        name for name, n in Counter(a.attribute for a in (*sensitive, *labels)).items() if n > 1
    ]
    if twice:
        raise ConfigError(f"m4: two attributes are called {twice[0]!r}; give each its own name.")
    if keep_fraction > max_weight:
        raise ConfigError(
            f"m4: keep_fraction {keep_fraction} is the mean of weights of which max_weight "
            f"{max_weight} is the largest. Give a smaller fraction, or a larger weight."
        )
    bounds = (max_representation_bias, max_association_bias)
    return M4(
        Moments(sensitive, labels, among),
        keep_fraction=keep_fraction,
        bounds=bounds,
        max_weight=max_weight,
        penalty=penalty,
        missing=missing,
    )
