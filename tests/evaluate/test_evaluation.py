import json
import shutil
from math import log

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from recllm.data.dataset import Dataset
from recllm.errors import UserError
from recllm.evaluate import baselines, catalogue, figures, language_model
from recllm.evaluate.evaluation import evaluate, training_log, unread_notes
from recllm.evaluate.language_model import principal_components, swapped_rows
from recllm.evaluate.tasks import Prediction, load_tasks
from recllm.infer import transformers_engine
from recllm.infer.transformers_engine import TransformersEngine
from recllm.recipe import RankingSection


@pytest.fixture(scope="module")
def report(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "report"
    section = made.recipe.evaluate.model_copy(update={"adapters": {"stock": str(made.plain)}})
    recipe = made.recipe.model_copy(update={"evaluate": section})
    document = evaluate(recipe, made.dataset, made.encoder, made.adapter, folder)
    return folder, document


def entry(document, name, task="next_item"):
    (found,) = [system for system in document["systems"] if (system["name"], system["task"]) == (name, task)]
    return found


def test_the_report_folder_is_whole(report):
    folder, document = report
    names = {path.name for path in folder.iterdir()}
    assert {"metrics.json", "predictions.parquet", "gates.parquet", "report.html", "report.md"} <= names
    assert json.loads((folder / "metrics.json").read_text()) == document


def test_every_system_is_there_for_every_task(report):
    _, document = report
    names = [(system["name"], system["kind"]) for system in document["systems"] if system["task"] == "next_item"]
    assert names == [
        ("ilora", "adapter"),
        ("stock", "adapter"),
        ("ilora_uniform", "control"),
        ("ilora_shuffled", "control"),
        ("base_model", "base_model"),
        ("sasrec", "baseline"),
        ("item_to_item", "baseline"),
        ("popularity", "baseline"),
        ("random", "baseline"),
    ]
    like = [system["name"] for system in document["systems"] if system["task"] == "like"]
    assert like[-2:] == ["constant", "user_most_frequent"]
    assert document["main_system"] == {"next_item": "ilora", "like": "ilora"}


def test_figures_are_those_of_the_predictions(report):
    folder, document = report
    rows = pq.read_table(folder / "predictions.parquet").to_pylist()
    for name in ("ilora", "sasrec", "random"):
        mine = [row for row in rows if row["system"] == name and row["task"] == "next_item"]
        assert len(mine) == 10
        hits = [row["rank"] <= 3 for row in mine]
        found = entry(document, name)["metrics"]["hit_rate@3"]
        assert found["value"] == pytest.approx(sum(hits) / 10)
        assert found["low"] <= found["value"] <= found["high"]
        for row in mine:
            target = row["scores"][row["candidates"].index(row["target"])]
            assert row["rank"] == sum(score >= target for score in row["scores"])


def test_nats_are_the_scores_of_the_targets(report):
    folder, _ = report
    for row in pq.read_table(folder / "predictions.parquet").to_pylist():
        if row["nats"] is not None and row["task"] == "next_item":
            assert row["nats"] == pytest.approx(-row["scores"][row["candidates"].index(row["target"])])


def test_item_to_item_knows_the_ring(report):
    _, document = report
    assert entry(document, "item_to_item")["metrics"]["hit_rate@1"]["value"] == 1  # the next item follows the last
    assert entry(document, "item_to_item")["full_catalogue"]["hit_rate@1"]["value"] == 1
    assert entry(document, "ilora")["full_catalogue"] is None


def test_controls_differ_from_the_adapter_and_from_each_other(report):
    _, document = report
    nats = {name: entry(document, name)["metrics"]["nats"]["value"] for name in
            ("ilora", "ilora_uniform", "ilora_shuffled", "stock", "base_model")}  # fmt: skip
    assert len({round(value, 6) for value in nats.values()}) == 5


def test_the_uniform_control_is_the_adapter_as_a_plain_lora(made, report, tmp_path):
    _, document = report
    shutil.copytree(made.adapter, tmp_path / "as_plain")
    for name in ("ilora.json", "gate.safetensors"):
        (tmp_path / "as_plain" / name).unlink()
    shutil.rmtree(tmp_path / "as_plain" / "sequence_encoder")
    found = evaluate(made.recipe, made.dataset, made.encoder, tmp_path / "as_plain", tmp_path / "report")
    uniform, plain = entry(document, "ilora_uniform"), entry(found, "lora")
    assert plain["metrics"]["nats"]["value"] == pytest.approx(uniform["metrics"]["nats"]["value"], abs=1e-4)
    assert found["gate"] is None


def test_comparisons_are_with_the_main_system_and_corrected(report):
    _, document = report
    tests = [test for test in document["comparisons"] if (test["task"], test["metric"]) == ("next_item", "hit_rate@1")]
    assert {test["a"] for test in tests} == {"ilora"}
    assert len(tests) == 8
    assert {test["method"] for test in tests} == {"mcnemar"}  # one example a user
    assert all(test["p_holm"] >= test["p_value"] for test in tests)
    for test in tests:
        values = [entry(document, test[side])["metrics"]["hit_rate@1"]["value"] for side in ("a", "b")]
        assert test["difference"] == pytest.approx(values[0] - values[1])


def test_segments_divide_the_examples(report):
    _, document = report
    for segment, values in document["segments"]["next_item"].items():
        assert sum(found["ilora"]["num_examples"] for found in values.values()) == 10, segment


def test_gates_are_written_for_every_example(report):
    folder, document = report
    gates = pq.read_table(folder / "gates.parquet").to_pylist()
    assert len(gates) == 20  # both tasks
    assert all(sum(row["weights"]) == pytest.approx(1) for row in gates)
    assert all(row["strongest"] == int(np.argmax(row["weights"])) for row in gates)
    assert document["gate"]["mean_weights"] == pytest.approx(np.mean([row["weights"] for row in gates], axis=0))
    assert 0 < document["gate"]["mean_entropy"] <= document["gate"]["max_entropy"] == pytest.approx(log(2))


def test_generation_counts_unfinished_output_as_invalid(report):
    _, document = report
    found = entry(document, "ilora")["generation"]
    assert found["num_examples"] == 10
    assert found["valid_ratio"]["value"] >= found["exact_hit"]["value"]
    assert entry(document, "sasrec")["generation"] is None
    assert entry(document, "ilora", "like")["generation"] is None


def test_the_users_own_log_and_provenance_come_along(report, made):
    _, document = report
    assert document["training_log"] == [{"step": 1, "loss": 2.5}]
    assert document["provenance"]["hashes"]["items"] == Dataset.open(made.dataset).vocabulary_sha256
    assert set(document["provenance"]["hashes"]["adapters"]) == {"stock"}
    assert document["provenance"]["engine"] == "transformers"
    assert document["counts"]["evaluated"]["next_item"] == {
        "examples": 10, "users": 10, "of_examples": 60, "chosen_by_seed": 0,
    }  # fmt: skip


def test_baselines_alone_need_no_adapter(made, tmp_path):
    recipe = made.recipe.model_copy(
        update={"evaluate": made.recipe.evaluate.model_copy(update={"baselines": ["popularity", "random"]})}
    )
    document = evaluate(recipe, made.dataset, made.encoder, None, tmp_path / "report")
    names = {system["name"] for system in document["systems"]}
    assert names == {"popularity", "random", "constant", "user_most_frequent"}
    assert document["gate"] is None
    assert not (tmp_path / "report" / "gates.parquet").exists()


def test_no_log_is_no_error(tmp_path):
    assert training_log(tmp_path) == []
    assert training_log(None) == []


# ---- whom experts serve, other gates, soft tokens ----


def names_of(document, task="next_item"):
    return [system["name"] for system in document["systems"] if system["task"] == task]


def evaluate_kind(made, tmp_path, kind, adapters=None, **changes):
    section = made.recipe.evaluate.model_copy(update={"baselines": [], "adapters": adapters or {}, **changes})
    recipe = made.recipe.model_copy(update={"evaluate": section})
    return evaluate(recipe, made.dataset, made.encoder, made.kinds[kind], tmp_path / "report")


def test_experts_are_described_by_genres_and_users(report):
    folder, document = report
    found = document["experts"]
    assert found["item_groups"] == {"column": "genres", "separator": "|", "guessed": True}
    assert found["num_users"] == 10
    parts = {part["name"]: part for part in found["parts"]}
    assert {group["name"] for group in parts["genres"]["groups"]} <= {"Action", "Comedy", "Drama"}
    assert [group["name"] for group in parts["gender"]["groups"]] == ["F", "M"]
    assert all(len(group["lifts"]) == 2 for part in found["parts"] for group in part["groups"])
    assert "Whom each expert serves" in (folder / "report.html").read_text()


def test_collapse_is_that_of_the_gate_module(report):
    import torch

    from recllm.model.gate import collapse

    folder, document = report
    weights = np.array(pq.read_table(folder / "gates.parquet")["weights"].to_pylist())
    assert document["gate"]["collapse"] == pytest.approx(collapse(torch.tensor(weights)), abs=1e-6)
    assert document["gate"]["uniform"] == 1 / 2


def test_nats_are_compared_with_every_plain_lora(report):
    _, document = report
    tests = [test for test in document["against_plain"] if test["task"] == "next_item"]
    assert [(test["a"], test["b"]) for test in tests] == [
        ("ilora", "stock"), ("ilora_uniform", "stock"), ("ilora_shuffled", "stock"),
    ]  # fmt: skip
    for test in tests:
        values = [entry(document, test[side])["metrics"]["nats"]["value"] for side in ("a", "b")]
        assert test["difference"] == pytest.approx(values[0] - values[1])
        assert test["p_holm"] >= test["p_value"]


def test_segments_have_the_rank_in_the_catalogue_where_a_system_has_one(report):
    _, document = report
    for values in document["segments"]["next_item"].values():
        for found in values.values():
            assert "full ndcg@3" in found["sasrec"]
            assert "full ndcg@3" not in found["ilora"]


def test_a_soft_token_has_its_own_controls_and_no_gate(made, tmp_path):
    document = evaluate_kind(made, tmp_path, "soft_token", {"lora": str(made.plain)})
    assert names_of(document) == ["soft_token", "lora", "soft_token_shuffled", "soft_token_without_token"]
    assert document["gate"] is document["experts"] is None
    assert not (tmp_path / "report/gates.parquet").exists()
    nats = [entry(document, name)["metrics"]["nats"]["value"] for name in names_of(document)]
    assert len({round(value, 6) for value in nats}) == 4
    assert "adds a soft token" in (tmp_path / "report/report.html").read_text()
    assert {test["a"] for test in document["against_plain"]} == {*names_of(document)} - {"lora"}
    assert entry(document, "soft_token")["method"] == "soft_token"


def test_without_its_token_the_adapter_is_the_plain_lora_of_the_same_weights(made, tmp_path):
    shutil.copytree(made.kinds["soft_token"], tmp_path / "plain")
    for name in ("soft_token.json", "soft_token.safetensors"):
        (tmp_path / "plain" / name).unlink()
    shutil.rmtree(tmp_path / "plain/sequence_encoder")
    document = evaluate_kind(
        made, tmp_path, "soft_token", {"plain": str(tmp_path / "plain")}, controls=["without_token"]
    )
    without, plain = entry(document, "soft_token_without_token"), entry(document, "plain")
    assert without["metrics"]["nats"]["value"] == pytest.approx(plain["metrics"]["nats"]["value"], abs=1e-5)


def test_a_control_that_does_not_apply_is_left_out_with_a_sentence(made, tmp_path):
    document = evaluate_kind(made, tmp_path, "soft_token", controls=["uniform", "shuffled"])
    assert names_of(document) == ["soft_token", "soft_token_shuffled"]
    said = "No uniform control: a soft token has no gate, it is switched off by without_token."
    assert document["notes"] == [said]
    assert said in (tmp_path / "report/report.html").read_text()


def test_a_sigmoid_gate_is_uniform_at_one_half(made, tmp_path):
    shutil.copytree(made.kinds["sigmoid"], tmp_path / "plain")
    for name in ("ilora.json", "gate.safetensors"):
        (tmp_path / "plain" / name).unlink()
    shutil.rmtree(tmp_path / "plain/sequence_encoder")
    document = evaluate_kind(made, tmp_path, "sigmoid", {"plain": str(tmp_path / "plain")}, controls=["uniform"])
    uniform, plain = entry(document, "ilora_uniform"), entry(document, "plain")
    assert uniform["metrics"]["nats"]["value"] == pytest.approx(plain["metrics"]["nats"]["value"], abs=1e-4)
    assert (document["gate"]["type"], document["gate"]["uniform"], document["gate"]["num_experts"]) == (
        "sigmoid",
        0.5,
        4,
    )
    assert 0 < document["gate"]["mean_entropy"] <= document["gate"]["max_entropy"] == pytest.approx(log(4))
    assert len(document["experts"]["parts"][0]["groups"][0]["lifts"]) == 4


def test_one_gate_a_layer_is_shown_by_layer_and_described_by_its_mean(made, tmp_path):
    document = evaluate_kind(made, tmp_path, "per_layer")
    gate = document["gate"]
    assert (gate["num_layers"], np.shape(gate["layer_means"])) == (2, (2, 2))
    assert np.mean(gate["layer_means"], axis=0) == pytest.approx(gate["mean_weights"])
    rows = pq.read_table(tmp_path / "report/gates.parquet").to_pylist()
    for row in rows:
        assert np.mean(row["layer_weights"], axis=0) == pytest.approx(row["weights"], abs=1e-6)
    assert (tmp_path / "report/plots/gate-layers.svg").is_file()
    nats = {round(entry(document, name)["metrics"]["nats"]["value"], 6) for name in names_of(document)}
    assert len(nats) == 3


def test_each_different_history_is_encoded_once(made, tmp_path, monkeypatch):
    from recllm.model import sequence_encoder

    before, calls = sequence_encoder.encode_histories, []

    def counted(*args, **kwargs):
        calls.append(len(args[1]))
        return before(*args, **kwargs)

    monkeypatch.setattr(sequence_encoder, "encode_histories", counted)
    evaluate(made.recipe.model_copy(update={"evaluate": made.recipe.evaluate.model_copy(update={"baselines": []})}),
             made.dataset, made.encoder, made.adapter, tmp_path / "report")  # fmt: skip
    assert calls == [20]  # two tasks; neither the controls nor the generated answers read the histories again


@pytest.mark.parametrize("kind", ["gru4rec", "content"])
def test_the_encoder_stands_under_its_own_type_and_ranks_the_catalogue(made, tmp_path, kind):
    import torch

    from recllm.model.sequence_encoder import make_encoder, save_encoder
    from recllm.recipe import EncoderSection

    dataset = Dataset.open(made.dataset)
    section = EncoderSection(type=kind, hidden_size=8, num_layers=1, num_heads=1)
    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) if kind == "content" else None
    save_encoder(make_encoder(section, 40, 20, features), tmp_path / "encoder", dataset.vocabulary_sha256, {})
    baselines = {"baselines": ["sequence_encoder", "random"]}
    recipe = made.recipe.model_copy(update={"evaluate": made.recipe.evaluate.model_copy(update=baselines)})
    document = evaluate(recipe, made.dataset, tmp_path / "encoder", None, tmp_path / "report")
    assert names_of(document) == [kind, "random"]
    assert 0 <= entry(document, kind)["full_catalogue"]["hit_rate@1"]["value"] <= 1
    assert "sequence encoder of this run" in entry(document, kind)["description"]


