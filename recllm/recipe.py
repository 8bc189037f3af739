"""The recipe: one YAML file is a whole run. Typed sections, unknown key = error, dotted overrides.

A path or shipped name and a list of "section.key=value" enter; a frozen `Recipe` leaves.
"""

import datetime
import difflib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from recllm import assets
from recllm.errors import UserError

# What readers and templates of events call things themselves
_EVENT_NAMES = ("user_id", "item_id", "timestamp", "action", "rating", "session_id", "item", "pause_s")
FAR_TRANS = "far-trans://"  # FOLDER/FILE: what is made of a bank's data, see recllm/data/offline.py


class Section(BaseModel):
    """A part of a recipe: frozen, and a key that it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class InteractionsSource(Section):
    """Where interactions are read. `columns` maps our column names to the file's: {user_id: uid}; null: not read."""

    path: str | list[str]  # several files are read as one; a saved HF dataset is a folder
    # jsonl_sessions: a line is a session, an object with a list of events. In it, in other JSON, and in columns that
    # hold JSON, a name with dots goes on into objects: {item_id: events.aid, page: context.page}
    format: Literal["auto", "csv", "parquet", "jsonl", "recbole", "hf", "jsonl_sessions"] = "auto"
    columns: dict[str, str | int | None] = {}  # an int names a column by position (files without a header)
    header: bool = True
    separator: str = ","
    timestamp_unit: Literal["s", "ms", "us", "iso8601"] = "s"
    events: str = "events"  # of jsonl_sessions: the key of the list


class IdMap(Section):
    """A two-column table that turns the item ids of the items file into those of the interactions."""

    path: str
    source: str  # column with the ids of the items file
    target: str  # column with the ids of the interactions
    separator: str = ","


class ItemsSource(Section):
    """Where item titles and attributes are read; `id_map` translates their ids into those of the interactions."""

    path: str
    format: Literal["auto", "csv", "parquet", "jsonl", "recbole", "hf"] = "auto"
    columns: dict[str, str | int | None] = {}
    header: bool = True
    separator: str = ","
    id_map: IdMap | None = None


class UsersSource(Section):
    """Where user attributes are read, for templates that show them; every column beside user_id is one."""

    path: str
    format: Literal["auto", "csv", "parquet", "jsonl", "recbole", "hf"] = "auto"
    columns: dict[str, str | int | None] = {}
    header: bool = True
    separator: str = ","


class DataSection(Section):
    """The input files. Paths: a file, or offline://NAME/FILE for the fetched default (recllm/data/offline.py)."""

    interactions: InteractionsSource
    # None: the ids of the log, each its own title. `items: null` says so; an event log, with `actions`, may say nothing
    items: ItemsSource | None = None
    users: UsersSource | None = None


class NamesSource(Section):
    """A table that names entities or relations: `columns` maps id and name to the file's."""

    path: str
    format: Literal["auto", "csv", "parquet", "jsonl", "recbole"] = "auto"
    columns: dict[str, str | int | None] = {}
    header: bool = True
    separator: str = ","


class TriplesSource(Section):
    """Where triples are read; `columns` maps head, relation, tail and, optionally, timestamp to the file's."""

    path: str | list[str]  # several files are read as one
    # rdf: Turtle, TriG, N-Triples and N-Quads
    format: Literal["auto", "csv", "parquet", "jsonl", "recbole", "rdf"] = "auto"
    columns: dict[str, str | int | None] = {}
    header: bool = True
    separator: str = ","
    timestamp_unit: Literal["s", "ms", "us", "iso8601"] = "s"
    entities: NamesSource | None = None  # readable names of what heads and tails write as ids
    relations: NamesSource | None = None


class LinksSource(Section):
    """Which entity an item is; `id_map` translates its item ids into those of the interactions."""

    path: str
    format: Literal["auto", "csv", "parquet", "jsonl", "recbole"] = "auto"
    columns: dict[str, str | int | None] = {}  # item_id and entity_id
    header: bool = True
    separator: str = ","
    id_map: IdMap | None = None


