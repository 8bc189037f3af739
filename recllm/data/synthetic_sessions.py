"""Writes event logs of a known process: users of hidden clusters whose sessions end in "leave" most of the time.

A world, sizes and a seed enter; a folder with interactions.parquet and items.parquet leaves (`write_sessions`), or the
events as arrays (`draw_sessions`). As the policies are known, so is the best possible score of a predictor that knows
the cluster (`best_score`), what a prompt shows of the session (`prompt_score`), or everything that the user did before
(`bayes_answers`).
"""

import dataclasses
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from recllm import files
from recllm.errors import UserError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

LEAVE = "leave"
_ACTIONS = ("view", "search", "compare", "save", "share", "ask", "cart", "buy")
_THINGS = (
    *("lamp", "chair", "kettle", "jacket", "phone", "tent", "camera", "bicycle", "watch", "guitar", "mirror", "basket"),
    *(
        "radio",
        "boots",
        "blanket",
        "printer",
        "scarf",
        "skillet",
        "ladder",
        "globe",
        "helmet",
        "clock",
        "drill",
        "vase",
    ),
)
_COLOURS = ("red", "blue", "green", "white", "black", "grey", "golden", "silver", "brown", "pink", "violet", "orange")
_START_S = 1_600_000_000
_DAY_S = 86_400
_CERTAIN = 1e-300  # for the logarithm of a probability 0: such a cluster is ruled out
_MAX_BELIEFS = 1 << 18


