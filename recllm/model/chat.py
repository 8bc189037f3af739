"""Messages → token ids: the one place where a prompt or an answer becomes tokens.

Chat messages and a tokenizer enter; lists of token ids leave. Training, scoring and generating all come
through here, so that a title has the same tokens in a training window and in an evaluation prompt.

Three rules:

1. The messages before a final assistant message go through the tokenizer's chat template with
   `add_generation_prompt=True`. A tokenizer without a template (base models) gets their contents as plain text,
   each followed by a newline.
2. A final assistant message is an unfinished answer: its lines follow, tokenised as every answer is.
3. An answer is tokenised line by line, each line with its own newline. Byte-pair encodings merge across a newline
   ("!\\n" is one token of Llama 3, and "\\n" takes the next line's first space); cutting there first keeps a title's
   tokens independent of what stands around it.

Terminator: an answer that ends in a newline belongs to a list and that newline ends it; any other answer ends with
the tokenizer's eos token.
"""

from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from recllm.errors import UserError
from recllm.model.base_model import load_tokenizer

Message = Mapping[str, str]  # {"role": "user", "content": "…"}
REMEMBERED_LINES, REMEMBERED_PROMPTS = 1 << 18, 1 << 12  # a few hundred bytes each; when full, it begins anew


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], completion: Sequence[Message]
) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of the completion with its terminator; the loss stands on the latter only.

    Raises:
        UserError: no message, a message without role or content, or a completion that is not one assistant message.
    """
    return prompt_ids(tokenizer, prompt), completion_ids(tokenizer, prompt, completion)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message]) -> list[int]:
    """Token ids of a prompt, up to where the completion begins.

    Raises:
        UserError: no message before the answer, or a message without role or content.
    """
    turns, unfinished = _split(prompt)
    return _turn_ids(tokenizer, turns) + line_ids(tokenizer, unfinished)


def completion_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[Message],
    completion: Sequence[Message],
) -> list[int]:
    """Token ids of the completion with its terminator.

    The terminator hangs on the completion alone; the prompt is only checked to agree: an answer that continues a list
    must itself end in a newline, or the model would learn to stop after it.

    Raises:
        UserError: the completion is not one assistant message, or continues a list without ending in a newline.
    """
    return answer_ids(tokenizer, _completion_text(_split(prompt)[1], completion))


def _completion_text(unfinished: str, completion: Sequence[Message]) -> str:
    if len(completion) != 1 or completion[0].get("role") != "assistant":
        raise UserError(f"completion {list(completion)!r}: exactly one assistant message is expected")
    text = completion[0]["content"]
    if unfinished.endswith("\n") and not text.endswith("\n"):
        raise UserError(f'completion "{text}" continues a list of lines but has no newline at its end: add it')
    return text


def answer_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of one answer with its terminator: the newline that it ends with, otherwise eos.

    Raises:
        UserError: the answer has no newline and the tokenizer no eos token.
    """
    return line_ids(tokenizer, text) + _terminator(tokenizer, text)


def answers_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """`answer_ids` of each text, with all lines in one call of the tokenizer; errors as there."""
    lines = [_lines(text) for text in texts]
    ids = iter(_encode_lines(tokenizer, [line for own in lines for line in own]))
    return [
        [token for _ in own for token in next(ids)] + _terminator(tokenizer, text) for text, own in zip(texts, lines)
    ]


