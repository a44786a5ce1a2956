import io
import json
import os
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from configs.errors import DataError, UsageError
from curation.manifest import Manifest, manifest_of_tars
from pretrain.bad_samples import KINDS, BadSamples, check_share, drop_rows_after
from pretrain.config import DataConfig
from pretrain.data.augment import ImageTransform
from pretrain.data.batch import Batch, BatchPlan, SampleForm
from pretrain.data.captions import CaptionChoice, draw
from pretrain.data.dataset import Source, Sources, open_sources
from pretrain.data.loader import BatchDataset, batches, loader_options
from pretrain.model.tokenizer import Tokenizer
from pretrain.reduction.image import RandomPatches
from pretrain.reduction.text import TextReduction, truncate
from tests.pretrain.conftest import make_dataset, png, write_tar

TOKENIZER = Tokenizer.train_words(
    ["a red green blue gray square number one two three photo of bad"],
    vocab_size=50,
    context_length=8,
)
IMAGE = ImageTransform(
    image_size=16, scale=(0.5, 1.0), ratio=(0.8, 1.25), flip=True, max_image_pixels=10**6
)


def sources_of(*manifests: Manifest, weights=()) -> Sources:
    pairs = zip(manifests, weights or [1.0] * len(manifests), strict=True)
    return Sources(tuple(Source(m, str(m.folder), weight) for m, weight in pairs))


def dataset_of(
    data, rank=0, world=1, batch=16, seed=0, window=2, skipped=(), cache=None, **form
) -> BatchDataset:
    sources = data if isinstance(data, Sources) else sources_of(data)
    plan = BatchPlan(
        seed=seed, global_batch_size=batch, rank=rank, world_size=world, window_shards=window,
        patch_rows=4, image_reduction=RandomPatches(0.5), text_reduction=TextReduction(truncate()),
        skipped=tuple(skipped),
    )  # fmt: skip
    return BatchDataset(sources, SampleForm(image=IMAGE, **form), TOKENIZER, plan, cache)


def all_batches(dataset: BatchDataset, first: int, last: int, num_workers: int = 0) -> list[Batch]:
    return list(batches(dataset, first=16 * first, last=16 * last, num_workers=num_workers))


def same(a: Batch, b: Batch) -> bool:
    tensors = [(x, y) for x, y in zip(a, b, strict=True) if isinstance(x, torch.Tensor)]
    assert len(tensors) >= 3
    return a.key == b.key and a.bad == b.bad and all(torch.equal(x, y) for x, y in tensors)


@pytest.fixture(scope="module")
def whole(dataset) -> list[Batch]:
    return all_batches(dataset_of(dataset), 0, 13)  # more than two epochs of 96 samples


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_batches_are_the_same_for_any_number_of_workers(dataset, whole, num_workers):
    others = all_batches(dataset_of(dataset), 0, 13, num_workers)
    assert all(same(a, b) for a, b in zip(whole, others, strict=True))


class Environment(Dataset):
    def __getitem__(self, index):
        return os.environ.get("PAIRMILL_TEST_SET_LATER")

    def __len__(self):
        return 2


def test_workers_see_what_the_environment_of_their_rank_became_after_the_first_loader(
    dataset, monkeypatch
):
    """They start from a fork server, which keeps the environment of the time of its own start."""
    all_batches(dataset_of(dataset), 0, 1, num_workers=1)
    for value in ("credentials", "others", None):
        if value is None:
            monkeypatch.delenv("PAIRMILL_TEST_SET_LATER")
        else:
            monkeypatch.setenv("PAIRMILL_TEST_SET_LATER", value)
        options = loader_options(dataset_of(dataset).plan, 1)
        assert list(DataLoader(Environment(), **options)) == [value, value]


def test_a_later_start_at_any_step_sees_exactly_the_remaining_batches(dataset, whole):
    for step in range(13):
        rest = all_batches(dataset_of(dataset), step, 13)
        assert len(rest) == 13 - step
        assert all(same(a, b) for a, b in zip(whole[step:], rest, strict=True))


@pytest.mark.parametrize("world", [2, 4, 8])
def test_the_parts_of_all_ranks_make_the_batch_of_one(dataset, whole, world):
    parts = [dataset_of(dataset, rank=r, world=world) for r in range(world)]
    for step in (0, 5, 6, 11):  # 96 samples: step 6 is in the second epoch
        split = [part.batch(16 * step) for part in parts]
        assert [key for part in split for key in part.key] == whole[step].key
        for field in range(3):
            assert torch.equal(torch.cat([part[field] for part in split]), whole[step][field])


