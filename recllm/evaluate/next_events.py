"""Written events against what happened: answers of the task next_event enter, their figures leave.

An answer is one JSON object, read strictly (convert/actions.py): what is unfinished, cannot be read or names an unknown
action is wrong in every respect and stays in the denominator.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from recllm.convert.actions import ACTION, Answer, answer_schema, read_answer
from recllm.errors import UserError
from recllm.evaluate.action_metrics import rouge_l

EXACT, TYPE_ACCURACY, ROUGE = "exact", "type_accuracy", "rouge_l/"

Written = Sequence[tuple[str, bool]]  # texts, and whether each ended by itself


class NextEvents:
    """Judges answers to N examples of next_event.

    Args:
        right: (N,) the right answers, as convert wrote them.
        classes: (N,) their actions, by number.
        words: of the actions.
        fields: keys of further fields.

    Raises:
        UserError: a right answer that cannot be read.
    """

    def __init__(
        self, right: Sequence[str], classes: npt.NDArray[np.int64], words: Sequence[str], fields: Sequence[str]
    ) -> None:
        self.right, self.classes, self.words, self.fields = list(right), classes, list(words), list(fields)
        self._wanted = self.read([(text, True) for text in self.right])
        for text, wanted, place in zip(self.right, self._wanted, classes.tolist(), strict=True):
            if wanted.action != place:
                raise UserError(
                    f"the answer {text!r} of the dataset is not that of the action {self.words[place]!r} with the keys "
                    f"{', '.join([ACTION, *self.fields])} ({wanted.reason or 'another action'}): convert again"
                )

    @property
    def json_schema(self) -> dict[str, Any]:
        """What answers are held to."""
        return answer_schema(self.words, self.fields)

    def read(self, written: Written) -> list[Answer]:
        """What the answers say."""
        return [read_answer(text, finished, self.words, self.fields) for text, finished in written]

    def predicted(self, written: Written) -> npt.NDArray[np.int64]:
        """(N,) the action of each answer; -1 where it cannot be read."""
        return np.array([answer.action for answer in self.read(written)], dtype=np.int64)

    def figures(self, written: Written) -> dict[str, npt.NDArray[np.float64]]:
        """Of each answer, (N,): exact, type_accuracy, valid_ratio, and rouge_l/FIELD of each field.

        exact: action and all fields are letter by letter the right ones; a blank field is none. rouge_l is 0 where the
        answer cannot be read or leaves the field out, and NaN where the right answer leaves the field out: what was
        written there costs exact, and no similarity.
        """
        answers = self.read(written)
        pairs = list(zip(answers, self._wanted[: len(answers)], strict=True))
        exact = [a.action == b.action and a.fields == b.fields for a, b in pairs]
        table = {
            EXACT: np.array(exact, dtype=np.float64),
            TYPE_ACCURACY: np.array([a.action == b.action for a, b in pairs], dtype=np.float64),
            "valid_ratio": np.array([not a.reason for a, _ in pairs], dtype=np.float64),
        }
        for name in self.fields:
            table[ROUGE + name] = np.array([_similarity(a.fields.get(name), b.fields.get(name)) for a, b in pairs])
        return table

    def reasons(self, written: Written) -> dict[str, int]:
        """Why answers could not be read: how often for each reason, most often first."""
        found = [answer.reason for answer in self.read(written) if answer.reason]
        return {reason: found.count(reason) for reason in sorted(set(found), key=lambda one: -found.count(one))}


def _similarity(written: str | None, right: str | None) -> float:
    if right is None:
        return np.nan
    return 0.0 if written is None else rouge_l(written, right)