class RetrievalSection(Section):
    """Which triples a prompt may show. two_stage: first what matters to this user, then what hangs on that.

    parallel does both stages at once, from the user's items; khop and pagerank know one stage; random is the baseline
    that they all should beat: triples around the user's items, drawn by seed.
    """

    method: Literal["khop", "random", "pagerank", "two_stage", "parallel"] = "two_stage"
    hops: int = Field(2, ge=1, le=4)
    fan_out: int = Field(20, ge=1)  # edges of one relation that are followed from an entity, the newest
    allow: list[str] = []  # relations by id or name; empty: all
    deny: list[str] = []
    hub_penalty: float = Field(0.5, ge=0)  # an entity passes on its weight / degree ** hub_penalty
    max_items: int = Field(50, ge=1)  # newest items of the history that retrieval starts from
    entities: int = Field(20, ge=1)  # that the first stage hands to the second
    max_triples: int = Field(100, ge=1)  # the best, of which the budget takes as many as fit
    path_length: int = Field(2, ge=1, le=3)  # triples between the history and what a path leads to, at most


GraphFormat = Literal["grouped", "lines", "turtle", "json_ld"]


class GraphSection(Section):
    """A knowledge graph whose triples prompts show, each older than its example's cut-off."""

    triples: TriplesSource
    links: LinksSource
    retrieval: RetrievalSection = RetrievalSection()
    budget: int = Field(256, ge=1)  # tokens of the subgraph in a prompt, by the base model's tokenizer
    format: GraphFormat = "grouped"  # a template may have its own
    dates: bool = False  # show the day of triples that have a time


class FinanceSection(Section):
    """A bank's data of the FAR-Trans schema, on which the tasks `assets` and `rank_assets` ask on dates.

    assets: what to buy for the next `window_days`? rank_assets: which of protocol.candidates.count assets, the one that
    the customer buys first in the window among them, suits best? By U = z(μ) − λ z(σ²) − γ z(drawdown), of the prices
    of `lookback_days` before the date; λ, γ are fitted to the customer's purchases before it (finance_choices.py).

    Where the recipe names none, it gives `data`, and a `graph` its triples and links: facts and prices of the assets.
    The dates of valid and test are protocol.split's, of the method dates.
    """

    folder: str  # with the CSV files, or offline://far-trans-synthetic, a bank that is drawn on this machine
    train_from: datetime.date | None = None  # None: the first day with a price, of rank_assets lookback_days later
    every_days: int = Field(28, ge=1)
    window_days: int = Field(180, ge=1)
    # assets: which customers are asked on a date. both: those who then buy something that rises, as FLARKO has it: the
    # future chooses them. preference: those who buy anything. all: everybody with a history. rank_assets always asks
    # those who buy something that is on offer
    keep: Literal["both", "preference", "all"] = "both"
    min_history: int = Field(1, ge=1)  # transactions before the date
    max_assets: int = Field(10, ge=1)  # assets: of an answer to learn from
    lookback_days: int = Field(70, ge=3)  # rank_assets
    min_choices: int = Field(5, ge=1)  # rank_assets: with fewer, all customers' purchases before the date are fitted


class ActionsSection(Section):
    """The log holds events: what users did, with an item or without. The gate then reads (item, action).

    `words` is the closed vocabulary of actions, label in the log → how prompts and answers write it; its order is that
    of the classes in reports.
    """

    words: dict[str, str] = Field(min_length=2)
    drop_unknown: bool = False  # events with another action are dropped and counted, else an error
    without_item: list[str] | Literal["*"] = []  # labels of actions that need no item; "*": none does
    attributes: list[str] = []  # further columns of the log, as text: what is typed, the target's name, a rationale
    observed: list[str] = []  # those of them that are known before the action: of what is asked about, too
    session_gap_s: int | None = Field(None, ge=1)  # a longer pause begins a session; for logs without session ids

    @model_validator(mode="after")
    def _fits(self) -> "ActionsSection":
        if len(set(self.words.values())) < len(self.words):
            raise ValueError(f"words {list(self.words.values())}: every action needs words of its own")
        if blank := [
            label for label, words in self.words.items() if not label.strip() or words.split() != words.split(" ")
        ]:
            raise ValueError(
                f"words of {blank[0]!r}: neither label nor words may be blank, or hold breaks or double blanks"
            )
        if self.without_item != "*" and (unknown := [one for one in self.without_item if one not in self.words]):
            raise ValueError(f"without_item names {unknown[0]!r}, which is none of the words {', '.join(self.words)}")
        if unknown := [name for name in self.observed if name not in self.attributes]:
            raise ValueError(f"observed names {unknown[0]!r}, which is none of the attributes {self.attributes}")
        if wrong := [name for name in self.attributes if name in _EVENT_NAMES or self.attributes.count(name) > 1]:
            raise ValueError(
                f"attributes {self.attributes}: {wrong[0]!r} is there twice, or has a meaning of its own; give it "
                f"another name and map that, data.interactions.columns: {{my_{wrong[0]}: …}}"
            )
        return self