def test_a_run_on_one_rank_goes_on_on_two_and_four_with_exactly_the_remaining_keys(dataset, whole):
    seen = [key for batch in whole[:3] for key in batch.key]
    for world, first, last in ((2, 3, 7), (4, 7, 13)):
        ranks = [dataset_of(dataset, rank=r, world=world) for r in range(world)]
        for step in range(first, last):
            seen += [key for part in ranks for key in part.batch(16 * step).key]
    assert seen == [key for batch in whole for key in batch.key]


def test_another_global_batch_cuts_the_same_sequence_differently(dataset, whole):
    keys = [key for batch in whole for key in batch.key]
    other = dataset_of(dataset, batch=26)
    assert [key for k in range(8) for key in other.batch(26 * k).key] == keys


def test_skipped_ranges_are_passed_over_and_the_rest_is_unchanged(dataset, whole):
    keys = [key for batch in whole for key in batch.key]
    skipping = dataset_of(dataset, skipped=[(40, 72), (10, 26)])
    got = [key for k in range(5) for key in skipping.batch(16 * k).key]
    assert got == (keys[:10] + keys[26:40] + keys[72:])[:80]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 4), st.integers(0, 30))
def test_two_windows_any_world_and_batch_give_the_samples_of_one_rank(
    dataset, window, world, local, step
):
    batch = world * local
    one = dataset_of(dataset, batch=batch, window=window).batch(batch * step)
    ranks = [
        dataset_of(dataset, rank=r, world=world, batch=batch, window=window) for r in range(world)
    ]
    parts = [rank.batch(batch * step) for rank in ranks]
    assert [key for part in parts for key in part.key] == one.key
    assert torch.equal(torch.cat([part.image_b3HW for part in parts]), one.image_b3HW)
    assert torch.equal(torch.cat([part.token_bL for part in parts]), one.token_bL)


def test_a_tiny_dataset_fills_batches_and_workers_many_times_over(tmp_path):
    manifest = make_dataset(tmp_path, [1, 2])
    found = all_batches(dataset_of(manifest), 0, 4, num_workers=4)
    keys = [key for batch in found for key in batch.key]
    assert len(keys) == 64
    for epoch in range(21):
        assert len(set(keys[3 * epoch : 3 * epoch + 3])) == 3


def test_every_batch_of_a_mixture_has_its_shares_and_each_source_its_own_epochs(tmp_path):
    a, b = make_dataset(tmp_path / "a", [20, 10]), make_dataset(tmp_path / "b", [8])
    data = sources_of(a, b, weights=[3.0, 1.0])
    one = dataset_of(data)
    parts = [dataset_of(data, rank=r, world=4) for r in range(4)]
    alone = [dataset_of(m, batch=1) for m in (a, b)]
    counts = [0, 0]
    for step in range(6):
        batch = one.batch(16 * step)
        source, _ = one._mixture.split(np.arange(16 * step, 16 * step + 16))
        assert np.bincount(source).tolist() == [12, 4]
        for i, key in zip(source, batch.key, strict=True):
            assert alone[i].batch(counts[i]).key == [key]  # the source's own sequence
            counts[i] += 1
        assert [key for part in parts for key in part.batch(16 * step).key] == batch.key
    assert counts == [72, 24]  # 2.4 epochs of one, 3 of the other


def test_a_bad_image_is_replaced_named_and_the_same_on_every_rank(tmp_path):
    good = [(f"{i:03d}", {"png": png(i, 16, i), "txt": b"a red square"}) for i in range(15)]
    write_tar(
        tmp_path / "0.tar", [*good, ("bad", {"png": png(0, 16, 0)[:60], "txt": b"a blue square"})]
    )
    manifest = manifest_of_tars(tmp_path)
    whole = dataset_of(manifest).batch(0)
    assert [(b.key, b.kind, "0.tar:bad" in whole.key) for b in whole.bad] == [
        ("0.tar:bad", "undecodable image", False)
    ]
    parts = [dataset_of(manifest, rank=r, world=4).batch(0) for r in range(4)]
    assert [key for part in parts for key in part.key] == whole.key
    assert [bad for part in parts for bad in part.bad] == whole.bad


