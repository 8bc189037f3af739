"""The items of an adapter, as requests name them, and the prompt that shows a history of them.

A dataset's or an adapter's folder enters (items.parquet and manifest.json). Item indices leave for the ids and titles
of a request, and for item indices the messages that `recllm convert` would write. Imports without torch.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from recllm.convert.targets import PHRASING_SALT
from recllm.convert.templates import Template, load_template, render_rows
from recllm.convert.titles import neutralise
from recllm.data.dataset import Dataset
from recllm.data.randomness import mix, text_keys
from recllm.errors import UserError
from recllm.schema import ITEM_ID, TITLE

NEXT_ITEM = "next_item"

Messages = list[dict[str, str]]


class Catalogue:
    """Finds items by id or by title.

    Args:
        ids, titles, texts: of every item in the order of item_index; texts are the titles as prompts write them.
    """

    def __init__(self, ids: Sequence[str], titles: Sequence[str], texts: Sequence[str]) -> None:
        self.ids, self.texts = list(ids), list(texts)
        self._by_id = {name: index for index, name in enumerate(ids)}
        # Of items that share a title the lowest one stands for it, as in ItemTrie.representatives
        self._by_title = dict(zip(reversed([*texts, *titles]), reversed([*range(len(texts)), *range(len(titles))])))

    @classmethod
    def of(cls, dataset: Dataset) -> "Catalogue":
        """Of an opened folder."""
        return cls(dataset.items[ITEM_ID].to_pylist(), dataset.items[TITLE].to_pylist(), dataset.titles)

    def __len__(self) -> int:
        return len(self.ids)

    def item(self, item_id: str | None, title: str | None) -> int | None:
        """The item of an id, or else of a title, as prompts write it or as the items file does.

        None is cold start: no such item.

        >>> catalogue = Catalogue(["a", "b"], ["Heat", "Heat"], ["Heat (1995)", "Heat (1986)"])
        >>> catalogue.item("b", "b"), catalogue.item("Heat", "Heat"), catalogue.item("Heat", None)
        (1, 0, None)
        """
        found = None if item_id is None else self._by_id.get(item_id)
        return self._by_title.get(title) if found is None and title is not None else found


class NextItemPrompts:
    """Writes the prompt of a held-out next_item example for any history, as `recllm convert` does.

    Args:
        template: of the recipe.
        dense: whether answers continue a list, dense_window > 0.
        max_items: titles that a prompt shows, prompt.max_items.
        seed: of the recipe, which draws a user's phrasing.
        texts: items as prompts write them.
        special_tokens: of the tokenizer: broken in what is told about a user.
    """

    def __init__(
        self,
        template: Template,
        dense: bool,
        max_items: int,
        seed: int,
        texts: Sequence[str],
        special_tokens: Sequence[str] = (),
    ) -> None:
        self.template, self.dense, self.max_items, self.seed = template, dense, max_items, seed
        self.texts, self.special_tokens = texts, special_tokens

    @classmethod
    def of(
        cls, dataset: Dataset, template: str | None = None, special_tokens: Sequence[str] = ()
    ) -> "NextItemPrompts | None":
        """By the manifest of an opened folder; None where the recipe has no next_item task.

        Args:
            dataset: whose manifest names task, template and seed.
            template: where the template lies; None: where the recipe says.
            special_tokens: of the tokenizer.

        Raises:
            UserError: no such template, or one with another text than the adapter was trained with.
        """
        recipe = dataset.manifest["recipe"]
        entries = zip(recipe["tasks"], dataset.manifest["templates"])
        found = next(((task, entry) for task, entry in entries if task["task"] == NEXT_ITEM), None)
        if found is None:
            return None
        task, entry = found
        dense = task.get("dense_window", 0) > 0
        loaded = load_template(template or entry["template"], NEXT_ITEM, dense=dense)
        if loaded.sha256 != entry["sha256"]:
            raise UserError(
                f'template "{loaded.name}" is {loaded.id} ({loaded.sha256[:12]}…), the adapter was trained with '
                f"{entry['id']} ({entry['sha256'][:12]}…): give that file with --template"
            )
        if recipe.get("graph") and "graph" in loaded.uses(dense):
            raise UserError(
                f"{dataset.folder}: this adapter was trained on prompts that show a knowledge graph, which `recllm "
                "serve` does not hold: serve the folder with vLLM by hand, with prompts as `recllm convert` writes them"
            )
        shown = int(dataset.manifest["prompt_max_items"])
        return cls(loaded, dense, shown, int(recipe.get("seed", 0)), dataset.titles, special_tokens)

    @property
    def end(self) -> str:
        """What ends an answer: a newline where it continues a list, otherwise "" (eos)."""
        return "\n" if self.dense else ""

    def messages(self, items: Sequence[int], user_id: str | None = None, user_text: str = "") -> Messages:
        """The prompt that asks what follows `items`, oldest first.

        A template's phrasing is drawn as convert draws it, by the user's id and the length of the history; without an
        id it is the first one.
        """
        phrasing = self.template.phrasings[self._phrasing(user_id, len(items))]
        shown = [self.texts[item] for item in (items[-self.max_items :] if self.max_items else ())]
        columns: dict[str, list[Any]] = {"user": [neutralise(user_text, self.special_tokens)], "graph": [""]}
        if not self.dense:
            columns |= {"history": ["\n".join(shown)], "num_history": [len(shown)]}
        asked = phrasing.window if self.dense else phrasing.user
        messages = [] if phrasing.system is None else [_message("system", phrasing.system, columns)]
        messages.append(_message("user", asked or "", columns))
        if self.dense and shown:
            messages.append({"role": "assistant", "content": "".join(f"{text}\n" for text in shown)})
        return messages

    def _phrasing(self, user_id: str | None, position: int) -> int:
        if user_id is None:
            return 0
        drawn = mix(self.seed, PHRASING_SALT, text_keys([user_id]), np.array([position]))
        return int(drawn[0] % np.uint64(len(self.template.phrasings)))


def _message(role: str, source: str, columns: dict[str, list[Any]]) -> dict[str, str]:
    return {"role": role, "content": render_rows([source], [0], columns)[0]}


class GateReading:
    """Which part of a history a gate reads.

    Args:
        max_items: the newest so many, history.max_items.
        listed: of a /v1/recommend with history.gate=before_list, the newest so many that the prompt's list shows and
            the gate does not read; 0 with history.gate=all.
    """

    def __init__(self, max_items: int, listed: int) -> None:
        self.max_items, self.listed = max_items, listed

    @classmethod
    def of(cls, dataset: Dataset, prompts: NextItemPrompts | None) -> "GateReading":
        """By the manifest of an opened folder."""
        before_list = dataset.manifest.get("history_gate", "all") == "before_list"
        listed = prompts.max_items if before_list and prompts is not None and prompts.dense else 0
        return cls(int(dataset.manifest["history_max_items"]), listed)

    def read(self, items: Sequence[int], in_prompt: bool) -> npt.NDArray[np.int64]:
        """The items, or event codes, that the gate reads.

        `in_prompt`: the newest of them stand in a list that the answer continues.

        >>> GateReading(max_items=3, listed=1).read([1, 2, 3, 4, 5], in_prompt=True).tolist()
        [2, 3, 4]
        """
        end = max(len(items) - (self.listed if in_prompt else 0), 0)
        return np.array(items[max(end - self.max_items, 0) : end], dtype=np.int64)
