import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recllm.errors import UserError
from recllm.infer import item_trie
from recllm.infer.item_trie import ItemTrie, catalogue_trie
from recllm.model.chat import answer_ids

ROOT = Path(__file__).resolve().parents[2]
END = 9  # stands at the end of a title and nowhere else
TITLES = st.lists(st.lists(st.integers(0, 3), max_size=5).map(lambda ids: [*ids, END]), min_size=1, max_size=30)
SMALL = [[5, 6, END], [5, 7, END], [5, 6, END], [8, END]]  # items 0 and 2 share a title


def prefixes(titles):
    """The reference: every beginning of a title, with the tokens that may follow."""
    found = {}
    for title in titles:
        for length in range(len(title) + 1):
            found.setdefault(tuple(title[:length]), set()).update(title[length : length + 1])
    return found


def test_a_small_trie_by_hand():
    trie = ItemTrie.build(SMALL)
    #                                root  5  8  6  7  9(8) 9(6) 9(7)
    assert trie.tokens.tolist() == [-1, 5, 8, 6, 7, 9, 9, 9]
    assert trie.parent.tolist() == [-1, 0, 0, 1, 1, 2, 3, 4]
    assert trie.first_child.tolist() == [1, 3, 5, 6, 7, 8, 8, 8, 8]
    assert trie.title.tolist() == [-1, -1, -1, -1, -1, 2, 0, 1]
    assert trie.item_title.tolist() == [0, 1, 0, 2]
    assert (trie.num_nodes, trie.num_titles, trie.num_items, trie.depth) == (8, 3, 4, 3)
    assert trie.lengths.tolist() == [3, 3, 2]
    assert {array.dtype for array in vars(trie).values()} == {np.dtype(np.int32)}


@given(TITLES)
def test_it_equals_a_dict_of_prefixes(titles):
    trie, reference = ItemTrie.build(titles), prefixes(titles)
    assert trie.num_nodes == len(reference)
    for prefix, following in reference.items():
        node = trie.walk(prefix)
        tokens, nodes = trie.children(node)
        assert trie.path(node) == list(prefix)
        assert tokens.tolist() == sorted(following) == trie.allowed(prefix).tolist()
        assert [trie.path(child) for child in nodes.tolist()] == [[*prefix, token] for token in tokens.tolist()]
        assert trie.parent[nodes].tolist() == [node] * len(nodes)
        assert (trie.title_of(node) >= 0) == (list(prefix) in titles)
    for item, title in enumerate(titles):
        number = trie.title_of(trie.walk(title))
        assert trie.items_of(number).tolist() == [other for other, ids in enumerate(titles) if ids == title]
        assert trie.item_title[item] == number
        assert trie.lengths[number] == len(title)


@given(TITLES)
def test_flat_ids_and_lists_make_the_same_trie(titles):
    flat, offsets = np.concatenate(titles), np.cumsum([0, *map(len, titles)])
    one, other = ItemTrie.build(titles), ItemTrie.build(flat, offsets)
    assert all(np.array_equal(vars(one)[name], vars(other)[name]) for name in vars(one))


@given(TITLES)
def test_nodes_are_in_order(titles):
    trie = ItemTrie.build(titles)
    depths = np.array([len(trie.path(node)) for node in range(trie.num_nodes)])
    keys = list(zip(depths.tolist(), trie.parent.tolist(), trie.tokens.tolist(), strict=True))
    assert keys == sorted(keys)
    assert trie.levels.tolist() == np.searchsorted(depths, range(trie.depth + 2)).tolist()
    firsts = [trie.items_of(title)[0] for title in range(trie.num_titles)]
    assert firsts == sorted(firsts)  # titles are numbered by their first items


@given(TITLES, st.data())
def test_children_of_many_nodes_are_those_of_each(titles, data):
    trie = ItemTrie.build(titles)
    nodes = data.draw(st.lists(st.integers(0, trie.num_nodes - 1), max_size=8))
    found = trie.children_of(nodes)
    expected = [(row, *pair) for row, node in enumerate(nodes) for pair in zip(*trie.children(node), strict=True)]
    assert list(zip(*found, strict=True)) == expected


def test_what_begins_no_title_leads_nowhere():
    trie = ItemTrie.build(SMALL)
    assert trie.walk([]) == 0
    assert [trie.walk(tokens) for tokens in ([6], [5, 9], [5, 6, END, 1], [99])] == [-1] * 4
    assert trie.walk([6, END], node=trie.walk([5])) == trie.walk([5, 6, END])
    assert trie.allowed([6]).tolist() == []
    assert trie.allowed([8, END]).tolist() == []


# ---- items that share a title ----


def test_a_title_shared_by_items_is_one_title():
    trie = ItemTrie.build([[1, END], [2, END], [1, END], [1, END], [2, END]])
    assert trie.num_titles == 2
    assert [trie.items_of(title).tolist() for title in range(2)] == [[0, 2, 3], [1, 4]]
    assert trie.representatives().tolist() == [0, 1]
    assert trie.representatives([5, 1, 7, 7, 3]).tolist() == [2, 4]  # the most popular, the lower of equals
    assert trie.representatives(np.array([0, 2, 0, 1, 2], dtype=np.uint8)).tolist() == [3, 1]
    with pytest.raises(ValueError, match="one number for each of 5 items"):
        trie.representatives([1, 2])


