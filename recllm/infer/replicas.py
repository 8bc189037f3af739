"""Engines under Ray: several of a kind, each an actor of its own process, that share what is asked.

`Replicas` starts them and hands out chunks of prompts, each prompt with all of its answers and its gate:

    here                                     a replica: one GPU, or a share of the cores
    chunks, IN_FLIGHT a replica at most  →   the engine, started by the first call
    answers, each chunk's exactly once   ←   with the process that gave them

A replica whose process dies is started again by Ray, RESTARTS times at most, and asked again for what it owes: answers
hang on their chunk alone. Its place, a placement group of Ray, is kept for it. One whose node is lost waits for room on
another, while the others go on. One that says nothing is told of; after `silence_s` its process is killed, and it is
replaced as one that died; if it then says nothing again before it has answered anything, that is an error. What a
replica raises is raised here; that is no reason to ask again. What the engines are is not known here
(ray_vllm_engine.py). Imports Ray when replicas are started, and no torch.
"""

import contextlib
import itertools
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from recllm import cluster
from recllm.errors import UserError

ASKED = "recllm evaluate --engine ray-vllm"  # how errors call it
IN_FLIGHT = 2  # chunks a replica: one that it works on, one that waits there
RESTARTS = 3  # of a replica
LEAST, MOST, TURNS = 32, 256, 4  # prompts of a chunk; chunks a replica where there are enough prompts
START_S = 3600.0  # until all replicas have started (large models come from slow disks), or for a lost one's new place
SILENT_S = 60.0  # without an answer, before that is told and the nodes are looked at
FREE_S = 15.0  # until what an earlier run held is counted as free
ENVIRONMENT = {  # of a replica
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in the actor itself: it dies, and frees its GPU, with it
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}

Engine = Any  # score, rank_titles and generate of VllmEngine
Start = Callable[[], Callable[[Path | None], Engine]]  # runs in a replica: an engine for an adapter's folder, or None


class Place(NamedTuple):
    """Where a replica runs."""

    node: str
    pid: int


class Replica:
    """The actor: one engine, started by the first call, so that what stops it is that call's error and no death.

    Args:
        start: makes the engines.
        identity: of the driver's recllm; nodes may join after all were asked for theirs.
    """

    def __init__(self, start: Start, identity: cluster.Identity) -> None:
        self._start, self._identity = start, identity
        self._make: Callable[[Path | None], Engine] | None = None
        self._engines: dict[Path | None, Engine] = {}

    def place(self) -> Place:
        """Start the engine where that is still to be done.

        Raises:
            UserError: names the node.
        """
        found = Place(socket.gethostname(), os.getpid())
        if self._make is None:
            if (here := cluster.identity()) != self._identity:
                raise UserError(
                    f"{ASKED}: this process runs recllm {cluster.Identity(*self._identity)}, node {found.node} runs "
                    f"recllm {here}: install the same one on all"
                )
            try:
                self._make = self._start()
            except UserError as error:
                raise UserError(f"replica on node {found.node}: {error}") from None
        return found

    def ask(self, folder: Path | None, method: str, shared: Any, arguments: Mapping[str, Any]) -> tuple[Place, Any]:
        """Answers of an engine's method to one chunk. `shared` holds further arguments that all chunks have."""
        place = self.place()
        assert self._make is not None  # started
        if folder not in self._engines:
            self._engines[folder] = self._make(folder)
        return place, getattr(self._engines[folder], method)(**arguments, **(shared or {}))