def test_the_old_name_of_the_encoder_says_its_new_one(tmp_path):
    from recllm.recipe import load_recipe

    with pytest.raises(UserError, match='"sasrec" is called "sequence_encoder" now'):
        load_recipe("movielens/next_item_ilora", ["evaluate.baselines=[sasrec]"])


# ---- bad input: refused before anything is scored, the old report untouched ----


@pytest.fixture
def no_scoring(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("scoring began before the input was checked")

    monkeypatch.setattr(language_model.LanguageModels, "_ask", refuse)
    monkeypatch.setattr(baselines, "score_examples", refuse)


def refuse(made, tmp_path, message, **changes):
    report = tmp_path / "report"
    report.mkdir()
    (report / "old").write_text("old")
    arguments = {"recipe": made.recipe, "dataset_folder": made.dataset, "encoder_folder": made.encoder,
                 "adapter_folder": made.adapter} | changes  # fmt: skip
    with pytest.raises(UserError, match=message):
        evaluate(**arguments, output=report)
    assert [path.name for path in report.iterdir()] == ["old"]


def test_an_adapter_of_another_vocabulary_is_refused(made, tmp_path, no_scoring):
    shutil.copytree(made.adapter, tmp_path / "other")
    document = json.loads((tmp_path / "other/ilora.json").read_text())
    (tmp_path / "other/ilora.json").write_text(json.dumps(document | {"vocabulary_sha256": "0" * 64}))
    refuse(made, tmp_path, "vocabulary 000000000000", adapter_folder=tmp_path / "other")


def test_an_adapter_of_another_base_model_is_refused(made, tmp_path, no_scoring):
    shutil.copytree(made.plain, tmp_path / "other")
    document = json.loads((tmp_path / "other/base_model.json").read_text())
    (tmp_path / "other/base_model.json").write_text(json.dumps(document | {"hidden_size": 576}))
    section = made.recipe.evaluate.model_copy(update={"adapters": {"wide": str(tmp_path / "other")}})
    recipe = made.recipe.model_copy(update={"evaluate": section})
    refuse(made, tmp_path, r"hidden_size 576 \(given: 32\)", recipe=recipe)


def test_a_folder_without_an_adapter_is_refused(made, tmp_path, no_scoring):
    refuse(made, tmp_path, "holds no adapter_config.json", adapter_folder=tmp_path)


def test_a_name_that_is_taken_is_refused(made, tmp_path, no_scoring):
    section = made.recipe.evaluate.model_copy(update={"adapters": {"ilora": str(made.plain)}})
    refuse(made, tmp_path, '"ilora" is the name', recipe=made.recipe.model_copy(update={"evaluate": section}))


def test_candidates_of_another_protocol_are_refused(made, tmp_path, no_scoring):
    candidates = made.recipe.protocol.candidates.model_copy(update={"seed": 5})
    protocol = made.recipe.protocol.model_copy(update={"candidates": candidates})
    recipe = made.recipe.model_copy(update={"protocol": protocol})
    refuse(made, tmp_path, r"candidates\.seed=0, the recipe has 5", recipe=recipe)


def test_broken_candidates_are_refused(made, tmp_path, no_scoring):
    shutil.copytree(made.dataset, tmp_path / "dataset")
    (path,) = (tmp_path / "dataset" / "test").iterdir()
    table = pq.read_table(path)
    lists = table["candidates"].to_pylist()
    lists[0][0] = lists[0][1]
    place, field = table.column_names.index("candidates"), table.schema.field("candidates")
    pq.write_table(table.set_column(place, field, pa.array(lists, field.type)), path)
    recipe = made.recipe.model_copy(update={"evaluate": made.recipe.evaluate.model_copy(update={"max_examples": None})})
    refuse(made, tmp_path, "example next_item/.*candidates", recipe=recipe, dataset_folder=tmp_path / "dataset")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "gate.safetensors"])
