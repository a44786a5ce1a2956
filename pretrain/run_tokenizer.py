"""The tokenizer of a run: learned from its captions or read, once, and kept in the run folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from configs import draws
from configs.errors import ConfigError
from configs.publish import published_folder
from pretrain.config import PretrainConfig, TokenizerConfig
from pretrain.data.dataset import Sources
from pretrain.data.mixture import shares_of
from pretrain.data.reader import captions_of
from pretrain.data.streaming import Stream
from pretrain.model.clip import Json
from pretrain.model.tokenizer import TOKENIZER_FILE, Tokenizer
from pretrain.ranks import on_first_rank

_TOKEN_COUNTS = "token_counts.npy"  # beside the tokenizer of a run


def run_tokenizer(
    config: PretrainConfig, data: Sources | Stream, context_length: int, *, counted: bool = False
) -> Tokenizer:
    """Return the run's tokenizer: made once, by rank 0, and kept in the run folder.

    With `counted`, how often each of its tokens stands in the captions lies beside it. It is made
    again where the dataset, its section or the context length is another.
    """
    folder = Path(config.output) / "tokenizer"
    made_from = {
        "manifest_digest": data.digest,
        "tokenizer": config.tokenizer.model_dump(mode="json"),
        "context_length": context_length,
        "counted": counted,
    }

    def make() -> None:
        note = folder / "made_from.json"
        if note.is_file() and json.loads(note.read_text(encoding="utf-8")) == made_from:
            return
        tokenizer = make_tokenizer(config.tokenizer, data, context_length)
        counts = count_tokens(config.tokenizer, data, tokenizer) if counted else None
        shutil.rmtree(folder, ignore_errors=True)
        with published_folder(folder) as temporary:
            tokenizer.save(temporary)
            if counts is not None:
                np.save(temporary / _TOKEN_COUNTS, counts)
            (temporary / note.name).write_text(json.dumps(made_from, indent=2), encoding="utf-8")

    on_first_rank(make)
    tokenizer = Tokenizer.load(folder)
    tokenizer.token_counts = np.load(folder / _TOKEN_COUNTS) if counted else None
    return tokenizer


def make_tokenizer(
    section: TokenizerConfig, data: Sources | Stream, context_length: int
) -> Tokenizer:
    """Make the tokenizer of a run afresh."""
    if section.name == "clip":
        return Tokenizer.clip(context_length)
    if section.name == "file":
        return Tokenizer.from_file(
            Path(section.path or ""),
            context_length,
            end_token=section.end_token,
            pad_token=section.pad_token,
        )
    assert isinstance(data, Sources), "refused by the configuration"
    return Tokenizer.train_words(
        sample_captions(data, section.num_captions),
        vocab_size=section.vocab_size,
        context_length=context_length,
    )


def count_tokens(
    section: TokenizerConfig, data: Sources | Stream, tokenizer: Tokenizer
) -> npt.NDArray[np.int64]:
    """Count the tokens of the dataset's captions (tokenizer.num_captions of them)."""
    if not isinstance(data, Sources):
        raise ConfigError(
            "text_reduction frequency counts the captions of the index, which source: streaming "
            "has not; choose another reduction, or a manifest."
        )
    return tokenizer.count(sample_captions(data, section.num_captions))


def sample_captions(data: Sources, num_captions: int) -> Iterator[str]:
    """Yield the captions of whole shards, in an order drawn by hash, until there are enough.

    Of a mixture, each source gives its part of them.
    """
    shares = shares_of([source.weight for source in data])
    for source, share in zip(data, shares, strict=True):
        wanted, num_yielded = num_captions * share // sum(shares), 0
        for shard in draws.permutation(source.manifest.num_shards, 0, "tokenizer/shards"):
            if num_yielded >= wanted:
                break
            usable = captions_of(source, int(shard))
            num_yielded += len(usable)
            yield from usable


def with_tokenizer(model_config: Json, tokenizer: Tokenizer) -> Json:
    """Return the model config with the text tower fitted to the tokenizer.

    The vocabulary is as large as the tokenizer's. Except for CLIP's, which open_clip's towers are
    made for, the text feature is taken at its end token, and `hf_tokenizer_name` tells open_clip to
    read the tokenizer.json beside the weights.
    """
    fitted: Json = {
        "vocab_size": tokenizer.vocab_size,
        "context_length": tokenizer.context_length,
    }
    if not tokenizer.is_clip:
        fitted |= {
            "pool_type": "eos",
            "eos_id": tokenizer.end_id,
            "hf_tokenizer_name": TOKENIZER_FILE,
        }
    return {**model_config, "text_cfg": {**model_config["text_cfg"], **fitted}}
