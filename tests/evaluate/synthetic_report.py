"""A made-up report folder: the structure that evaluation.py documents, figures that are clearly nobody's.

Written for looking at the report while working on it, too: python tests/evaluate/synthetic_report.py FOLDER
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

EXAMPLES, CANDIDATES, EXPERTS = 120, 20, 4
# name → (kind, hit_rate@1 of the made-up figures, nats or None)
SYSTEMS: dict[str, tuple[str, float, float | None]] = {
    "ilora": ("adapter", 0.17, 10.1),
    "ilora_uniform": ("control", 0.16, 10.2),
    "ilora_shuffled": ("control", 0.15, 10.3),
    "plain": ("adapter", 0.16, 10.2),
    "base_model": ("base_model", 0.10, 13.4),
    "sasrec": ("baseline", 0.24, None),
    "item_to_item": ("baseline", 0.33, None),
    "popularity": ("baseline", 0.23, None),
    "random": ("baseline", 0.05, None),
}
TITLES = [f"Invented Film {letter}{number}" for letter in "ABCDE" for number in range(8)]
FULL_CATALOGUE = ("sasrec", "item_to_item", "popularity", "random")


def estimate(value: float | None, half: float = 0.03) -> dict[str, float | None]:
    if value is None:
        return dict.fromkeys(("value", "low", "high"))
    return {"value": value, "low": value - half, "high": value + half}


def comparison(b: str, metric: str, difference: float, half: float, p_holm: float, **more: Any) -> dict[str, Any]:
    method = "mcnemar" if metric in {"hit_rate@1", "accuracy"} else "paired_bootstrap"
    test = {"task": "next_item", "a": "ilora", "b": b, "metric": metric, "difference": difference}
    test |= {"low": difference - half, "high": difference + half, "p_value": p_holm / 4, "p_holm": p_holm}
    return test | {"method": method, "num_examples": EXAMPLES, "num_users": EXAMPLES} | more


def metrics() -> dict[str, Any]:
    """A whole metrics.json of one ranking task."""
    return {
        "format": 1,
        "name": "synthetic",
        "description": "Made-up figures for looking at the report: nothing here was measured",
        "split": "test",
        "tasks": ["next_item"],
        "main_system": {"next_item": "ilora"},
        "protocol": _protocol(),
        "candidates_label": "sampled: 1 target + 19 uniform items",
        "provenance": _provenance(),
        "counts": {
            "users": 900,
            "items": 1600,
            "evaluated": {
                "next_item": {"examples": EXAMPLES, "users": EXAMPLES, "of_examples": 340, "chosen_by_seed": 0}
            },
        },
        "audit": {
            "share_of_targets_before_last_training_event": 0.999,
            "users_with_tied_last_timestamps": 0.44,
            "warnings": ["99.9% of the test targets are older than the last training event"],
        },
        "systems": [_system(name) for name in SYSTEMS],
        "comparisons": _comparisons(),
        "segments": {"next_item": _segments()},
        "segment_notes": {
            "target popularity": "head: the most frequent 20% of items in training; tail: the others; "
            "cold: never in training"
        },
        "examples": [_example(number) for number in range(10)],
        "against_plain": [
            comparison(name, "nats", nats - SYSTEMS["plain"][2], 0.05, 0.001) | {"a": name, "b": "plain"}
            for name, (kind, _, nats) in SYSTEMS.items()
            if kind in ("adapter", "control") and name != "plain"
        ],
        "gate": _gate(),
        "experts": _experts(),
        "notes": [],
        "training_log": [_log(step) for step in range(5, 151, 5)],
    }


def write(folder: Path, document: dict[str, Any] | None = None) -> Path:
    """A report folder as `recllm evaluate` leaves it before the report is written."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(document or metrics()), encoding="utf-8")
    pq.write_table(_predictions(), folder / "predictions.parquet")
    pq.write_table(_gates(), folder / "gates.parquet")
    return folder