def test_a_damaged_adapter_is_refused(made, tmp_path, no_scoring, name):
    shutil.copytree(made.adapter, tmp_path / "other")
    (tmp_path / "other" / name).write_bytes((made.adapter / name).read_bytes()[:-40])
    section = made.recipe.evaluate.model_copy(update={"adapters": {"second": str(tmp_path / "other")}})
    refuse(made, tmp_path, name, recipe=made.recipe.model_copy(update={"evaluate": section}))


def test_an_answer_that_the_model_has_no_room_for_is_refused(made, tmp_path, no_scoring):
    decoding = made.recipe.protocol.decoding.model_copy(update={"max_new_tokens": 500})
    protocol = made.recipe.protocol.model_copy(update={"decoding": decoding})
    refuse(made, tmp_path, "lower protocol.decoding.max_new_tokens", recipe=made.recipe.model_copy(
        update={"protocol": protocol}))  # fmt: skip


def test_a_prompt_that_the_model_has_no_room_for_is_refused(made, tmp_path, no_scoring, monkeypatch):
    from recllm.infer.tokens import Tokens

    before = Tokens.__init__
    monkeypatch.setattr(
        Tokens, "__init__", lambda self, tokenizer, context, vocabulary: before(self, tokenizer, 20, vocabulary)
    )
    refuse(made, tmp_path, "the model reads at most 20: lower prompt.max_items")