@dataclasses.dataclass(frozen=True)
class SessionClusters:
    """Event logs of hidden user clusters: what users do next in a session, and when they leave it.

    A stays A = num_actions, categories K = num_categories, clusters C = num_clusters. A session opens with one of the A
    actions on an item, both drawn uniformly; each step then leads from the *context*, which is the last action a and
    the category k of its item, to the next action: one of the A on an item drawn anew and uniformly, or "leave" (number
    A, without an item), which ends the session. A user of cluster c has one *preferred* action π_c(a, k) a context:

        P_c(b | a, k) = (1 − noise) · [b = π_c(a, k)] + noise · ρ(b),   ρ(leave) = exit_rate, ρ(b) = (1 − exit_rate) / A

    `exit_rate` is the share of steps (all events but the first of a session; they are the targets) at which the action
    is "leave". A session has n steps with probability (1 − exit_rate)^(n−1) · exit_rate, 1 / exit_rate on average.

    A cluster stays at S = (1 − exit_rate) · K categories, for they interest it, and leaves at all others. Of these S a
    share `conflict` is its own, m of them as many as fit into it, and the rest is common to all: of the categories in
    random order the first S − m are common, and the c-th m behind them are those of cluster c. The p-th category of a
    cluster leads from a to the action (a + 1 + p) mod A. So two clusters never stay at a category of their own
    together, and where one of them stays the others leave: that is as far as they can disagree, for each of them leaves
    at a share exit_rate of all contexts. Where C · S = K, clusters differ in a share `conflict` of the contexts.

    Hence, for every cluster at every conflict and noise: contexts are equally frequent, at each step of a session the
    action is "leave" with probability exit_rate and each other one with (1 − exit_rate) / A (as π_c leads equally often
    to each). Popularity gains nothing beyond always leaving; how long a session has lasted says nothing; only context
    and cluster do. Where clusters differ and C · S = K, "leave" has the probability exit_rate for all who do not know
    the cluster.
    """

    num_clusters: int = 4  # C
    num_actions: int = 4  # A, without "leave"
    num_categories: int = 8  # K
    items_per_category: int = 4
    conflict: float = 1.0  # share of the categories at which a cluster stays that are its own; 0: one policy for all
    exit_rate: float = 0.75  # in web logs 0.60 to 0.85
    noise: float = 0.1  # share of steps whose action is drawn by ρ, whatever the context
    seed: int = 0  # of the order of the categories

    def __post_init__(self) -> None:
        for name in ("conflict", "noise"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}={getattr(self, name)}: a share from 0 to 1 is expected")
        if self.num_clusters < 1:
            raise UserError(f"num_clusters={self.num_clusters}: at least 1 is expected")
        words = {"num_actions": _ACTIONS, "num_categories": _THINGS, "items_per_category": _COLOURS}
        for name, known in words.items():
            if not 1 <= getattr(self, name) <= len(known):
                raise UserError(f"{name}={getattr(self, name)}: 1 to {len(known)} are expected, as many as have names")
        stays = (1 - self.exit_rate) * self.num_categories
        if not 0.5 < stays < self.num_categories - 0.5 or abs(stays - round(stays)) > 1e-9:
            raise UserError(
                f"exit_rate={self.exit_rate} with num_categories={self.num_categories}: users would stay at {stays:g} "
                "categories, and a whole number of them is expected, neither 0 nor all: take a multiple of "
                f"1/{self.num_categories}, or num_categories=20 for steps of 0.05"
            )
        if self.num_clusters * self.stays > self.num_categories:
            raise UserError(
                f"{self.num_clusters} clusters that each stay at {self.stays} of {self.num_categories} categories: "
                "clusters in conflict have no category in common: raise exit_rate or lower num_clusters"
            )

    @property
    def stays(self) -> int:
        """S, the number of categories at which a cluster stays, after each action."""
        return round((1 - self.exit_rate) * self.num_categories)

    @property
    def num_items(self) -> int:
        """Items of category k have the numbers k · items_per_category and following."""
        return self.num_categories * self.items_per_category

    @property
    def labels(self) -> list[str]:
        """(A + 1) the actions as the log writes them; "leave" is the last."""
        return [*_ACTIONS[: self.num_actions], LEAVE]

    @property
    def popularity(self) -> Floats:
        """ρ (A + 1,), the share of each action in the targets."""
        shares = np.full(self.num_actions + 1, (1 - self.exit_rate) / self.num_actions)
        shares[-1] = self.exit_rate
        return shares

    @property
    def own(self) -> int:
        """m, how many of the S categories are a cluster's own."""
        return math.floor(self.conflict * self.stays + 1e-9)

    @property
    def interests(self) -> Ints:
        """(C, S): the categories at which each cluster stays, the common ones first."""
        order = np.random.default_rng([self.seed, 0]).permutation(self.num_categories)
        common = np.tile(order[: self.stays - self.own], (self.num_clusters, 1))
        behind = order[self.stays - self.own :][: self.num_clusters * self.own]
        return np.concatenate([common, behind.reshape(self.num_clusters, self.own)], axis=1)

    @property
    def preferred(self) -> Ints:
        """π (C, A, K): the number of each cluster's preferred action in each context; A is "leave"."""
        found = np.full((self.num_clusters, self.num_actions, self.num_categories), self.num_actions)
        last = np.arange(self.num_actions)
        for cluster, categories in enumerate(self.interests):
            for place, category in enumerate(categories):
                found[cluster, :, category] = (last + 1 + place) % self.num_actions
        return found

    @property
    def policies(self) -> Floats:
        """(C, A, K, A + 1): P_c(b | a, k); rows sum to 1."""
        chosen = np.eye(self.num_actions + 1)[self.preferred]
        return (1 - self.noise) * chosen + self.noise * self.popularity


# ---- best possible scores ----


class Score(NamedTuple):
    """How well the next action is predicted, on average over targets. The rule answers the most probable action.

    Of n equally probable actions each is answered with 1/n.
    """

    nats: float  # −ln of the probability given to it
    accuracy: float
    macro_recall: float  # mean over the A + 1 actions of the share of their targets that are answered right


def best_score(world: SessionClusters) -> Score:
    """Of a predictor that knows the user's cluster and the context: nobody does better. Exact."""
    rows = world.policies.reshape(-1, world.num_actions + 1)
    return _expected(rows, np.full(len(rows), 1 / len(rows)))


