import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from recllm.graph.segments import packed, stable_order, starts
from recllm.graph.store import ALWAYS

NUMBERS = st.sampled_from([0, 1, 2, 3, 1000, 2**31, 2**40, 2**62, ALWAYS, -1])


@given(st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS), max_size=20))
def test_packed_columns_put_the_same_rows_together(rows):
    columns = packed(*np.array(rows, dtype=np.int64).reshape(-1, 4).T)
    order = np.arange(len(rows))
    for column in columns:
        order = order[stable_order(column[order])]
    groups = np.split(order, np.flatnonzero(starts(*(column[order] for column in columns)))[1:])
    expected = {}
    for place, row in enumerate(rows):
        expected.setdefault(row, []).append(place)
    assert sorted(group.tolist() for group in groups if len(group)) == sorted(expected.values())


def test_small_columns_share_an_integer():
    prompts, entities = np.array([3, 3, 0]), np.array([2**20, 0, 5])
    assert [column.tolist() for column in packed(np.full(3, ALWAYS), prompts, entities)] == [
        [3 << 21 | 2**20, 3 << 21, 5]
    ]
