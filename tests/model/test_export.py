import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from recllm import files
from recllm.errors import UserError
from recllm.model.adapter import gate_weights
from recllm.model.export import (
    assign,
    cluster,
    clustering_cost,
    distortion,
    export_prototypes,
    export_user_adapter,
)
from recllm.recipe import GateSection
from recllm.schema import event_vocabulary_sha256, vocabulary_sha256

CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # fp32, logits of order 10
GATES = {
    "softmax": GateSection(),
    "top-k": GateSection(top_k=2),
    "sigmoid": GateSection(type="sigmoid"),
    "per layer": GateSection(per_layer=True),
    "sigmoid per layer": GateSection(type="sigmoid", per_layer=True, hidden_size=6),
}


def _logits(model: Any, tokens: torch.Tensor, **gates: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens, **gates).logits


# ---- one user ----


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES.keys())
def test_one_users_adapter_is_an_ordinary_lora(
    adapter: Any, tiny_llama: Any, tmp_path: Path, tokens: torch.Tensor, histories: torch.Tensor, gate: GateSection
) -> None:
    model = adapter(gate=gate)
    weights = gate_weights(model, histories).detach()
    same = tokens[:1]
    outputs = []
    for user in range(3):
        export_user_adapter(model, weights[user], tmp_path / "user")
        stock = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "user"))
        expected = _logits(model, same, history_items=histories[user : user + 1])
        torch.testing.assert_close(_logits(stock, same), expected, **CLOSE)
        torch.testing.assert_close(_logits(stock.merge_and_unload(), same), expected, **CLOSE)
        outputs.append(expected)
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-2)
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-2)


def test_one_users_weights_are_one_row(adapter: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\(2, 4\), one user's are \(4,\)"):
        export_user_adapter(adapter(), torch.rand(2, 4), tmp_path / "user")
    with pytest.raises(UserError, match="not finite"):
        export_user_adapter(adapter(), torch.tensor([0.5, float("nan"), 0.5, 0.0]), tmp_path / "user")
    assert not (tmp_path / "user").exists()


@pytest.fixture
def catalogue(tmp_path: Path) -> Path:
    """A folder with the vocabulary of the 20 items i0 … i19, as adapter/ and dataset/ have it."""
    ids = [f"i{number}" for number in range(20)]
    columns = {"item_index": pa.array(range(20), pa.int32())} | dict.fromkeys(("item_id", "title", "text"), ids)
    (tmp_path / "catalogue").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "catalogue" / "items.parquet")
    manifest = {"items_sha256": vocabulary_sha256(ids), "history_max_items": 4}
    (tmp_path / "catalogue" / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path / "catalogue"


@pytest.fixture
def of_catalogue(adapter: Any, catalogue: Path) -> Any:
    """of_catalogue(…) is adapter(…), of that vocabulary."""

    def build(name: str = "default", **section: Any) -> Any:
        model = adapter(name=name, **section)
        manifest = json.loads((catalogue / "manifest.json").read_text())
        model.base_model.sequence_encoder[name].vocabulary_sha256 = manifest["items_sha256"]
        return model

    return build


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES.keys())
@pytest.mark.parametrize("name", ["default", "other"])
def test_a_history_of_item_ids_is_exported_as_the_gate_that_it_has(
    of_catalogue: Any, catalogue: Path, tmp_path: Path, gate: GateSection, name: str
) -> None:
    model = of_catalogue(name=name, gate=gate)
    weights = {  # of what is read, padded with nothing: the newest history_max_items = 4
        history: model.base_model.gate_weights(torch.tensor([[*read]], dtype=torch.long), adapter_name=name)[0].detach()
        for history, read in {"i3 i1": (3, 1), "i1 i3": (1, 3), "i9 i8 i7 i6 i5 i19": (7, 6, 5, 19), "": ()}.items()
    }
    uniform = torch.full_like(weights[""], 1 / 2 if gate.type == "sigmoid" else 1 / 4)
    assert torch.equal(weights[""], uniform)  # of an empty history: the cold start
    written = []
    for history, expected in weights.items():
        assert export_user_adapter(model, history.split(), tmp_path / "user", name, items=catalogue) == []
        export_user_adapter(model, expected, tmp_path / "by-gate", name)
        found, wanted = (load_file(tmp_path / out / "adapter_model.safetensors") for out in ("user", "by-gate"))
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, msg=lambda text, key=key: f"{key}: {text}")
        written.append(torch.cat([value.flatten() for key, value in found.items() if "lora_B" in key]))
    assert all(not torch.allclose(written[0], other, atol=1e-2) for other in written[1:])


def test_items_that_are_unknown_are_left_out_and_said(of_catalogue: Any, catalogue: Path, tmp_path: Path) -> None:
    """As serving leaves them out: before the newest items that the gate reads are counted."""
    model, weights = of_catalogue(), tmp_path / "user" / "adapter_model.safetensors"
    export_user_adapter(model, ["i1", "i2", "i3", "i4"], tmp_path / "user", items=catalogue)
    known = weights.read_bytes()
    history = ["new", "i1", "i2", "new", "i3", "20", "i4"]
    assert export_user_adapter(model, history, tmp_path / "user", items=catalogue) == ["new", "new", "20"]
    assert weights.read_bytes() == known
    export_user_adapter(model, [], tmp_path / "user", items=catalogue)
    cold = weights.read_bytes()
    assert export_user_adapter(model, ["new"], tmp_path / "user", items=catalogue) == ["new"]
    assert weights.read_bytes() == cold != known