def test_a_sample_that_the_index_calls_unreadable_is_replaced(tmp_path):
    good = [(f"{i:03d}", {"png": png(i, 16, i), "txt": b"a red square"}) for i in range(15)]
    write_tar(tmp_path / "0.tar", [*good, ("empty", {"png": b"", "txt": b"a blue square"})])
    batch = dataset_of(manifest_of_tars(tmp_path)).batch(0)
    assert {(bad.key, bad.problem) for bad in batch.bad} == {("0.tar:empty", "empty image")}
    assert len(batch.key) == 16


def test_a_dataset_of_bad_images_only_is_an_error_and_no_hang(tmp_path):
    bad = [(f"{i}", {"png": png(0, 16, 0)[:60], "txt": b"a"}) for i in range(3)]
    write_tar(tmp_path / "0.tar", bad)
    with pytest.raises(DataError, match="32 samples in a row could not be used"):
        dataset_of(manifest_of_tars(tmp_path)).batch(0)


def test_a_shard_cut_since_the_manifest_is_an_error_that_names_it(tmp_path):
    manifest = make_dataset(tmp_path, [20])
    with open(tmp_path / "00000.tar", "r+b") as file:
        file.truncate(5000)
    with pytest.raises(DataError, match=r"00000\.tar: has 5,000 bytes, the manifest says"):
        dataset_of(manifest).batch(0)


def test_a_missing_shard_is_an_error_that_names_it(tmp_path):
    manifest = make_dataset(tmp_path, [20])
    (tmp_path / "00000.tar").unlink()
    with pytest.raises(DataError, match=r"00000\.tar: cannot be opened"):
        dataset_of(manifest).batch(0)


def test_kept_patches_are_distinct_ascending_and_uniform():
    kept = RandomPatches(0.75).kept(0, np.arange(4000), 4)
    assert kept.shape == (4000, 4)
    assert (np.diff(kept, axis=1) > 0).all()
    counts = np.bincount(kept.ravel(), minlength=16)
    assert counts.min() > 850  # 1000 expected, sd about 27
    assert counts.max() < 1150


@pytest.mark.parametrize(("ratio", "kept"), [(0.0, 196), (0.5, 98), (0.75, 49), (0.999, 1)])
def test_the_mask_ratio_is_the_fraction_removed(ratio, kept):
    assert RandomPatches(ratio).num_kept(14) == kept


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_in_a_worker_arrives_as_itself_without_a_traceback(tmp_path, num_workers):
    manifest = make_dataset(tmp_path, [20])
    (tmp_path / "00000.tar").unlink()
    (error,) = batches(dataset_of(manifest), first=0, last=16, num_workers=num_workers)
    assert isinstance(error, DataError)
    assert "cannot be opened" in str(error)
    assert "Traceback" not in str(error)


def test_an_index_of_another_version_is_an_error_that_says_what_to_do(tmp_path):
    manifest = make_dataset(tmp_path, [20])
    path = tmp_path / "00000.index.parquet"
    table = pq.read_table(path, partitioning=None)
    info = json.loads(table.schema.metadata[b"pairmill"]) | {"version": 1}
    pq.write_table(table.replace_schema_metadata({b"pairmill": json.dumps(info)}), path)
    with pytest.raises(DataError, match=r"not of version \d+\)\. Remove it, and `pairmill index`"):
        dataset_of(manifest).batch(0)


