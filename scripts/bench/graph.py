#!/usr/bin/env python
"""Retrieval of subgraphs against DuckDB, conversion with subgraphs, and what ten times the triples cost.

    python scripts/bench/graph.py                                    # 1e6 and 1e7 triples, 20,000 users
    python scripts/bench/graph.py --triples 1e5 --users 1000

The graph is built from a Parquet file; then every user, with a cut-off of its own, gets the 100 best triples within
2 hops of 3 items: the newest 20 edges of each relation followed from an entity, hubs penalised by 0.5. The first size
is answered by DuckDB, too, which has the triples as a table of edges sorted as ours, made before the clock starts, and
gets one query for each `--batch` users. Answers are compared user by user; a difference is an error.
- duckdb_over_ours: both score and rank. Compared are the scores and, apart from ties with the last, the triples.
- duckdb_plain_over_ours: DuckDB finds all triples that are within reach, without scores; ours is the same `khop`
  without its cap. Compared as sets.

Then `recllm convert` runs on the graph of the first size with each method of retrieval: every user has 20 interactions,
and every example of next_item a subgraph around those before it (3,700 edges within 2 hops, as on MovieLens-1M), within
200 tokens of SmolLM2's tokenizer. conversion_examples_per_cpu_s: examples over the time of all of `convert`, reading
the log and writing included, but for building the graph, which is measured by itself. Where the tokenizer is not in the
cache there is no such figure, and the line says so.

One JSON line a size, then one with all. Every step runs in a fresh process. Times are user and system time; ours has
one thread, DuckDB `--threads`. Other work on the machine takes the caches away and so adds to them: a graph is built,
and a log converted, `--repeats` times, and the shortest counts. build_s: user and system time; build_system_s: the
latter alone, which is large where memory is short. peak_rss_mib and build_peak_rss_mib: the most memory that the
process held, mapped files and interpreter included. time_ratio and build_ratio: last size over first.

Triples are made up: an entity for 10 triples, entities by a power law (density 1 / sqrt(rank)), 20 relations, seconds
of ten years; users' items by the same law, cut-offs in the same years. In the log of the conversion a fifth of the
entities are items, drawn uniformly, and users take items by the same law.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # a checkout that is not installed

RELATIONS, ITEMS, YEARS_S, FOLLOWED, BEST = 20, 3, 315_360_000, 20, 100
ALL = 1 << 40  # triples a user: no cap
LENGTH, BUDGET, METHODS = 20, 200, ("two_stage", "khop", "parallel", "random", "pagerank")  # of the conversion
MODEL = "smollm2-135m-instruct"  # whose tokenizer counts the budget
ONE_THREAD = dict.fromkeys(("POLARS_MAX_THREADS", "OMP_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
SYLLABLES = (
    ("Bren", "Cal", "Dor", "Esk", "Fal", "Gar", "Hol", "Ing", "Kel", "Lor"),
    ("ack", "brook", "den", "field", "ford", "ham", "ley", "more", "ton", "wick"),
)

# One step of a breadth-first search: newest edges of the frontier, and what flows over each. `preference` breaks
# ties as the store does.
STEP = """
open{hop} AS (
    SELECT f.prompt, f.entity AS source, f.weight, e.code, e.target, e.time,
        row_number() OVER (
            PARTITION BY f.prompt, f.entity, e.code ORDER BY e.time DESC, e.preference DESC) AS place
    FROM front{hop} f JOIN prompts p USING (prompt) JOIN edges e ON e.source = f.entity AND e.time < p.cutoff),
count{hop} AS (
    SELECT prompt, source, count(*) AS opened, count(*) FILTER (place <= {fan_out}) AS followed
    FROM open{hop} GROUP BY ALL),