def closed_task() -> dict[str, Any]:
    """The same run with a `like` task beside the ranking."""
    document = metrics()
    document["tasks"].append("like")
    document["main_system"]["like"] = "ilora"
    for name, kind, accuracy in (("ilora", "adapter", 0.7), ("constant", "baseline", 0.6)):
        figures = {
            "accuracy": estimate(accuracy),
            "balanced_accuracy": estimate(accuracy - 0.1),
            "f1 like": estimate(accuracy + 0.1),
            "brier": estimate(0.2),
            "valid_ratio": estimate(1.0, 0.0),
        }
        document["systems"].append(
            {
                "name": name,
                "kind": kind,
                "task": "like",
                "description": "…",
                "num_examples": 50,
                "num_users": 50,
                "metrics": figures,
                "full_catalogue": None,
                "generation": None,
            }
        )
    document["comparisons"].append(comparison("constant", "accuracy", 0.1, 0.05, 0.001, task="like"))
    return document


ACTIONS = {"view": 0.5, "add_to_cart": 0.2, "buy": 0.1, "leave the shop": 0.15, "search": 0.05, "rate": 0.0}


def action_task() -> dict[str, Any]:
    """The same run with `next_action` beside the ranking: a model that nearly always leaves, and is below constant."""
    document = metrics()
    document["tasks"].append("next_action")
    document["main_system"]["next_action"] = "ilora"
    counts = {"examples": EXAMPLES, "users": 40, "sessions": 60, "of_examples": EXAMPLES, "chosen_by_seed": 0}
    document["counts"]["evaluated"]["next_action"] = counts
    for name, kind, exact in (
        ("ilora", "adapter", 0.2),
        ("ilora_uniform", "control", 0.21),
        ("base_model", "base_model", 0.1),
        ("constant", "baseline", 0.5),
        ("markov", "baseline", 0.45),
        ("last_action", "baseline", 0.3),
    ):
        document["systems"].append(_of_actions(name, kind, exact))
        if name != "ilora":
            size = {"num_examples": EXAMPLES, "num_sessions": 60}
            test = comparison(name, "exact_match", 0.2 - exact, 0.05, 0.001, task="next_action", **size)
            document["comparisons"].append({k: v for k, v in test.items() if k != "num_users"})
    document["below_constant"] = [
        {
            "task": "next_action",
            "system": "ilora",
            "metric": "exact_match",
            "value": 0.2,
            "constant": 0.5,
            "answer": "leave the shop",
            "answer_share": 0.97,
            "rest_recall": 0.007,
        }
    ]
    document["notes"] = [
        'next_action: none of the 120 evaluated examples has the label "rate": it has no recall and no F1, and means '
        "over classes leave it out."
    ]
    recalls = {"view": estimate(0.3), "buy": estimate(0.5), "search": estimate(None)}
    for system in document["systems"]:
        if system["task"] == "next_item" and system["name"] in FULL_CATALOGUE:
            possible = {"view": 90, "buy": 12, "search": 0}
            system["otto"] = {"k": 20, "recall": recalls, "possible": possible, "score": estimate(0.4)}
    for entry in document["training_log"]:
        draw = np.random.default_rng(entry["step"])
        weights = draw.dirichlet(np.ones(3) * (3 + entry["step"] / 50))
        entry |= {f"dro_weight/{group}": float(w) for group, w in zip(ACTIONS, weights, strict=False)}
        entry |= {f"dro_loss/{group}": 2 - float(w) for group, w in zip(ACTIONS, weights, strict=False)}
    return document


def _of_actions(name: str, kind: str, exact: float) -> dict[str, Any]:
    able = name != "last_action"
    figures = {
        "exact_match": estimate(exact),
        "accuracy": estimate(exact + 0.01),
        "macro_f1": estimate(exact - 0.05),
        "weighted_f1": estimate(exact),
        "macro_recall": estimate(exact - 0.02),
        "macro_recall/head": estimate(0.007),
        "macro_recall/tail": estimate(exact),
        "valid_ratio": estimate(1.0, 0.0),
    }
    probabilities = {
        "multiclass_brier": estimate(0.6),
        "top_label_calibration_error": estimate(0.3),
        "label_nats": estimate(1.4),
    }
    if able:
        figures |= {"macro_auc": estimate(0.6), "macro_grouped_auc": estimate(0.55), **probabilities}
    if kind != "baseline":
        figures["nats"] = estimate(8.0)
    after = {metric: estimate(value["value"] / 2) for metric, value in probabilities.items()}
    return {
        "name": name,
        "kind": kind,
        "task": "next_action",
        "description": "…",
        "num_examples": EXAMPLES,
        "num_users": 40,
        "num_sessions": 60,
        "metrics": figures,
        "full_catalogue": None,
        "generation": None,
        "classes": _classes_of(name),
        "calibration": {"temperature": 2.5, "num_examples": 80, "before": probabilities, "after": after}
        if able
        else None,
        "reliability": {"before": _bins(0.7), "after": _bins(1.0)} if able else None,
    }


