"""The recipe refuses what it does not know, and says what to do instead."""

from pathlib import Path

import pytest
import yaml

from recllm import assets
from recllm.errors import UserError
from recllm.recipe import load_recipe

NAME = "movielens/next_item_ilora"


@pytest.mark.parametrize("name", assets.names("recipes"))
def test_shipped_recipes_load_and_name_what_is_shipped(name: str) -> None:
    recipe = load_recipe(name)
    for task in recipe.tasks:
        assert assets.find("prompts", task.template).is_file()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter.rr=1", 'adapter.rr: unknown key "rr", did you mean "r"?'),
        ("protocol.splt.x=2", 'did you mean "split"?'),
        ("tasks.0.templte=x", 'did you mean "template"?'),
        ("zzz=1", "known keys: name"),
        ("adapter.r=6", "multiple of 4"),
        ("filter.min_rating=abc", "abc"),
        ("tasks.7.task=like", "no position in a list of 1"),
        ("adapter.r", 'has no "="'),
        ("adapter.r.x=1", "nothing below it"),
        ("protocol=nowhere", "nowhere"),
        ("data.items.id_map.souce=x", 'did you mean "source"?'),
        ("prompt.user={{ age }} years", "into double quotes"),
        ("output_dir=runs/{nam}", "only {name}"),
    ],
)
def test_a_bad_override_is_an_error_with_a_next_step(override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_recipe(NAME, [override])
    assert message in str(error.value)


def test_overrides_reach_into_lists_and_protocols() -> None:
    recipe = load_recipe(NAME, ["tasks.0.dense_window=5", "protocol.candidates.count=7", "train.max_steps=3"])
    assert (recipe.tasks[0].dense_window, recipe.protocol.candidates.count, recipe.train["max_steps"]) == (5, 7, 3)


ACTIONS = "actions={words: {view: view, buy: buy}}"


def test_a_catalogue_may_be_left_to_the_log_but_is_not_forgotten() -> None:
    log = "data={interactions: {path: log.csv}}"
    with pytest.raises(UserError, match=r"data.items is missing: name the file .* or write items: null"):
        load_recipe(NAME, [log])
    assert load_recipe(NAME, ["data.items=null"]).data.items is None
    assert load_recipe(NAME, [log, ACTIONS]).data.items is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("actions.words={view: view, buy: view}", "every action needs words of its own"),
        ("actions.words={view: view, ' ': blank}", "words of ' ': neither label nor words may be blank"),
        ("actions.words={view: view, buy: 'add  it'}", "words of 'buy': neither"),
        ("actions.without_item=[leave]", "without_item names 'leave', which is none of the words view, buy"),
        ("actions.observed=[page]", "observed names 'page', which is none of the attributes"),
        ("actions.attributes=[action]", "'action' is there twice, or has a meaning of its own"),
        ("actions.session_gap_s=0", "greater than or equal to 1"),
        ("protocol.split={method: user_holdout, whole_sessions: true}", "belongs to the methods temporal and dates"),
    ],
)
def test_actions_that_do_not_fit(override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_recipe(NAME, [ACTIONS, override])
    assert message in str(error.value)


GRAPH = "graph={triples: {path: kg.csv}, links: {path: links.csv}}"


def test_the_graph_section_has_defaults_and_takes_overrides() -> None:
    assert load_recipe(NAME).graph is None
    graph = load_recipe(NAME, [GRAPH, "graph.retrieval.hops=1", "graph.triples.entities={path: names.csv}"]).graph
    assert graph is not None
    assert (graph.retrieval.method, graph.retrieval.hops, graph.budget, graph.format) == (
        "two_stage",
        1,
        256,
        "grouped",
    )
    assert graph.triples.entities is not None
    assert graph.links.id_map is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("graph.triples.pth=x", 'graph.triples.pth: unknown key "pth", did you mean "path"?'),
        ("graph.links.id_map.surce=x", 'did you mean "source"?'),
        ("graph.triples.entities={file: x}", 'unknown key "file"'),
        ("graph.triples.format=owl", "'rdf'"),
        ("graph.retrieval.hops=5", "less than or equal to 4"),
        ("graph.retrieval.fan_out=0", "greater than or equal to 1"),
        ("graph.retrieval.method=random_walk", "'khop'"),
        ("graph.retrieval.hub_penalty=-1", "greater than or equal to 0"),
        ("graph.budget=0", "greater than or equal to 1"),
        ("graph.format=xml", "'json_ld'"),
    ],
)
def test_a_bad_graph_section_is_an_error_with_a_next_step(override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_recipe(NAME, [GRAPH, override])
    assert message in str(error.value)


def test_replicas_are_of_engine_ray_vllm_only() -> None:
    assert load_recipe(NAME, ["evaluate.engine=ray-vllm", "evaluate.replicas=4"]).evaluate.replicas == 4
    with pytest.raises(UserError, match="replicas=4 with engine vllm: only engine ray-vllm has replicas"):
        load_recipe(NAME, ["evaluate.engine=vllm", "evaluate.replicas=4"])


def test_an_unknown_name_lists_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean"):
        load_recipe("movielens/next_item_ilra")


def test_broken_yaml_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("name: a\ndata: [1, 2\nseed: 3\n")
    with pytest.raises(UserError, match="line 3"):
        load_recipe(path)


def test_a_recipe_in_another_encoding_names_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("name: é\n".encode("latin-1"))
    with pytest.raises(UserError, match="byte 6 is not UTF-8"):
        load_recipe(path)


def test_yaml_is_data_and_never_code(tmp_path: Path) -> None:
    path = tmp_path / "code.yaml"
    path.write_text("name: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(UserError, match="not valid YAML"):
        load_recipe(path)


def test_a_recipe_of_the_user_comes_before_a_shipped_one(tmp_path: Path) -> None:
    document = yaml.safe_load(assets.find("recipes", NAME).read_text()) | {"name": "mine"}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(document))
    recipe = load_recipe(path)
    assert recipe.name == "mine"
    assert recipe.output == Path("runs/mine")


def test_the_recipe_of_the_readme_loads(tmp_path: Path) -> None:
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    (tmp_path / "shop.yaml").write_text(readme.split("```yaml\n")[1].split("```")[0])
    assert load_recipe(tmp_path / "shop.yaml").name == "shop"
