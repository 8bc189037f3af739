"""What the numbers of a report say, in plain words. metrics.json enters as a dict, sentences leave.

Nothing is claimed in advance: every sentence is chosen by a test. A difference counts only when its Holm-adjusted p is
below 1 − confidence and its interval leaves out zero; anything else is "no difference shown", never "no difference".
Fewer than statistics.FEW_USERS users have no p, and so no verdict.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from recllm.evaluate.asset_rankings import LEADING
from recllm.evaluate.recommendations import hits_names
from recllm.evaluate.statistics import FEW_USERS
from recllm.evaluate.tasks import ACTION_KINDS, CLOSED_KINDS

LOWER_IS_BETTER = frozenset(
    {"nats", "label_nats", "brier", "multiclass_brier", "calibration_error", "top_label_calibration_error"}
)
Verdict = Literal["ahead", "behind", "open"]
Metrics = Mapping[str, Any]


class Sentence(NamedTuple):
    """One finding; `tone` is for a mark beside it: good, bad, open (undecided) or note."""

    tone: str
    text: str


def verdict(comparison: Metrics, confidence: float) -> Verdict:
    """Is system a of this comparison shown to be better (ahead) or worse (behind) than b, or is it open?

    >>> test = {"metric": "nats", "difference": -0.1, "low": -0.2, "high": -0.05, "p_value": 0.001, "p_holm": 0.002}
    >>> verdict(test, 0.95)
    'ahead'
    >>> verdict(test | {"p_holm": 0.2}, 0.95)
    'open'
    """
    low, high, p_holm = comparison.get("low"), comparison.get("high"), comparison.get("p_holm")
    if low is None or high is None or p_holm is None or p_holm >= 1 - confidence or low <= 0 <= high:
        return "open"
    return "ahead" if (low > 0) != (comparison["metric"] in LOWER_IS_BETTER) else "behind"


def supported_best(
    values: Mapping[str, Metrics | None], metric: str, tests: Sequence[Metrics], confidence: float
) -> str | None:
    """The system to print in bold: the best of the column, if it is shown to be ahead of every other; otherwise None.

    Against each other system the paired test decides where there is one, and disjoint intervals where there is none.
    """
    known = {name: value for name, value in values.items() if value and value.get("value") is not None}
    if len(known) < 2:
        return None
    sign = -1 if metric in LOWER_IS_BETTER else 1
    best = max(known, key=lambda name: sign * known[name]["value"])
    rest = (name for name in known if name != best)
    return best if all(_separated(best, other, known, metric, tests, confidence) for other in rest) else None


def _separated(
    best: str, other: str, values: Mapping[str, Metrics], metric: str, tests: Sequence[Metrics], confidence: float
) -> bool:
    for test in tests:
        if test["metric"] == metric and {test["a"], test["b"]} == {best, other}:
            return verdict(test, confidence) == ("ahead" if test["a"] == best else "behind")
    edges: list[Any] = [values[name].get(edge) for name in (best, other) for edge in ("low", "high")]
    if None in edges:
        return False
    low, high, other_low, other_high = edges
    return high < other_low if metric in LOWER_IS_BETTER else low > other_high


def is_closed(task: str) -> bool:
    """Whether a task is answered by one of a few labels, by its name: "like", and "like.2" where there are several.

    >>> is_closed("like.2"), is_closed("next_item")
    (True, False)
    """
    return task.partition(".")[0] in CLOSED_KINDS


def is_action(task: str) -> bool:
    """Whether a task is about actions, by its name: its intervals and tests are over sessions.

    >>> is_action("next_event.2"), is_action("like")
    (True, False)
    """
    return task.partition(".")[0] in ACTION_KINDS


def unit(task: str) -> str:
    """What is resampled of a task.

    >>> unit("outcome"), unit("like")
    ('sessions', 'users')
    """
    return "sessions" if is_action(task) else "users"


def num_clusters(entry: Metrics) -> int:
    """How many sessions or users a system's figures or a test are about, whichever is resampled."""
    sessions = entry.get("num_sessions")
    return int(entry["num_users"] if sessions is None else sessions)


def clusters(entry: Metrics) -> str:
    """The same in words.

    >>> clusters({"num_users": 3, "num_sessions": 7}), clusters({"num_users": 3})
    ('7 sessions of 3 users', '3 users')
    """
    users = f"{entry['num_users']} users" if "num_users" in entry else ""
    if entry.get("num_sessions") is None:
        return users
    return f"{entry['num_sessions']} sessions" + (f" of {users}" if users else "")


