"""Text to token ids, by the Rust `tokenizers` library.

Three kinds: CLIP's byte-pair encoding (open_clip's ids, to the last one), a word-level vocabulary
trained on the captions, any `tokenizer.json` of Hugging Face. Each is a folder's `tokenizer.json`
with truncation and padding set to the context length, so that the file alone says how a caption
becomes ids; `tokenizer_config.json` beside it lets open_clip's `hf_tokenizer_name` (through
transformers) read the same file. Texts are cleaned as open_clip cleans them (ftfy, HTML entities
twice, white space; lower case for CLIP): the same raw caption gives the same ids here and there.
"""

from __future__ import annotations

import gzip
import html
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import ftfy
import numpy as np
import numpy.typing as npt
import tokenizers
import torch
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from configs.errors import CheckpointError, ConfigError
from pretrain.reduction.speech import ranks_of_entries
from pretrain.reduction.text import Text, TextReduction, cut_at_end

TOKENIZER_FILE = "tokenizer.json"
_CONFIG_FILE = "tokenizer_config.json"
PAD, UNKNOWN, END = "<pad>", "<unk>", "<end>"
PAD_ID, UNKNOWN_ID, END_ID = 0, 1, 2
# What byte-pair and word-piece vocabularies put around the pieces of words.
_MARKS = re.compile("</w>|^##|\u0120|\u2581")
_CLIP_SPECIAL = ("<start_of_text>", "<end_of_text>")
_CLIP_VOCABULARY = 49_408
# Printable ASCII without "&", tabs and line feeds: ftfy and HTML have nothing to mend in it.
_CLEAN = re.compile(r"[\t\n\x20-%'-~]*")


def clean(text: str) -> str:
    """Mend encoding, undo HTML entities (twice, as on the web), collapse white space."""
    if not _CLEAN.fullmatch(text):
        text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return " ".join(text.split())


