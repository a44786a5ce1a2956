import numpy as np
import pytest
import torch

from configs.errors import DataError
from curation.manifest import manifest_of_tars
from pretrain.data.decode import ImageTransform
from pretrain.data.loader import Batch, BatchDataset, BatchPlan, batches
from pretrain.model.tokenizer import Tokenizer
from pretrain.reduction.image import num_kept_patches, random_patches
from tests.pretrain.conftest import make_dataset, png, write_tar


def dataset_of(manifest, rank=0, world=1, batch=16, seed=0) -> BatchDataset:
    transform = ImageTransform(
        image_size=16, scale=(0.5, 1.0), ratio=(0.8, 1.25), flip=True, max_image_pixels=10**6
    )
    tokenizer = Tokenizer.train_words(
        ["a red green blue gray square number"], vocab_size=50, context_length=8
    )
    plan = BatchPlan(
        seed=seed, global_batch_size=batch, rank=rank, world_size=world, window_shards=2,
        num_patches=16, mask_ratio=0.5,
    )  # fmt: skip
    return BatchDataset(manifest, transform, tokenizer, plan)


def same(a: Batch, b: Batch) -> bool:
    tensors = zip(a[:3], b[:3], strict=True)
    return a.key == b.key and a.bad == b.bad and all(torch.equal(x, y) for x, y in tensors)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_batches_are_the_same_for_any_number_of_workers(dataset, num_workers):
    alone = list(batches(dataset_of(dataset), first=0, last=8, num_workers=0))
    others = list(batches(dataset_of(dataset), first=0, last=8, num_workers=num_workers))
    assert len(alone) == 8
    assert all(same(a, b) for a, b in zip(alone, others, strict=True))


def test_a_later_start_sees_exactly_the_remaining_batches(dataset):
    whole = list(batches(dataset_of(dataset), first=0, last=9, num_workers=0))
    rest = list(batches(dataset_of(dataset), first=5, last=9, num_workers=0))
    assert all(same(a, b) for a, b in zip(whole[5:], rest, strict=True))


@pytest.mark.parametrize("world", [2, 4])
def test_the_parts_of_all_ranks_make_the_batch_of_one(dataset, world):
    one = dataset_of(dataset)
    parts = [dataset_of(dataset, rank=r, world=world) for r in range(world)]
    for step in (0, 5, 6, 11):  # 96 samples: step 6 is in the second epoch
        whole, split = one.batch(step), [part.batch(step) for part in parts]
        assert [key for part in split for key in part.key] == whole.key
        for field in range(3):
            assert torch.equal(torch.cat([part[field] for part in split]), whole[field])


def test_a_bad_image_is_replaced_named_and_the_same_on_every_rank(tmp_path):
    good = [(f"{i:03d}", {"png": png(i, 16, i), "txt": b"a red square"}) for i in range(15)]
    write_tar(
        tmp_path / "0.tar", [*good, ("bad", {"png": png(0, 16, 0)[:60], "txt": b"a blue square"})]
    )
    manifest = manifest_of_tars(tmp_path)
    whole = dataset_of(manifest).batch(0)
    assert [(b.key, "0.tar:bad" in whole.key) for b in whole.bad] == [("0.tar:bad", False)]
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
    with pytest.raises(DataError, match="16 samples in a row could not be decoded"):
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
    kept = random_patches(0, np.arange(4000), 16, 0.75)
    assert kept.shape == (4000, 4)
    assert (np.diff(kept, axis=1) > 0).all()
    counts = np.bincount(kept.ravel(), minlength=16)
    assert counts.min() > 850  # 1000 expected, sd about 27
    assert counts.max() < 1150


@pytest.mark.parametrize(("ratio", "kept"), [(0.0, 196), (0.5, 98), (0.75, 49), (0.999, 1)])
def test_the_mask_ratio_is_the_fraction_removed(ratio, kept):
    assert num_kept_patches(196, ratio) == kept


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_in_a_worker_arrives_as_itself_without_a_traceback(tmp_path, num_workers):
    manifest = make_dataset(tmp_path, [20])
    (tmp_path / "00000.tar").unlink()
    (error,) = batches(dataset_of(manifest), first=0, last=1, num_workers=num_workers)
    assert isinstance(error, DataError)
    assert "cannot be opened" in str(error)
    assert "Traceback" not in str(error)