step{hop} AS (
    SELECT prompt, source, code, target, time, {hop} AS hop, weight / sqrt(opened) / followed AS flow
    FROM open{hop} JOIN count{hop} USING (prompt, source) WHERE place <= {fan_out})"""
SCORED = """
WITH front1 AS (SELECT prompt, entity, sum(weight) AS weight FROM seeds GROUP BY ALL),{step1},
front2 AS (
    SELECT prompt, target AS entity, sum(flow) AS weight FROM step1
    WHERE NOT EXISTS (FROM front1 f WHERE f.prompt = step1.prompt AND f.entity = step1.target) GROUP BY ALL),{step2},
found AS (
    SELECT prompt, if(code < {relations}, source, target) AS head, code % {relations} AS relation,
        if(code < {relations}, target, source) AS tail, time, sum(flow) AS score, min(hop) AS hop
    FROM (FROM step1 UNION ALL FROM step2) GROUP BY ALL)
SELECT prompt, head, relation, tail, time, score, hop FROM found
QUALIFY row_number() OVER (PARTITION BY prompt ORDER BY score DESC) <= {best}
ORDER BY prompt, score DESC"""
PLAIN_STEP = """
step{hop} AS (
    SELECT f.prompt, f.entity AS source, e.code, e.target, e.time
    FROM front{hop} f JOIN prompts p USING (prompt) JOIN edges e ON e.source = f.entity AND e.time < p.cutoff
    QUALIFY row_number() OVER (
        PARTITION BY f.prompt, f.entity, e.code ORDER BY e.time DESC, e.preference DESC) <= {fan_out})"""
PLAIN = """
WITH front1 AS (SELECT DISTINCT prompt, entity FROM seeds),{step1},
front2 AS (SELECT prompt, target AS entity FROM step1 EXCEPT FROM front1),{step2}
SELECT DISTINCT prompt, if(code < {relations}, source, target) AS head, code % {relations} AS relation,
    if(code < {relations}, target, source) AS tail, time
