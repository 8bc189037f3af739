"""An adapter's folder, checked and opened for serving: all that answers a request beside the base model.

A folder and the name of its base model enter. A `ServedAdapter` leaves, which turns a request's history into token ids
and gate weights; whatever would stop vLLM, or make it answer wrongly, is refused here, before it is started.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from recllm.convert.titles import tokenizer_special_tokens
from recllm.data.dataset import Dataset
from recllm.errors import UserError
from recllm.files import read_json
from recllm.infer.vllm_engine import lora_settings
from recllm.infer.vllm_plugin.gates import GateError, Shape, shape_of
from recllm.model.adapter import (
    BASE_MODEL,
    ITEMS,
    LORA_CONFIG,
    LORA_WEIGHTS,
    MANIFEST,
    TOKEN_CONFIG,
    check_base_config,
    check_vocabulary,
)
from recllm.model.base_model import load_base_config, load_tokenizer, model_folder
from recllm.model.chat import prompt_ids
from recllm.model.sequence_encoder import read_tensors
from recllm.model.user_gate import UserGate
from recllm.schema import NO_ITEM, event_codes
from recllm.serve.catalogue import Catalogue, GateReading, NextItemPrompts
from recllm.serve.fields import Entry

LONGEST = 4096  # tokens of --max-model-len where it is not given and the model reads more


@dataclass(frozen=True)
class ServedAdapter:
    """What the gateway knows of an adapter; made by `open_adapter`."""

    folder: Path
    base_model: str
    context: int  # tokens of a prompt with its answer
    tokenizer: Any
    shape: Shape | None  # of its gates, None of a plain LoRA
    gate: UserGate | None
    catalogue: Catalogue | None  # None of a LoRA that stock PEFT wrote
    prompts: NextItemPrompts | None  # None without a next_item task, and of events: clients write their prompts
    reading: GateReading | None
    actions: tuple[str, ...] = ()  # labels in the order of their numbers where histories are of events

    def find(self, entry: Entry) -> int | None:
        """The item of an entry, or the code of an event; None where its item is unknown."""
        if self.catalogue is None:
            return None
        named = entry.item_id is not None or entry.title is not None
        item = self.catalogue.item(entry.item_id, entry.title) if named else NO_ITEM
        if entry.action is None or item is None:
            return item
        action = self.actions.index(entry.action)
        return int(event_codes(np.array(item), np.array(action), len(self.catalogue)))

    def read(self, items: Sequence[int], in_prompt: bool) -> npt.NDArray[np.int64]:
        """The items, or event codes, that a request's gate hangs on; none of a plain LoRA."""
        if self.gate is None or self.reading is None:
            return np.empty(0, dtype=np.int64)
        return self.reading.read(items, in_prompt)

    def weights(self, read: npt.NDArray[np.int64]) -> list[float]:
        """The gate weights of what is read, flat."""
        if self.gate is None:
            raise ValueError(f"{self.folder} has no gate")
        flat: list[float] = self.gate.weights([read]).ravel().tolist()
        return flat

    def prompt(self, items: Sequence[int], user_id: str | None, user_text: str) -> list[int]:
        """Token ids of the prompt that asks what follows."""
        if self.prompts is None:
            raise ValueError(f"{self.folder} has no next_item task")
        return prompt_ids(self.tokenizer, self.prompts.messages(items, user_id, user_text))


def open_adapter(
    folder: Path,
    model: str | None = None,
    context: int | None = None,
    template: str | None = None,
) -> ServedAdapter:
    """Read and check a folder.

    Args:
        folder: of an instance-wise or a plain LoRA.
        model: the base model; None: the one that the adapter was trained on.
        context: tokens of a prompt with its answer; None: the model's, at most LONGEST.
        template: of the next_item task; None: where the adapter's recipe says.

    Raises:
        UserError: anything that cannot be served, with the reason.
    """
    folder = Path(folder)
    shape = _check_files(folder)
    base_model = model or _trained_on(folder)
    config = load_base_config(base_model)
    check_base_config(config, folder)
    dataset = _dataset(folder, shape)
    prompts = None
    if dataset is not None and not dataset.is_events:
        special = tokenizer_special_tokens(model_folder(base_model))
        prompts = NextItemPrompts.of(dataset, template, special)
    return ServedAdapter(
        folder=folder.resolve(),
        base_model=base_model,
        context=_context(context, config),
        tokenizer=load_tokenizer(base_model),
        shape=shape,
        gate=None if shape is None else UserGate.load(folder),
        catalogue=None if dataset is None else Catalogue.of(dataset),
        prompts=prompts,
        reading=None if dataset is None else GateReading.of(dataset, prompts),
        actions=() if dataset is None else tuple(dataset.actions),
    )


def _check_files(folder: Path) -> Shape | None:
    """The shape of the gates of a folder that vLLM can load."""
    if not (folder / LORA_CONFIG).is_file():
        raise UserError(f"{folder} holds no {LORA_CONFIG}: a folder written by `recllm train` is expected")
    if (folder / TOKEN_CONFIG).is_file():
        raise UserError(
            f"{folder} has a soft token, which vLLM does not serve: it would serve the LoRA without the token. Train "
            "with adapter.method=ilora or lora"
        )
    try:
        shape = shape_of(folder)
    except GateError as error:
        raise UserError(str(error)) from None
    lora_settings([folder])
    weights = read_tensors(folder / LORA_WEIGHTS, "LoRA weights")
    if broken := [name for name, value in weights.items() if not torch.isfinite(value).all()]:
        raise UserError(
            f"{folder / LORA_WEIGHTS}: {broken[0]} holds numbers that are not finite: train the adapter again"
        )
    return shape


def _trained_on(folder: Path) -> str:
    if not (folder / BASE_MODEL).is_file():
        raise UserError(f"{folder} has no {BASE_MODEL}, so its base model is not known: name it with --model")
    return str(read_json(folder / BASE_MODEL, "the base model of an adapter")["name_or_path"])


def _dataset(folder: Path, shape: Shape | None) -> Dataset | None:
    """The folder's items and manifest; None of a plain LoRA without both."""
    if shape is None and not (folder / ITEMS).exists() and not (folder / MANIFEST).exists():
        return None
    dataset = Dataset.open(folder)
    check_vocabulary(folder, dataset.vocabulary_sha256)
    return dataset


def _context(asked: int | None, config: Any) -> int:
    most = getattr(config, "max_position_embeddings", None) or LONGEST
    if asked is not None and not 1 <= asked <= most:
        raise UserError(f"--max-model-len {asked}: the base model reads 1 to {most} tokens, take one of these")
    return asked or min(most, LONGEST)