class FilterSection(Section):
    """What is dropped before sequences are built."""

    min_rating: float | None = None  # interactions below are dropped
    like_at: float | None = None  # ratings at or above become action "like", the others "dislike"
    rating_bands: dict[str, float] = {}  # action → the lowest rating that becomes it, ascending; instead of like_at
    user_core: int = Field(1, ge=1)  # k-core: users and items with fewer interactions go, until none is left
    item_core: int = Field(1, ge=1)
    drop_unknown_items: bool = False  # interactions with items absent from the items file: dropped, else an error

    @property
    def makes_actions(self) -> bool:
        """Whether actions come from ratings, whatever the log says."""
        return self.like_at is not None or bool(self.rating_bands)

    @model_validator(mode="after")
    def _bands_fit(self) -> "FilterSection":
        bounds = list(self.rating_bands.values())
        if self.rating_bands and (len(bounds) < 2 or any(a >= b for a, b in itertools.pairwise(bounds))):
            raise ValueError(
                f"rating_bands {self.rating_bands}: give two or more, each with its lowest rating, lowest band first"
            )
        if self.rating_bands and self.like_at is not None:
            raise ValueError(f"like_at={self.like_at} and rating_bands both make actions of ratings: take one of them")
        return self


class HistorySection(Section):
    """What the gate reads: all items before the target, or of a held-out dense example those before the list.

    In training the gate of a dense window has read what precedes the window. A held-out example continues a list that
    its prompt shows: with `before_list` its gate has read what precedes the list, as in training, and nothing newer.
    """

    max_items: int = Field(200, ge=1)
    gate: Literal["all", "before_list"] = "all"


class PromptSection(Section):
    """What the prompt shows."""

    max_items: int = Field(10, ge=0)
    item: str = "{{ title }}"  # how one item is written; any attribute of items.parquet may be used
    # How one event is written (with `actions`): action and item in words, pause_s (seconds since the session's event
    # before, "" at its first), and the attributes of actions.attributes
    event: str = "{{ action }}{% if item %}: {{ item }}{% endif %}"
    user: str = ""  # the template variable `user`: how a user is written, from the attributes of data.users


class TaskSection(Section):
    """One kind of example."""

    task: Literal[
        "next_item",
        "next_item_among",
        "like",
        "item_to_attribute",  # this and the next two need a graph
        "attribute_to_item",
        "explain",
        "assets",  # this and the next need finance
        "rank_assets",
        "next_action",  # these four need actions: the type of the next action,
        "next_event",  # the whole of it as a JSON object,
        "outcome",  # whether a session comes to an action of `positive`, from its first events,
        "action_on_item",  # what the user does with a given item
    ]
    template: str  # a shipped name or a path, e.g. next_item/films
    dense_window: int = Field(0, ge=0)  # n > 0: training examples are windows of n titles with the loss on each
    # random: the loss begins at a random title of the window; those before it are shown and read by the gate, as the
    # list of a held-out example is
    dense_start: Literal["first", "random"] = "first"
    max_train_targets: int | None = Field(None, ge=1)  # training targets per user (or windows), chosen by seed
    relations: list[str] = []  # item_to_attribute, attribute_to_item: by id or name; empty: those of graph.retrieval
    # next_item: what the prompt lists is of the target's session, and the target never the first event of one. The
    # tasks that need actions are always so, action_on_item excepted
    within_session: bool = False
    positive: list[str] = []  # outcome: labels of the actions of which one makes the answer yes
    after: int = Field(3, ge=1)  # outcome: how many events of the session are shown
    fields: dict[str, str] = {}  # next_event: further keys of the answer → attribute, or item
    # Attribute that a completion writes before its answer, of tasks with actions; training leaves out events without
    rationale: str | None = None


