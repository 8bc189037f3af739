import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from recllm.data.randomness import mix, text_keys, uniform


def test_values_never_change():
    """Written out: a change here silently changes every frozen dataset."""
    assert mix(0).tolist() == 0xE220A8397B1DCDAF  # first output of splitmix64 seeded with 0
    assert text_keys(["17"]).tolist() == [
        int.from_bytes(bytes.fromhex("20398d138e4d7bb4"), "little")
    ]  # printf 17 | b2sum -l 64


@given(st.integers(0, 2**64 - 1), st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20))
def test_each_row_by_itself_gives_the_same(seed, keys):
    together = mix(seed, np.array(keys, dtype=np.uint64), 3)
    assert together.tolist() == [mix(seed, np.array([key], dtype=np.uint64), 3)[0] for key in keys]


def test_seed_key_and_their_order_matter():
    one, two = np.array([1]), np.array([2])
    assert len({int(v[0]) for v in (mix(0, one), mix(1, one), mix(0, two), mix(0, one, two), mix(0, two, one))}) == 5


def test_broadcasts():
    assert mix(0, np.arange(3)[:, None], np.arange(4)[None, :]).shape == (3, 4)


def test_uniform_is_uniform():
    numbers = uniform(mix(0, np.arange(100_000)))
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.histogram(numbers, bins=10, range=(0, 1))[0]
    assert abs(counts - 10_000).max() < 5 * np.sqrt(10_000 * 0.9)
