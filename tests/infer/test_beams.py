import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from recllm.errors import UserError
from recllm.infer.beams import Beam, search
from recllm.infer.item_trie import ItemTrie

END = 9
TITLES = st.lists(st.lists(st.integers(0, 3), max_size=4).map(lambda ids: [*ids, END]), min_size=1, max_size=25)
FLAGS = st.booleans()


@st.composite
def cases(draw):
    """A trie, log p of each node behind its parent, excluded items. Sixteenths of nats: exact, and with ties."""
    trie = ItemTrie.build(draw(TITLES))
    sixteenths = draw(st.lists(st.integers(0, 64), min_size=trie.num_nodes, max_size=trie.num_nodes))
    excluded = draw(st.lists(st.integers(0, trie.num_items - 1), max_size=8))
    return trie, -np.array(sixteenths) / 16, excluded


def run(trie, table, *args, **options):
    beam = Beam(trie, *args, **options)
    search([beam], lambda beams: [table[beams[0].choices.nodes]])
    return beam.ranking()


def open_titles(trie, excluded):
    return [title for title in range(trie.num_titles) if not set(trie.items_of(title).tolist()) <= set(excluded)]


def title_score(trie, table, title, mean=False):
    path = trie.path(trie.leaf[title])
    total = sum(table[trie.walk(path[: length + 1])] for length in range(len(path)))
    return total / len(path) if mean else total


def exhaustive(trie, table, excluded, mean):
    """Every title that is left by falling score, the lower leaf first among equals."""
    scores = {title: title_score(trie, table, title, mean) for title in open_titles(trie, excluded)}
    order = sorted(scores, key=lambda title: (-scores[title], trie.leaf[title]))
    return order, [scores[title] for title in order]


def plain_beams(trie, table, width, excluded, mean):
    """The same search with lists and without an early stop."""
    left, done, frontier = {trie.leaf[title] for title in open_titles(trie, excluded)}, [], [(0.0, 0)]

    def leads_on(node):
        return node in left or any(leads_on(child) for child in trie.children(node)[1].tolist())

    while frontier:
        found = [
            (score + table[child], child)
            for score, node in frontier
            for child in trie.children(node)[1].tolist()
            if leads_on(child)
        ]
        kept = sorted(found, key=lambda pair: (-pair[0], pair[1]))[:width]
        done += [pair for pair in kept if trie.title_of(pair[1]) >= 0]
        frontier = [pair for pair in kept if trie.title_of(pair[1]) < 0]
    lengths = {node: len(trie.path(node)) if mean else 1 for _, node in done}
    done = [(score / lengths[node], node) for score, node in done]
    return [(trie.title_of(node), score) for score, node in sorted(done, key=lambda pair: (-pair[0], pair[1]))]


@given(cases(), FLAGS)
def test_full_width_equals_brute_force(case, mean):
    trie, table, excluded = case
    assume(open_titles(trie, excluded))
    ranking = run(trie, table, trie.num_titles, None, trie.excluding(excluded), mean)
    titles, scores = exhaustive(trie, table, excluded, mean)
    assert ranking.titles.tolist() == titles
    assert ranking.scores.tolist() == scores


@given(cases(), FLAGS, st.integers(1, 8), st.integers(1, 6))
def test_any_width_equals_beams_that_never_stop_early(case, mean, width, k):
    trie, table, excluded = case
    assume(open_titles(trie, excluded))
    titles, scores, _ = run(trie, table, width, k, trie.excluding(excluded), mean)
    assert list(zip(titles.tolist(), scores.tolist())) == plain_beams(trie, table, width, excluded, mean)[:k]
    assert 1 <= len(titles) == len(set(titles.tolist())) <= k
    assert set(titles.tolist()) <= set(open_titles(trie, excluded))


@given(cases(), FLAGS, st.integers(1, 8), st.integers(1, 6))
def test_what_is_called_exact_is_the_exhaustive_ranking(case, mean, width, k):
    trie, table, excluded = case
    assume(open_titles(trie, excluded))
    ranking = run(trie, table, width, k, trie.excluding(excluded), mean)
    titles, scores = exhaustive(trie, table, excluded, mean)
    if ranking.is_exact:
        assert ranking.titles.tolist() == titles[:k]
        assert ranking.scores.tolist() == scores[:k]
    else:
        assert width < trie.num_titles


def test_a_narrow_search_knows_whether_what_it_cut_could_have_won():
    trie = ItemTrie.build([[1, END], [2, END], [3, END]])
    for cut, is_exact in ((-4.5, True), (-4.0, False), (-3.5, False)):  # an equal one might stand before it
        beam = Beam(trie, width=2, k=1)
        beam.advance([-1.0, -2.0, cut])
        beam.advance([-3.0, -3.0])
        assert beam.ranking().titles.tolist() == [0]
        assert beam.ranking().is_exact is is_exact


