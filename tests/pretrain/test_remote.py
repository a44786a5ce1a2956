"""Remote shards against a real S3 server that fails, cuts and delays reads."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.errors import ConfigError, DataError
from pretrain.config import DataConfig
from pretrain.data.batch import Batch
from pretrain.data.dataset import open_sources
from pretrain.data.loader import BatchDataset, batches
from pretrain.data.remote import Cache, CachePlan
from tests.pretrain.conftest import make_dataset
from tests.pretrain.test_loader import dataset_of, same
from tests.s3 import S3Server, s3_server

SHARDS = [30, 27, 25, 21, 33, 28]


@pytest.fixture(scope="module")
def s3():
    with pytest.MonkeyPatch.context() as patch, s3_server(patch) as server:
        yield server


@pytest.fixture(autouse=True)
def no_faults(s3):
    yield
    s3.fail_every = s3.cut_every = 0
    s3.slow_seconds = 0.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data")
    make_dataset(path, SHARDS)
    return path


@pytest.fixture(scope="module")
def url(s3: S3Server, folder: Path) -> str:
    return s3.upload(folder, "bucket/set")


def config_of(where: str, cache: Path, max_bytes: int = 10**9) -> DataConfig:
    remote = {"folder": str(cache), "cache_bytes": max_bytes, "retries": 6}
    return DataConfig(manifest=where, window_shards=2, remote=remote)


def opened(where: str, cache: Path, max_bytes: int = 10**9) -> BatchDataset:
    sources = open_sources(config_of(where, cache, max_bytes))
    plan = CachePlan(folder=cache / "shards", max_bytes=max_bytes, retries=6)
    return dataset_of(sources, cache=plan)


def used(cache: Path) -> int:
    return sum(path.stat().st_size for path in (cache / "shards").iterdir())


def run(dataset: BatchDataset, steps: int, num_workers: int = 0) -> list[Batch]:
    found = list(batches(dataset, first=0, last=16 * steps, num_workers=num_workers))
    assert all(isinstance(batch, Batch) for batch in found), found
    return found


def test_remote_batches_equal_local_ones_with_failed_cut_and_slow_reads_and_the_cap_held(
    s3, url, folder, tmp_path
):
    """More than an epoch by two workers over a cache that cannot hold all of it."""
    sizes = sorted(p.stat().st_size for p in folder.glob("*.tar"))
    cap = sum(sizes) - 1  # not all shards fit at once
    dataset = opened(url, tmp_path, cap)
    s3.fail_every, s3.cut_every, s3.slow_seconds = 5, 7, 0.005
    most, done = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            if (tmp_path / "shards").exists():
                try:
                    most = max(most, used(tmp_path))
                except FileNotFoundError:
                    continue
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        remote = run(dataset, 11, num_workers=2)
    finally:
        done.set()
        watcher.join()
    local = run(opened(str(folder), tmp_path), 11)
    assert all(same(a, b) for a, b in zip(remote, local, strict=True))
    assert s3.num_faults >= 5
    assert 0 < most <= cap


def test_with_room_every_file_is_fetched_once_whatever_the_number_of_processes(s3, url, tmp_path):
    s3.fetched.clear()
    run(opened(url, tmp_path), 11, num_workers=2)
    tars = [path for path, _ in s3.fetched if path.endswith(".tar")]
    assert len(tars) == len(set(tars)) == len(SHARDS)


def test_the_next_window_is_fetched_while_this_one_is_read(s3, url, tmp_path):
    dataset = opened(url, tmp_path)
    dataset.batch(0)
    deadline = time.time() + 20
    while time.time() < deadline and len(list((tmp_path / "shards").glob("*.tar"))) < 4:
        time.sleep(0.05)
    assert len(list((tmp_path / "shards").glob("*.tar"))) == 4  # two windows of two shards


def test_where_everything_in_the_cache_is_being_read_samples_are_read_by_range(
    s3, url, folder, tmp_path, capfd
):
    """Another process holds the whole cache: no wait for it, and nothing above the cap."""
    sizes = sorted(p.stat().st_size for p in folder.glob("*.tar"))
    cap = sum(sizes)
    shards = tmp_path / "shards"
    shards.mkdir(parents=True)
    (shards / "held").write_bytes(bytes(cap))
    with open(shards / "held", "rb") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        found = run(opened(url, tmp_path, cap), 2)
        assert used(tmp_path) <= cap
    local = run(opened(str(folder), tmp_path), 2)
    assert all(same(a, b) for a, b in zip(found, local, strict=True))
    assert "has no room" in capfd.readouterr().err


def test_a_cache_that_cannot_hold_two_windows_is_refused_with_what_it_needs(url, tmp_path):
    with pytest.raises(ConfigError, match=r"two windows of 2 shards of .* take [0-9,]+ bytes"):
        open_sources(config_of(url, tmp_path, 50_000))


def test_errors_that_do_not_end_are_an_error_that_names_the_file(s3, url, tmp_path):
    dataset = opened(url, tmp_path)
    s3.fail_every = 1
    dataset._cache = CachePlan(folder=tmp_path / "shards", max_bytes=10**9, retries=0)
    with pytest.raises(DataError, match=r"s3://bucket/set/0000\d\..*failed 1 times"):
        dataset.batch(0)


def test_a_remote_shard_of_another_size_is_an_error(s3, folder, tmp_path):
    where = s3.upload(folder, "bucket/cut")
    import s3fs

    store = s3fs.S3FileSystem(skip_instance_cache=True)
    for name in store.ls("bucket/cut"):
        if name.endswith(".tar"):
            store.pipe_file(name, store.cat_file(name)[:-512])
    with pytest.raises(DataError, match=r"has [0-9,]+ bytes, [0-9,]+ were expected"):
        opened(where, tmp_path).batch(0)


def test_a_missing_remote_dataset_says_so(s3, tmp_path):
    with pytest.raises(DataError, match=r"s3://bucket/none/shards\.parquet: FileNotFoundError"):
        open_sources(config_of("s3://bucket/none", tmp_path))


def test_what_a_killed_process_left_unfinished_is_fetched_again(s3, url, folder, tmp_path):
    cache = Cache(CachePlan(folder=tmp_path, max_bytes=10**9))
    target = f"{url}/00000.tar"
    part = cache.path(target).with_name(cache.path(target).name + ".part")
    part.write_bytes(b"half")  # nobody holds its lock
    descriptor = cache.open(target, (folder / "00000.tar").stat().st_size)
    assert os.pread(descriptor, 10**7, 0) == (folder / "00000.tar").read_bytes()
    os.close(descriptor)
    assert not part.exists()


def test_the_least_recently_used_copy_that_nobody_reads_goes_first(s3, url, folder, tmp_path):
    sizes = {
        name: (folder / name).stat().st_size for name in ("00000.tar", "00001.tar", "00002.tar")
    }
    cache = Cache(CachePlan(folder=tmp_path, max_bytes=sum(sizes.values()) - 1))
    held = cache.open(f"{url}/00000.tar", sizes["00000.tar"])
    os.close(cache.open(f"{url}/00001.tar", sizes["00001.tar"]))
    os.close(cache.open(f"{url}/00002.tar", sizes["00002.tar"]))
    assert [cache.path(f"{url}/{name}").exists() for name in sizes] == [True, False, True]
    os.close(held)


def test_a_mixture_of_local_and_remote_sources_is_one_sequence(url, folder, tmp_path):
    mixture = [{"manifest": url, "weight": 3}, {"manifest": str(folder), "weight": 1}]
    remote = {"folder": str(tmp_path)}
    sources = open_sources(DataConfig(mixture=mixture, window_shards=2, remote=remote))
    plan = CachePlan(folder=tmp_path / "shards", max_bytes=10**9)
    one = dataset_of(sources, cache=plan)
    halves = [dataset_of(sources, rank=r, world=2, cache=plan) for r in range(2)]
    for consumed in (0, 16, 320):
        whole, parts = one.batch(consumed), [half.batch(consumed) for half in halves]
        assert torch.equal(torch.cat([p.image_b3HW for p in parts]), whole.image_b3HW)
    assert np.bincount(one._mixture.split(np.arange(16))[0]).tolist() == [12, 4]