def test_every_kind_of_bad_sample_is_replaced_near_by_counted_and_named(tmp_path):
    """All odd samples of a shard of 40 are bad, each in its own way."""
    picture = png(0, 16, 0)
    wide = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4) + b"IHDR" + (2**15).to_bytes(4) * 2
    bad = {
        "cut image": {"png": picture[:60], "txt": b"a"},
        "no image": {"txt": b"a"},
        "no caption": {"png": picture},
        "not utf-8": {"png": picture, "txt": b"\xff\xfe"},
        "empty image": {"png": b"", "txt": b"a"},
        "no picture": {"png": b"a text", "txt": b"a"},
        "bomb": {"png": wide + bytes([8, 2, 0, 0, 0]) + bytes(40), "txt": b"a"},
        "bad json": {"png": picture, "json": b"{"},
    }
    samples = []
    for i, (name, members) in enumerate(bad.items()):
        samples += [(f"{i}-{name}", members), (f"{i}-good", {"png": picture, "txt": b"a"})]
    write_tar(tmp_path / "data/0.tar", samples)
    other = [(f"other{i}", {"png": picture, "txt": b"a"}) for i in range(16)]
    write_tar(tmp_path / "data/1.tar", other)
    manifest = manifest_of_tars(tmp_path / "data")
    one = dataset_of(manifest, window=1, batch=32).batch(0)
    kinds = {found.key.partition("-")[2]: found.kind for found in one.bad}
    assert kinds.keys() == bad.keys()
    assert set(kinds.values()) <= set(KINDS) - {"other"}
    assert len(set(kinds.values())) >= 6
    first = sorted(key.partition(":")[0] for key in one.key[:16])
    assert len(set(first)) == 1  # replacements come from the window, whose shards are at hand
    parts = [dataset_of(manifest, rank=r, world=4, window=1, batch=32).batch(0) for r in range(4)]
    assert [key for part in parts for key in part.key] == one.key
    log = BadSamples(tmp_path, rank=0, before={"no image": 2})
    log.note(one.bad)
    counts = log.in_all(log.counts_here())
    assert sum(counts.values()) == len(one.bad) + 2
    rows = [
        json.loads(line) for line in (tmp_path / "bad_samples-0.jsonl").read_text().splitlines()
    ]
    assert [row["key"] for row in rows] == [found.key for found in one.bad]
    left = drop_rows_after(tmp_path, 8)
    assert sum(left.values()) == sum(found.position < 8 for found in one.bad)
    with pytest.raises(DataError, match=r"2 no image.*more than data.max_bad_fraction = 0.01"):
        check_share({"no image": 2, "truncated": 9}, samples_seen=1000, limit=0.01, folder="run")
    check_share({"no image": 10}, samples_seen=1000, limit=0.01, folder="run")


def test_captions_are_drawn_by_place_and_weight_and_put_into_a_template(tmp_path):
    rewrites = ["one", "two", "three"]
    members = {"png": png(0, 16, 0), "txt": b"red", "json": json.dumps({"rewrites": rewrites})}
    members["json"] = members["json"].encode()
    write_tar(tmp_path / "0.tar", [(f"{i}", members) for i in range(8)])
    manifest = manifest_of_tars(tmp_path)
    choice = CaptionChoice(
        places=(("txt", 1.0), ("json:rewrites", 3.0), ("json:missing", 9.0)),
        templates=("a photo of {caption}", "{caption}"),
    )
    dataset = dataset_of(manifest, batch=400, caption=choice, negative_caption="json:rewrites")
    batch = dataset.batch(0)
    ids = {word: TOKENIZER.encode([word])[0][0] for word in ["red", "photo", *rewrites]}
    tokens = batch.token_bL
    share = {word: float((tokens == i).any(1).float().mean()) for word, i in ids.items()}
    assert share["red"] == pytest.approx(0.25, abs=0.07)
    assert share["photo"] == pytest.approx(0.5, abs=0.08)
    for word in rewrites:
        assert share[word] == pytest.approx(0.25, abs=0.07)
    assert (batch.negative_token_bL[:, 0] == ids["one"]).all()
    part = dataset_of(manifest, rank=1, world=2, batch=400, caption=choice).batch(0)
    assert torch.equal(part.token_bL, tokens[200:])


def test_a_caption_is_text_and_never_a_format():
    choice = CaptionChoice(templates=("a {caption}",))
    drawn = draw(0, np.asarray([0]))[0]
    assert choice(["{caption} {0.__class__} %s"], {}.get, drawn) == "a {caption} {0.__class__} %s"


@pytest.mark.parametrize("broken", [b"{", b"[1]", b'{"a": 3}', b"\xff", b"[" * 100_000])
def test_a_broken_place_leaves_its_weight_to_the_others(broken):
    choice = CaptionChoice(places=(("json:a", 9.0), ("other|txt", 1.0)))
    members = {"json": broken, "txt": b"good"}
    assert choice([], members.get, draw(0, np.asarray([0]))[0]) == "good"
    assert choice([], {"json": broken}.get, draw(0, np.asarray([0]))[0]) is None