def prompt_score(world: SessionClusters, shown: int) -> Score:
    """Of Bayes' predictor that sees the last `shown` events of the session and nothing else of the user. Exact.

    A share (1 − exit_rate)^j · exit_rate of the targets has seen j < shown − 1 steps before, and the rest, a share
    (1 − exit_rate)^(shown − 1), the newest shown − 1 of more. Beliefs that are alike are counted together.

    Raises:
        UserError: no event is shown, or so many that their beliefs are too many: `bayes_answers` averages a sample.
    """
    if shown < 1:
        raise UserError(f"shown={shown}: the context is the last event of the prompt, so at least 1 is expected")
    last = np.arange(world.num_actions)  # (M,) the last action, and (M, C) the chance of cluster and what was seen
    chances = np.full((world.num_actions, world.num_clusters), 1 / world.num_actions / world.num_clusters)
    rows, weights = [], []
    for seen in range(shown):
        share = (1 - world.exit_rate) ** seen * (1 if seen == shown - 1 else world.exit_rate)
        for mixed, chance in _mixed(world, last, chances):
            rows.append(mixed)
            weights.append(chance * share)
        if seen < shown - 1:
            last, chances = _after_a_step(world, last, chances)
    return _expected(np.concatenate(rows), np.concatenate(weights))


def _mixed(world: SessionClusters, last: Ints, chances: Floats) -> list[tuple[Floats, Floats]]:
    """For each category: what is known of the next action (M, A + 1), and the chance of each belief (M,)."""
    policies, total = world.policies, chances.sum(1)
    posterior = chances / total[:, None]
    return [
        (np.einsum("mc,cmb->mb", posterior, policies[:, last, category]), total / world.num_categories)
        for category in range(world.num_categories)
    ]


def _after_a_step(world: SessionClusters, last: Ints, chances: Floats) -> tuple[Ints, Floats]:
    """Beliefs after one more step that did not leave; those with the same last action and posterior are summed."""
    stays = world.policies[..., :-1].transpose(1, 2, 3, 0)[last]  # (M, K, A, C)
    found = chances[:, None, None] * stays / (world.num_categories * (1 - world.exit_rate))
    actions = np.broadcast_to(np.arange(world.num_actions), found.shape[:3]).ravel()
    found = found.reshape(-1, world.num_clusters)
    possible = found.sum(1) > 0
    actions, found = actions[possible], found[possible]
    keys = np.column_stack([actions, np.round(found / found.sum(1, keepdims=True), 12)])
    kinds, member = np.unique(keys, axis=0, return_inverse=True)
    if len(kinds) > _MAX_BELIEFS:
        raise UserError(f"{len(kinds)} beliefs are too many to enumerate: show fewer events, or average bayes_answers")
    summed = np.zeros((len(kinds), world.num_clusters))
    np.add.at(summed, member.ravel(), found)
    return kinds[:, 0].astype(np.int64), summed


def _expected(rows: Floats, weights: Floats) -> Score:
    """Rows (M, A + 1) of true probabilities of the next action, each met with a weight (M,); weights sum to 1."""
    logs = np.log(rows, out=np.zeros_like(rows), where=rows > 0)
    right = rows * _answered(rows) * weights[:, None]  # chance of action and right answer
    recall = right.sum(0) / (rows * weights[:, None]).sum(0)
    return Score(float(-(rows * logs).sum(1) @ weights), float(right.sum()), float(recall.mean()))


def _answered(rows: Floats) -> Floats:
    """With which chance the rule answers each action: 1/n each of n equally probable ones."""
    best = rows >= rows.max(1, keepdims=True) * (1 - 1e-9)
    chances: Floats = best / best.sum(1, keepdims=True)
    return chances