# ---- exclusion ----


@given(TITLES, st.data())
def test_blocked_is_every_node_with_nothing_left_below(titles, data):
    trie = ItemTrie.build(titles)
    excluded = data.draw(st.lists(st.integers(0, len(titles) - 1), max_size=20))
    left = [ids for ids in titles if not {i for i, other in enumerate(titles) if other == ids} <= set(excluded)]
    reachable = prefixes(left) if left else {}
    blocked = trie.excluding(excluded)
    expected = [node for node in range(trie.num_nodes) if tuple(trie.path(node)) not in reachable]
    assert blocked.tolist() == expected
    for prefix in reachable:
        assert trie.allowed(prefix, blocked).tolist() == sorted(reachable[prefix])


def test_a_shared_title_is_excluded_with_all_of_its_items():
    trie = ItemTrie.build(SMALL)
    assert trie.excluding([0]).tolist() == []
    assert trie.excluding([2, 0]).tolist() == [3, 6]  # "5 6" and "5 6 9"; 5 leads on to 7
    assert trie.excluding([2, 0, 1]).tolist() == [1, 3, 4, 6, 7]
    assert trie.excluding(np.arange(4)).tolist() == list(range(8))
    assert trie.excluding([]).tolist() == []
    with pytest.raises(ValueError, match="of a trie with 4 items"):
        trie.excluding([1, 4])


# ---- what is refused ----


def test_no_title_and_an_empty_title_are_refused():
    with pytest.raises(UserError, match="0 titles, at least 1 is needed"):
        ItemTrie.build([])
    with pytest.raises(UserError, match=r"item 1 \[\] has a title of 0 tokens"):
        ItemTrie.build([[1], []])
    with pytest.raises(ValueError, match="ascend from 0 to 3"):
        ItemTrie.build([1, 2, 3], [0, 2])
    with pytest.raises(ValueError, match="token id -1"):
        ItemTrie.build([[1, -1]])


def test_a_title_that_another_begins_with_is_refused_by_name():
    with pytest.raises(UserError, match=r"item 1 \[1\] is the beginning of item 2 \[1, 2, 3\]"):
        ItemTrie.build([[4], [1], [1, 2, 3]])
    with pytest.raises(UserError, match='item 0 "Heat" is the beginning of item 1 "Heat 2"'):
        ItemTrie.build([[1], [1, 2]], texts=["Heat", "Heat 2"])


# ---- from texts ----

TEXTS = ["Heat", "Heat 2", "Up!", " Up", "Heat", "Amélie", "[REC]", "two\nlines", "x" * 40]


@pytest.mark.parametrize("end", ["\n", ""])
def test_titles_are_tokenised_as_answers_are(tiny_tokenizer, monkeypatch, end):
    monkeypatch.setattr(item_trie, "_TEXTS_AT_ONCE", 4)
    trie = catalogue_trie(tiny_tokenizer, TEXTS, end)
    expected = [answer_ids(tiny_tokenizer, text + end) for text in TEXTS]
    assert [trie.path(trie.leaf[title]) for title in trie.item_title.tolist()] == expected
    assert trie.items_of(0).tolist() == [0, 4]


@pytest.mark.slow
@pytest.mark.parametrize("end", ["\n", ""])
def test_real_titles_by_a_real_tokenizer(smollm2, movielens, end):
    from recllm.model.base_model import load_tokenizer

    lines = (movielens / "ml-100k.item").read_text(encoding="utf-8").splitlines()[1:]
    texts, tokenizer = [line.split("\t")[1] for line in lines], load_tokenizer(smollm2)
    trie = catalogue_trie(tokenizer, texts, end)
    expected = [answer_ids(tokenizer, text + end) for text in texts]
    assert [trie.path(trie.leaf[title]) for title in trie.item_title.tolist()] == expected
    assert (trie.num_items, trie.num_titles) == (1682, 1659)


def test_texts_that_make_no_trie_are_refused(tiny_tokenizer):
    with pytest.raises(UserError, match="item 1 has an empty title"):
        catalogue_trie(tiny_tokenizer, ["Heat", ""], "\n")
    with pytest.raises(UserError, match="0 titles"):
        catalogue_trie(tiny_tokenizer, [], "\n")
    with pytest.raises(UserError, match='item 0 "Heat" is the beginning of item 1 "Heat\n2"'):
        catalogue_trie(tiny_tokenizer, ["Heat", "Heat\n2"], "\n")


def test_trie_and_beams_need_no_torch():
    code = "import sys, recllm.infer.item_trie, recllm.infer.beams; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_bench_prints_what_a_trie_costs():
    command = [sys.executable, str(ROOT / "scripts" / "bench" / "trie.py"), "--titles", "3000"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["tokens"] > line["nodes"] > line["different_titles"] > 2900
    assert line["peak_mib"] >= line["before_mib"] > 0