def _terminator(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """What follows an answer: nothing where a newline ends it, otherwise [eos]."""
    if text.endswith("\n"):
        return []
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {tokenizer.name_or_path} has no eos token to end an answer with: set one")
    return [tokenizer.eos_token_id]


def line_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text, each line tokenised by itself and without a terminator; "" gives []."""
    return [token for piece in _encode_lines(tokenizer, _lines(text)) for token in piece]


def _lines(text: str) -> list[str]:
    """Lines with their newlines; not str.splitlines, which cuts at other characters too."""
    lines = text.split("\n")
    return [line + "\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])


def _encode_lines(tokenizer: PreTrainedTokenizerBase, lines: Sequence[str]) -> list[list[int]]:
    if not lines:
        return []
    encoded: list[list[int]] = tokenizer(list(lines), add_special_tokens=False)["input_ids"]
    return encoded


class RememberingEncoder:
    """`encode` for many examples: remembers the ids of each answer line and of each prompt's finished turns.

    A catalogue has far fewer titles, and a dense task far fewer prompts, than there are examples.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._known_lines: dict[str, array[int]] = {}
        self._known_turns: dict[tuple[tuple[str, str], ...], array[int]] = {}

    def __call__(self, prompt: Sequence[Message], completion: Sequence[Message]) -> tuple["array[int]", "array[int]"]:
        """As `encode`, but as arrays of int32; same ids, same errors."""
        turns, unfinished = _split(prompt)
        text = _completion_text(unfinished, completion)
        prompt_ids = self._turns(turns) + self._lines(unfinished)
        return prompt_ids, self._lines(text) + array("i", _terminator(self.tokenizer, text))

    def count_before_last_line(self, completion: Sequence[Message]) -> int:
        """How many of a completion's tokens, from its first, are those of the lines before its last one.

        As lines are tokenised one by one, no token lies on both sides.
        """
        text = completion[0]["content"]
        return len(self._lines(text[: text.rfind("\n") + 1]))

    def _turns(self, turns: Sequence[Message]) -> "array[int]":
        key = tuple((turn["role"], turn["content"]) for turn in turns)
        ids = self._known_turns.get(key)
        if ids is None:
            if len(self._known_turns) >= REMEMBERED_PROMPTS:
                self._known_turns.clear()
            ids = self._known_turns[key] = array("i", _turn_ids(self.tokenizer, turns))
        return ids

    def _lines(self, text: str) -> "array[int]":
        lines, known = _lines(text), self._known_lines
        if new := [line for line in dict.fromkeys(lines) if line not in known]:
            if len(known) + len(new) > REMEMBERED_LINES:
                known.clear()
                new = list(dict.fromkeys(lines))
            known.update((line, array("i", ids)) for line, ids in zip(new, _encode_lines(self.tokenizer, new)))
        ids = array("i")
        for line in lines:
            ids.extend(known[line])
        return ids


def _split(prompt: Sequence[Message]) -> tuple[Sequence[Message], str]:
    """Finished turns, and the text of an unfinished answer ("" where the prompt has none)."""
    for message in prompt:
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise UserError(f"prompt message {dict(message)!r}: a role and a content, both text, are expected")
    continued = bool(prompt) and prompt[-1]["role"] == "assistant"
    turns = prompt[:-1] if continued else prompt
    if not turns:
        raise UserError(f"prompt {list(prompt)!r}: at least one message before the answer is expected")
    return turns, prompt[-1]["content"] if continued else ""


def _turn_ids(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message]) -> list[int]:
    messages: list[dict[str, Any]] = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    if tokenizer.chat_template:
        ids: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        return list(ids)
    return _begin_ids(tokenizer) + line_ids(tokenizer, "".join(f"{turn['content']}\n" for turn in turns))


def framing_bytes(tokenizer: PreTrainedTokenizerBase, roles: Sequence[str]) -> int:
    """How many bytes, and so at most how many tokens, a prompt of such messages has beside their contents.

    What the chat template writes, the beginning and the terminator are counted; roles are those of the messages, the
    last one "assistant" where an answer is unfinished.
    """
    turns = roles[:-1] if roles[-1] == "assistant" else roles
    begin_and_end = 2
    if not turns or not tokenizer.chat_template:
        return begin_and_end + len(turns)
    messages = [{"role": role, "content": "x"} for role in turns]  # templates may refuse a message without content
    text: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return begin_and_end + len(str(text).encode()) - len(turns)


def _begin_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[bos] where the tokenizer itself begins every text with it, otherwise []."""
    begin = tokenizer("")["input_ids"][:1]
    return list(begin) if begin and begin[0] == tokenizer.bos_token_id else []


def token_counter(name_or_path: str) -> Callable[[Sequence[Message], Sequence[Message]], tuple[int, int]]:
    """A function (prompt, completion) → how many tokens each has, by the tokenizer of a base model."""
    tokenizer = load_tokenizer(name_or_path)

    def count(prompt: Sequence[Message], completion: Sequence[Message]) -> tuple[int, int]:
        ids = encode(tokenizer, prompt, completion)
        return len(ids[0]), len(ids[1])

    return count
