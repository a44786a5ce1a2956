"""Token reduction: which patches and tokens stay, by hand and by property."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import ConfigError
from configs.load import validate
from pretrain.config import PretrainConfig
from pretrain.model.clip import ClipModel
from pretrain.model.patches import encode_text
from pretrain.model.tokenizer import Tokenizer
from pretrain.reduction.image import BlockPatches, GridPatches, RandomPatches
from pretrain.reduction.text import (
    Text,
    TextReduction,
    Vocabulary,
    block,
    frequency,
    kept_tokens,
    random,
    removal_probabilities,
    syntax,
    truncate,
)
from tests.pretrain.conftest import TINY_MODEL

MANY = np.arange(4000)
CAPTIONS = [
    "the small red bird sits on an old wooden fence",
    "a dog",
    "a very beautiful mountain landscape with a lake",
    "running quickly through the green forest",
]


def kept_of(keys, num_between: int, length: int, *, drawn=None, head=1, tail=1, **vocabulary):
    """The kept indices of head + between + tail tokens, ids 10, 11, ... between."""
    ids = [*range(head), *range(10, 10 + num_between), *([9] * tail)]
    text = Text(ids, head, tail)
    drawn = np.full(len(ids), 0.5) if drawn is None else np.asarray(drawn, dtype=float)
    return kept_tokens(text, length, keys, drawn, Vocabulary(**vocabulary)).tolist()


@pytest.mark.parametrize(
    ("reduction", "num_kept"),
    [(RandomPatches(0.75), 16), (GridPatches(2), 16), (BlockPatches(0.75), 16)],
)
def test_every_image_reduction_keeps_its_number_of_patches_ascending_whatever_the_batch(
    reduction, num_kept
):
    kept = reduction.kept(5, MANY, 8)
    assert kept.shape == (4000, num_kept)
    assert (np.diff(kept, axis=1) > 0).all()
    assert kept.min() >= 0
    assert kept.max() < 64
    alone = reduction.kept(5, MANY[1234:1235], 8)  # another batch, another rank
    assert np.array_equal(alone[0], kept[1234])
    assert not np.array_equal(reduction.kept(6, MANY, 8), kept)


def test_a_grid_keeps_one_corner_of_every_window_and_each_corner_as_often():
    kept = GridPatches(2).kept(0, MANY, 4)
    rows, columns = kept // 4, kept % 4
    windows = (rows // 2) * 2 + columns // 2
    assert (np.sort(windows, axis=1) == np.arange(4)).all()
    corners = (rows % 2) * 2 + columns % 2
    assert (corners == corners[:, :1]).all()  # the same in all windows: a regular grid
    counts = np.bincount(corners[:, 0])
    assert counts.min() > 890  # 1,000 expected, sd 27
    assert counts.max() < 1110
    with pytest.raises(ConfigError, match="7 x 7 patches do not divide into windows of 2 x 2"):
        GridPatches(2).kept(0, MANY, 7)


def test_a_block_is_a_square_of_neighbours_that_reaches_every_place():
    kept = BlockPatches(0.75).kept(0, MANY, 6)  # 9 of 36: 3 x 3
    rows, columns = kept // 6, kept % 6
    assert (rows.max(axis=1) - rows.min(axis=1) == 2).all()
    assert (columns.max(axis=1) - columns.min(axis=1) == 2).all()
    assert len(np.unique(kept[:, 0])) == 16
    assert BlockPatches(0.5).num_kept(14) == 81  # the largest square within 98


def test_a_cut_text_keeps_its_special_tokens():
    assert kept_of(truncate(), 5, 4) == [0, 1, 2, 6]
    assert kept_of(truncate(), 2, 4) == [0, 1, 2, 3]  # not too long: all of it
    drawn = [0.9, 0.1, 0.5, 0.2, 0.7]
    assert kept_of(random(), 5, 4, drawn=drawn) == [0, 2, 4, 6]  # 0.1 and 0.2, in text order
    assert kept_of(block(), 5, 4, drawn=[0.99] * 5) == [0, 4, 5, 6]  # starts at 3 of 0..3
    assert kept_of(block(), 5, 4, drawn=[0.0] * 5) == [0, 1, 2, 6]


def test_syntax_by_vocabulary_keeps_nouns_then_adjectives_then_verbs_leftmost_first():
    rank = np.zeros(20, dtype=np.int8)
    rank[10:17] = [4, 3, 1, 2, 4, 1, 3]
    chosen = {n: kept_of(syntax(), 7, n + 2, rank=rank)[1:-1] for n in (1, 2, 3, 4, 5, 6)}
    assert chosen[1] == [3]
    assert chosen[2] == [3, 6]  # both nouns
    assert chosen[3] == [3, 4, 6]  # and the adjective between them
    assert chosen[4] == [2, 3, 4, 6]  # and the first verb
    assert chosen[5] == [2, 3, 4, 6, 7]
    assert chosen[6] == [1, 2, 3, 4, 6, 7]  # and the first of the rest


def test_syntax_by_caption_keeps_whole_words_and_cuts_what_is_still_too_long():
    # "dog" (one piece), "very", "beautiful" (three pieces): two words fit, four tokens do not.
    text = Text([0, 11, 12, 13, 14, 15, 9], 1, 1, [0, 1, 2, 2, 2], ["dog", "very", "beautiful"])
    kept = kept_tokens(text, 4, syntax(tags="caption"), np.zeros(5), Vocabulary())
    assert kept.tolist() == [0, 1, 3, 6]
    assert kept_tokens(text, 5, syntax(tags="caption"), np.zeros(5), Vocabulary()).tolist() == [
        0, 1, 2, 3, 6]  # fmt: skip


def test_frequent_tokens_are_masked_with_the_probability_of_the_paper():
    counts = np.array([0, 10, 990_000, 9_990], dtype=np.int64)
    removal = removal_probabilities(counts, 1e-3)
    assert removal[0] == 0.0
    assert removal[1] == 0.0  # f = 1e-5 < t
    assert removal[2] == pytest.approx(1 - np.sqrt(1e-3 / 0.99))
    assert removal[3] == pytest.approx(1 - np.sqrt(1e-3 / 0.00999))
    table = np.zeros(20)
    table[10:14] = [0.9, 0.0, 0.9, 0.2]
    drawn = [0.95, 0.3, 0.1, 0.4]  # u - p: 0.05, 0.3, -0.8, 0.2
    assert kept_of(frequency(), 4, 4, drawn=drawn, removal=table)[1:-1] == [2, 4]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 30), st.integers(3, 12), st.integers(0, 10**6))
def test_what_is_kept_is_ascending_fits_and_ends_with_the_end_token(between, length, position):
    size = between + 2
    text = Text([1, *range(3, 3 + between), 2], 1, 1, list(range(between)), ["dog"] * between)
    vocabulary = Vocabulary(np.ones(64, dtype=np.int8), np.zeros(64))
    drawn = np.random.default_rng(position).random(size)
    for keys in (truncate(), random(), block(), syntax(), syntax(tags="caption"), frequency()):
        kept = kept_tokens(text, length, keys, drawn, vocabulary)
        assert len(kept) == min(size, length)
        assert (np.diff(kept) > 0).all()
        assert (kept[0], kept[-1]) == (0, size - 1)


@pytest.mark.parametrize("make", [Tokenizer.clip, None])
def test_reduced_ids_are_those_of_the_tokenizer_and_do_not_depend_on_the_batch(make):
    if make is None:
        long = Tokenizer.train_words(CAPTIONS * 3, vocab_size=64, context_length=16)
    else:
        long = make(16)
    plain = long(CAPTIONS)
    positions = np.arange(100, 104)
    vocabulary = Vocabulary(long.speech_ranks(), np.zeros(long.vocab_size))
    for keys in (truncate(), random(), block(), syntax(), syntax(tags="caption"), frequency()):
        short = long.with_context(6)
        reduction = TextReduction(keys, None, vocabulary)
        token, kept = short.reduced(CAPTIONS, reduction, seed=1, positions=positions)
        assert kept is None
        assert token.shape == (4, 6)
        assert torch.equal(token[1], plain[1][:6])  # short enough: as it is
        alone, _ = short.reduced(CAPTIONS[2:3], reduction, seed=1, positions=positions[2:3])
        assert torch.equal(alone[0], token[2])
        for row, whole in zip(token.tolist(), plain.tolist(), strict=True):
            assert set(row) <= set(whole)
            assert long.end_id in row
        held, kept = long.reduced(
            CAPTIONS, TextReduction(keys, 6, vocabulary), seed=1, positions=positions
        )
        assert torch.equal(held, plain)  # the tower's length; 6 of its positions stay
        assert torch.equal(held.gather(1, kept.long())[:, -1] == long.end_id, plain[:, 6] != 0)
    first, _ = long.with_context(6).reduced(
        CAPTIONS, TextReduction(truncate()), seed=1, positions=positions
    )
    assert torch.equal(first, long.with_context(6)(CAPTIONS))


def test_brills_tagger_keeps_the_words_that_carry_the_picture():
    tokenizer = Tokenizer.clip(16)
    short = tokenizer.with_context(6)
    text = ["the small red bird sits on an old wooden fence"]
    by_entry = TextReduction(syntax(), None, Vocabulary(tokenizer.speech_ranks()))
    by_caption = TextReduction(syntax(tags="caption"))
    for reduction in (by_entry, by_caption):
        token, _ = short.reduced(text, reduction, seed=0, positions=np.zeros(1, dtype=np.int64))
        kept = [tokenizer.encode([word])[0][1] for word in ("small", "red", "bird", "fence")]
        assert token[0].tolist() == [49406, *kept, 49407]


def tiny() -> ClipModel:
    torch.manual_seed(0)
    text = {**TINY_MODEL["text_cfg"], "vocab_size": 32, "pool_type": "eos", "eos_id": 2}
    return ClipModel({**TINY_MODEL, "text_cfg": text}).eval()


def test_the_text_tower_gathers_after_positions_are_added():
    clip = tiny().clip
    token = torch.tensor([[5, 6, 7, 8, 2, 0, 0, 0], [9, 9, 4, 2, 0, 0, 0, 0]])
    everything = torch.arange(8).expand(2, 8)
    whole = clip.encode_text(token)
    torch.testing.assert_close(encode_text(clip, token, everything), whole)
    # Causal attention: the padding after the end token changes nothing.
    torch.testing.assert_close(encode_text(clip, token, everything[:, :5]), whole)
    kept = torch.tensor([[0, 2, 4], [1, 2, 3]])
    short = encode_text(clip, token, kept)
    moved = clip.positional_embedding.detach().clone()
    for row, places in enumerate(kept):  # the same as a short text whose positions are those
        with torch.no_grad():
            clip.positional_embedding[:3] = moved[places]
        packed = torch.zeros(1, 8, dtype=torch.long)
        packed[0, :3] = token[row, places]
        torch.testing.assert_close(short[row : row + 1], clip.encode_text(packed))
        with torch.no_grad():
            clip.positional_embedding.copy_(moved)


@pytest.mark.parametrize("pooling", ["tok", "avg"])
def test_masking_is_right_with_either_pooling(pooling):
    torch.manual_seed(0)
    vision = {**TINY_MODEL["vision_cfg"], "pool_type": pooling}
    text = {**TINY_MODEL["text_cfg"], "vocab_size": 32}
    model = ClipModel({**TINY_MODEL, "vision_cfg": vision, "text_cfg": text}).eval()
    image = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    token = torch.ones(2, 8, dtype=torch.long)
    kept = torch.tensor([[1, 2, 7], [0, 9, 15]])
    visual = model.clip.visual
    patch_b1LW = visual.ln_pre(
        torch.cat(
            [visual.class_embedding.expand(2, 1, -1),
             visual.conv1(model.pixels(image)).flatten(2).transpose(1, 2)], dim=1,
        ) + visual.positional_embedding
    )  # fmt: skip
    rows = torch.arange(2)[:, None]
    seen = torch.cat([patch_b1LW[:, :1], patch_b1LW[:, 1:][rows, kept]], dim=1)
    out = visual.ln_post(visual.transformer(seen))
    pooled = out[:, 0] if pooling == "tok" else out[:, 1:].mean(dim=1)
    masked = model(image, token, kept).image_bD
    torch.testing.assert_close(masked, pooled @ visual.proj)
    whole = model(image, token).image_bD  # nothing is removed in evaluation
    torch.testing.assert_close(whole, model.clip.encode_image(model.pixels(image)))
    assert not torch.allclose(whole, masked)


def test_a_section_of_another_reduction_starts_afresh_and_wrong_keys_are_named():
    tree = {
        "name": "x", "output": "x", "data": {"manifest": "x"}, "model": "ViT-B-16",
        "objective": {"name": "clip"}, "global_batch_size": 8, "samples": 8,
        "reduction": {"name": "grid", "mask_ratio": 0.5},
        "text_reduction": {"name": "syntax", "tags": "nltk", "num_tokens": 2},
    }  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        validate(tree, PretrainConfig, label="x")
    said = str(caught.value)
    assert "reduction.mask_ratio: there is no such key" in said
    assert "text_reduction.num_tokens: Input should be greater than or equal to 3" in said
    assert "text_reduction.tags: Input should be 'vocabulary' or 'caption'" in said
