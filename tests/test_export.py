"""`recllm export` on a whole run: an ordinary LoRA of one user, or a few for all."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from recllm.cli import main
from recllm.model import export


@pytest.fixture
def trained(tiny_recipe: Path) -> Path:
    """The recipe of a run whose adapter is trained."""
    for verb in ("convert", "train"):
        assert main([verb, str(tiny_recipe)]) == 0
    return tiny_recipe


def test_export(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_llama) -> None:
    from peft import PeftModel

    recipe, user, out = str(trained), str(tmp_path / "user"), tmp_path / "prototypes"
    assert main(["export", recipe, "--user", "u7", "--output", user]) == 0
    PeftModel.from_pretrained(tiny_llama(), user)
    log = history_of("u7", tmp_path)
    by_ids = ["export", recipe, "--output", str(tmp_path / "ids"), "--history"]
    assert main([*by_ids, ",".join(log)]) == 0
    weights = [(tmp_path / out / "adapter_model.safetensors").read_bytes() for out in ("user", "ids")]
    assert weights[0] == weights[1]
    capsys.readouterr()
    assert main([*by_ids, f"{log[0]},absent"]) == 0
    said = capsys.readouterr().out
    assert "a history of 1 items" in said
    assert "left out as unknown: absent" in said
    assert (tmp_path / "ids" / "adapter_model.safetensors").read_bytes() != weights[0]

    assert main(["export", recipe, "--prototypes", "3", "--output", str(out), "--examples", "8"]) == 0
    said = capsys.readouterr().out
    document = json.loads((out / "prototypes.json").read_text())
    assert document["users"] == sum(entry["users"] for entry in document["prototypes"]) == 60
    assert document["cost"]["examples"] == 8
    assert f"a held-out answer loses {document['cost']['nats_lost']:.4f} nats" in said
    for entry in document["prototypes"]:
        PeftModel.from_pretrained(tiny_llama(), str(out / entry["folder"]))
    assert pq.read_table(out / "assignment.parquet")["user_id"].to_pylist()[0].startswith("u")

    # what cannot be is said before anything long, and takes nothing away
    assert main(["export", recipe, "--user", "nobody", "--output", user]) == 2
    assert 'no user "nobody" among its 60' in capsys.readouterr().err
    assert main(["export", recipe, "--prototypes", "61", "--output", str(out)]) == 2
    assert "61 prototypes" in capsys.readouterr().err
    assert main(["export", recipe, "--prototypes", "0", "--output", str(out)]) == 2
    assert main(["export", recipe, "--user", "u7", "--output", str(tmp_path / "run")]) == 2
    assert "no earlier export" in capsys.readouterr().err
    assert (out / "prototypes.json").is_file()


@pytest.mark.parametrize(("gate", "dense", "listed"), [("before_list", 4, 4), ("before_list", 0, 0), ("all", 4, 0)])
def test_the_gate_reads_what_it_read_of_held_out_examples(tiny_recipe, tmp_path, monkeypatch, gate, dense, listed):
    edited = yaml.safe_load(tiny_recipe.read_text())
    edited["history"] = {"gate": gate}
    edited["tasks"] = [{"task": "next_item", "template": "next_item/films", "dense_window": dense}]
    tiny_recipe.write_text(yaml.safe_dump(edited))
    for verb in ("convert", "train"):
        assert main([verb, str(tiny_recipe)]) == 0
    seen, gates_of = [], export.gates_of

    def watched(model, dataset, users, ends, max_items):
        seen.append((users, ends, np.diff(dataset.sequences.offsets)))
        return gates_of(model, dataset, users, ends, max_items)

    monkeypatch.setattr(export, "gates_of", watched)
    assert main(["export", str(tiny_recipe), "--user", "u7", "--output", str(tmp_path / "user")]) == 0
    ((users, ends, lengths),) = seen
    assert ends.tolist() == [lengths[users[0]] - listed]
    by_ids = ["--history", ",".join(history_of("u7", tmp_path)), "--output", str(tmp_path / "ids")]
    assert main(["export", str(tiny_recipe), *by_ids]) == 0
    one, same = ((tmp_path / out / "adapter_model.safetensors").read_bytes() for out in ("user", "ids"))
    assert one == same


def history_of(user: str, folder: Path) -> list[str]:
    """Item ids of a user of the log, oldest first."""
    lines = (folder / "interactions.csv").read_text().splitlines()
    return [line.split(",")[1] for line in lines if line.startswith(f"{user},")]


def test_export_before_training(tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tiny_recipe), "--user", "u7", "--output", str(tmp_path / "user")]) == 2
    assert "run `recllm convert`" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--user", "u1", "--prototypes", "2"], ["--user", "u1", "--history", "i1"]])
def test_one_of_them_is_asked_for(tiny_recipe: Path, options: list[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", str(tiny_recipe), "--output", "x", *options])