def is_explained(task: str) -> bool:
    """Whether a task's answers are checked against the graph, by its name.

    >>> is_explained("explain.2"), is_explained("like")
    (True, False)
    """
    return task.partition(".")[0] == "explain"


def is_listed(task: str) -> bool:
    """Whether a task's answers are lists of assets, by its name.

    >>> is_listed("assets.2"), is_listed("like")
    (True, False)
    """
    return task.partition(".")[0] == "assets"


def is_ordered(task: str) -> bool:
    """Whether a task's answers are orders of candidate assets, by its name.

    >>> is_ordered("rank_assets.2"), is_ordered("assets")
    (True, False)
    """
    return task.partition(".")[0] == "rank_assets"


def candidates_note(metrics: Metrics, task: str) -> str:
    """How the candidates of a task came about.

    >>> found = {"candidates_label": "sampled: 1 target + 19 uniform items", "protocol": {"candidates": {"count": 20}}}
    >>> candidates_note(found, "next_item")
    'sampled: 1 target + 19 uniform items'
    >>> candidates_note(found, "item_to_attribute.2")
    'of a question: the right answer and 19 wrong ones, drawn as often as the relation leads to them'
    """
    if task.partition(".")[0] == "item_to_attribute":
        wrong = metrics["protocol"]["candidates"]["count"] - 1
        return f"of a question: the right answer and {wrong} wrong ones, drawn as often as the relation leads to them"
    return str(metrics.get("candidates_label") or "")


def leading_metrics(metrics: Metrics, task: str) -> list[str]:
    """The metrics that a task's report begins with; the first leads its pictures and sentences."""
    if is_ordered(task):
        return list(LEADING)
    if is_listed(task):
        return hits_names(max(metrics["protocol"]["ranking"]["k"]))
    return [ranking_metric(metrics, task)]


def ranking_metric(metrics: Metrics, task: str) -> str:
    """The metric that leads a task's pictures and sentences: ndcg at the largest k; accuracy, supported, hits, or exact
    match."""
    if is_ordered(task):
        return LEADING[0]
    if is_listed(task):
        return hits_names(max(metrics["protocol"]["ranking"]["k"]))[0]
    if is_action(task):
        return "exact_match"
    if is_explained(task):
        return "supported"
    if is_closed(task):
        return "accuracy"
    return f"ndcg@{max(metrics['protocol']['ranking']['k'])}"


def below_constant(metrics: Metrics) -> list[str]:
    """What a report opens with: models that do worse than always giving the most frequent answer, main ones first."""
    return [_below_constant(found) for found in metrics.get("below_constant") or []]


def _below_constant(found: Metrics) -> str:
    names = {"exact_match": "exact match", "accuracy": "accuracy", "type_accuracy": "accuracy of the action's type"}
    name = names[found["metric"]]
    text = (
        f"Below the constant answer: on {found['task']}, {found['system']} has an {name} of {found['value']:.3f}, "
        f"always giving the most frequent answer of training has {found['constant']:.3f}."
    )
    if found["answer"] is None:
        return f"{text} None of its answers can be read."
    rest = (
        ""
        if found["rest_recall"] is None
        else f", and its mean recall on all other classes is {found['rest_recall']:.1%}"
    )
    return f'{text} {found["answer_share"]:.1%} of its answers are "{found["answer"]}"{rest}.'


def read(metrics: Metrics, task: str) -> list[Sentence]:
    """The findings of one task, most important first."""
    confidence = metrics["protocol"]["bootstrap"]["confidence"]
    tests = [t for t in metrics["comparisons"] if t["task"] == task and t.get("difference") is not None]
    systems = {system["name"]: system for system in metrics["systems"] if system["task"] == task}
    main = metrics["main_system"].get(task)
    if main not in systems:
        return [Sentence("note", "No system of this run was evaluated on this task.")]
    lead = ranking_metric(metrics, task)
    sentences = list[Sentence]()
    for metric in leading_metrics(metrics, task):
        sentences += _against_others(tests, systems, main, metric, confidence)
    sentences += _against_base(tests, systems, confidence)
    sentences += _about_gate(tests, systems, lead, confidence)
    sentences += _about_collapse(metrics, main)
    sentences += _about_generation(systems[main])
    sentences += _about_lists(systems[main])
    sentences += _about_orders(systems[main], task)
    sentences += _about_classes(systems[main])
    sentences += _about_calibration(systems[main])
    return sentences + list(_about_size(tests, systems, lead))