class EncoderSection(Section):
    """The sequence encoder that guides the gate, and baseline of every report.

    sasrec: Kang & McAuley 2018. gru4rec: Hidasi et al. 2016. content: SASRec over the base model's own hidden states of
    the item texts, so that items without any interaction have a representation too.
    """

    type: Literal["sasrec", "gru4rec", "content"] = "sasrec"
    hidden_size: int = Field(64, ge=1)
    num_layers: int = Field(2, ge=1)
    num_heads: int = Field(2, ge=1)  # sasrec, content
    window: int = Field(0, ge=0)  # sasrec, content: a state sees so many items back in each layer; 0: all of them
    dropout: float = Field(0.4, ge=0, lt=1)
    learning_rate: float = Field(1e-3, gt=0)
    batch_size: int = Field(32, ge=1)
    max_epochs: int = Field(200, ge=1)
    patience: int = Field(10, ge=1)  # epochs without a better validation ndcg@10, with `actions` nats
    joint_learning_rate: float | None = Field(None, gt=0)  # trained on with the adapter; None: frozen


class ModelSection(Section):
    """The base model."""

    name_or_path: str  # a local folder, a hub name, or offline://smollm2-135m-instruct
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    quantization: Literal["4bit", "8bit"] | None = None  # bitsandbytes: nf4 with double quantisation, or LLM.int8()


class GateSection(Section):
    """The gate: representation → expert weights. hidden_size 0 is one linear layer, otherwise an MLP."""

    type: Literal["softmax", "sigmoid"] = "softmax"  # over num_experts (the paper), or one for each rank
    hidden_size: int = Field(0, ge=0)
    temperature: float = Field(1.0, gt=0)
    top_k: int | None = Field(None, ge=2)  # softmax: the largest k experts alone, renormalised (one would weigh 1)
    per_layer: bool = False  # one gate for each layer of the base model in place of one for all
    balance: float = Field(0.0, ge=0)  # weight of the load-balancing loss
    learning_rate: float | None = Field(None, gt=0)  # None: train.learning_rate


class AdapterSection(Section):
    """LoRA (`lora`), instance-wise LoRA (`ilora`) or LoRA beside a soft token (`soft_token`), with peft's own names."""

    method: Literal["ilora", "lora", "soft_token"] = "ilora"
    r: int = Field(8, ge=1)
    lora_alpha: int = Field(16, ge=1)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = "all-linear"
    num_experts: int = Field(4, ge=1)
    gate: GateSection = GateSection()

    @model_validator(mode="after")
    def _gate_fits(self) -> "AdapterSection":
        gate = self.gate
        if self.method != "ilora":
            return self
        if gate.type == "softmax" and self.r % self.num_experts:
            raise ValueError(
                f"r={self.r} does not split into num_experts={self.num_experts} equal experts: "
                f"take an r that is a multiple of {self.num_experts}"
            )
        if gate.top_k is not None and (gate.type != "softmax" or gate.top_k > self.num_experts):
            raise ValueError(
                f"gate.top_k={gate.top_k} with gate.type={gate.type} and num_experts={self.num_experts}: it is for the "
                "softmax gate, and at most num_experts"
            )
        return self


class DroSection(Section):
    """Group distributionally robust optimisation (Sagawa et al. 2020): groups that do badly weigh more and more.

    Rare groups need large batches, and train.max_grad_norm clips the steps in which one weighs most.
    """

    groups: Literal["action", "user_cluster"] = "action"  # classes of the answers, or k-means of representations
    step_size: float = Field(0.01, gt=0)  # η of the paper's algorithm 1
    clusters: int = Field(8, ge=2)  # of user_cluster


class LossSection(Section):
    """What a token of a completion counts. The default is the mean over all of them."""

    rationale_weight: float = Field(1.0, ge=0)  # of the tokens of a rationale
    answer_weight: float = Field(1.0, ge=0)  # of all others
    # By the label of an example: balanced is N / (C · n_c); effective is (1 − β) / (1 − β^n_c) (Cui et al. 2019), both
    # scaled so that an example weighs 1 on average
    class_weights: Literal["none", "balanced", "effective"] = "none"
    class_beta: float = Field(0.999, gt=0, lt=1)  # β of effective
    dro: DroSection | None = None

    @model_validator(mode="after")
    def _something_counts(self) -> "LossSection":
        if self.rationale_weight == self.answer_weight == 0:
            raise ValueError("rationale_weight and answer_weight are both 0: nothing would be learnt")
        return self