def _classes_of(name: str) -> dict[str, Any]:
    """Answers of a model that leaves, or of one that views."""
    favourite = 0 if name == "constant" else 3
    support = [round(share * EXAMPLES) for share in ACTIONS.values()]
    table = [[0] * (len(ACTIONS) + 1) for _ in support]
    for line, count in zip(table, support, strict=True):
        line[favourite], line[1], line[-1] = round(0.97 * count), round(0.02 * count), round(0.01 * count)
    per_class = [
        {
            "label": label,
            "words": label.replace("_", " "),
            "head": label == "view",
            "support": count,
            "predicted": sum(line[place] for line in table),
            "precision": estimate(0.2),
            "recall": estimate(0.97 if place == favourite else 0.007) if count else estimate(None),
            "f1": estimate(0.1) if count else estimate(None),
        }
        for place, (label, count) in enumerate(zip(ACTIONS, support, strict=True))
    ]
    often = {"label": list(ACTIONS)[favourite], "share": estimate(0.97), "rest_recall": estimate(0.007)}
    return {"per_class": per_class, "confusion": table, "most_frequent": often}


def _bins(factor: float) -> list[dict[str, Any]]:
    """A reliability plot: right `factor` times as often as it says."""
    return [
        {
            "low": low / 10,
            "high": (low + 1) / 10,
            "num_examples": 5 + 3 * low,
            "confidence": low / 10 + 0.05,
            "accuracy": factor * (low / 10 + 0.05),
        }
        for low in range(2, 10)
    ]


def _protocol() -> dict[str, Any]:
    return {
        "name": "temporal_20",
        "description": "",
        "split": {"method": "temporal"},
        "candidates": {"count": CANDIDATES, "method": "uniform", "seed": 0},
        "ranking": {"k": [1, 5, 10], "full_catalogue": True, "exclude_history": True},
        "decoding": {"score": "sum", "max_new_tokens": 32},
        "bootstrap": {"samples": 2000, "confidence": 0.95, "seed": 0},
    }


def _provenance() -> dict[str, Any]:
    return {
        "versions": {"recllm": "0.1.0", "python": "3.11.0", "torch": "2.13.0"},
        "hashes": {
            "recipe": "ab" * 32,
            "dataset_manifest": "cd" * 32,
            "adapter": None,
            "inputs": {"log.inter": "ef" * 32},
        },
        "seed": 0,
        "seeds": {"recipe": 0, "candidates": 0},
        "command": "recllm evaluate synthetic",
        "created": "2025-01-01T00:00:00+00:00",
        "base_model": {"name_or_path": "invented-135m", "dtype": "bfloat16", "attn_implementation": "sdpa"},
        "machine": {"cpu_count": 2, "processor": "invented", "platform": "Linux", "torch_device": "cpu"},
        "seconds": {"ilora": 61.2, "sasrec": 0.2},
    }


