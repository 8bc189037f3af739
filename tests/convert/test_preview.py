import pytest

from recllm.convert import pipeline
from recllm.convert.pipeline import convert
from recllm.convert.preview import preview
from recllm.errors import UserError


def count_words(prompt, completion):
    return tuple(sum(len(message["content"].split()) for message in side) for side in (prompt, completion))


def test_shows_examples_of_train_and_test_with_their_tokens(make_recipe, tmp_path):
    before = set(tmp_path.rglob("*"))
    text = preview(make_recipe(), 3, count_words)
    assert set(tmp_path.rglob("*")) == before
    assert text.count("=== train next_item/") == 3
    assert text.count("=== test next_item/") == 3
    assert "valid" not in text
    assert text.count("[length] prompt ") == 6
    assert "completion 3 tokens" in text  # "Title 7 (1977)"
    assert text.count("[candidates] ") == 3


def test_shows_what_convert_writes(make_recipe, tmp_path):
    import pyarrow.parquet as pq

    recipe = make_recipe(tasks=[{"task": "next_item_among", "template": "next_item_among/items"}])
    convert(recipe, tmp_path / "dataset", workers=1)
    text = preview(recipe, 2)
    for split in ("train", "test"):
        for row in pq.read_table(tmp_path / "dataset" / split).slice(0, 2).to_pylist():
            assert f"=== {split} {row['example_id']} ===" in text
            assert row["prompt"][0]["content"] in text
            assert row["completion"][0]["content"] in text


def test_every_task_is_shown(make_recipe):
    tasks = [{"task": task, "template": f"{task}/items"} for task in ("next_item", "next_item_among", "like")]
    text = preview(make_recipe(tasks=tasks, filter={"like_at": 4}), 1, count_words)
    for task in ("next_item", "next_item_among", "like"):
        assert f"=== train {task}/" in text
        assert f"=== test {task}/" in text
    assert "[label] " in text


@pytest.mark.parametrize("count", [0, -1])
def test_less_than_one_example_is_refused(make_recipe, count):
    with pytest.raises(UserError, match=f"preview of {count} examples: ask for 1 or more"):
        preview(make_recipe(), count)


def test_what_convert_refuses_preview_refuses(make_recipe):
    protocol = {"name": "p", "split": {"method": "leave_one_out"}, "candidates": {"count": 25}}
    with pytest.raises(UserError, match=r"other candidates"):
        preview(make_recipe(protocol=protocol), 1)


def test_bad_template_is_found_before_the_data(make_recipe, monkeypatch):
    monkeypatch.setattr(pipeline, "prepare", None)
    with pytest.raises(UserError, match="next_item/films"):
        preview(make_recipe(tasks=[{"task": "next_item", "template": "next_item/flims"}]), 1)