def test_item_groups_that_items_do_not_have_are_refused(made, tmp_path, no_scoring):
    section = made.recipe.evaluate.model_copy(update={"item_groups": "flavour by |"})
    refuse(made, tmp_path, "flavour", recipe=made.recipe.model_copy(update={"evaluate": section}))


def test_a_run_without_any_system_is_refused(made, tmp_path, no_scoring):
    section = made.recipe.evaluate.model_copy(update={"baselines": []})
    recipe = made.recipe.model_copy(update={"evaluate": section})
    refuse(made, tmp_path, "no system scores the task next_item", recipe=recipe, adapter_folder=None)


def test_a_broken_training_log_is_refused(made, tmp_path, no_scoring):
    shutil.copytree(made.adapter, tmp_path / "other")
    (tmp_path / "other/training_log.json").write_text("[{")
    refuse(made, tmp_path, "training_log.json", adapter_folder=tmp_path / "other")


@pytest.mark.parametrize("k", [[], [0], [5, -1]])
def test_cutoffs_below_one_are_refused_with_the_recipe(k):
    with pytest.raises(ValidationError, match="k"):
        RankingSection(k=k)


# ---- parts ----


def test_each_example_is_scored_with_the_gate_of_its_own_history(made, report):
    from recllm.infer.transformers_engine import TransformersEngine
    from recllm.model.adapter import load_adapter
    from recllm.model.base_model import load_base_model

    folder, _ = report
    base, tokenizer = load_base_model(made.recipe.model)
    engine = TransformersEngine(load_adapter(base, made.adapter), tokenizer, 1)
    dataset = Dataset.open(made.dataset)
    task = load_tasks(dataset, "test", 10, 0)[0]
    pairs = list(zip(task.users, task.examples.gate_end, strict=True))
    histories = [dataset.history(int(user), int(end), 200) for user, end in pairs]
    answers = task.answer_texts(dataset.titles)
    rows = pq.read_table(folder / "predictions.parquet").to_pylist()
    found = {
        row["example_id"]: row["scores"] for row in rows if row["system"] == "ilora" and row["task"] == "next_item"
    }
    for n in (2, 7):
        (scores,) = engine.score([task.prompts[n]], [answers[n]], histories=[histories[n]])
        assert found[task.examples.example_ids[n]] == pytest.approx(scores, abs=1e-4)
        (others,) = engine.score([task.prompts[n]], [answers[n]], histories=[histories[n - 1]])
        assert np.abs(others - scores).max() > 1e-3  # the gate of another example would be seen


