import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from configs import draws


def splitmix(state: int, word: int) -> int:
    """SplitMix64's step in plain Python integers."""
    mask = (1 << 64) - 1
    z = ((state ^ word) + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


@given(st.integers(0, 2**63), st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=3))
def test_draws_equal_the_mixer_written_in_plain_integers(seed, words):
    state = draws.stream_key(seed, "test")
    for word in words:
        state = splitmix(state, word)
    arrays = [np.asarray([word], dtype=np.uint64) for word in words]
    assert int(draws.bits(seed, "test", *arrays)[0]) == state


def test_a_draw_does_not_depend_on_the_draws_beside_it():
    many = draws.uniform(1, "a", np.arange(100))
    assert [float(draws.uniform(1, "a", i)) for i in range(100)] == many.tolist()


def test_seed_and_purpose_make_independent_draws():
    base = draws.uniform(0, "a", np.arange(20_000))
    for other in (
        draws.uniform(1, "a", np.arange(20_000)),
        draws.uniform(0, "b", np.arange(20_000)),
    ):
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.03


def test_uniform_draws_fill_the_unit_interval_evenly():
    values = draws.uniform(0, "even", np.arange(100_000))
    assert values.min() >= 0
    assert values.max() < 1
    counts = np.bincount((values * 20).astype(int), minlength=20)
    assert np.abs(counts - 5000).max() < 5 * np.sqrt(5000)


@given(st.integers(0, 200), st.integers(0, 100), st.integers(0, 5))
def test_a_permutation_holds_every_number_once(size, seed, word):
    got = draws.permutation(size, seed, "p", word)
    assert sorted(got.tolist()) == list(range(size))


def test_the_numbers_never_change():
    """A change here would change every dataset and every run: these are the format."""
    assert draws.stream_key(0, "x") == int.from_bytes(
        hashlib.blake2b(b"0\0x", digest_size=8).digest(), "little"
    )
    assert draws.bits(0, "x", np.arange(3)).tolist() == FIRST_BITS
    assert draws.permutation(8, 0, "x").tolist() == FIRST_PERMUTATION


def test_uids_split_into_two_words():
    uid = (1).to_bytes(8, "little") + (2).to_bytes(8, "little")
    low, high = draws.uid_words([uid, uid])
    assert (low.tolist(), high.tolist()) == ([1, 1], [2, 2])


FIRST_BITS = [14297628518904604914, 14810633824281669435, 5541586772707376413]
FIRST_PERMUTATION = [6, 7, 2, 4, 5, 3, 0, 1]