class Answers(NamedTuple):
    """What a predictor says of T targets."""

    nats: Floats  # (T,)
    hits: Floats  # (T,) the chance that the rule answers right: 1, 0, or 1/n of equally probable actions
    labels: Ints  # (T,) the right actions

    def score(self) -> Score:
        """Means over the targets; the recall of the actions that occur in them."""
        return Score(float(self.nats.mean()), float(self.hits.mean()), macro_recall(self.hits, self.labels))


def macro_recall(hits: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Mean over the actions that occur of the share of their targets that are answered right.

    >>> macro_recall([1, 1, 1, 0], [4, 4, 4, 0])
    0.5
    """
    hits, labels = np.asarray(hits, float), np.asarray(labels)
    return float(np.mean([hits[labels == label].mean() for label in np.unique(labels)]))


class Log(NamedTuple):
    """Drawn events, user by user in order of time; P events of U users."""

    clusters: Ints  # (U,)
    users: Ints  # (P,) ascending
    sessions: Ints  # (P,) ascending; the session's number among all users' sessions
    actions: Ints  # (P,) "leave" is A
    items: Ints  # (P,) -1 of "leave"

    @property
    def targets(self) -> Ints:
        """(T,) places of the events that are asked for: all but each session's first."""
        return np.flatnonzero(np.diff(self.sessions, prepend=-1) == 0)


def bayes_answers(
    world: SessionClusters, log: Log, shown: int | None = None, clusters: Ints | None = None, step: int = 1 << 16
) -> Answers:
    """Bayes' predictor at every target of a log.

    Before a target it has seen everything that the user did, in all sessions (forward filtering: the posterior of the
    clusters by what they would have done at each earlier target), or, with `shown`, the last `shown` events of the
    target's session; with `clusters` (U,) it knows the user's cluster. `step` targets are computed at a time.
    """
    targets = log.targets
    categories = log.items[targets - 1] // world.items_per_category
    policies, contexts = world.policies, (log.actions[targets - 1], categories)
    logs = np.log(np.maximum(policies, _CERTAIN))
    evidence = logs[:, contexts[0], contexts[1], log.actions[targets]]  # (C, T)
    before = np.concatenate([np.zeros((world.num_clusters, 1)), np.cumsum(evidence, axis=1)], axis=1)  # (C, T + 1)
    known = before[:, :-1] - before[:, _first_seen(log, targets, shown)]
    if clusters is not None:
        known = np.where(np.equal.outer(np.arange(world.num_clusters), clusters[log.users[targets]]), 0.0, -np.inf)
    posterior = np.exp(known - known.max(0))
    posterior /= posterior.sum(0)
    nats, hits = np.empty(len(targets)), np.empty(len(targets))
    for begin in range(0, len(targets), step):
        part = slice(begin, begin + step)
        rows = np.einsum("ct,ctb->tb", posterior[:, part], policies[:, contexts[0][part], contexts[1][part]])
        place = np.arange(len(rows)), log.actions[targets[part]]
        nats[part] = -np.log(np.maximum(rows[place], _CERTAIN))
        hits[part] = _answered(rows)[place]
    return Answers(nats, hits, log.actions[targets])


def _first_seen(log: Log, targets: Ints, shown: int | None) -> Ints:
    """(T,) for each target the number of the oldest target that its predictor has seen; its own: none."""
    own = np.arange(len(targets))
    if shown is None:
        return np.searchsorted(log.users[targets], log.users[targets])
    of_session = np.searchsorted(log.sessions[targets], log.sessions[targets])
    return np.maximum(of_session, own - (shown - 1))  # n events show n - 1 steps


# ---- drawing and writing ----


def draw_sessions(world: SessionClusters, num_users: int, num_sessions: int, seed: int) -> Log:
    """Events of users in equal shares of the clusters, `num_sessions` sessions each."""
    generator = np.random.default_rng([seed, 1])
    clusters = generator.permutation(np.arange(num_users) % world.num_clusters)
    cumulated = np.cumsum(world.policies, axis=-1)
    inside = np.arange(num_users * num_sessions)  # sessions that nobody has left yet; ascending, user by user
    actions = generator.integers(0, world.num_actions, len(inside))
    events = []  # (session, action, item) of the first events, then of the second ones, and so on
    while len(inside):
        stays = actions < world.num_actions
        items = np.where(stays, generator.integers(0, world.num_items, len(inside)), -1)
        events.append(np.stack([inside, actions, items]))
        inside, actions, items = inside[stays], actions[stays], items[stays]
        rows = cumulated[clusters[inside // num_sessions], actions, items // world.items_per_category]
        drawn = (rows <= generator.random(len(inside))[:, None]).sum(1)
        actions = np.minimum(drawn, world.num_actions)  # a row may end at 1 − ε
    sessions, flat, items = np.concatenate(events, axis=1)
    order = np.argsort(sessions, kind="stable")
    sessions = sessions[order]
    return Log(clusters, sessions // num_sessions, sessions, flat[order], items[order])


def write_sessions(path: Path, world: SessionClusters, num_users: int, num_sessions: int, seed: int) -> Path:
    """Write a log of users of hidden clusters; the folder is complete or absent.

    A user's sessions begin hours to days after each other, their events follow within two minutes. "leave" is an event
    of its own, without an item.

    Returns:
        The folder `path`, with interactions.parquet (user_id, session_id, timestamp, action, item_id: null of "leave"),
        items.parquet (item_id, title, category: a title is a colour and the category), clusters.parquet (user_id,
        cluster) and world.json, the arguments of `SessionClusters`. Item n has item_id n, user u has user_id u.

    Raises:
        UserError: no users or no sessions.
    """
    if num_users < 1 or num_sessions < 1:
        raise UserError(f"{num_users} users with {num_sessions} sessions each: at least 1 user with 1 is expected")
    log = draw_sessions(world, num_users, num_sessions, seed)
    table = {
        "user_id": log.users,
        "session_id": log.sessions,
        "timestamp": _times(log, num_sessions, np.random.default_rng([seed, 2])),
        "action": pa.array(world.labels).take(pa.array(log.actions)),
        "item_id": pa.array(log.items, mask=log.items < 0),
    }
    with files.replacing_folder(Path(path)) as folder:
        pq.write_table(pa.table(table), folder / "interactions.parquet")
        pq.write_table(pa.table(_titled(world)), folder / "items.parquet")
        pq.write_table(pa.table({"user_id": range(num_users), "cluster": log.clusters}), folder / "clusters.parquet")
        files.write_json(folder / "world.json", dataclasses.asdict(world))
    return Path(path)


def _times(log: Log, num_sessions: int, generator: np.random.Generator) -> Ints:
    """(P,) seconds: strictly ascending within a user."""
    new_session = np.diff(log.sessions, prepend=-1) != 0
    new_user = np.diff(log.users, prepend=-1) != 0
    pauses = generator.integers(3_600, 4 * _DAY_S, len(log.users))
    steps = generator.integers(5, 120, len(log.users))
    passed = np.cumsum(np.where(new_session, pauses, steps))
    begins = np.flatnonzero(new_user)
    first: Ints = np.repeat(passed[begins], np.diff(np.append(begins, len(passed))))
    # users begin within the same time in which one of them passes through all sessions
    start = generator.integers(0, max(1, num_sessions) * 2 * _DAY_S, len(begins))
    return _START_S + passed - first + start[log.users]


def _titled(world: SessionClusters) -> dict[str, list[int] | list[str]]:
    """Which colour an item has says nothing of what users do."""
    things = [_THINGS[item // world.items_per_category] for item in range(world.num_items)]
    titles = [f"{_COLOURS[item % world.items_per_category]} {thing}" for item, thing in enumerate(things)]
    return {"item_id": list(range(world.num_items)), "title": titles, "category": things}