def test_histories_that_cannot_be_read_are_refused(
    of_catalogue: Any, adapter: Any, catalogue: Path, tmp_path: Path
) -> None:
    def refused(words: str, history: Any = ("i1",), model: Any = None, items: Path | None = catalogue) -> None:
        with pytest.raises(UserError, match=words):
            export_user_adapter(model or of_catalogue(), history, tmp_path / "user", items=items)

    refused("needs items=, the adapter's folder", items=None)
    refused('the history is the text "i1", a list', history="i1")
    refused(r"history\[1\] is 3, an item id .* is expected, as text", history=["i1", 3])
    refused(r"trained on the vocabulary None…, .* pass the adapter's own folder", model=adapter())
    refused("no gate to fold", model=adapter(method="lora"))
    without = of_catalogue()
    del without.base_model.sequence_encoder["default"]
    refused("no sequence encoder", model=without)
    manifest = json.loads((catalogue / "manifest.json").read_text()) | {"events": True, "actions": {"labels": ["view"]}}
    (catalogue / "manifest.json").write_text(json.dumps(manifest))
    events = of_catalogue()
    events.base_model.sequence_encoder["default"].vocabulary_sha256 = event_vocabulary_sha256(
        [f"i{number}" for number in range(20)], ["view"]
    )
    refused("is of events, whose histories are no lists of item ids", model=events)
    assert not (tmp_path / "user").exists()


def test_no_folder_of_something_else_is_replaced(adapter: Any, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    for export in (
        lambda: export_user_adapter(adapter(), torch.rand(4), tmp_path / "mine"),
        lambda: export_prototypes(adapter(), torch.rand(3, 4), 2, tmp_path / "mine"),
    ):
        with pytest.raises(UserError, match="no earlier export"):
            export()
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


def test_an_earlier_export_is_replaced_by_another(adapter: Any, tmp_path: Path) -> None:
    export_user_adapter(adapter(), torch.rand(4), tmp_path / "out")
    export_prototypes(adapter(), torch.rand(3, 4), 2, tmp_path / "out")
    export_user_adapter(adapter(), torch.rand(4), tmp_path / "out")
    assert not (tmp_path / "out" / "prototype-00").exists()


def test_what_has_no_gate_is_refused(adapter: Any, tmp_path: Path) -> None:
    for method in ("lora", "soft_token"):
        with pytest.raises(UserError, match="no gate to fold"):
            export_user_adapter(adapter(method=method), torch.rand(4), tmp_path / "user")


# ---- clusters ----


def _groups(sizes: list[int], spread: float = 0.01) -> np.ndarray:
    generator = np.random.default_rng(0)
    centres = np.eye(len(sizes), 6)
    parts = [centre + spread * generator.standard_normal((size, 6)) for centre, size in zip(centres, sizes)]
    return np.concatenate(parts)


def test_groups_are_found_the_largest_first() -> None:
    points = _groups([5, 30, 12])
    centres, labels = cluster(points, 3)
    assert labels.tolist() == [2] * 5 + [0] * 30 + [1] * 12
    assert np.allclose(centres[0], points[5:35].mean(axis=0))
    assert assign(points, centres).tolist() == labels.tolist()


def test_one_prototype_is_the_mean() -> None:
    points = _groups([5, 3])
    centres, labels = cluster(points, 1)
    assert np.allclose(centres, points.mean(axis=0))
    assert not labels.any()
    assert distortion(points, centres[labels])["variance_kept"] == pytest.approx(0)


def test_as_many_prototypes_as_users_cost_nothing() -> None:
    points = _groups([4, 3])
    centres, labels = cluster(points, 7)
    assert distortion(points, centres[labels]) == {"mean_distance": 0, "max_distance": 0, "variance_kept": 1}


def test_more_prototypes_than_different_gates() -> None:
    points = np.repeat(np.eye(2), [5, 2], axis=0)
    centres, labels = cluster(points, 4)  # empty histories all have the same gate
    assert centres.tolist() == [[1, 0], [0, 1]]
    assert labels.tolist() == [0] * 5 + [1] * 2


@pytest.mark.parametrize("seed", range(5))
def test_no_cluster_is_empty(seed: int) -> None:
    # a mass of equal gates and few others: starts fall on top of each other
    points = np.concatenate([np.zeros((500, 4)), np.random.default_rng(seed).random((9, 4))])
    centres, labels = cluster(points, 8, seed)
    assert len(centres) == 8
    assert np.bincount(labels, minlength=8).min() >= 1
    assert np.isfinite(centres).all()


def test_a_cluster_that_is_left_alone_begins_anew() -> None:
    from recllm.model.export import _lloyd

    points = _groups([20, 20, 20])
    centres, labels = _lloyd(points, np.stack([points[0], points[25], np.full(6, 1e3)]))  # the third is nobody's
    assert sorted(np.bincount(labels).tolist()) == [20, 20, 20]
    assert distortion(points, centres[labels])["variance_kept"] > 0.99


def test_the_same_seed_gives_the_same_clusters() -> None:
    points = np.random.default_rng(0).random((200, 4))
    first, second = cluster(points, 5, seed=3), cluster(points, 5, seed=3)
    assert np.array_equal(first[0], second[0])
    assert np.array_equal(first[1], second[1])


def test_more_prototypes_keep_more_variance() -> None:
    points = np.random.default_rng(0).random((300, 4))
    kept = [
        distortion(points, (result := cluster(points, m))[0][result[1]])["variance_kept"] for m in (1, 2, 4, 16, 64)
    ]
    assert kept == sorted(kept)
    assert kept[-1] > 0.9


# ---- written ----


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES.keys())
def test_prototypes_are_ordinary_loras_of_their_gates(
    adapter: Any, tiny_llama: Any, tmp_path: Path, tokens: torch.Tensor, gate: GateSection
) -> None:
    model = adapter(gate=gate)
    weights = gate_weights(model, torch.arange(20)[:, None]).detach()
    document = export_prototypes(model, weights, 3, tmp_path / "out", user_ids=[f"u{n}" for n in range(20)])
    assert document == json.loads((tmp_path / "out" / "prototypes.json").read_text())
    table = pq.read_table(tmp_path / "out" / "assignment.parquet")
    assert table.column_names == ["row", "user_id", "prototype", "distance"]
    assert table["user_id"].to_pylist()[:2] == ["u0", "u1"]
    for number, entry in enumerate(document["prototypes"]):
        members = [row for row, prototype in enumerate(table["prototype"].to_pylist()) if prototype == number]
        mean = weights[members].mean(dim=0)
        assert entry["users"] == len(members) > 0
        torch.testing.assert_close(torch.tensor(entry["gate_weights"]), mean)
        stock = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "out" / entry["folder"]))
        torch.testing.assert_close(
            _logits(stock, tokens), _logits(model, tokens, gate_weights=mean.expand(3, *mean.shape)), **CLOSE
        )
    assert document["mean_distance"] == pytest.approx(np.mean(table["distance"].to_pylist()))
    assert document["max_distance"] == pytest.approx(max(table["distance"].to_pylist()))
    assert 0 < document["variance_kept"] < 1