class Replicas:
    """Started replicas, and who of them is asked what.

    Args:
        start: makes a replica's engines, in its process.
        count: of replicas.
        chunk: prompts of a chunk; None: by the number of prompts.
        silence_s: seconds without an answer after which a replica is killed and replaced: more than a chunk takes, and
            a start before it. None waits for ever.

    Raises:
        UserError: as `cluster.connected`; fewer GPUs or cores than replicas; what `start` raises, with the node's name.
    """

    def __init__(self, start: Start, count: int, chunk: int | None = None, silence_s: float | None = None) -> None:
        self.count, self.chunk, self.silence_s = count, chunk, silence_s
        self._actors: list[Any] = []
        self._held: list[Any] = []  # the placement group of each, which keeps its GPU or cores for it
        self._shared: list[tuple[Any, Any]] = []  # what all chunks are given, and its place in Ray's object store
        self._heard = [0.0] * count  # when each answered last
        self._told_after = [SILENT_S] * count  # seconds without an answer of each; doubled whenever they are told
        self._able_since = [0.0] * count  # since when each was asked and, as far as seen, has had a place
        self._killed: set[int] = set()  # those that were killed for their silence and have not answered since
        self._connection = contextlib.ExitStack()
        try:
            self._ray = self._connection.enter_context(cluster.connected(ASKED))
            self._each = room(count)
            self._held = [_placement_group(self._each) for _ in range(count)]
            self._actors = [self._actor(group).remote(start, cluster.identity()) for group in self._held]
            self.places = self._started()
        except BaseException:
            self.close()
            raise

    def _actor(self, group: Any) -> Any:
        """The actor's class, with what it is given: all that its placement group holds."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return self._ray.remote(Replica).options(
            max_restarts=RESTARTS,
            max_task_retries=-1,  # as often as it is started again
            runtime_env={"env_vars": _environment(self._each)},
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0),
            **self._each,
        )

    def ask(
        self,
        folder: Path | None,
        method: str,
        chunks: Iterable[dict[str, Any]],
        shared: dict[str, Any] | None = None,
        progress: str | None = None,
        total: int | None = None,
    ) -> list[Any]:
        """Answers to chunks of prompts, in the order of the chunks.

        A chunk is taken from `chunks` when a replica has room for it. Each is answered once: an answer that is missing,
        comes twice or has another number of rows than the chunk has prompts is an error.

        Args:
            folder: of the adapter; None asks the base model.
            method: of the engine.
            chunks: its keyword arguments, `prompts` among them.
            shared: keyword arguments that all chunks have, sent to each replica's node once.
            progress: name for the progress bar; None shows none.
            total: prompts in all.

        Raises:
            UserError: a replica died more often than RESTARTS, found no node again, or hung twice (`silence_s`).
            Exception: what a replica raises.
        """
        numbered, common = enumerate(chunks), self._put(shared)
        waiting: dict[Any, tuple[int, int, int]] = {}  # reference → chunk, replica, prompts
        answers: dict[int, Any] = {}

        def send(replica: int) -> None:
            for number, arguments in itertools.islice(numbered, 1):
                reference = self._actors[replica].ask.remote(folder, method, common, arguments)
                waiting[reference] = (number, replica, len(arguments["prompts"]))

        self._heard = [time.monotonic()] * self.count
        self._able_since = list(self._heard)
        for replica in [*range(self.count)] * IN_FLIGHT:
            send(replica)
        with tqdm(total=total, desc=progress, disable=progress is None, unit="prompt") as bar:
            while waiting:
                reference = self._next({reference: replica for reference, (_, replica, _) in waiting.items()})
                number, replica, size = waiting.pop(reference)
                self._heard[replica] = self._able_since[replica] = time.monotonic()
                self._killed.discard(replica)
                answer = self._answer(reference, replica)
                if number in answers or len(answer) != size:
                    raise RuntimeError(f"chunk {number} of {size} prompts has {len(answer)} answers, once is expected")
                answers[number] = answer
                send(replica)
                bar.update(size)
        if sorted(answers) != list(range(len(answers))) or next(numbered, None) is not None:
            raise RuntimeError(f"{len(answers)} chunks were answered, and not each of them")
        return [answers[number] for number in range(len(answers))]

    def spans(self, count: int) -> list[slice]:
        """Chunks of prompts: a few for each replica, so that a slow one does not keep the others waiting."""
        size = self.chunk or chunk_size(count, self.count)
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]

    def close(self) -> None:
        """End the replicas' processes, and the connection to Ray where it was made for them."""
        actors, held = self._actors, self._held
        self._actors, self._held, self._shared = [], [], []
        with self._connection:  # closed even where Ray is gone
            for actor in actors:
                self._ray.kill(actor)
            if held:
                from ray.util.placement_group import remove_placement_group

                for group in held:
                    remove_placement_group(group)

    def _put(self, shared: dict[str, Any] | None) -> Any:
        """A reference to arguments in Ray's object store; equal ones (the same objects) are put there once."""
        if shared is None:
            return None
        for known, reference in self._shared:
            if known.keys() == shared.keys() and all(known[name] is shared[name] for name in known):
                return reference
        self._shared = [*self._shared, (shared, self._ray.put(shared))][-2:]  # a catalogue has a trie by ending
        return self._shared[-1][1]

    def _started(self) -> list[Place]:
        """Wait until every replica has started.

        Raises:
            UserError: not all have within START_S.
        """
        waiting = {actor.place.remote(): number for number, actor in enumerate(self._actors)}
        found: dict[int, Place] = {}
        until = time.monotonic() + START_S
        with tqdm(total=self.count, desc="replicas", unit="replica") as bar:
            while waiting:
                done, _ = self._ray.wait(list(waiting), num_returns=1, timeout=max(0.0, until - time.monotonic()))
                if not done:
                    raise UserError(
                        f"{len(found)} of {self.count} replicas started within {START_S:.0f} s: see `ray status` for "
                        "what the others wait for, or lower evaluate.replicas"
                    )
                number = waiting.pop(done[0])
                found[number] = Place(*self._get(done[0], number))
                bar.update()
        return [found[number] for number in range(self.count)]

    def _next(self, waiting: Mapping[Any, int]) -> Any:
        """The first reference that is answered, of those that are waited for, each with its replica.

        Raises:
            UserError: none is for START_S, in which a replica has no place; a replica hung twice.
        """
        since, told, look = time.monotonic(), "", min(SILENT_S, self.silence_s or SILENT_S)
        while not (done := self._ray.wait(list(waiting), num_returns=1, timeout=look)[0]):
            self._tell_of_silence(set(waiting.values()))
            self._replace_silent(waiting)
            lacking = self._lacking()
            if lacking is None:  # long chunks
                since, told = time.monotonic(), ""
                continue
            text, wait, advice = lacking
            if time.monotonic() - since > START_S:
                raise UserError(f"{text}, {advice}")
            if told != text:
                tqdm.write(f"{text}; {wait}", file=sys.stderr)
            told = text
        self._tell_of_silence(set(waiting.values()))
        self._replace_silent(waiting)
        return done[0]

    def _lacking(self) -> tuple[str, str, str] | None:
        """Why a replica has no place, what it waits for, and what to do; None where all have one."""
        found = placeable(self._each)
        if found < self.count:
            return (
                f"Ray has lost nodes: it has room for {found} of {self.count} replicas",
                "what the others owe waits for a new node (`ray start`)",
                "and no other came: start Ray on more nodes, or lower evaluate.replicas",
            )
        if not (without := self._unplaced()):
            return None
        for replica in without:
            self._able_since[replica] = time.monotonic()
        unplaced = ", ".join(map(str, without))
        return (
            f"replica {unplaced} of {self.count} is to be started again and has no place",
            "what it owes waits: others may hold what the nodes have (`ray status`)",
            f"for {START_S:.0f} s: wait for the others who use the cluster (`ray status`), start Ray on more nodes, or "
            "lower evaluate.replicas",
        )

    def _unplaced(self) -> list[int]:
        """Replicas that Ray has yet to place."""
        return [number for number, group in enumerate(self._held) if not group.wait(timeout_seconds=1)]

    def _tell_of_silence(self, owing: set[int]) -> None:
        """Say who has not answered for long; of each after SILENT_S, and then after twice as long as the last time."""
        for replica in sorted(owing):
            silent = time.monotonic() - self._heard[replica]
            if silent < self._told_after[replica]:
                continue
            self._told_after[replica] = 2 * silent
            place = self.places[replica]
            tqdm.write(
                f"no answer for {silent:.0f} s from replica {replica} (process {place.pid} on {place.node})",
                file=sys.stderr,
            )

    def _replace_silent(self, waiting: Mapping[Any, int]) -> None:
        """Kill those who have not answered for `silence_s`: Ray starts them again and asks what they owe again.

        One that has no place is not silent, what it waits for has an end of its own; nor is one whose answer is here
        and was not taken yet.

        Raises:
            UserError: one of them was killed before, and has not answered anything since.
        """
        if self.silence_s is None:
            return
        for replica in sorted(set(waiting.values())):
            silent = time.monotonic() - self._able_since[replica]
            if silent < self.silence_s:
                continue
            self._able_since[replica] = time.monotonic()
            owed = [reference for reference, owing in waiting.items() if owing == replica]
            if self._ray.wait(owed, num_returns=1, timeout=0)[0] or not self._held[replica].wait(timeout_seconds=1):
                continue
            place = self.places[replica]
            advice = (
                "if it was at work, raise evaluate.replica_timeout_s, which has to cover an engine's start and a chunk "
                "of prompts (null waits for ever)"
            )
            if replica in self._killed:
                raise UserError(
                    f"replica {replica} of {self.count} (on {place.node}) gave no answer for {silent:.0f} s, was "
                    f"killed and started again, and gave none for {silent:.0f} s again: look at vLLM's log there; "
                    f"{advice}"
                )
            self._killed.add(replica)
            tqdm.write(
                f"replica {replica} (process {place.pid} on {place.node}) gave no answer for {silent:.0f} s: it is "
                f"killed and started again, and asked again for what it owes; {advice}",
                file=sys.stderr,
            )
            self._ray.kill(self._actors[replica], no_restart=False)

    def _answer(self, reference: Any, replica: int) -> Any:
        place, answer = self._get(reference, replica)
        before, self.places[replica] = self.places[replica], Place(*place)
        if before != place:
            tqdm.write(
                f"replica {replica} died (process {before.pid} on {before.node}) and was started again (process "
                f"{place.pid} on {place.node}): what it owed was asked again",
                file=sys.stderr,
            )
        return answer

    def _get(self, reference: Any, replica: int) -> Any:
        """What a reference stands for.

        Raises:
            UserError: the replica died too often.
            Exception: what the replica raised, without Ray's wrapping.
        """
        with cluster.own_errors():
            try:
                return self._ray.get(reference)
            except self._ray.exceptions.RayActorError as error:
                raise UserError(
                    f"replica {replica} of {self.count} died again after it had been started again {RESTARTS} times. "
                    f"The last time: {error}"
                ) from None