def test_mean_scores_are_the_sums_over_their_tokens(made, report, tmp_path):
    folder, document = report
    decoding = made.recipe.protocol.decoding.model_copy(update={"score": "mean"})
    protocol = made.recipe.protocol.model_copy(update={"decoding": decoding})
    section = made.recipe.evaluate.model_copy(update={"baselines": [], "controls": []})
    recipe = made.recipe.model_copy(update={"protocol": protocol, "evaluate": section})
    found = evaluate(recipe, made.dataset, made.encoder, made.adapter, tmp_path / "report")
    assert entry(found, "ilora")["metrics"]["nats"]["value"] == pytest.approx(
        entry(document, "ilora")["metrics"]["nats"]["value"], abs=1e-6
    )
    rows = [pq.read_table(f / "predictions.parquet").to_pylist()[0] for f in (folder, tmp_path / "report")]
    titles = Dataset.open(made.dataset).titles
    lengths = [len(titles[item]) + 1 for item in rows[0]["candidates"]]  # one token a byte, and the newline
    assert rows[1]["scores"] == pytest.approx([score / n for score, n in zip(rows[0]["scores"], lengths)], abs=1e-6)


def test_equal_weights_have_no_strongest_expert():
    weights = np.array([[0.25] * 4, [0.1, 0.1, 0.7, 0.1]], dtype=np.float32)
    assert language_model.strongest_experts(weights).tolist() == [-1, 2]