def test_further_views_and_hard_negatives_come_with_the_batch(tmp_path):
    members = {
        "png": png(0, 24, 0),
        "txt": b"a red",
        "neg.txt": b"a blue",
        "neg.png": png(2, 24, 1),
    }
    write_tar(tmp_path / "0.tar", [(f"{i}", members) for i in range(16)])
    manifest = manifest_of_tars(tmp_path)
    form = {"views": (IMAGE, IMAGE), "negative_caption": "neg.txt", "negative_image": "neg.png"}
    batch = dataset_of(manifest, **form).batch(0)
    assert batch.view_bv3HW.shape == (16, 2, 3, 16, 16)
    assert not torch.equal(batch.view_bv3HW[:, 0], batch.view_bv3HW[:, 1])
    assert not torch.equal(batch.view_bv3HW[:, 0], batch.image_b3HW)
    assert torch.equal(batch.negative_token_bL[0], TOKENIZER(["a blue"])[0])
    assert (batch.negative_image_b3HW[:, 2].float().mean((1, 2)) > 150).all()
    assert (batch.image_b3HW[:, 2].float().mean((1, 2)) < 100).all()
    part = dataset_of(manifest, rank=1, world=2, **form).batch(0)
    assert torch.equal(part.view_bv3HW, batch.view_bv3HW[8:])


def test_bare_tars_are_indexed_on_first_use_and_only_then(tmp_path):
    for i in range(3):
        samples = [(f"{i}{j}", {"png": png(j, 16, j), "txt": b"a red"}) for j in range(6)]
        write_tar(tmp_path / f"{i}.tar", samples)
    with pytest.raises(UsageError, match="1 of its 4 tars are not there"):
        open_sources(DataConfig(manifest=f"{tmp_path}/{{0..3}}.tar"))
    some = open_sources(DataConfig(manifest=f"{tmp_path}/{{0..1}}.tar"))
    assert some.num_samples == 12
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.parquet")}
    assert len(stamps) == 3  # two indexes and the table of shards
    again = open_sources(DataConfig(manifest=f"{tmp_path}/{{0..1}}.tar"), first_rank=False)
    assert again.digest == some.digest
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    every = open_sources(DataConfig(manifest=str(tmp_path)))
    assert every.num_samples == 18
    assert len(dataset_of(some).batch(0).key) == len(dataset_of(every).batch(0).key) == 16


def test_a_streamed_run_has_full_batches_from_tars_and_allowed_pipes_only(tmp_path, capfd):
    from pretrain.data.streaming import Stream, StreamDataset, stream_batches

    for i in range(2):
        samples = [(f"{i}{j}", {"png": png(j, 16, j), "txt": b"a red"}) for j in range(9)]
        samples.append((f"bad{i}", {"png": b"no", "txt": b"a"}))
        write_tar(tmp_path / f"{i}.tar", samples)
    with pytest.raises(ValueError, match="runs a shell command"):
        DataConfig(source="streaming", urls=[f"pipe:cat {tmp_path}/0.tar"])
    urls = (str(tmp_path / "0.tar"), f"pipe:cat {tmp_path}/1.tar", str(tmp_path / "missing.tar"))
    plan = dataset_of(make_dataset(tmp_path / "x", [3])).plan
    dataset = StreamDataset(Stream(urls), SampleForm(image=IMAGE), TOKENIZER, plan)
    found = list(stream_batches(dataset, first=0, last=16 * 6, num_workers=2))
    assert [len(set(batch.key)) > 4 for batch in found] == [True] * 6
    assert {key.partition(":")[0] for batch in found for key in batch.key} == {"0.tar", "1.tar"}
    assert {bad.kind for batch in found for bad in batch.bad} == {"undecodable image"}
    kept = RandomPatches(0.5).kept(0, np.arange(16, 32), 4)
    assert np.array_equal(found[1].kept_bK.numpy(), kept)  # drawn by position, as ever
    nothing = StreamDataset(Stream(urls[2:]), SampleForm(image=IMAGE), TOKENIZER, plan)
    (error,) = stream_batches(nothing, first=0, last=16, num_workers=0)
    assert "50 shards in a row could not be read" in str(error)


def test_a_sample_is_read_from_its_members_by_byte_range_only(tmp_path):
    """What stands between the members of a tar is never looked at: its headers are overwritten."""
    manifest = make_dataset(tmp_path, [12])
    want = dataset_of(manifest).batch(0)
    path = tmp_path / "00000.tar"
    with tarfile.open(path) as tar:
        headers = [member.offset for member in tar]
    data = io.BytesIO(path.read_bytes())
    for offset in headers:
        data.seek(offset)
        data.write(bytes(512))
    path.write_bytes(data.getvalue())
    assert same(dataset_of(manifest).batch(0), want)
