import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.batch import BatchPlan
from pretrain.data.mixture import MAX_PERIOD, Mixture, shares_of
from pretrain.data.order import SampleOrder, positions_of
from pretrain.reduction.image import RandomPatches
from pretrain.reduction.text import TextReduction, truncate

sizes = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(sum)
ranges = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), max_size=6)


def order_of(shard_sizes: list[int], window: int, seed: int = 0, digest: str = "d") -> SampleOrder:
    return SampleOrder(shard_sizes, seed=seed, digest=digest, window_shards=window)


def pairs(order: SampleOrder, positions: np.ndarray) -> list[tuple[int, int]]:
    place = order.locate(positions.astype(np.int64))
    return list(zip(place.shard.tolist(), place.row.tolist(), strict=True))


def plan(rank: int, world: int, batch: int, skipped=()) -> BatchPlan:
    return BatchPlan(
        seed=0, global_batch_size=batch, rank=rank, world_size=world, window_shards=1,
        patch_rows=4, image_reduction=RandomPatches(0.0), text_reduction=TextReduction(truncate()),
        skipped=tuple(skipped),
    )  # fmt: skip


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


@given(sizes, st.integers(1, 5), st.data())
def test_a_window_holds_whole_shards_and_no_others(shard_sizes, window, data):
    order = order_of(shard_sizes, window)
    position = data.draw(st.integers(0, 3 * order.num_samples - 1))
    found = order.window(position)
    assert found.first <= position < found.first + found.size
    assert len(found.shards) <= window
    got = pairs(order, np.arange(found.first, found.first + found.size))
    assert sorted(got) == [
        (shard, row) for shard in sorted(found.shards) for row in range(shard_sizes[shard])
    ]


@given(
    sizes, st.integers(1, 5), st.integers(1, 8), st.integers(1, 5), ranges, st.integers(0, 40)
)  # fmt: skip
def test_the_union_over_ranks_is_one_sequence_for_every_world_size_and_batch(
    shard_sizes, window, world, local, skipped, steps
):
    """Cut by whole batches of any size on any number of ranks, the sequence is the same."""
    order = order_of(shard_sizes, window)
    batch = world * local
    union = [
        plan(rank, world, batch, skipped).positions(step * batch)
        for step in range(steps)
        for rank in range(world)
    ]
    consumed = np.concatenate([*union, np.zeros(0, dtype=np.int64)])
    one = plan(0, 1, max(1, steps * batch), skipped).positions(0)[: steps * batch]
    assert consumed.tolist() == one.tolist()
    assert pairs(order, consumed) == pairs(order, one)


@given(ranges, st.integers(0, 400))
def test_skipped_ranges_are_never_visited_and_nothing_else_is_left_out(skipped, count):
    gone = {p for first, last in skipped for p in range(first, last)}
    wanted = [p for p in range(count + len(gone)) if p not in gone][:count]
    assert positions_of(np.arange(count), skipped).tolist() == wanted


@settings(max_examples=50)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(0, 10**12), st.data())
def test_a_mixture_keeps_its_quotas_to_within_one_sample_at_every_moment(weights, start, data):
    mixture = Mixture(weights)
    count = data.draw(st.integers(1, 400))
    source, ordinal = mixture.split(np.arange(start, start + count))
    shares = np.asarray(mixture.shares) / mixture.period
    _, before = mixture.split(np.arange(start, start + mixture.period))
    for i, share in enumerate(shares):
        mine = ordinal[source == i]
        assert (np.diff(mine) == 1).all()  # no sample of a source is left out or given twice
        if len(mine):
            assert abs(mine[0] - start * share) <= 1
        assert abs(len(mine) - count * share) < 2  # within one at both ends of any batch
    assert len(before) == mixture.period


@pytest.mark.parametrize(
    ("weights", "shares"),
    [([5.0], [1]), ([0.7, 0.3], [7, 3]), ([3, 1], [3, 1]), ([0.5, 0.25, 0.25], [2, 1, 1])],
)
def test_decimal_weights_are_exact_shares(weights, shares):
    assert shares_of(weights) == shares


def test_weights_without_a_short_period_are_rounded_and_never_to_nothing():
    shares = shares_of([1.0, 1 / 3, 1e-9])
    assert sum(shares) <= MAX_PERIOD + 1
    assert shares[2] == 1
    assert abs(shares[0] / shares[1] - 3) < 1e-3


def test_sources_of_a_mixture_have_epochs_of_their_own():
    mixture = Mixture([3, 1])
    source, ordinal = mixture.split(np.arange(400))
    epochs = [ordinal[source == i] // 20 for i in range(2)]  # two datasets of 20 samples
    assert [int(e.max()) for e in epochs] == [14, 4]


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