def test_swapped_rows_never_give_a_user_their_own_gate():
    users = np.array([4, 4, 9, 2, 2, 2, 7])
    for seed in range(20):
        rows = swapped_rows(users, np.random.default_rng(seed))
        assert (users[rows] != users).all()
    assert swapped_rows(np.array([3, 3]), np.random.default_rng(0)) is None


def test_principal_components_find_the_long_direction():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(100, 1)) * np.array([3.0, 4.0, 0.0]) + rng.normal(size=(100, 3)) * 0.01
    x, y = principal_components(rows)
    assert x.std() == pytest.approx(((rows - rows.mean(0)) @ [0.6, 0.8, 0]).std(), rel=1e-3)
    assert y.std() < 0.05
    assert [len(axis) for axis in principal_components(np.ones((1, 3)))] == [1, 1]
    assert principal_components(np.arange(3.0)[:, None])[1].tolist() == [0, 0, 0]


def test_generated_titles_match_by_the_whole_text_only():
    titles = ["Heat", "Heat 2", "Up", "Up"]
    generations = [("  HEAT ", True), ("Heat 2 is good", True), ("Heat", False), ("Up", True), ("", True)]
    assert figures.match_titles(generations, titles).tolist() == [0, -1, -1, -2, -1]


def test_nan_scores_are_misses_in_the_denominator(made):
    task = load_tasks(Dataset.open(made.dataset), "test", 10, 0)[0]
    scores = np.zeros((10, 6))
    scores[np.arange(10), task.right_column] = 1
    scores[:4] = np.nan
    table = figures.example_metrics(task, Prediction(scores), [1])
    assert table["hit_rate@1"].mean() == 6 / 10
    assert table["valid_ratio"].mean() == 6 / 10
    (like,) = [task for task in load_tasks(Dataset.open(made.dataset), "test", 10, 0) if task.is_closed]
    closed = figures.example_metrics(like, Prediction(np.full((10, 2), np.nan)), [1])
    assert closed["accuracy"].sum() == 0


