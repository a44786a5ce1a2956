"""Vectors beside an index: what is written is read, and nothing else is taken for it."""

from __future__ import annotations

import numpy as np
import pytest

from configs.errors import DataError, UsageError
from curation.scan import InputShard, ScanTask, scan_shard
from curation.vectors import (
    has_vector,
    read_vectors,
    read_vectors_info,
    vectors_path,
    write_vectors,
)


@pytest.fixture
def indexed(tars, tmp_path):
    """Make the index of a tar of some samples."""

    def make(num_samples: int = 3, *, word: str = "red"):
        members = [m for n in range(num_samples) for m in tars.sample(f"{n}", f"a {word} {n}")]
        tar = tars.write(tmp_path / "0.tar", members)
        index = tmp_path / "0.index.parquet"
        scan_shard(ScanTask(input=InputShard(source="s", shard="0", path=str(tar), index=index)))
        return index

    return make


def vectors(rows: int, dim: int = 4) -> np.ndarray:
    return np.arange(1, rows * dim + 1).reshape(rows, dim).astype(np.float16)


def test_vectors_come_back_as_they_were_written_and_numpy_alone_reads_them(indexed):
    index, array = indexed(), vectors(3)
    array[1] = np.nan
    made = write_vectors(index, "clip_image", array, made_by="weights 7f")
    found = read_vectors(index, "clip_image", digest=made.digest)
    assert not found.flags.writeable
    np.testing.assert_array_equal(found, array)
    np.testing.assert_array_equal(np.load(index.parent / "0.index.clip_image.npy"), array)
    assert has_vector(found).tolist() == [True, False, True]
    assert read_vectors_info(index, "clip_image") == made
    assert (made.num_samples, made.dim, made.made_by) == (3, 4, "weights 7f")
    assert [p.name for p in index.parent.iterdir() if "tmp" in p.name] == []


def test_the_digest_is_that_of_the_vectors(indexed):
    index = indexed()
    first = write_vectors(index, "v", vectors(3))
    assert write_vectors(index, "v", vectors(3)) == first
    other = write_vectors(index, "v", vectors(3) + 1)
    assert other.digest != first.digest
    with pytest.raises(DataError, match="made again since"):
        read_vectors(index, "v", digest=first.digest)


def test_zero_infinity_and_nan_are_no_vector():
    rows = np.array([[0, 0], [1, 0], [np.inf, 1], [np.nan, np.nan], [1, np.nan]], np.float16)
    assert has_vector(rows).tolist() == [False, True, False, False, False]


@pytest.mark.parametrize(
    ("array", "why"),
    [
        (vectors(2), r"float16 \[2, 4\]; expected float16 \[3, dim\]"),
        (vectors(3).astype(np.float32), "got float32"),
        (vectors(3)[:, 0], r"float16 \[3\]"),
        (vectors(3)[:, :0], "dimension of 0"),
        (np.where(vectors(3) == 6, np.inf, vectors(3)).astype(np.float16), "row 1 of"),
        (np.where(vectors(3) == 6, np.nan, vectors(3)).astype(np.float16), "1 rows are neither"),
    ],
)
def test_an_array_that_does_not_fit_is_refused_and_nothing_is_left(indexed, array, why):
    index = indexed()
    with pytest.raises(DataError, match=why):
        write_vectors(index, "v", array)
    assert not vectors_path(index, "v").exists()


def test_vectors_of_another_state_of_the_tar_are_not_taken(indexed):
    write_vectors(indexed(), "v", vectors(3))
    index = indexed(word="blue")  # as many rows, other samples
    with pytest.raises(DataError, match=r"another index.*pairmill score"):
        read_vectors(index, "v")
    assert read_vectors_info(index, "v") is None


def test_what_is_missing_damaged_or_foreign_is_named_with_what_to_do(indexed):
    index = indexed()
    write_vectors(index, "clip_image", vectors(3))
    with pytest.raises(DataError, match=r"did you mean 'clip_image' \(this index has: clip_im"):
        read_vectors(index, "clip_imag")
    vectors_path(index, "clip_image").unlink()
    with pytest.raises(DataError, match=r"0\.index\.v\.npy: there are no such.*pairmill score"):
        read_vectors(index, "v")
    with pytest.raises(UsageError, match="no vectors can be called 'a/b'"):
        read_vectors(index, "a/b")
    np.save(vectors_path(index, "v"), vectors(3))
    with pytest.raises(DataError, match="no vectors of ours"):
        read_vectors(index, "v")
    write_vectors(index, "v", vectors(3))
    whole = vectors_path(index, "v").read_bytes()
    for length in range(0, len(whole), 7):
        vectors_path(index, "v").write_bytes(whole[:length])
        with pytest.raises(DataError, match="no vectors of ours"):
            read_vectors(index, "v")
        assert read_vectors_info(index, "v") is None
    with pytest.raises(DataError, match="no readable index"):
        write_vectors(index.with_name("1.index.parquet"), "v", vectors(3))
