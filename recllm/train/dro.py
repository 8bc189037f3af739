"""Group distributionally robust optimisation: groups that do badly come to weigh more and more.

Sagawa, Koh, Hashimoto & Liang, "Distributionally Robust Neural Networks for Group Shifts", ICLR 2020, algorithm 1: the
loss is Σ_g q_g ℓ_g over the groups' mean losses, and each step q_g ← q_g exp(η ℓ_g) / Z, from q_g = 1 / G. The paper
draws a group first, all alike, and then an example of it. Here examples come as they are, which three things are for:

- An example of group g weighs q_g / p_g, with p_g the group's share of the training tokens' weight. Over an epoch that
  is Σ_g q_g ℓ_g, however rare a group is and however examples are put into batches. With a mean over the group's
  examples in a step, a group that one step in ten has would get a tenth of its q_g.
- All groups grow each step, those that a step lacks by their last known loss (one never met by the mean of the others).
  If only those grew that a step has, a rare group would lose weight to a frequent one that does better.
- A step's gradient is taken with the q before it, as the losses of a step are whole only when its last micro-batch has
  run: what a step does then does not depend on how it is cut into micro-batches and processes.

Groups enter; the factor of each group's examples leaves, and a document for checkpoints and logs.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import logsumexp

from recllm.errors import UserError

DRO = "dro.json"  # in a checkpoint and in the adapter's folder
Floats = npt.NDArray[np.float64]


class Groups(NamedTuple):
    """G groups of training examples."""

    names: list[str]
    shares: Floats  # (G,) of the training tokens' weight, above 0, sum 1
    centres: npt.NDArray[Any] | None = None  # (G, D) of user clusters


class GroupDro:
    """The weights of groups, and what is known of their losses. The same numbers on all processes.

    Args:
        groups: what they are called and how large they are.
        step_size: η.
    """

    def __init__(self, groups: Groups, step_size: float) -> None:
        self.groups, self.step_size = groups, step_size
        count = len(groups.names)
        self.log_weights: Floats = np.full(count, -np.log(count))  # logarithms: q of a group that does well underflows
        self.losses: Floats = np.full(count, np.nan)  # last known, nats a token's weight
        self._nats, self._counted = np.zeros(count), np.zeros(count)  # since the last log

    @property
    def weights(self) -> Floats:
        """q, (G,), sums to 1."""
        return np.exp(self.log_weights)

    @property
    def factors(self) -> Floats:
        """What the tokens of each group's examples count more than they would, (G,): q_g / p_g."""
        return self.weights / self.groups.shares

    def update(self, nats: Floats, counted: Floats) -> None:
        """After a step: the weighted nats of each group's tokens (G,), and their weights (G,), of all processes.

        >>> dro = GroupDro(Groups(["a", "b"], np.array([0.75, 0.25])), step_size=1.0)
        >>> dro.update(np.array([4 * np.log(2), 2 * np.log(6)]), np.array([4.0, 2.0]))
        >>> (4 * dro.weights).round(12).tolist()  # ½ · 2 and ½ · 6, over their sum
        [1.0, 3.0]
        """
        seen = counted > 0
        self.losses[seen] = nats[seen] / counted[seen]
        known = ~np.isnan(self.losses)
        if known.any():
            grown = self.log_weights + self.step_size * np.where(known, self.losses, self.losses[known].mean())
            self.log_weights = grown - logsumexp(grown)
        self._nats, self._counted = self._nats + nats, self._counted + counted

    def logged(self) -> dict[str, float]:
        """q now, and the mean loss since the last call of the groups that were met; begins anew."""
        met = self._counted > 0
        means = self._nats[met] / self._counted[met]
        names = self.groups.names
        found = {f"dro_weight/{name}": float(weight) for name, weight in zip(names, self.weights)}
        found |= {f"dro_loss/{names[place]}": float(mean) for place, mean in zip(np.flatnonzero(met), means)}
        self._nats, self._counted = np.zeros(len(names)), np.zeros(len(names))
        return found

    def document(self) -> dict[str, Any]:
        """What a run goes on from: `restore` takes it. Numbers come back from JSON to the last bit."""
        centres = self.groups.centres
        return {
            "format_version": 1,
            "groups": self.groups.names,
            "shares": self.groups.shares.tolist(),
            "step_size": self.step_size,
            "weights": self.weights.tolist(),
            "log_weights": self.log_weights.tolist(),
            "losses": [None if np.isnan(loss) else float(loss) for loss in self.losses],
            "centres": None if centres is None else np.asarray(centres, dtype=np.float64).tolist(),
        }

    def restore(self, document: dict[str, Any], place: str) -> None:
        """Go on from a document.

        Raises:
            UserError: it is of other groups; `place` names it.
        """
        if document.get("groups") != self.groups.names:
            raise UserError(
                f"{place} has the groups {document.get('groups')}, this run has {self.groups.names}: the checkpoint is "
                "not of this run, move its folder away to begin afresh"
            )
        self.log_weights = np.array(document["log_weights"], dtype=np.float64)
        self.losses = np.array([np.nan if loss is None else loss for loss in document["losses"]], dtype=np.float64)
