import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pretrain.data.loader import BatchPlan
from pretrain.data.order import SampleOrder

sizes = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(sum)


def order_of(shard_sizes: list[int], window: int, seed: int = 0, digest: str = "d") -> SampleOrder:
    return SampleOrder(shard_sizes, seed=seed, digest=digest, window_shards=window)


def pairs(order: SampleOrder, positions: np.ndarray) -> list[tuple[int, int]]:
    place = order.locate(positions.astype(np.int64))
    return list(zip(place.shard.tolist(), place.row.tolist(), strict=True))


@given(sizes, st.integers(1, 5), st.integers(0, 3), st.integers(0, 2**40))
def test_an_epoch_holds_every_sample_exactly_once(shard_sizes, window, epoch, seed):
    order = order_of(shard_sizes, window, seed)
    n = order.num_samples
    got = pairs(order, np.arange(epoch * n, (epoch + 1) * n))
    assert sorted(got) == [(s, r) for s, size in enumerate(shard_sizes) for r in range(size)]


@given(sizes, st.integers(1, 5), st.data())
def test_any_position_is_found_without_the_ones_before_it(shard_sizes, window, data):
    n = sum(shard_sizes)
    position = data.draw(st.integers(0, 3 * n - 1))
    whole = pairs(order_of(shard_sizes, window), np.arange(3 * n))
    assert pairs(order_of(shard_sizes, window), np.asarray([position])) == [whole[position]]


@given(sizes, st.integers(1, 5))
def test_a_window_holds_whole_shards_and_no_others(shard_sizes, window):
    order = order_of(shard_sizes, window)
    got = [shard for shard, _ in pairs(order, np.arange(order.num_samples))]
    last_seen = {shard: i for i, shard in enumerate(got)}
    first_seen = {shard: i for i, shard in reversed(list(enumerate(got)))}
    for i in range(len(got)):
        open_shards = [s for s in last_seen if first_seen[s] <= i <= last_seen[s]]
        assert len(open_shards) <= window


@given(st.integers(1, 4), st.integers(0, 20))
def test_the_union_over_ranks_is_the_same_sequence_for_every_world_size(log_world, step):
    world = 2 ** (log_world - 1)
    plans = [
        BatchPlan(
            seed=0, global_batch_size=16, rank=rank, world_size=world, window_shards=1,
            num_patches=16, mask_ratio=0.0,
        )
        for rank in range(world)
    ]  # fmt: skip
    union = np.concatenate([plan.positions(step) for plan in plans])
    assert union.tolist() == list(range(step * 16, (step + 1) * 16))


def test_seed_digest_and_epoch_each_change_the_order():
    positions = np.arange(40)
    base = pairs(order_of([10, 30], 2), positions)
    assert base != pairs(order_of([10, 30], 2, seed=1), positions)
    assert base != pairs(order_of([10, 30], 2, digest="e"), positions)
    assert base != pairs(order_of([10, 30], 2), positions + 40)


def test_the_middle_of_a_billion_samples_is_reached_at_once():
    order = order_of([10_000] * 100_000, 64)
    place = order.locate(np.asarray([2_500_000_000]))
    assert 0 <= place.shard[0] < 100_000
    assert 0 <= place.row[0] < 10_000
