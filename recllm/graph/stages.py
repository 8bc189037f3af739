"""Retrieval in two stages: what matters to this user, then what is around that.

Stage one, behaviour, reads the user's items and their neighbourhood and chooses entities: what several of the user's
items share and few others have. Stage two, context, reads the graph around the chosen entities alone. `two_stage` runs
one behind the other, `parallel` lets the second start from the user's items instead and merges both by rank.
"""

from dataclasses import replace

import numpy as np

from recllm.graph.segments import best_places, is_in, ranges, stable_order, starts
from recllm.graph.store import Graph
from recllm.graph.subgraphs import Ints, Seeds, Subgraphs
from recllm.graph.walk import (
    Doubles,
    Found,
    Frontier,
    Rules,
    Steps,
    best,
    follow,
    gathered,
    grouped,
    joined,
    keys_of,
    merged,
    near_of,
    spread,
)

FUSION_RANK = 60  # k of reciprocal rank fusion


def two_stage(graph: Graph, seeds: Seeds, rules: Rules) -> tuple[Subgraphs, Seeds]:
    """The subgraphs, and the entities that stage one chose for them with their weights, best first."""
    near = near_of(graph, seeds, rules)
    chosen = behaviour(graph, seeds, rules, near)
    found = context(graph, seeds, chosen, rules, near)
    return best(graph, found, seeds.num_prompts, rules.max_triples), chosen


def behaviour(
    graph: Graph, seeds: Seeds, rules: Rules, near: Steps | None = None, beside: Steps | None = None
) -> Seeds:
    """Stage one: the `rules.entities` entities next to the user's items that say most of the user, items apart.

    With m the summed weight of the seeds that a triple ties to an entity, and d the entity's degree before the cut-off,
    its weight is m² / d ** hub_penalty, scaled to a sum of 1 a prompt. At a penalty of 1 that is the squared cosine
    between the user's items and all that the entity is tied to, but for a factor that all entities of a prompt share.

    Args:
        near: the edges from the seeds, where they are known.
        beside: the edges from what these reach, seeds apart, where they are known.
    """
    near = near or near_of(graph, seeds, rules)
    shared = _shared(graph, near)
    known = is_in(keys_of(graph, shared.prompts, shared.entities), keys_of(graph, near.prompts, near.entities))
    shared = Frontier(shared.prompts[~known], shared.entities[~known], shared.weights[~known])
    beside = beside or follow(graph, shared, seeds.cutoffs, replace(rules, fan_out=0))  # of the same entities
    weights = shared.weights**2 / np.maximum(beside.degrees, 1) ** rules.hub_penalty
    return _best_entities(seeds, shared, weights, rules.entities)


def context(graph: Graph, seeds: Seeds, chosen: Seeds, rules: Rules, near: Steps | None = None) -> Found:
    """Stage two: the triples that tie the chosen entities to the user's items, and those around them.

    A chosen entity's weight flows back over the triples that tie it to the seeds, in equal parts, and on over
    those within `rules.hops` − 1 of it, as in `walk.py`: nothing is further than `rules.hops` from a seed, and without
    a chosen entity there is nothing.

    Args:
        near: the edges from the seeds, where they are known.
    """
    frontier = gathered(graph, chosen.prompts, chosen.entities, chosen.weights)
    beside = follow(graph, frontier, seeds.cutoffs, rules if rules.hops > 1 else replace(rules, fan_out=0), hop=2)
    steps = [_ties(graph, near or near_of(graph, seeds, rules), chosen, beside, rules)]
    if rules.hops > 1:
        steps += spread(graph, beside, seeds.cutoffs, rules, rules.hops - 1, first=2)
    return merged(graph, joined(steps), rules.max_triples)