def _system(name: str) -> dict[str, Any]:
    kind, top, nats = SYSTEMS[name]
    figures = {}
    for k in (1, 5, 10):
        figures[f"hit_rate@{k}"] = estimate(min(0.95, top + 0.05 * (k - 1)), 0.06)
        figures[f"ndcg@{k}"] = estimate(top + 0.025 * (k - 1), 0.05)
        figures[f"mrr@{k}"] = estimate(top + 0.02 * (k - 1), 0.05)
    figures |= {"mrr": estimate(top + 0.2, 0.05), "valid_ratio": estimate(1.0, 0.0)}
    if nats is not None:
        figures["nats"] = estimate(nats, 0.3)
    full = (
        {m: estimate(v["value"] / 10, 0.02) for m, v in figures.items() if m != "nats"}
        if name in FULL_CATALOGUE
        else None
    )
    generation = (
        {
            "num_examples": 50,
            "max_new_tokens": 32,
            "valid_ratio": estimate(0.8, 0.1),
            "exact_hit": estimate(0.02, 0.02),
            "note": "first 50 of 120 evaluated examples",
        }
        if name == "ilora"
        else None
    )
    return {
        "name": name,
        "kind": kind,
        "has_gate": name.startswith("ilora"),
        "method": "ilora" if name.startswith("ilora") else "lora" if name == "plain" else None,
        "task": "next_item",
        "description": f"what {name} is",
        "num_examples": EXAMPLES,
        "num_users": EXAMPLES,
        "metrics": figures,
        "full_catalogue": full,
        "generation": generation,
    }


def _comparisons() -> list[dict[str, Any]]:
    tests = []
    for name, (_, top, nats) in SYSTEMS.items():
        if name != "ilora":
            difference = 0.17 - top
            p = 0.002 if abs(difference) > 0.08 else 0.4
            tests += [comparison(name, metric, difference, 0.06, p) for metric in ("hit_rate@1", "ndcg@10")]
            if nats is not None:
                tests.append(comparison(name, "nats", 10.1 - nats, 0.05, 0.001))
    return tests


def _segments() -> dict[str, Any]:
    values = {
        "target popularity": {"head": (0.08, 70), "tail": (-0.06, 42), "cold": (-0.1, 8)},
        "history length": {"1-5": (-0.03, 20), "6-10": (0.0, 30), "11-20": (0.02, 40), "21-50": (0.03, 30)},
    }
    return {
        name: {value: {system: _segment(system, shift, n) for system in SYSTEMS} for value, (shift, n) in parts.items()}
        for name, parts in values.items()
    }


def _segment(system: str, shift: float, n: int) -> dict[str, Any]:
    _, top, nats = SYSTEMS[system]
    found = {"hit_rate@1": estimate(top + shift, n**-0.5 / 2), "ndcg@10": estimate(top + 0.2 + shift, n**-0.5 / 2)}
    if nats is not None:
        found["nats"] = estimate(nats - 10 * shift, 3 * n**-0.5)
    return {**found, "num_examples": n, "num_users": n}


def _example(number: int) -> dict[str, Any]:
    draw = np.random.default_rng(number)
    target = TITLES[number]
    systems = {}
    for name in SYSTEMS:
        rank = int(draw.integers(1, CANDIDATES + 1))
        texts = [str(t) for t in draw.choice(TITLES[10:], 5, replace=False)]
        if rank <= 5:
            texts[rank - 1] = target
        top = [{"text": text, "score": -8.0 - place, "target": text == target} for place, text in enumerate(texts)]
        systems[name] = {
            "rank": rank,
            "full_rank": rank * 40 if name in FULL_CATALOGUE else None,
            "top": top,
            "text": TITLES[20 + number] if name == "ilora" else None,
            "valid": True,
        }
    history = [str(title) for title in draw.choice(TITLES[10:], 10, replace=False)]
    return {
        "task": "next_item",
        "example_id": f"next_item/{number}/40",
        "user_id": str(number),
        "history": history,
        "history_length": 40,
        "target": target,
        "label": None,
        "systems": systems,
    }


def _gate() -> dict[str, Any]:
    table = _gates()
    weights = np.stack(table["weights"].to_numpy(zero_copy_only=False))
    entropy = -(weights * np.log(weights)).sum(axis=1)
    counts = np.bincount(table["strongest"].to_numpy(), minlength=EXPERTS)
    return {
        "system": "ilora",
        "num_experts": EXPERTS,
        "mean_weights": weights.mean(0).tolist(),
        "file": "gates.parquet",
        "strongest_counts": counts.tolist(),
        "mean_entropy": float(entropy.mean()),
        "max_entropy": float(np.log(EXPERTS)),
        "deviation": weights.std(0).tolist(),
        "type": "softmax",
        "uniform": 1 / EXPERTS,
        "collapse": {
            "num_users": EXAMPLES,
            "entropy": 0.97,
            "largest_mean": 0.34,
            "top_expert_share": 0.4,
            "stuck_experts": 0.0,
            "collapsed_layers": 0.0,
            "collapsed": False,
        },
        "num_layers": None,
        "layer_means": None,
    }