def _against_others(
    tests: Sequence[Metrics], systems: Mapping[str, Metrics], main: str, metric: str, confidence: float
) -> Iterator[Sentence]:
    """Who is ahead of whom in the leading metric, controls left to the gate's own sentence."""
    mine = [t for t in tests if t["metric"] == metric and systems.get(t["b"], {}).get("kind") != "control"]
    by_verdict = {name: [t for t in mine if verdict(t, confidence) == name] for name in ("behind", "ahead", "open")}
    for test in sorted(by_verdict["behind"], key=lambda t: -abs(t["difference"])):
        kind = ", which needs no language model," if systems[test["b"]]["kind"] == "baseline" else ""
        yield Sentence("bad", f"{test['b']}{kind} is ahead of {main} in {metric}: {_numbers(test, flip=True)}.")
    if by_verdict["ahead"]:
        names = _list([f"{t['b']} ({signed(t['difference'])})" for t in by_verdict["ahead"]])
        yield Sentence("good", f"{main} is ahead of {names} in {metric}.")
    if by_verdict["open"] and num_clusters(by_verdict["open"][0]) < FEW_USERS:
        found = clusters(by_verdict["open"][0])
        yield Sentence("open", f"{found} are too few to compare systems: at least {FEW_USERS} are needed.")
    elif by_verdict["open"]:
        names = _list([t["b"] for t in by_verdict["open"]], "or")
        yield Sentence(
            "open", f"No difference shown between {main} and {names} in {metric}: the test cannot tell them apart."
        )
    if not mine:
        yield Sentence("note", f"{main} was compared with no other system in {metric}.")


def _against_base(tests: Sequence[Metrics], systems: Mapping[str, Metrics], confidence: float) -> Iterator[Sentence]:
    for test in tests:
        if test["metric"] == "nats" and systems.get(test["b"], {}).get("kind") == "base_model":
            found = verdict(test, confidence)
            text = _TRAINING[found].format(b=test["b"])
            yield Sentence(_TONES[found], f"{text}: {_numbers(test, unit=' nats an answer')}.")


def _about_gate(
    tests: Sequence[Metrics], systems: Mapping[str, Metrics], metric: str, confidence: float
) -> Iterator[Sentence]:
    """Does the gate, or the soft token, help?

    The adapter must be ahead of itself with the gate switched off (uniform; without_token) AND of its shuffled control,
    which shows that it needs its gate: both are the same weights under gates that they were not trained with. And it
    must be ahead of every plain LoRA, trained without a gate: only that shows a gain.
    """
    for name in ("nats", metric):
        controls = {
            test["b"].removeprefix(test["a"] + "_"): test
            for test in tests
            if test["metric"] == name and systems.get(test["b"], {}).get("kind") == "control"
        }
        plain = [t for t in tests if t["metric"] == name and _is_plain_lora(systems.get(t["b"], {}))]
        if controls:
            words = _words_of(systems[next(iter(controls.values()))["a"]])
            verdicts = {k: verdict(t, confidence) for k, t in controls.items()}
            if set(verdicts) >= {words.off, "shuffled"} and set(verdicts.values()) == {"ahead"}:
                yield _needed_gate_sentence(controls, plain, name, confidence, words)
            else:
                yield _gate_sentence(verdicts, controls, name, words)


class _Words(NamedTuple):
    """How to speak of what an adapter reads of a user."""

    noun: str
    off: str  # the control that switches it off
    controls: Mapping[str, str]


_GATE = _Words("gate", "uniform", {"uniform": "the uniform gate", "shuffled": "another user's gate"})
_TOKEN = _Words(
    "soft token", "without_token", {"without_token": "no soft token", "shuffled": "another user's soft token"}
)


def _words_of(system: Metrics) -> _Words:
    return _TOKEN if system.get("method") == "soft_token" else _GATE


def _is_plain_lora(system: Metrics) -> bool:
    return system.get("kind") == "adapter" and system.get("method") == "lora"