def chunk_size(prompts: int, replicas: int) -> int:
    """Prompts of a chunk: TURNS chunks a replica, of LEAST to MOST prompts; fewer only where that leaves one idle.

    >>> chunk_size(1_000_000, 8), chunk_size(2_000, 8), chunk_size(256, 8), chunk_size(12, 8)
    (256, 63, 32, 2)
    """
    share, turn = -(-prompts // replicas), -(-prompts // (replicas * TURNS))
    return max(1, min(max(turn, LEAST), share, MOST))


def room(replicas: int) -> dict[str, int]:
    """What a replica is given, as options of a Ray actor: a GPU where the cluster has any, otherwise cores.

    Raises:
        UserError: fewer GPUs, or cores, than replicas; too few of them are free.
    """
    import ray

    gpus, advice = int(ray.cluster_resources().get("GPU", 0)), "lower evaluate.replicas or start Ray on more nodes"
    if gpus:
        if gpus < replicas:
            raise UserError(f"evaluate.replicas={replicas} needs a GPU each, Ray has {gpus}: {advice}")
        _wait_until_free("GPU", replicas, gpus)
        return {"num_gpus": 1, "num_cpus": 1}
    cores = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    share = cores_each(cores, replicas)
    if share is None:
        raise UserError(f"evaluate.replicas={replicas} needs a core each, Ray has {sum(cores)} and no GPU: {advice}")
    _wait_until_free("CPU", replicas * share, sum(cores))
    return {"num_cpus": share}


def _placement_group(each: Mapping[str, int]) -> Any:
    """What a replica is given, held for it until it is given back or this process ends."""
    from ray.util.placement_group import placement_group

    names = {"num_gpus": "GPU", "num_cpus": "CPU"}
    return placement_group([{names[option]: amount for option, amount in each.items()}])


def placeable(each: Mapping[str, int]) -> int:
    """How many replicas have room on the nodes that are alive, were nobody else there."""
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    names = {"num_gpus": "GPU", "num_cpus": "CPU"}
    return sum(
        min(int(resources.get(names[option], 0)) // amount for option, amount in each.items()) for resources in alive
    )


def cores_each(nodes: Sequence[int], replicas: int) -> int | None:
    """The most cores that every replica can have, each on one node; None where they have not one each.

    >>> cores_each([16], 2), cores_each([8, 4], 2), cores_each([1], 2)
    (8, 4, None)
    """
    possible = range(max(nodes, default=0), 0, -1)
    return next((share for share in possible if sum(cores // share for cores in nodes) >= replicas), None)


def _wait_until_free(resource: str, needed: int, all_there_are: int) -> None:
    """Wait FREE_S for resources that others hold: what a run held that has just ended is not free at once.

    Raises:
        UserError: they are not free by then.
    """
    import ray

    until = time.monotonic() + FREE_S
    while (free := int(ray.available_resources().get(resource, 0))) < needed:
        if time.monotonic() > until:
            raise UserError(
                f"evaluate.replicas: {needed} {resource}s are needed, {free} of Ray's {all_there_are} are free: wait "
                "for the others who use the cluster (`ray status`), or lower evaluate.replicas"
            )
        time.sleep(0.2)


def _environment(resources: Mapping[str, int]) -> dict[str, str]:
    """Environment variables of a replica. On a CPU vLLM would bind each of a node's engines to the same cores."""
    found = dict(ENVIRONMENT)
    if "num_gpus" not in resources:
        found |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(resources["num_cpus"])}
    own = {name: os.environ[name] for name in found if name in os.environ}
    return found | own | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