class Tokenizer:
    """Captions to [n, context_length] int64 ids, padded with `pad_id`, ended by `end_id`.

    `is_clip`: CLIP's vocabulary, which open_clip knows by itself and lower-cases for.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        context_length: int,
        *,
        pad_id: int = PAD_ID,
        is_clip: bool = False,
    ) -> None:
        backend.encode_special_tokens = True  # "<end>" in a caption is text
        backend.no_truncation()  # pretrain.reduction.text does both, in one place
        backend.no_padding()
        self._backend = backend
        self.is_clip = is_clip
        self.context_length = context_length
        self.vocab_size = backend.get_vocab_size()
        self.pad_id = pad_id
        # How often each entry stands in the dataset's captions, where that was counted.
        self.token_counts: npt.NDArray[np.int64] | None = None
        self._tail = _tail(backend)
        self._num_head = _num_head(backend)
        self.end_id = self._tail[0] if self._tail else None

    @classmethod
    def clip(cls, context_length: int) -> Tokenizer:
        """Make CLIP's tokenizer from the merges that open_clip ships."""
        from open_clip.tokenizer import bytes_to_unicode, default_bpe

        with gzip.open(default_bpe(), "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")[1 : _CLIP_VOCABULARY - 512 - 2 + 1]
        merges = [(a, b) for a, b in (line.split() for line in lines)]
        letters = list(bytes_to_unicode().values())
        words = [*letters, *(f"{x}</w>" for x in letters), *(a + b for a, b in merges)]
        vocabulary = {word: i for i, word in enumerate([*words, *_CLIP_SPECIAL])}
        model = models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>")
        backend = tokenizers.Tokenizer(model)
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(_clip_pattern()), "removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        start, end = _CLIP_SPECIAL
        backend.post_processor = processors.TemplateProcessing(
            single=f"{start} $A {end}", special_tokens=[(t, vocabulary[t]) for t in (start, end)]
        )
        return cls(backend, context_length, is_clip=True)

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
        return cls(backend, context_length)

    @classmethod
    def from_file(
        cls,
        path: Path,
        context_length: int,
        *,
        end_token: str | None = None,
        pad_token: str | None = None,
    ) -> Tokenizer:
        """Read any Hugging Face tokenizer.json.

        `end_token` is appended to every text where the file itself appends no special token;
        `pad_token` is needed where the file sets no padding.

        Raises ConfigError.
        """
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust library raises bare Exception
            raise ConfigError(f"{path} is not a readable tokenizers file ({error}).") from None
        for key, token in (("end_token", end_token), ("pad_token", pad_token)):
            if token is not None and backend.token_to_id(token) is None:
                raise ConfigError(f"tokenizer.{key}: {path} has no token {token!r}.")
        padding = backend.padding
        if pad_token is None and padding is None:
            raise ConfigError(f"{path} sets no padding; name its token: tokenizer.pad_token.")
        if not _tail(backend):
            if end_token is None:
                raise ConfigError(
                    f"{path} ends a text with no special token, and the text feature is taken at "
                    "one; name it: tokenizer.end_token."
                )
            backend.post_processor = processors.TemplateProcessing(
                single=f"$A {end_token}",
                special_tokens=[(end_token, backend.token_to_id(end_token))],
            )
        pad_id: Any = backend.token_to_id(pad_token) if pad_token else (padding or {})["pad_id"]
        return cls(backend, context_length, pad_id=int(pad_id))

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
        truncation, padding = backend.truncation, backend.padding
        if truncation is None or padding is None:
            raise CheckpointError(
                f"{path} sets no truncation or no padding, so the context length is not known; "
                "expected a file that pairmill wrote."
            )
        vocabulary = backend.get_vocab_size()
        is_clip = vocabulary == _CLIP_VOCABULARY and all(map(backend.token_to_id, _CLIP_SPECIAL))
        return cls(
            backend, int(truncation["max_length"]), pad_id=padding["pad_id"], is_clip=is_clip
        )

    def with_context(self, context_length: int) -> Tokenizer:
        """Return the same tokenizer for texts of another length."""
        other = Tokenizer(self._backend, context_length, pad_id=self.pad_id, is_clip=self.is_clip)
        other.token_counts = self.token_counts
        return other

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and what transformers needs; the caller publishes the folder."""
        backend = self._backend
        pad = backend.id_to_token(self.pad_id)
        backend.enable_truncation(self.context_length)
        backend.enable_padding(length=self.context_length, pad_id=self.pad_id, pad_token=pad)
        backend.save(str(folder / TOKENIZER_FILE))
        backend.no_truncation()
        backend.no_padding()
        if self.is_clip:  # open_clip reads it by its own tokenizer; transformers would take "!" out
            return
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self.context_length,
            "pad_token": pad,
            "clean_up_tokenization_spaces": False,
        }
        if self.end_id is not None:
            config["eos_token"] = backend.id_to_token(self.end_id)
        if backend.token_to_id(UNKNOWN) is not None:
            config["unk_token"] = UNKNOWN
        (folder / _CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of the texts with their special tokens, at full length."""
        cleaned = [clean(text) for text in texts]
        if self.is_clip:
            cleaned = [text.lower() for text in cleaned]
        ids = [encoding.ids for encoding in self._backend.encode_batch_fast(cleaned)]
        if self.is_clip:
            for i, text in enumerate(cleaned):
                if "_of_text>" in text:  # to open_clip, the name of a special token is the token
                    ids[i] = [ids[i][0], *_open_clip().encode(texts[i]), ids[i][-1]]
        return ids

    def to_json(self) -> str:
        """Return the whole tokenizer as it stands in its file; equal ones give equal ids."""
        text: str = self._backend.to_str()
        return text

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """Return the ids of the texts, [n, context_length] int64."""
        return torch.from_numpy(
            cut_at_end(self.encode(texts), self.context_length, pad_id=self.pad_id, tail=self._tail)
        )

    def reduced(
        self,
        texts: Sequence[str],
        reduction: TextReduction,
        *,
        seed: int,
        positions: npt.NDArray[np.int64],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the ids of the texts [b, context_length] int64 and the positions that the tower
        keeps of them [b, K], None where it keeps all. `positions` [b] are those of the samples.
        """
        needs_words = "words" in reduction.keys.needs
        encoded = self._with_words(texts) if needs_words else self._plain(texts)
        token_bL, kept_bK = reduction(
            encoded, self.context_length, pad_id=self.pad_id, seed=seed, positions=positions
        )
        return torch.from_numpy(token_bL), None if kept_bK is None else torch.from_numpy(kept_bK)

    def _plain(self, texts: Sequence[str]) -> list[Text]:
        head, tail = self._num_head, len(self._tail)
        return [Text(ids, head, tail) for ids in self.encode(texts)]

    def _with_words(self, texts: Sequence[str]) -> list[Text]:
        """Return the texts with the words that the tokens are pieces of, in lower case."""
        found = []
        cleaned = [clean(text).lower() for text in texts]
        encodings = self._backend.encode_batch(cleaned)
        for text, plain, encoding in zip(cleaned, self._plain(texts), encodings, strict=True):
            end = len(encoding.ids) - plain.num_tail
            if list(plain.ids) != encoding.ids:  # a special token's name in the text (see encode)
                number = list(range(len(plain.ids) - plain.num_head - plain.num_tail))
                found.append(plain._replace(word=number, words=[""] * len(number)))
                continue
            number = [word for word in encoding.word_ids[plain.num_head : end] if word is not None]
            spans = [encoding.word_to_chars(word) for word in range(max(number, default=-1) + 1)]
            words = [text[span[0] : span[1]] if span else "" for span in spans]
            found.append(plain._replace(word=number, words=words))
        return found

    def speech_ranks(self) -> npt.NDArray[np.int8]:
        """Return the rank of the part of speech of every entry, tagged alone (speech.py)."""
        entries = (self._backend.id_to_token(i) or "" for i in range(self.vocab_size))
        return ranks_of_entries(_MARKS.sub("", entry).lower() for entry in entries)

    def count(self, texts: Iterable[str]) -> npt.NDArray[np.int64]:
        """Return how often each entry stands in the texts, special tokens left out [vocab_size]."""
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for batch in _batched(texts, 10_000):
            between = [text.between for text in self._plain(batch)]
            counts += np.bincount(np.concatenate(between), minlength=self.vocab_size)
        return counts


def _tail(backend: tokenizers.Tokenizer) -> list[int]:
    """Return the special tokens that the tokenizer puts after every text."""
    encoding = backend.encode("a")
    tail: list[int] = []
    for token, special in zip(
        reversed(encoding.ids), reversed(encoding.special_tokens_mask), strict=True
    ):
        if not special:
            break
        tail.insert(0, token)
    return tail


def _num_head(backend: tokenizers.Tokenizer) -> int:
    """Return how many special tokens the tokenizer puts before every text."""
    mask = backend.encode("a").special_tokens_mask
    return next((i for i, special in enumerate(mask) if not special), 0)


def _batched(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    iterator = iter(texts)
    while batch := list(islice(iterator, size)):
        yield batch


@lru_cache(maxsize=1)
def _open_clip() -> Any:
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


@lru_cache(maxsize=1)
def _clip_pattern() -> str:
    """Return CLIP's word pattern for lower-case text.

    Letters, numbers and white space are spelled out from the `regex` library that open_clip uses:
    the Rust library's Unicode tables are of another version, and ids must not depend on that.
    U+017F is a letter s to a pattern that ignores case.
    """
    letter, number, space = (_ranges(p) for p in (r"\p{L}", r"\p{N}", r"\s"))
    contractions = "'[s\\x{17f}]|'t|'re|'ve|'m|'ll|'d"
    return f"{contractions}|[{letter}]+|[{number}]|[^{space}{letter}{number}]+"


def _ranges(pattern: str) -> str:
    import regex

    everything = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)
    found = (match.span() for match in regex.finditer(f"{pattern}+", everything))
    runs = []
    for start, stop in found:
        first, last = ord(everything[start]), ord(everything[stop - 1])
        runs.append(f"\\x{{{first:x}}}" if first == last else f"\\x{{{first:x}}}-\\x{{{last:x}}}")
    return "".join(runs)