def test_closed_figures_by_hand(made):
    (like,) = [task for task in load_tasks(Dataset.open(made.dataset), "test", 10, 0) if task.is_closed]
    scores = np.log(np.where(np.eye(2)[like.right_column] == 1, 0.8, 0.2))
    entry = figures.closed_figures(like, [Prediction(scores)], made.recipe.protocol.bootstrap)[0]
    assert entry["auc"]["value"] == 1
    assert entry["brier"]["value"] == pytest.approx(0.2**2)
    assert entry["calibration_error"]["value"] == pytest.approx(0.2)
    assert entry["balanced_accuracy"]["value"] == 1


def test_language_models_rank_the_whole_catalogue_where_that_is_asked_for(made, report, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers_engine, "_LOGITS_BYTES", 259 * 4 * 60)  # some seven titles a part
    monkeypatch.setattr(catalogue, "CATALOGUE_USERS", 4)
    section = made.recipe.evaluate.model_copy(update={"exhaustive": True})
    recipe = made.recipe.model_copy(update={"evaluate": section})
    document = evaluate(recipe, made.dataset, made.encoder, made.adapter, tmp_path / "report")
    for name in ("ilora", "ilora_uniform", "ilora_shuffled", "base_model"):
        assert entry(document, name)["full_catalogue"]["hit_rate@3"]["value"] >= 0
        assert entry(report[1], name)["full_catalogue"] is None  # it costs too much to be the default
        assert entry(document, name, "like")["full_catalogue"] is None
    dataset = Dataset.open(made.dataset)
    (task, _) = load_tasks(dataset, "test", 10, recipe.seed)
    models = language_model.LanguageModels(recipe, dataset, [])
    base, tokenizer = models.engines.base, models.engines.tokenizer
    engine = TransformersEngine(base, tokenizer, 4, share_prompts=False)  # a forward for each title
    scores = engine.score(task.prompts, [[f"{title}{end}" for title in dataset.titles] for end in task.ends])
    found = {}
    for row, (user, end, target) in enumerate(zip(task.users, task.examples.history_end, task.target)):
        had = set(dataset.history(int(user), int(end), int(end)).tolist()) - {int(target)}
        others = [item for item in range(dataset.num_items) if item not in had | {int(target)}]
        found[task.examples.example_ids[row]] = 1 + sum(scores[row, item] >= scores[row, target] for item in others)
    rows = pq.read_table(tmp_path / "report" / "predictions.parquet").to_pylist()
    ours = {r["example_id"]: r["full_rank"] for r in rows if (r["system"], r["task"]) == ("base_model", "next_item")}
    assert ours == found
    assert len(set(found.values())) > 1