class EvaluateSection(Section):
    """What is scored beside the adapter of this run."""

    # Who runs the language models: this process, vLLM, or as many of them as `replicas` says, under Ray
    engine: Literal["transformers", "vllm", "ray-vllm"] = "transformers"
    replicas: int = Field(1, ge=1)  # of ray-vllm: one a GPU; where the cluster has none, each a share of its cores
    # A replica without an answer for so long is killed and replaced, and if that is so again, the run stops. It has to
    # cover an engine's start and a chunk of at most 256 prompts with all their answers; null waits for ever
    replica_timeout_s: float | None = Field(6 * 3600.0, gt=0)
    split: Literal["valid", "test"] = "test"
    batch_size: int = Field(8, ge=1)
    max_examples: int | None = Field(None, ge=1)  # a seeded choice of users; None scores all
    # Ranks of language models in the whole catalogue: exact, by the likelihood of every title, at its tokens a user; or
    # by a beam search of this width, where a target that it does not find is a miss. Both: how much the beam finds.
    exhaustive: bool = False
    beam_width: int | None = Field(None, ge=1)
    baselines: list[Literal["random", "popularity", "item_to_item", "sequence_encoder", "base_model"]] = [
        "random",
        "popularity",
        "item_to_item",
        "sequence_encoder",  # the run's own: stands in the report under its type
        "base_model",
    ]
    # Of the tasks with actions, each of those for which it makes sense (evaluate/action_systems.py)
    action_baselines: list[
        Literal[
            "constant",
            "user_most_frequent",
            "item_most_frequent",
            "last_action",
            "markov",
            "boosted_trees",
            "sequence_encoder",
        ]
    ] = [
        "constant",
        "user_most_frequent",
        "item_most_frequent",
        "last_action",
        "markov",
        "boosted_trees",
        "sequence_encoder",
    ]
    # None: all that go with the method: uniform and shuffled gates, or shuffled and without_token of a soft token
    controls: list[Literal["uniform", "shuffled", "without_token"]] | None = None
    adapters: dict[str, str] = {}  # further adapters: name in the report → folder
    item_groups: str | None = None  # attribute that says what experts serve: "genres", "genres by |"; "": none

    @model_validator(mode="after")
    def _replicas_are_of_ray(self) -> "EvaluateSection":
        if self.replicas > 1 and self.engine != "ray-vllm":
            raise ValueError(f"replicas={self.replicas} with engine {self.engine}: only engine ray-vllm has replicas")
        return self


class GivenRows(Section):
    """A published protocol's rows: JSONL files with a user, the items before the target and the target."""

    valid: str
    test: str
    user: str = "user"  # keys of a row
    history: str = "history"
    target: str = "target"
    item_id_offset: int = 0  # added to a row's item ids to get those of the interactions


class SplitSection(Section):
    """Which positions are targets of train, valid and test.

    leave_one_out: a user's last interaction is test, the one before valid.
    temporal: global cut-offs in time so that the newest `test_fraction` of interactions is test. With whole_sessions a
    session lies where it begins, and what it holds from the next cut-off on is unused.
    user_holdout: all of a user is train, valid or test. session_holdout: whole sessions, by seeded choice;
    a user's training ends at their first valid or test session, their validation at the first test session.
    dates: as temporal, with cut-offs that are given as dates: midnights in UTC.
    given: the targets of published rows; a user's later interactions are unused, the others are train.
    """

    method: Literal["leave_one_out", "temporal", "dates", "user_holdout", "session_holdout", "given"] = "temporal"
    valid_fraction: float = Field(0.1, gt=0, lt=1)
    test_fraction: float = Field(0.1, gt=0, lt=1)
    targets: Literal["first", "last", "all"] = "first"  # which of a user's valid or test positions are scored
    min_history: int = Field(1, ge=1)  # valid and test positions with fewer earlier interactions are no targets
    whole_sessions: bool = False  # temporal and dates: no session on both sides
    given: GivenRows | None = None  # only with method given
    valid_from: datetime.date | None = None  # only with method dates, and needed there
    test_from: datetime.date | None = None

    @model_validator(mode="after")
    def _dates_fit(self) -> "SplitSection":
        dates = (self.valid_from, self.test_from)
        if self.method != "dates" and dates != (None, None):
            raise ValueError(f"valid_from and test_from belong to the method dates, this is {self.method}")
        if self.whole_sessions and self.method not in ("temporal", "dates"):
            raise ValueError(f"whole_sessions belongs to the methods temporal and dates, this is {self.method}")
        in_order = self.valid_from and self.test_from and self.valid_from < self.test_from
        if self.method == "dates" and not in_order:
            raise ValueError(
                f"the method dates needs valid_from before test_from, not {dates[0]} and {dates[1]}: set both, e.g. "
                "valid_from: 2021-04-01"
            )
        return self