FROM (FROM step1 UNION ALL FROM step2)"""


def main() -> None:
    """Run every size and print its line."""
    arguments = parse()
    if arguments.step:
        print(json.dumps(STEPS[arguments.step](arguments, Path(arguments.folder))))
        return
    lines: list[dict[str, Any]] = []
    for size in arguments.triples:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            lines.append(run_size(arguments, int(float(size)), Path(folder), is_first=not lines))
        print(json.dumps(lines[-1]), flush=True)
    first, last = lines[0], lines[-1]
    ratios = {
        "size_ratio": round(last["triples"] / first["triples"], 2),
        "time_ratio": round(last["ms_per_1000_users"] / first["ms_per_1000_users"], 2),
        "build_ratio": round(last["build_s"] / first["build_s"], 2),
        "last_peak_rss_mib": last["peak_rss_mib"],
        "last_build_peak_rss_mib": last["build_peak_rss_mib"],
    }
    print(json.dumps({"bench": "graph", **first, **ratios, "sizes": lines}))


def parse() -> argparse.Namespace:
    """The command line; --step is for the processes that this script starts itself."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--triples", nargs="+", default=["1e6", "1e7"], help="sizes; DuckDB answers the first")
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--converted-users", type=int, default=3000, help="of the conversion")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=500, help="users of one DuckDB query")
    parser.add_argument("--threads", type=int, default=1, help="of DuckDB")
    parser.add_argument("--repeats", type=int, default=2, help="times that a graph is built and a log converted")
    parser.add_argument("--folder", default=None, help="where temporary files go")
    parser.add_argument("--step", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--method", default=METHODS[0], help=argparse.SUPPRESS)
    return parser.parse_args()


def run_size(arguments: argparse.Namespace, size: int, folder: Path, *, is_first: bool) -> dict[str, Any]:
    """Each step in a process of its own; DuckDB and the conversion belong to the first size."""

    def run(step: str, method: str = "") -> dict[str, Any]:
        names = ("users", "converted_users", "seed", "batch", "threads")
        options = [f"--{name.replace('_', '-')}={getattr(arguments, name)}" for name in names]
        command = [sys.executable, __file__, f"--step={step}", f"--folder={folder}", f"--triples={size}", *options]
        command += [f"--method={method}"] if method else []
        environment = os.environ | ONE_THREAD | {"TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=False, env=environment)
        if done.returncode:
            raise SystemExit(f"step {step} {method} of {size} triples failed, see above")
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    line: dict[str, Any] = {"triples": size, "users": arguments.users, **run("make")}
    line |= min((run("build") for _ in range(arguments.repeats)), key=lambda built: float(built["build_s"]))
    line |= run("retrieve")
    if is_first:
        line |= run("duckdb") | run("make_log")
        conversion = {}
        for method in METHODS * bool(line["tokenizer"]):
            found = [run("convert", method) for _ in range(arguments.repeats)]
            conversion[method] = min(found, key=lambda one: float(one["cpu_s"]))
        figures = {method: found["examples_per_cpu_s"] for method, found in conversion.items()}
        line |= {"conversion": conversion, "conversion_examples_per_cpu_s": figures}
    return line


def make(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write triples.parquet, links.csv and the seeds of the users."""
    import polars as pl

    size, rng = int(arguments.triples[0]), np.random.default_rng(arguments.seed)
    entities = max(size // 10, 2)

    def drawn(count: int) -> np.ndarray:
        return (entities * rng.random(count) ** 2).astype(np.int64)

    ends = np.concatenate([drawn(size), drawn(size)])
    numbers = np.unique(ends, return_inverse=True)[1]  # none is missing: the number that a graph gives is the id
    columns = {"head": numbers[:size], "relation": rng.integers(0, RELATIONS, size), "tail": numbers[size:]}
    frame = pl.DataFrame({**columns, "timestamp": rng.integers(0, YEARS_S, size)})
    frame.write_parquet(folder / "triples.parquet")
    (folder / "links.csv").write_text("item_id,entity_id\n0,0\n")
    users = arguments.users
    items = np.minimum(drawn(users * ITEMS), numbers.max()).astype(np.int32)
    np.savez(folder / "seeds.npz", entities=items, cutoffs=rng.integers(0, YEARS_S, users))
    return {"entities": int(numbers.max()) + 1, "relations": RELATIONS}


def build(_: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The graph's folder from triples.parquet."""
    from recllm.graph.build import build_graph
    from recllm.recipe import GraphSection

    links = {"path": str(folder / "links.csv"), "format": "csv"}
    section = GraphSection.model_validate({"triples": triples_of(folder), "links": links})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_stime
    with tempfile.TemporaryDirectory(dir=folder) as built:
        seconds, _ = timed(lambda: build_graph(section, ["0"], Path(built)))
        system = resource.getrusage(resource.RUSAGE_SELF).ru_stime - before
        shutil.rmtree(folder / "graph", ignore_errors=True)
        shutil.move(built, folder / "graph")
        Path(built).mkdir()  # for the context to remove
    return {"build_s": round(seconds, 2), "build_system_s": round(system, 2), "build_peak_rss_mib": peak_mib()}


def triples_of(folder: Path) -> dict[str, Any]:
    """The recipe's section about triples.parquet."""
    columns = {name: name for name in ("head", "relation", "tail", "timestamp")}
    return {
        "path": str(folder / "triples.parquet"),
        "format": "parquet",
        "timestamp_unit": "s",
        "columns": columns,
    }


def retrieve(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Our engine over all users, by the one entry that conversion uses."""
    from recllm.graph.retrieve import retrieve
    from recllm.graph.store import Graph
    from recllm.recipe import RetrievalSection

    graph, seeds = Graph.open(folder / "graph"), all_seeds(folder)
    section = RetrievalSection(method="khop", hops=2, fan_out=FOLLOWED, max_triples=BEST)
    key, names = np.zeros(arguments.users, dtype=np.uint64), [str(number) for number in range(RELATIONS)]
    seconds, found = timed(lambda: retrieve(graph, seeds, section, names, key))
    return {
        "ms_per_1000_users": round(1e6 * seconds / arguments.users, 1),
        "triples_shown_per_user": round(len(found.heads) / arguments.users, 1),
        "peak_rss_mib": peak_mib(),
    }


def duckdb(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both engines batch by batch, the answers compared."""
    from recllm.graph.store import Graph

    graph, seeds, connection = Graph.open(folder / "graph"), all_seeds(folder), connected(arguments, folder)
    taken = dict.fromkeys(("ours", "duckdb", "ours_plain", "duckdb_plain"), 0.0)
    reached = 0
    for prompts, part in seeds.parts(ITEMS * arguments.batch):
        give_seeds(connection, part)
        for kind, best, check in (("", BEST, check_best), ("_plain", ALL, check_all)):
            seconds, mine = timed(partial(ours, graph, part, best))
            taken[f"ours{kind}"] += seconds
            seconds, theirs = timed(partial(theirs_of, connection, query(bool(kind))))
            taken[f"duckdb{kind}"] += seconds
            check(mine, theirs, prompts.start)
        reached += len(mine.heads)
    per_1000 = {f"{name}_ms_per_1000_users": round(1e6 * value / arguments.users, 1) for name, value in taken.items()}
    return {
        **per_1000,
        "triples_reached_per_user": round(reached / arguments.users, 1),
        "answers_equal": True,
        "duckdb_over_ours": round(taken["duckdb"] / taken["ours"], 2),
        "duckdb_plain_over_ours": round(taken["duckdb_plain"] / taken["ours_plain"], 2),
    }


def make_log(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write what a conversion reads beside the triples: log, items, names and, where it is in the cache, tokenizer."""
    import polars as pl

    from recllm.data import offline

    rng, entities = np.random.default_rng(arguments.seed + 1), make_size(folder)
    items, users = max(entities // 5, 30), arguments.converted_users
    linked = rng.choice(entities, items, replace=False)
    rank = (items * rng.random(users * LENGTH) ** 2).astype(np.int64)
    log = {"user_id": np.repeat(np.arange(users), LENGTH), "item_id": rank}
    log["timestamp"] = np.sort(rng.integers(0, YEARS_S, (users, LENGTH)), axis=1).ravel()
    pl.DataFrame(log).write_parquet(folder / "log.parquet")
    words = [first + second for first in SYLLABLES[0] for second in SYLLABLES[1]]  # names share them, as people's do
    names = [f"{words[n % 100]} {words[n // 100 % 100]} {words[n // 10_000 % 100]}" for n in range(entities)]
    pl.DataFrame({"id": [str(n) for n in range(entities)], "name": names}).write_parquet(folder / "names.parquet")
    titles = [f"The {names[entity]}" for entity in linked.tolist()]
    pl.DataFrame({"item_id": np.arange(items), "title": titles}).write_parquet(folder / "items.parquet")
    links = pl.DataFrame({"item_id": np.arange(items), "entity_id": linked})
    links.write_csv(folder / "item_links.csv")
    if not (found := sorted(offline.cache().glob(f"{MODEL}-*-bf16/tokenizer.json"))):
        note = f"{MODEL} is not in the cache: run any recipe that uses it, such as recipes/movielens, and then this"
        return {"tokenizer": None, "conversion_note": note}
    shutil.copy(found[0], folder / "tokenizer.json")
    return {"tokenizer": MODEL}


def make_size(folder: Path) -> int:
    """Entities of the triples."""
    from recllm.graph.store import Graph

    return Graph.open(folder / "graph").num_entities


def convert(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """recllm's own `convert` with one method of retrieval."""
    from recllm.convert import pipeline
    from recllm.recipe import Recipe

    triples = triples_of(folder) | {"entities": {"path": str(folder / "names.parquet")}}
    retrieval = {"method": arguments.method, "hops": 2, "fan_out": FOLLOWED, "max_items": LENGTH}
    recipe = Recipe.model_validate(
        {
            "name": "bench",
            "data": {
                "interactions": {"path": str(folder / "log.parquet")},
                "items": {"path": str(folder / "items.parquet")},
            },
            "graph": {
                "triples": triples,
                "links": {"path": str(folder / "item_links.csv")},
                "retrieval": retrieval,
                "budget": BUDGET,
            },
            "protocol": "temporal_20",
            "prompt": {"max_items": 10},
            "tasks": [{"task": "next_item", "template": "next_item/films_graph"}],
            "model": {"name_or_path": "none"},
        }
    )
    built: list[float] = []
    build_graph = pipeline.build_graph

    def build_timed(*given: Any) -> Any:
        seconds, found = timed(lambda: build_graph(*given))
        built.append(seconds)
        return found

    tokenizer = (folder / "tokenizer.json").read_text(encoding="utf-8")
    with mock.patch.object(pipeline, "build_graph", build_timed):
        seconds, manifest = timed(lambda: pipeline.convert(recipe, folder / arguments.method, 1, tokenizer))
    seconds -= sum(built)
    shown = list(manifest["graph"]["shown"].values())
    examples, triples_shown = (sum(entry[name] for entry in shown) for name in ("with_graph", "triples"))
    every = sum(manifest["counts"]["examples"].values())
    return {
        "examples": every,
        "with_graph": examples,
        "cpu_s": round(seconds, 2),
        "examples_per_cpu_s": round(every / seconds),
        "triples_shown": round(triples_shown / max(examples, 1), 1),
        "tokens_shown": round(sum(entry["tokens"] for entry in shown) / max(examples, 1), 1),
        "peak_rss_mib": peak_mib(),
    }


def ours(graph: Any, seeds: Any, best: int) -> Any:
    """`khop` in the parts that `retrieve` makes."""
    from recllm.graph.retrieve import SEEDS_AT_ONCE, khop
    from recllm.graph.subgraphs import Subgraphs
    from recllm.graph.walk import Rules

    rules = Rules(hops=2, fan_out=FOLLOWED, max_triples=best)
    return Subgraphs.concatenated([khop(graph, part, rules) for _, part in seeds.parts(SEEDS_AT_ONCE)])


def theirs_of(connection: Any, text: str) -> dict[str, np.ndarray]:
    """DuckDB's answer, as our arrays are."""
    found: dict[str, np.ndarray] = connection.execute(text).fetchnumpy()
    return found


def connected(arguments: argparse.Namespace, folder: Path) -> Any:
    """A DuckDB with the triples as edges both ways, sorted as the store sorts them, in memory."""
    import duckdb
    import pyarrow as pa

    from recllm.graph.store import Graph, places

    keys = Graph.open(folder / "graph").entity_keys
    connection = duckdb.connect(config={"threads": arguments.threads})
    connection.execute(f"CREATE TABLE triples AS SELECT DISTINCT * FROM '{folder / 'triples.parquet'}'")
    connection.register("places", pa.table({"target": np.arange(len(keys)), "preference": places(keys)}))
    connection.execute(
        f"""CREATE TABLE edges AS
        WITH both_ways AS (
            SELECT head AS source, relation AS code, tail AS target, timestamp AS time FROM triples
            UNION ALL SELECT tail, relation + {RELATIONS}, head, timestamp FROM triples)
        SELECT source::INTEGER AS source, code::INTEGER AS code, target::INTEGER AS target, time, preference
        FROM both_ways JOIN places USING (target) ORDER BY source, code, time, preference"""
    )
    return connection


def give_seeds(connection: Any, seeds: Any) -> None:
    """Tables `seeds` and `prompts` of one batch."""
    import pyarrow as pa

    flat = pa.table({"prompt": seeds.prompts, "entity": seeds.entities, "weight": seeds.weights.astype(np.float64)})
    prompts = pa.table({"prompt": np.arange(seeds.num_prompts), "cutoff": seeds.cutoffs})
    for name, table in (("seeds", flat), ("prompts", prompts)):
        connection.register("given", table)
        connection.execute(f"CREATE OR REPLACE TEMP TABLE {name} AS FROM given")


def query(plain: bool) -> str:
    """The SQL of a batch."""
    step = PLAIN_STEP if plain else STEP
    steps = {f"step{hop}": step.format(hop=hop, fan_out=FOLLOWED) for hop in (1, 2)}
    return (PLAIN if plain else SCORED).format(**steps, relations=RELATIONS, best=BEST)


def check_all(mine: Any, theirs: dict[str, np.ndarray], first: int) -> None:
    """The same triples of every prompt."""
    left = sorted_rows(mine.prompts, mine.heads, mine.relations, mine.tails, mine.times)
    right = sorted_rows(*(theirs[name] for name in ("prompt", "head", "relation", "tail", "time")))
    if left.shape != right.shape or (left != right).any():
        raise SystemExit(
            f"users from {first}: {left.shape[1]} triples of ours, {right.shape[1]} of DuckDB, not the same"
        )


def check_best(mine: Any, theirs: dict[str, np.ndarray], first: int) -> None:
    """The same scores of every prompt, hops too, and the same triples where they are above the last score shown."""
    counts = np.bincount(theirs["prompt"], minlength=mine.num_prompts)
    if not np.array_equal(counts, np.diff(mine.offsets)):
        raise SystemExit(f"users from {first}: other numbers of triples than DuckDB's")
    np.testing.assert_allclose(mine.scores, theirs["score"], rtol=1e-5, err_msg=f"users from {first}")
    last = np.minimum.reduceat(mine.scores, mine.offsets[:-1][counts > 0])
    floor = np.repeat(last, counts[counts > 0]) * (1 + 1e-5)  # below, rounding decides which of two is shown
    left = rows(mine.prompts, mine.heads, mine.relations, mine.tails, mine.times, mine.hops)
    right = rows(*(theirs[name] for name in ("prompt", "head", "relation", "tail", "time", "hop")))
    if not (np.isin(left[mine.scores > floor], right).all() and np.isin(right[theirs["score"] > floor], left).all()):
        raise SystemExit(f"users from {first}: other triples than DuckDB's among the best {BEST}")


def rows(*columns: np.ndarray) -> np.ndarray:
    """(rows,) of which each is one value that can be compared."""
    table = np.stack([np.asarray(column, dtype=np.int64) for column in columns], axis=1)
    return table.view([("", np.int64)] * len(columns))[:, 0]


def sorted_rows(*columns: np.ndarray) -> np.ndarray:
    """(columns, rows) sorted by all columns."""
    table = np.stack([np.asarray(column, dtype=np.int64) for column in columns])
    return table[:, np.lexsort(table[::-1])]


def all_seeds(folder: Path) -> Any:
    """The users' items and cut-offs."""
    from recllm.graph.subgraphs import Seeds

    stored = np.load(folder / "seeds.npz", allow_pickle=False)
    entities = stored["entities"]
    offsets = np.arange(0, len(entities) + 1, ITEMS)
    return Seeds(offsets, entities, np.ones(len(entities), dtype=np.float32), stored["cutoffs"])


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of user and system time of this process's threads, and what `run` returned."""
    started = time.process_time()
    result = run()
    return time.process_time() - started, result


def peak_mib() -> int:
    """MiB that this process has held at the most."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


STEPS = {
    "make": make,
    "build": build,
    "retrieve": retrieve,
    "duckdb": duckdb,
    "make_log": make_log,
    "convert": convert,
}

if __name__ == "__main__":
    main()