@pytest.mark.parametrize("width", [1000, 3])
def test_a_beam_ranks_the_whole_catalogue_as_far_as_it_reaches(made, tmp_path, width):
    """All titles wide it is the exhaustive ranking; narrow, a target that it does not find is a miss."""
    documents, ranks = {}, {}
    for name, update in (
        ("exhaustive", {"exhaustive": True}),
        ("beam", {"beam_width": width}),
        ("both", {"exhaustive": True, "beam_width": width}),
    ):
        recipe = made.recipe.model_copy(update={"evaluate": made.recipe.evaluate.model_copy(update=update)})
        documents[name] = evaluate(recipe, made.dataset, made.encoder, made.adapter, tmp_path / name)
        rows = pq.read_table(tmp_path / name / "predictions.parquet").to_pylist()
        ranks[name] = {
            (row["system"], row["example_id"]): row["full_rank"]
            for row in rows
            if row["task"] == "next_item" and row["nats"] is not None
        }
    assert ranks["both"] == ranks["exhaustive"]  # exact ranks stay exact
    k = max(made.recipe.protocol.ranking.k)
    for name in ("ilora", "base_model"):
        assert entry(documents["exhaustive"], name)["beam"] is None
        beam = entry(documents["beam"], name)["beam"]
        assert beam == {"width": width, "k": k, "exact": beam["exact"], "recall": None}
        assert beam["exact"] == 1 if width == 1000 else 0 <= beam["exact"] < 1
        recall = entry(documents["both"], name)["beam"]["recall"]
        assert recall == 1 if width == 1000 else 0 < recall < 1
        said = (tmp_path / "both" / "report.md").read_text()
        assert f"of its best {k} a beam of {width} finds" in said
        assert f"{name} {recall:.2f}" in said
    assert f"language models by beams of {width}" in (tmp_path / "beam" / "report.md").read_text()
    for place, rank in ranks["beam"].items():
        exact = ranks["exhaustive"][place]
        if width == 1000:
            assert rank == (exact if exact <= k else 0)
        else:
            assert rank == 0 or rank <= k
    assert any(ranks["beam"].values())
    assert entry(documents["beam"], "ilora", "like")["beam"] is None


def test_ranking_everything_needs_a_protocol_that_ranks_everything(made, tmp_path):
    section = made.recipe.evaluate.model_copy(update={"exhaustive": True})
    ranking = made.recipe.protocol.ranking.model_copy(update={"full_catalogue": False})
    protocol = made.recipe.protocol.model_copy(update={"ranking": ranking})
    recipe = made.recipe.model_copy(update={"evaluate": section, "protocol": protocol})
    with pytest.raises(UserError, match="exhaustive=true ranks the whole catalogue"):
        evaluate(recipe, made.dataset, made.encoder, made.adapter, tmp_path / "report")


def test_the_longest_title_of_all_is_checked_before_anything_is_scored(made, monkeypatch):
    section = made.recipe.evaluate.model_copy(update={"exhaustive": True})
    recipe = made.recipe.model_copy(update={"evaluate": section})
    dataset = Dataset.open(made.dataset)
    tasks = load_tasks(dataset, "test", 10, recipe.seed)
    used = {int(item) for task in tasks if task.candidates is not None for item in task.candidates.ravel()}
    unused = next(item for item in range(dataset.num_items) if item not in used)
    dataset.titles[unused] = "x" * 600  # the tiny model reads 512 tokens
    with pytest.raises(UserError, match="the model reads at most 512"):
        language_model.LanguageModels(recipe, dataset, []).check(tasks)


def test_the_report_says_of_how_many_examples_the_gate_has_nothing_to_read(made):
    (task, like) = load_tasks(Dataset.open(made.dataset), "test", 10, made.recipe.seed)
    assert unread_notes([task, like]) == []
    ends = task.examples.gate_end.copy()
    ends[:3] = 0
    (note,) = unread_notes([task._replace(examples=task.examples._replace(gate_end=ends)), like])
    assert note.startswith("next_item: of 3 of 10 examples the gate has nothing to read")


def test_a_dataset_of_another_gate_reading_is_refused(made, tmp_path):
    history = made.recipe.history.model_copy(update={"gate": "before_list"})
    recipe = made.recipe.model_copy(update={"history": history})
    with pytest.raises(UserError, match=r"converted with history\.gate=all, the recipe has before_list: run"):
        evaluate(recipe, made.dataset, made.encoder, made.adapter, tmp_path / "report")