class CandidatesSection(Section):
    """Frozen candidates: `count` items, the target among them, none of the others from the user's history."""

    count: int = Field(20, ge=2)
    method: Literal["uniform", "popularity"] = "uniform"
    seed: int = 0


class RankingSection(Section):
    """Cut-offs, and full-catalogue ranking for the systems that can do it."""

    k: list[Annotated[int, Field(ge=1)]] = Field([1, 5, 10], min_length=1)
    full_catalogue: bool = True
    exclude_history: bool = True  # items the user already had are not ranked (the target always is)


class DecodingSection(Section):
    """How an LLM's answer becomes a score: sum or mean of the title's token log-probabilities."""

    score: Literal["sum", "mean"] = "sum"
    max_new_tokens: int = Field(32, ge=1)  # of a free answer, of a rationale, of an event
    constrained: bool = True  # next_event: answers are held to the JSON schema; false: written freely, read strictly


class ActionProtocol(Section):
    """How actions are scored."""

    calibration_examples: int = Field(500, ge=0)  # of valid: they fit systems' temperatures, not controls'; 0: none
    bins: int = Field(10, ge=2)  # of the reliability plot and the calibration error
    otto_k: int = Field(20, ge=1)  # cut-off, and cap of what is to be found, of recall@k for each action
    otto_weights: dict[str, float] = {}  # label → weight of its recall; OTTO: clicks 0.1, carts 0.3, orders 0.6
    otto_next: list[str] = []  # labels of which only the next one is to be found; OTTO: clicks


class BootstrapSection(Section):
    """Intervals: percentile bootstrap over users, of tasks with actions over sessions."""

    samples: int = Field(2000, ge=100)
    confidence: float = Field(0.95, gt=0, lt=1)
    seed: int = 0


class Protocol(Section):
    """How a run is scored: shipped in eval/, so that two recipes share one and papers can be compared."""

    name: str
    description: str = ""
    split: SplitSection = SplitSection()
    candidates: CandidatesSection = CandidatesSection()
    ranking: RankingSection = RankingSection()
    decoding: DecodingSection = DecodingSection()
    actions: ActionProtocol = ActionProtocol()
    bootstrap: BootstrapSection = BootstrapSection()


class Recipe(Section):
    """A whole run: convert → train → evaluate."""

    name: str
    description: str = ""
    seed: int = 0
    output_dir: str = "runs/{name}"
    data: DataSection
    graph: GraphSection | None = None
    finance: FinanceSection | None = None
    actions: ActionsSection | None = None
    filter: FilterSection = FilterSection()
    protocol: Protocol
    history: HistorySection = HistorySection()
    prompt: PromptSection = PromptSection()
    tasks: list[TaskSection] = Field(min_length=1)
    encoder: EncoderSection = EncoderSection()
    model: ModelSection
    adapter: AdapterSection = AdapterSection()
    loss: LossSection = LossSection()
    # transformers.TrainingArguments by their own names; and streaming: true, with buffer_size (16384 examples, among
    # which they are shuffled), for training examples that no process holds (train/streaming.py)
    train: dict[str, Any] = {}
    evaluate: EvaluateSection = EvaluateSection()

    @model_validator(mode="before")
    @classmethod
    def _bank_gives_data(cls, document: Any) -> Any:
        finance = document.get("finance") if isinstance(document, dict) else None
        if not isinstance(finance, dict) or "folder" not in finance:
            return document
        return _with_bank(document, str(finance["folder"]))

    @model_validator(mode="after")
    def _items_or_actions(self) -> "Recipe":
        if self.actions is None and "items" not in self.data.model_fields_set:
            raise ValueError(
                "data.items is missing: name the file with the items' titles, or write items: null if the ids of the "
                "log are to be their titles"
            )
        return self

    @field_validator("protocol", mode="before")
    @classmethod
    def _load_protocol(cls, value: Any) -> Any:
        return _read_yaml(assets.find("eval", value)) if isinstance(value, str) else value

    @field_validator("output_dir")
    @classmethod
    def _formats(cls, value: str) -> str:
        try:
            value.format(name="")
        except (KeyError, IndexError, ValueError):
            raise ValueError("holds braces that are not {name}: only {name}, the recipe's name, is filled in") from None
        return value

    @property
    def output(self) -> Path:
        """The folder of this run: dataset/, encoder/, adapter/ and report/ go there."""
        return Path(self.output_dir.format(name=self.name))