GENRES = ("Drama", "Comedy", "Action", "Thriller", "Romance", "Adventure", "Sci-Fi", "War", "Crime", "Children's")


def _experts() -> dict[str, Any]:
    draw = np.random.default_rng(11)

    def group(name: str, spread: float) -> dict[str, Any]:
        lifts = [
            {"value": v, "low": v / 1.2, "high": v * 1.2} for v in np.exp(spread * draw.normal(size=EXPERTS)).tolist()
        ]
        return {"name": name, "share": 0.2, "num_users": 100, "lifts": lifts}

    parts = [{"name": "genres", "what": "items", "groups": [group(name, 0.35) for name in GENRES]}]
    buckets = {
        "history length": ("1-5", "6-10", "11-20", "21-50"),
        "head items in the history": ("≤ 40%", "40% to 65%", "> 65%"),
        "time since the last interaction": ("≤ 2 hours", "2 hours to 3 days", "> 3 days"),
    }
    parts += [
        {"name": name, "what": "users", "groups": [group(value, 0.15) for value in values]}
        for name, values in buckets.items()
    ]
    return {
        "system": "ilora",
        "num_users": EXAMPLES,
        "item_groups": {"column": "genres", "separator": "|", "guessed": True},
        "notes": [],
        "parts": parts,
    }


def layered() -> dict[str, Any]:
    """The same run with a collapsed gate a layer."""
    document = metrics()
    draw = np.random.default_rng(5)
    means = draw.dirichlet(np.ones(EXPERTS) * 3, size=30)
    document["gate"] |= {"num_layers": 30, "layer_means": means.tolist()}
    collapse = {"collapsed": True, "collapsed_layers": 0.8, "largest_mean": 0.97, "stuck_experts": 0.75}
    document["gate"]["collapse"] |= collapse
    return document


def _log(step: int) -> dict[str, float]:
    wave = np.sin(step) / 10
    weights = {f"expert_{k}": 0.25 + (k - 1.5) * step / 2000 for k in range(EXPERTS)}
    return {
        "step": step,
        "loss": 4.0 - step / 100 + wave,
        "learning_rate": 1e-3,
        "gate_entropy": 1.386 - step / 400,
        **weights,
    }


def _predictions() -> pa.Table:
    draw = np.random.default_rng(7)
    rows = []
    for name, (_, top, nats) in SYSTEMS.items():
        for number in range(EXAMPLES):
            rank = 1 if draw.random() < top else int(draw.integers(2, CANDIDATES + 1))
            rows.append(
                {
                    "system": name,
                    "task": "next_item",
                    "example_id": f"next_item/{number}/40",
                    "user_index": number,
                    "target": number % 40,
                    "candidates": list(range(CANDIDATES)),
                    "scores": [0.0] * CANDIDATES,
                    "rank": rank,
                    "full_rank": None,
                    "nats": nats,
                    "text": None,
                    "valid": True,
                }
            )
    return pa.Table.from_pylist(rows)


def _gates() -> pa.Table:
    draw = np.random.default_rng(3)
    place = draw.normal(size=(EXAMPLES, 2))
    logits = place @ np.array([[1.5, -1.0, 0.2, -0.5], [0.1, 1.0, -1.5, 0.3]]) + 0.2 * draw.normal(
        size=(EXAMPLES, EXPERTS)
    )
    weights = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return pa.table(
        {
            "example_id": [f"next_item/{n}/40" for n in range(EXAMPLES)],
            "user_index": pa.array(np.arange(EXAMPLES), pa.int32()),
            "weights": pa.array(weights.astype(np.float32).tolist(), pa.list_(pa.float32())),
            "x": place[:, 0],
            "y": place[:, 1],
            "strongest": pa.array(weights.argmax(axis=1), pa.int32()),
        }
    )


if __name__ == "__main__":
    from recllm.evaluate import report

    made = {"--like": closed_task, "--layers": layered, "--actions": action_task}
    report.write(write(Path(sys.argv[1]), made[sys.argv[2]]() if len(sys.argv) > 2 else None))
