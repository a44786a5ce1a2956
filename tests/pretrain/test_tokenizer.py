"""CLIP's ids are open_clip's to the last one; any Hugging Face file works."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from configs.errors import ConfigError
from pretrain.config import TokenizerConfig
from pretrain.model.tokenizer import END_ID, Tokenizer, clean
from pretrain.reduction.text import cut_at_end
from pretrain.run_tokenizer import with_tokenizer

SHARED = Path(__file__).resolve().parents[3] / "shared/data"
LANGUAGES = """ein rotes Haus mit großen Fenstern|une école près de l’église
большой красный дом|大きな赤い家の写真|붉은 집 사진
صورة لبيت أحمر كبير|एक बड़े लाल घर की तस्वीर|ภาพถ่ายบ้านสีแดง
תמונה של בית אדום|İstanbul’da KIRMIZI bir ev
ΦΩΤΟΓΡΑΦΙΑ ενός σπιτιού ΣΑΣ|ⅷ ² ½ ٣ 五|Ⓐⓑ ﬁne ﬂag|𝕌𝕟𝕚𝕔𝕠𝕕𝕖 𐍈 𒀀
ＬＯＵＤ　ＮＯＩＳＥＳ|ſhort 'ſ it'S WE'RE don't 'Ll
👩‍👩‍👧‍👦🏳️‍🌈 emoji👍🏽|a_b-c/d\\e@f#g$5.99%
&lt;b&gt;&amp;amp;eacute; &nbsp;x &#x1F600;
<start_of_text>a<end_of_text>|!!<end_of_text>b <START_OF_TEXT>
schÃ¶n â€œquotedâ€\x9d|\x1b[31mred\x1b[0m\x07"""
LANGUAGES = (
    *LANGUAGES.replace("\n", "|").split("|"),
    "a\u0301 e\u0308 z\u200bw\u00adj\ufeff",
    "line\r\nbreak\u2028para\u2029\u0085next\ttab",
    "",
)


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    return Tokenizer.clip(77)


@pytest.fixture(scope="module")
def reference():
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def fuzzed(number: int, seed: int) -> list[str]:
    """Random joins and cuts of texts in many scripts, with random characters of all planes."""
    draw = random.Random(seed)
    planes = [(0, 0x250), (0x250, 0x3000), (0x3000, 0xD800), (0xE000, 0x10000), (0x10000, 0x32000)]
    texts = []
    for _ in range(number):
        parts = []
        for _ in range(draw.randint(1, 6)):
            text = draw.choice(LANGUAGES)
            start = draw.randint(0, len(text))
            parts.append(text[start : start + draw.randint(0, 40)])
            low, high = draw.choice(planes)
            parts.append("".join(chr(draw.randrange(low, high)) for _ in range(draw.randint(0, 3))))
            parts.append(draw.choice(["", " ", "  ", "\n", "&", ";", "'"]))
        text = "".join(parts)
        texts.append(draw.choice([str, str.upper, str.title])(text))
    return texts


def test_ids_are_open_clips_on_a_fuzzed_corpus_of_many_scripts(clip, reference):
    texts = [*LANGUAGES, *fuzzed(4000, seed=7)]
    assert torch.equal(clip(texts), reference(texts))


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80))
def test_ids_are_open_clips_on_any_text(clip, text):
    from open_clip.tokenizer import tokenize

    assert torch.equal(clip([text]), tokenize([text]))


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not here")
def test_ids_are_open_clips_on_raw_web_captions_and_names_in_26_languages(clip, reference):
    texts = []
    with gzip.open(SHARED / "captions/laion400m-10k.tsv.gz", "rt", encoding="utf-8") as file:
        texts += [line.rstrip("\n").split("\t")[-1] for line in file][::4]
    with gzip.open(SHARED / "emoji/names-multilingual.jsonl.gz", "rt", encoding="utf-8") as file:
        texts += [line[:300] for line in file][::8]
    assert len(texts) > 2500
    assert torch.equal(clip(texts), reference(texts))


@settings(max_examples=300)
@given(st.text(alphabet=[chr(c) for c in range(1, 128)], max_size=40))
def test_the_short_way_of_cleaning_is_the_long_one(text):
    from open_clip.tokenizer import _clean_whitespace

    assert clean(text) == _clean_whitespace(text)


def test_a_long_caption_keeps_its_end_token_at_any_context_length(clip, reference):
    text = "many words " * 60
    for length in (2, 8, 16, 77):
        ids = Tokenizer(clip._backend, length, is_clip=True)([text])
        assert torch.equal(ids, reference([text], context_length=length))


def test_a_saved_clip_tokenizer_reads_back_and_its_model_is_open_clips_own(clip, tmp_path):
    clip.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.is_clip
    assert torch.equal(again(LANGUAGES), clip(LANGUAGES))
    alone = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert alone.encode("a red square").ids == clip(["a red square"])[0].tolist()
    fitted = with_tokenizer({"text_cfg": {"width": 32}}, again)["text_cfg"]
    assert fitted == {"width": 32, "vocab_size": 49408, "context_length": 77}


def bert_like(folder: Path) -> Path:
    """A foreign tokenizer.json: word pieces between [CLS] and [SEP], padded with [PAD]."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "##dish", "square"]
    backend = tokenizers.Tokenizer(
        models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    backend.add_special_tokens(words[:4])
    backend.enable_padding(pad_id=0, pad_token="[PAD]")
    backend.save(str(folder / "bert.json"))
    return folder / "bert.json"


def test_any_hugging_face_file_makes_ids_with_its_own_special_tokens(tmp_path):
    made = Tokenizer.from_file(bert_like(tmp_path), 6)
    assert made(["a reddish square", "a a a a a a a"]).tolist() == [
        [2, 4, 5, 6, 7, 3], [2, 4, 4, 4, 4, 3],
    ]  # fmt: skip
    assert made(["a"]).tolist() == [[2, 4, 3, 0, 0, 0]]
    made.save(tmp_path)
    assert torch.equal(Tokenizer.load(tmp_path)(["a red square"]), made(["a red square"]))
    fitted = with_tokenizer({"text_cfg": {}}, made)["text_cfg"]
    assert (fitted["pool_type"], fitted["eos_id"], fitted["vocab_size"]) == ("eos", 3, 8)


def test_a_file_without_end_or_padding_needs_their_names(tmp_path):
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "</s>": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path / "plain.json"
    backend.save(str(path))
    with pytest.raises(ConfigError, match=r"tokenizer\.pad_token"):
        Tokenizer.from_file(path, 4)
    with pytest.raises(ConfigError, match=r"tokenizer\.end_token"):
        Tokenizer.from_file(path, 4, pad_token="?")
    with pytest.raises(ConfigError, match="has no token '<eot>'"):
        Tokenizer.from_file(path, 4, pad_token="?", end_token="<eot>")
    made = Tokenizer.from_file(path, 4, pad_token="?", end_token="</s>")
    assert made(["a", "a a a a a"]).tolist() == [[0, 1, 2, 2], [0, 0, 0, 1]]
    path.write_text(json.dumps({"model": 3}))
    with pytest.raises(ConfigError, match="not a readable tokenizers file"):
        Tokenizer.from_file(path, 4)


def test_a_section_takes_the_keys_of_its_kind_only():
    assert TokenizerConfig(name="clip").name == "clip"
    with pytest.raises(ValueError, match="tokenizer clip takes no vocab_size"):
        TokenizerConfig(name="clip", vocab_size=10)
    with pytest.raises(ValueError, match="tokenizer file needs a path"):
        TokenizerConfig(name="file")


def test_truncation_by_hand():
    got = cut_at_end([[1, 5, 6, 9], [1, 5, 6, 7, 9], [9]], 4, pad_id=0, tail=[9])
    assert np.array_equal(got, [[1, 5, 6, 9], [1, 5, 6, 9], [9, 0, 0, 0]])
    assert END_ID == 2