def test_the_same_export_twice_is_the_same_folder(adapter: Any, tmp_path: Path) -> None:
    weights = torch.rand(30, 4, generator=torch.Generator().manual_seed(0)).softmax(-1)
    for name in ("first", "second"):
        export_prototypes(adapter(), weights, 4, tmp_path / name, seed=1)
    assert files.sha256_of(tmp_path / "first") == files.sha256_of(tmp_path / "second")


@pytest.mark.parametrize("m", [0, 4])
def test_a_number_that_cannot_be(adapter: Any, tmp_path: Path, m: int) -> None:
    with pytest.raises(UserError, match="1 to 3 prototypes"):
        export_prototypes(adapter(), torch.rand(3, 4), m, tmp_path / "out")


def test_gates_of_another_shape(adapter: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"weights \(users, 4\) are expected"):
        export_prototypes(adapter(), torch.rand(3, 5), 2, tmp_path / "out")


# ---- what it costs ----


def test_cost_is_the_mean_difference_under_the_nearest_prototype() -> None:
    own = torch.tensor([[1.0, 0.0], [0.8, 0.2], [0.0, 1.0]])
    centres = np.array([[0.9, 0.1], [0.0, 1.0]])

    def nats(weights: torch.Tensor) -> np.ndarray:  # further from the first expert: dearer
        return 5 + weights[:, 1].numpy()

    cost = clustering_cost(nats, own, centres)
    assert cost["examples"] == 3
    assert cost["nats_own"] == pytest.approx(5 + (0.0 + 0.2 + 1.0) / 3)
    assert cost["nats_prototype"] == pytest.approx(5 + (0.1 + 0.1 + 1.0) / 3)
    assert cost["nats_lost"] == pytest.approx((0.1 - 0.1 + 0.0) / 3, abs=1e-7)
    assert cost["max_nats_lost"] == pytest.approx(0.1)


def test_cost_hands_over_gates_of_the_models_shape(adapter: Any, tmp_path: Path) -> None:
    seen: list[tuple[int, ...]] = []
    own = torch.rand(7, 2, 4).softmax(-1)

    def nats(weights: torch.Tensor) -> np.ndarray:
        seen.append(tuple(weights.shape))
        return np.zeros(7)

    document = export_prototypes(
        adapter(gate=GATES["per layer"]),
        own,
        2,
        tmp_path / "out",
        cost=lambda centres: clustering_cost(nats, own, centres),
    )
    assert seen == [(7, 2, 4), (7, 2, 4)]
    assert document["cost"]["nats_lost"] == 0
