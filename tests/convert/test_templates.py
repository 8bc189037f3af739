from pathlib import Path

import pytest

from recllm import assets
from recllm.convert import templates
from recllm.convert.templates import VARIABLES, compiled, load_template, render_rows
from recllm.errors import UserError


def write(folder: Path, user: str, task: str = "next_item", more: str = "") -> Path:
    path = folder / "mine.yaml"
    path.write_text(f"id: mine@1\ntask: {task}\nphrasings:\n  - user: '{user}'\n{more}")
    return path


@pytest.mark.parametrize("name", assets.names("prompts"))
def test_shipped_templates_load_and_have_several_phrasings(name):
    template = load_template(name, name.split("/")[0], dense=name.startswith("next_item/"))
    assert len(template.phrasings) >= 3
    assert template.id.startswith(f"{name}@")
    assert len(template.sha256) == 64


def test_undefined_variable_names_template_variable_and_known_ones(tmp_path):
    path = write(tmp_path, "Films: {{ histroy }}")
    with pytest.raises(UserError) as caught:
        load_template(path, "next_item")
    message = str(caught.value)
    assert "mine.yaml" in message
    assert '"histroy"' in message
    assert 'did you mean "history"' in message
    assert "num_history" in message


def test_variable_of_another_task_is_undefined(tmp_path):
    with pytest.raises(UserError, match=r'"candidates" is no variable'):
        load_template(write(tmp_path, "{{ history }} {{ candidates }}"), "next_item")


def test_attribute_of_a_variable_is_found_at_load(tmp_path):
    with pytest.raises(UserError, match=r"mine.yaml.*phrasing 1"):
        load_template(write(tmp_path, "{{ history.first }}"), "next_item")


@pytest.mark.parametrize("attack", ["{{ history.__class__.__mro__ }}", "{{ history.format.__globals__ }}"])
def test_the_sandbox_holds(tmp_path, attack):
    with pytest.raises(UserError, match="unsafe"):
        load_template(write(tmp_path, attack), "next_item")


def test_broken_jinja_names_the_line(tmp_path):
    with pytest.raises(UserError, match="line 1"):
        load_template(write(tmp_path, "{% if history %}"), "next_item")


def test_unknown_name_suggests_a_shipped_one():
    with pytest.raises(UserError, match=r'did you mean "next_item/films"'):
        load_template("next_item/film", "next_item")


def test_template_of_another_task_is_refused():
    with pytest.raises(UserError, match=r'is for the task "like".*next_item/films'):
        load_template("like/items", "next_item")


def test_unknown_key_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"phrasings\.0\.usr"):
        load_template(write(tmp_path, "{{ history }}", more="    usr: x\n"), "next_item")


def test_dense_needs_a_window_text_without_variables(tmp_path):
    path = write(tmp_path, "{{ history }}")
    load_template(path, "next_item")
    with pytest.raises(UserError, match="window"):
        load_template(path, "next_item", dense=True)
    with pytest.raises(UserError, match=r'"history" is no variable'):
        load_template(write(tmp_path, "x", more="    window: '{{ history }}'\n"), "next_item", dense=True)


def test_system_message_of_a_dense_task_has_no_variables(tmp_path):
    path = write(tmp_path, "{{ history }}", more="    window: x\n    system: '{{ num_history }} items'\n")
    load_template(path, "next_item")
    with pytest.raises(UserError, match=r'system: "num_history" is no variable'):
        load_template(path, "next_item", dense=True)


def test_template_that_fails_on_a_row_says_so():
    with pytest.raises(UserError, match=r"history\.split.*fails on an example"):
        render_rows(["{{ history.split()[2] }}"], [0, 0], {"history": ["a b c", "a b"]})


def test_like_needs_answers(tmp_path):
    with pytest.raises(UserError, match="answers"):
        load_template(write(tmp_path, "{{ target }}", task="like"), "like")


@pytest.mark.parametrize("answers", ['{like: "Yes", dislike: "Yes"}', '{like: "Yes", dislike: " Yes "}', "{like: a}"])
def test_answers_that_are_all_the_same_are_refused(tmp_path, answers):
    path = write(tmp_path, "{{ target }}", task="like", more=f"answers: {answers}\n")
    with pytest.raises(UserError, match=r"mine.yaml.*at least two different ones are needed"):
        load_template(path, "like")


def test_the_user_may_stand_everywhere(tmp_path):
    path = write(tmp_path, "{{ user }}", more="    window: '{{ user }}'\n    system: '{{ user }}'\n")
    load_template(path, "next_item", dense=True)
    with pytest.raises(UserError, match="phrasing 1"):  # tried without a user, too
        load_template(write(tmp_path, "{% if not user %}{{ history.first }}{% endif %}"), "next_item")


@pytest.mark.parametrize("name", assets.names("prompts"))
def test_shipped_templates_tell_about_a_user_if_there_is_one(name):
    for phrasing in load_template(name, name.split("/")[0]).phrasings:
        for source in filter(None, (phrasing.user, phrasing.window)):
            variables = dict.fromkeys(VARIABLES[name.split("/")[0]], "x")
            without = compiled(source).render({**variables, "user": ""})
            about, rest = compiled(source).render({**variables, "user": "anna, 30"}).split(": anna, 30\n\n")
            assert about in ("About me", "About the viewer", "About the user")
            assert rest == without
            assert "About" not in without


def test_constants_give_way_to_columns():
    assert render_rows(["{{ a }}{{ b }}"], [0, 0], {"a": [1, 2]}, {"a": 9, "b": 3}) == ["13", "23"]


def test_sha256_follows_the_bytes(tmp_path):
    first = load_template(write(tmp_path, "{{ history }}"), "next_item").sha256
    assert load_template(write(tmp_path, "{{ history }} "), "next_item").sha256 != first


def test_rows_render_as_jinja_renders_them():
    sources = [
        "{% for line in history.split('\\n') %}{{ loop.index }}. {{ line }}\n{% endfor %}<end>\n",
        "{{ num_history }} of {{ range(num_history) | list }}: {{ history | upper }}",
        "{% set n = num_history %}{% if n > 1 %}many{% else %}{{ history }}{% endif %}",
    ]
    columns = {"history": ["a\nb", "<&>", "x", "ü"], "num_history": [2, 1, 1, 3]}
    choice = [0, 1, 2, 2]
    expected = [
        compiled(sources[number]).render(history=history, num_history=count)
        for number, history, count in zip(choice, columns["history"], columns["num_history"], strict=True)
    ]
    assert render_rows(sources, choice, columns) == expected


def test_every_task_of_the_recipe_has_variables():
    from typing import get_args

    from recllm.recipe import TaskSection

    assert set(VARIABLES) == set(get_args(TaskSection.model_fields["task"].annotation))
    assert templates.environment().sandboxed