@given(cases())
def test_width_1_is_greedy(case):
    trie, table, _ = case
    node = 0
    while trie.title_of(node) < 0:
        children = trie.children(node)[1]
        node = int(children[np.argmax(table[children])])  # the first of equals is the lower node
    assert run(trie, table, 1).titles.tolist() == [trie.title_of(node)]


def test_scores_are_not_made_to_add_up_over_what_is_allowed():
    trie = ItemTrie.build([[1, END], [2, 3, END]])
    beam = Beam(trie, width=2)
    assert beam.choices.tokens.tolist() == [1, 2]
    beam.advance(np.log([0.25, 0.125]))  # the rest of the vocabulary has the other 5 / 8
    assert beam.tokens.tolist() == [1, 2]
    assert (beam.choices.rows.tolist(), beam.choices.tokens.tolist()) == ([0, 1], [END, 3])
    beam.advance(np.log([0.5, 1.0]))
    assert (beam.tokens.tolist(), beam.origins.tolist()) == ([3], [1])
    beam.advance(np.log([0.5]))
    assert beam.done
    assert beam.ranking().titles.tolist() == [0, 1]
    assert beam.ranking().scores == pytest.approx([math.log(0.25 * 0.5), math.log(0.125 * 1.0 * 0.5)])


def test_it_stops_when_nothing_can_win_any_more():
    trie = ItemTrie.build([[1, END], [2, 3, END], [4, 5, END]])
    for mean in (False, True):
        beam = Beam(trie, width=3, k=1, length_normalised=mean)
        beam.advance([-2.0, -1.0, -2.5])
        assert beam.tokens.tolist() == [2, 1, 4]  # best first
        beam.advance([-2.5, -2.0, -1.5])  # −4 is finished; −3.5 may win still, and −4 by the mean alone
        assert beam.tokens.tolist() == ([3, 5] if mean else [3])
        beam.advance([-1.0, -0.25] if mean else [-1.0])
        assert beam.done
        assert beam.ranking().titles.tolist() == [2 if mean else 0]
        assert beam.ranking().scores.tolist() == [-4.25 / 3 if mean else -4.0]


def test_the_best_k_are_not_given_up_for_the_best():
    beam = Beam(ItemTrie.build([[1, END], [2, END], [3, 4, END]]), width=3, k=2)
    beam.advance([-1.0, -2.0, -2.5])
    beam.advance([0.0, -4.0, -0.5])  # −1 and −6 are finished, and −3 may still be the second
    beam.advance([-1.0])
    assert beam.ranking().titles.tolist() == [0, 2]
    assert beam.ranking().scores.tolist() == [-1.0, -4.0]


def test_an_impossible_title_is_still_ranked():
    trie = ItemTrie.build([[1, 1, END], [2, END]])
    table = np.zeros(trie.num_nodes)
    table[trie.walk([1])] = -np.inf
    assert run(trie, table, 2).scores.tolist() == [0.0, -np.inf]


def test_beams_of_unequal_depth_are_driven_together():
    short, long = ItemTrie.build([[1, END], [2, END]]), ItemTrie.build([[1, 2, 3, 4, END], [1, 2, 3, 5, END]])
    beams = [Beam(short, 2), Beam(long, 2)]
    search(beams, lambda all_beams: [-np.arange(len(beam.choices.nodes), dtype=float) for beam in all_beams])
    assert [beam.ranking().titles.tolist() for beam in beams] == [[0, 1], [0, 1]]
    assert [beam.ranking().scores.tolist() for beam in beams] == [[0.0, -2.0], [0.0, -2.0]]


def test_nothing_allowed_is_an_error_that_names_the_prompt():
    trie = ItemTrie.build([[1, END], [2, END], [1, END]])
    with pytest.raises(UserError, match="prompt 7: all 2 titles are excluded"):
        Beam(trie, 2, blocked=trie.excluding([0, 1, 2]), name="prompt 7")
    assert not Beam(trie, 2, blocked=trie.excluding([0, 1]), name="prompt 7").done  # item 2 has the title of item 0


def test_what_makes_no_sense_is_refused():
    trie = ItemTrie.build([[1, END], [2, END]])
    for width, k in ((0, 1), (1, 0)):
        with pytest.raises(UserError, match="at least 1 of both"):
            Beam(trie, width, k)
    with pytest.raises(ValueError, match="for 2 choices"):
        Beam(trie, 1).advance([-1.0])
    with pytest.raises(UserError, match="prompt 3: the model gives NaN"):
        Beam(trie, 1, name="prompt 3").advance([-1.0, np.nan])