def _needed_gate_sentence(
    controls: Mapping[str, Metrics], plain: Sequence[Metrics], metric: str, confidence: float, words: _Words
) -> Sentence:
    """The adapter is ahead of both controls: is it ahead of every plain LoRA, too?"""
    numbers, scored = _gate_numbers(controls, words), f"Measured in {metric}"
    needs = f"{scored}, this adapter needs its {words.noun} ({numbers})"
    if not plain:
        text = "whether it beats a plain LoRA is not tested here: add evaluate.adapters: {lora: FOLDER}"
        return Sentence("open", f"{needs}; {text}.")
    against = "; ".join(f"against the plain LoRA {t['b']} {_numbers(t)}" for t in plain)
    verdicts = {verdict(test, confidence) for test in plain}
    if verdicts == {"ahead"}:
        return Sentence("good", f"{scored}, the {words.noun} helps on this data: {numbers}; {against}.")
    if "behind" in verdicts:
        return Sentence("bad", f"{needs}, but a plain LoRA without one is ahead of it: {against}.")
    return Sentence("open", f"{needs}, but is not shown to beat a plain LoRA without one: {against}.")


def _gate_sentence(
    verdicts: Mapping[str, Verdict], controls: Mapping[str, Metrics], metric: str, words: _Words
) -> Sentence:
    numbers, noun, off = _gate_numbers(controls, words), words.noun, verdicts.get(words.off)
    scored = f"Measured in {metric}"
    if all(test["difference"] == test.get("low") == test.get("high") == 0 for test in controls.values()):
        names = _list([words.controls.get(k, k) for k in controls])
        return Sentence("open", f"{scored}, the {noun} changes nothing on this data: {names} score exactly the same.")
    if "behind" in verdicts.values():
        losers = _list([words.controls.get(k, k) for k, v in verdicts.items() if v == "behind"])
        return Sentence("bad", f"{scored}, the {noun} hurts on this data: it is behind {losers} ({numbers}).")
    if off == "ahead" and "shuffled" in verdicts:
        return Sentence(
            "open", f"{scored}, a {noun} of another user does as well: not a gain from knowing the user ({numbers})."
        )
    if off == "ahead" or (verdicts.get("shuffled") == "ahead" and off is None):
        return Sentence("open", f"{scored}, the {noun} is ahead, but one of the two controls was not run ({numbers}).")
    if verdicts.get("shuffled") == "ahead":
        return Sentence(
            "open",
            f"{scored}, another user's {noun} does worse than the user's own, but switching the {noun} off is not "
            f"shown to: no gain shown ({numbers}).",
        )
    return Sentence("open", f"{scored}, the {noun} is not shown to help on this data: {numbers}.")


def _gate_numbers(controls: Mapping[str, Metrics], words: _Words) -> str:
    return "; ".join(f"against {words.controls.get(k, k)} {_numbers(t)}" for k, t in controls.items())


def _about_collapse(metrics: Metrics, main: str) -> Iterator[Sentence]:
    gate = metrics.get("gate")
    if not gate or gate["system"] != main or gate["num_experts"] < 2:
        return
    share = gate["mean_entropy"] / gate["max_entropy"]
    if text := collapse_warning(gate):
        yield Sentence("bad", text)
    elif share > 0.99:
        text = f"The gate stays close to uniform: its mean entropy is {share:.1%} of the largest possible."
        yield Sentence("note", text)


def collapse_warning(gate: Metrics | None) -> str:
    """A sentence where the gate hardly uses its experts any more (the rule of model/gate.py), otherwise ""."""
    found = (gate or {}).get("collapse") or {}
    if not gate or not found.get("collapsed"):
        return ""
    layers = f" in {found['collapsed_layers']:.0%} of the layers; mean over layers" if gate.get("num_layers") else ""
    return (
        f"The gate has collapsed{layers}: one expert holds {found['largest_mean']:.0%} of the mean weight, and "
        f"{found['stuck_experts']:.0%} of the experts have the same weight for nearly everybody. "
        "Lower adapter.gate.learning_rate, or set adapter.gate.balance."
    )


def is_distinct(lift: Metrics) -> bool:
    """Whether the interval of a lift leaves out 1."""
    return lift.get("low") is not None and (lift["low"] > 1 or lift["high"] < 1)


