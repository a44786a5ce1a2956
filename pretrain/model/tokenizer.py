"""Text to token ids, by the Rust `tokenizers` library.

A tokenizer is a folder's `tokenizer.json` with truncation and padding set to the context length, so
that the file alone says how a caption becomes ids. `tokenizer_config.json` beside it lets
open_clip's `hf_tokenizer_name` (through transformers) read the same file. Texts are cleaned as
open_clip cleans them before a Hugging Face tokenizer (ftfy, HTML entities twice, white space): the
same raw caption gives the same ids here and there.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import ftfy
import tokenizers
import torch
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from configs.errors import CheckpointError

TOKENIZER_FILE = "tokenizer.json"
PAD, UNKNOWN, END = "<pad>", "<unk>", "<end>"
PAD_ID, UNKNOWN_ID, END_ID = 0, 1, 2


def clean(text: str) -> str:
    """Mend encoding, undo HTML entities (twice, as on the web), collapse white space."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


class Tokenizer:
    """Captions to [n, context_length] int64 ids, padded with 0, ended by `end_id`."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        assert backend.truncation is not None, "a tokenizer of a model has a context length"
        backend.encode_special_tokens = True  # "<end>" in a caption is text
        self._backend = backend
        self.context_length = int(backend.truncation["max_length"])
        self.vocab_size = backend.get_vocab_size()

    @classmethod
    def train_words(
        cls, captions: Iterable[str], *, vocab_size: int, context_length: int
    ) -> Tokenizer:
        """Make a word-level vocabulary of the `vocab_size` commonest lower-cased words.

        Words are runs of letters and digits, or of punctuation; the order is by count, then by
        word.
        """
        backend = tokenizers.Tokenizer(models.WordLevel(unk_token=UNKNOWN))
        backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(
            vocab_size=vocab_size, special_tokens=[PAD, UNKNOWN, END], show_progress=False
        )
        backend.train_from_iterator((clean(caption) for caption in captions), trainer)
        backend.post_processor = processors.TemplateProcessing(
            single=f"$A {END}", special_tokens=[(END, END_ID)]
        )
        return cls.from_backend(backend, context_length)

    @classmethod
    def from_backend(cls, backend: tokenizers.Tokenizer, context_length: int) -> Tokenizer:
        """Set truncation and padding to the context length."""
        backend.enable_truncation(context_length)
        backend.enable_padding(length=context_length, pad_id=PAD_ID, pad_token=PAD)
        return cls(backend)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read the tokenizer that a model folder carries."""
        path = folder / TOKENIZER_FILE
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust library raises bare Exception
            raise CheckpointError(
                f"{path} is not a readable tokenizers file ({error}); "
                "expected the tokenizer.json that a pairmill checkpoint carries."
            ) from None
        if backend.truncation is None:
            raise CheckpointError(
                f"{path} sets no truncation, so the context length is not known; "
                "expected a file that pairmill wrote."
            )
        return cls(backend)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and what transformers needs; the caller publishes the folder."""
        self._backend.save(str(folder / TOKENIZER_FILE))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self.context_length,
            "pad_token": PAD,
            "unk_token": UNKNOWN,
            "eos_token": END,
            "clean_up_tokenization_spaces": False,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """Return the ids of the texts, [n, context_length] int64."""
        encodings = self._backend.encode_batch_fast([clean(text) for text in texts])
        ids = [encoding.ids for encoding in encodings]
        return torch.tensor(ids, dtype=torch.int64).reshape(len(ids), self.context_length)