def _with_bank(document: dict[str, Any], folder: str) -> dict[str, Any]:
    """The document with what a bank's data gives, where it says nothing else."""

    def table(name: str) -> dict[str, Any]:
        return {"path": f"{FAR_TRANS}{folder}/{name}.parquet"}

    found = document | {"data": document.get("data") or {n: table(n) for n in ("interactions", "items")}}
    if isinstance(graph := document.get("graph"), dict):
        triples = {"triples": table("triples") | {"entities": table("entities")}, "links": table("links")}
        found["graph"] = triples | graph
    return found


def load_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by path or shipped name and apply overrides such as "adapter.r=16" (values are YAML).

    Raises:
        UserError: unknown recipe or key, wrong type, broken YAML; names the file, the key and the nearest known key.
    """
    path = assets.find("recipes", name)
    document = _read_yaml(path)
    if isinstance(document.get("protocol"), str):  # resolved first, so that an override can reach into it
        document["protocol"] = _read_yaml(assets.find("eval", document["protocol"]))
    for override in overrides:
        _apply(document, override)
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        raise UserError(f"{path}: {_explain(error)}") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8: save the file as UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML ({getattr(error, 'problem', error)}): mend that line") from None
    if not isinstance(document, dict):
        raise UserError(f"{path}: holds {type(document).__name__}, a mapping of keys to values was expected")
    return document


def _apply(document: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise UserError(f'override "{override}" has no "=": write section.key=value, e.g. adapter.r=16')
    *parents, last = dotted.split(".")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(
            f'override "{override}": the value is not valid YAML ({getattr(error, "problem", error)}): '
            f'put a text with braces or colons into double quotes, {dotted}="…"'
        ) from None
    target: Any = document
    for part in parents:
        target = _below(target, part, override)
    if not isinstance(target, list | dict):
        raise UserError(f'override "{override}": "{last}" is asked of a plain value, there is nothing below it')
    target[_key(target, last, override)] = value


def _below(target: Any, part: str, override: str) -> Any:
    if isinstance(target, list):
        return target[_index(target, part, override)]
    if not isinstance(target, dict):
        raise UserError(f'override "{override}": "{part}" is asked of a plain value, there is nothing below it')
    return target.setdefault(part, {})


def _key(target: Any, part: str, override: str) -> Any:
    return _index(target, part, override) if isinstance(target, list) else part


def _index(target: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(target):
        raise UserError(f'override "{override}": "{part}" is no position in a list of {len(target)} (count from 0)')
    return int(part)


def _explain(error: ValidationError) -> str:
    return "; ".join(_explain_one(dict(entry)) for entry in error.errors())


def _explain_one(entry: dict[str, Any]) -> str:
    place = [str(part) for part in entry["loc"]]
    if entry["type"] != "extra_forbidden":
        given = "" if entry["type"] == "missing" else f" (given: {entry['input']!r})"
        return f"{'.'.join(place)}: {entry['msg']}{given}{_renamed(place, entry['input'])}"
    known = _known_keys(place[:-1])
    close = difflib.get_close_matches(place[-1], known, n=1)
    hint = f'did you mean "{close[0]}"?' if close else f"known keys: {', '.join(known)}"
    return f'{".".join(place)}: unknown key "{place[-1]}", {hint}'


def _renamed(place: Sequence[str], value: Any) -> str:
    """The new name of a value that had another one in earlier versions."""
    renamed = {("evaluate.baselines", "sasrec"): "sequence_encoder"}
    new = renamed.get((".".join(place[:2]), value)) if isinstance(value, str) else None
    return f': "{value}" is called "{new}" now' if new else ""


def _known_keys(place: Sequence[str]) -> list[str]:
    section: Any = Recipe
    for part in place:
        if part.isdigit():
            continue
        section = _section_of(section.model_fields[part].annotation)
    return list(section.model_fields)


def _section_of(annotation: Any) -> Any:
    """The Section inside X, X | None or list[X]."""
    for option in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(option, type) and issubclass(option, Section):
            return option
    return annotation