def about_experts(found: Metrics | None) -> list[Sentence]:
    """What the lifts show, from the entry `experts` of metrics.json: at most one sentence an expert, the surest."""
    if not found or not found["parts"]:
        return []
    groups = [(part, group) for part in found["parts"] for group in part["groups"]]
    tested = sum(lift.get("low") is not None for _, group in groups for lift in group["lifts"])
    if not tested:
        return [Sentence("open", f"{found['num_users']} users are too few to say whom each expert serves.")]
    sentences = []
    for expert in range(len(groups[0][1]["lifts"])):
        shown = [(part, group, group["lifts"][expert]) for part, group in groups if is_distinct(group["lifts"][expert])]
        if shown:
            part, group, lift = max(shown, key=lambda entry: _certainty(entry[2]))
            sentences.append(Sentence("note", _expert_sentence(expert, part, group, lift, len(shown))))
    if sentences:
        return sentences
    return [
        Sentence(
            "open",
            f"Nothing distinguishes the experts: each of {tested} intervals, of a share among the users that an expert "
            f"weighs against all {found['num_users']} users, covers 1.",
        )
    ]


def _certainty(lift: Metrics) -> float:
    """How many half widths of its interval a lift is away from 1."""
    return abs(math.log(lift["value"])) / max(1e-9, math.log(lift["high"] / lift["value"]))


def _expert_sentence(expert: int, part: Metrics, group: Metrics, lift: Metrics, count: int) -> str:
    usual = f"{lift['value']:.2f} times [{lift['low']:.2f}, {lift['high']:.2f}] the usual share of"
    if part["what"] == "items":
        text = f"Expert {expert} serves histories with {usual} {group['name']}"
    else:
        text = f'Expert {expert} serves {usual} users with {part["name"]} "{group["name"]}"'
    return text + (f"; {count - 1} more of its shares differ from the usual." if count > 1 else ".")


def _about_generation(system: Metrics) -> Iterator[Sentence]:
    generation = system.get("generation")
    if generation and generation.get("valid_ratio"):
        valid, hit = generation["valid_ratio"]["value"], generation["exact_hit"]["value"]
        named = "named an item of the catalogue in {} of {} answers and the target in {}"
        if is_action(system["task"]):
            named = "gave an answer that can be read in {} of {} cases and the right one in {}"
        told = named.format(f"{valid:.0%}", generation["num_examples"], f"{hit:.0%}")
        yield Sentence("note", f"Writing freely, {system['name']} {told}.")


def _about_lists(system: Metrics) -> Iterator[Sentence]:
    """What became of the answers of the task assets as text."""
    figures, names = system["metrics"], ("valid_ratio", "finished", "unknown_share")
    if all(figures.get(name) for name in names):
        valid, finished, unknown = (figures[name]["value"] for name in names)
        yield Sentence(
            "note",
            f"Of the {system['num_examples']} answers of {system['name']} {finished:.0%} ended by themselves and "
            f"{valid:.0%} were lists that can be read; the others are misses. {unknown:.0%} of an answer's entries are "
            "no asset, or one that stood there before.",
        )


def _about_classes(system: Metrics) -> Iterator[Sentence]:
    """Whether a system only gives its favourite answer: a high accuracy does not tell."""
    if not system.get("classes"):
        return
    often = system["classes"]["most_frequent"]
    if often is None:
        yield Sentence("bad", f"None of the answers of {system['name']} can be read.")
        return
    support = {one["label"]: one["support"] for one in system["classes"]["per_class"]}
    share = support[often["label"]] / max(1, sum(support.values()))
    rest = often["rest_recall"]["value"]
    recall = "" if rest is None else f"; its mean recall on all other classes is {rest:.1%}"
    yield Sentence(
        "note",
        f'{often["share"]["value"]:.1%} of the answers of {system["name"]} are "{often["label"]}", which is right in '
        f"{share:.1%} of the examples{recall}.",
    )


def _about_calibration(system: Metrics) -> Iterator[Sentence]:
    found, name = system.get("calibration"), "top_label_calibration_error"
    if found and found["before"][name]["value"] is not None:
        before, after = (found[when][name]["value"] for when in ("before", "after"))
        yield Sentence(
            "note",
            f"A temperature of {found['temperature']:.2f}, fitted on {found['num_examples']} validation examples, "
            f"takes the calibration error of {system['name']} from {before:.3f} to {after:.3f}.",
        )