def parallel(graph: Graph, seeds: Seeds, rules: Rules) -> Subgraphs:
    """Both stages at once: the triples that tie the user's items to stage one's entities, and k-hop from the items.

    Merged by reciprocal rank fusion (Cormack, Clarke & Büttcher 2009): a triple's score is the sum of 1 / (60 + rank)
    over the lists that hold it, ranks from 1; its hop is the lower one, which is the same in both.
    """
    near, *further = spread(graph, near_of(graph, seeds, rules), seeds.cutoffs, rules, max(rules.hops, 2))
    beside = further[0]
    ties = merged(graph, _ties(graph, near, behaviour(graph, seeds, rules, near, beside), beside, rules))
    around = merged(graph, joined([near, *further[: rules.hops - 1]]), rules.max_triples)
    lists = [best(graph, found, seeds.num_prompts, rules.max_triples) for found in (ties, around)]
    return fused(graph, lists, rules.max_triples)


def fused(graph: Graph, lists: list[Subgraphs], max_triples: int) -> Subgraphs:
    """The lists of each prompt as one, by reciprocal rank fusion; ties as they stand, the first list first."""
    prompts = np.concatenate([part.prompts for part in lists])
    ranks = np.concatenate([ranges(np.ones(part.num_prompts, dtype=np.int64), np.diff(part.offsets)) for part in lists])
    names = ("heads", "relations", "tails", "times", "hops")
    columns = {name: np.concatenate([getattr(part, name) for part in lists]) for name in names}
    order, new = grouped(graph, prompts, *(columns[name].astype(np.int64) for name in names[:-1]))
    sums = np.bincount(np.cumsum(new) - 1, 1 / (FUSION_RANK + ranks[order]), minlength=int(new.sum()))
    once = np.argsort(order[new])  # back in the order of the lists
    places, scores = order[new][once], sums[once].astype(np.float32)
    offsets, kept = best_places(prompts[places], scores, lists[0].num_prompts, max_triples)
    return Subgraphs(offsets, scores=scores[kept], **{name: column[places[kept]] for name, column in columns.items()})


def _ties(graph: Graph, near: Steps, chosen: Seeds, beside: Steps, rules: Rules) -> Steps:
    """Of the edges from the seeds those to chosen entities; over each flows its part of the chosen entity's weight.

    `beside`: the edges from the chosen entities at least.
    """
    keys = keys_of(graph, near.of_edges(near.prompts), near.targets)
    chosen_keys = keys_of(graph, chosen.prompts, chosen.entities)
    order = np.argsort(chosen_keys)
    edges = np.flatnonzero(is_in(keys, chosen_keys[order]))
    which = order[np.searchsorted(chosen_keys[order], keys[edges])]
    degrees = beside.degrees[np.searchsorted(keys_of(graph, beside.prompts, beside.entities), chosen_keys)]
    flows = (
        chosen.weights
        / np.maximum(degrees, 1) ** rules.hub_penalty
        / np.maximum(np.bincount(which, minlength=len(order)), 1)
    )
    return near.only(edges, flows[which])


def _shared(graph: Graph, steps: Steps) -> Frontier:
    """What the edges reach, with the summed weight of the different entities that each is reached from."""
    sources: Ints = steps.of_edges(np.arange(len(steps.prompts)))
    keys = sources * graph.num_entities + steps.targets
    order = stable_order(keys)
    once = order[starts(keys[order])]
    sources = sources[once]
    return gathered(graph, steps.prompts[sources], steps.targets[once], steps.weights[sources])


def _best_entities(seeds: Seeds, reached: Frontier, weights: Doubles, count: int) -> Seeds:
    """The entities of highest weight of each prompt, best first, ties by lower number; weights of a sum of 1."""
    offsets, kept = best_places(reached.prompts, weights.astype(np.float32), seeds.num_prompts, count)
    prompts, weights = reached.prompts[kept], weights[kept]
    sums = np.bincount(prompts, weights, minlength=seeds.num_prompts)
    shares = (weights / sums[prompts]).astype(np.float32)
    return Seeds(offsets, reached.entities[kept].astype(np.int32), shares, seeds.cutoffs)