def _about_orders(system: Metrics, task: str) -> Iterator[Sentence]:
    """What became of the answers of the task rank_assets as text."""
    figures, names = system["metrics"], ("permutation_valid", "json_valid", "finished")
    if is_ordered(task) and all(figures.get(name) for name in names):
        valid, read, finished = (figures[name]["value"] for name in names)
        yield Sentence(
            "note",
            f"Of the {system['num_examples']} answers of {system['name']} {finished:.0%} ended by themselves, "
            f"{read:.0%} were lists that can be read and {valid:.0%} held every candidate once; the others count as 0. "
            "fitted_utility is the order that was taught: nothing can be ahead of it in undcg and tau/utility.",
        )


def _about_size(tests: Sequence[Metrics], systems: Mapping[str, Metrics], metric: str) -> Iterator[Sentence]:
    """The resolution of the run: half the interval of a typical difference, controls left out."""
    mine = [
        test
        for test in tests
        if test["metric"] == metric and systems.get(test["b"], {}).get("kind") != "control" and _width(test) > 0
    ]
    if mine and num_clusters(mine[0]) >= FEW_USERS:
        halves = sorted(_width(test) / 2 for test in mine)
        yield Sentence(
            "note",
            f"With {mine[0]['num_examples']} examples of {clusters(mine[0])}, differences in {metric} smaller "
            f"than about {halves[len(halves) // 2]:.3f} cannot be seen.",
        )


def _width(test: Metrics) -> float:
    low, high = test.get("low"), test.get("high")
    return 0.0 if low is None or high is None else high - low


_TONES = {"ahead": "good", "behind": "bad", "open": "open"}
_TRAINING = {
    "ahead": "Training made held-out answers likelier than under the untuned {b}",
    "behind": "Training made held-out answers less likely than under the untuned {b}",
    "open": "Training is not shown to change the likelihood of held-out answers against {b}",
}


def _numbers(test: Metrics, flip: bool = False, unit: str = "") -> str:
    """The difference with its interval and adjusted p; `flip` turns a − b into b − a."""
    difference, low, high = test["difference"], test.get("low"), test.get("high")
    if flip:
        difference, low, high = -difference, None if high is None else -high, None if low is None else -low
    interval = "" if low is None or high is None else f" [{signed(low)}, {signed(high)}]"
    p_holm = test.get("p_holm")
    return f"{signed(difference)}{unit}{interval}" + ("" if p_holm is None else f", Holm p {probability(p_holm)}")


def signed(value: float) -> str:
    """A difference for people.

    >>> signed(-0.25), signed(0.0001)
    ('−0.250', '+0.000')
    """
    return f"{value:+.3f}".replace("-", "−")


def probability(p: float) -> str:
    """A p-value for people.

    >>> probability(0.00001), probability(0.04)
    ('< 0.001', '0.040')
    """
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _list(words: Sequence[str], last: str = "and") -> str:
    """
    >>> _list(["a", "b", "c"])
    'a, b and c'
    """
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def beam_note(systems: Sequence[Mapping[str, Any]]) -> str:
    """How language models' ranks in the whole catalogue came about where a beam search had a part in it; "" elsewhere.

    >>> beam_note([{"name": "lora", "beam": {"width": 20, "k": 10, "exact": 0.5, "recall": None}}])
    'language models by beams of 20: a target that a beam does not find is a miss; known to be exact: lora 50%'
    >>> beam_note([{"name": "lora", "beam": {"width": 999, "k": 10, "exact": 1.0, "recall": None}}])
    'language models by beams of 999, the best 10 known to be exact: a target that is not among them is a miss'
    """
    found = {system["name"]: system["beam"] for system in systems if system.get("beam")}
    if not found:
        return ""
    width, k = (next(iter(found.values()))[name] for name in ("width", "k"))
    recalls = [f"{name} {beam['recall']:.2f}" for name, beam in found.items() if beam["recall"] is not None]
    if recalls:
        return f"language models by every title; of its best {k} a beam of {width} finds: {', '.join(recalls)}"
    if all(beam["exact"] == 1 for beam in found.values()):
        known = f"the best {k} known to be exact: a target that is not among them is a miss"
        return f"language models by beams of {width}, {known}"
    shares = ", ".join(f"{name} {beam['exact']:.0%}" for name, beam in found.items())
    missed = "a target that a beam does not find is a miss"
    return f"language models by beams of {width}: {missed}; known to be exact: {shares}"
