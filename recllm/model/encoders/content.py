"""The content encoder: SASRec over what the base model says of each item's text, so that new items are known too.

Features (num_items, F) of the items enter once (see item_features.py), then item indices or event codes (B, L) as for
SASRec. States (B, L, D) leave. Nothing is learned for a single item: its vector is a projection of its features, so an
item without any interaction is read and scored by its text. The idea is that of UniSRec (Hou et al., KDD 2022); the
features are those of the very model that the adapter tunes.
"""

from typing import Any

import torch
from torch import nn

from recllm.errors import UserError
from recllm.model.encoders.interface import NoItems
from recllm.model.encoders.sasrec import SASRec

MIN_DEVIATION = 1e-6  # below it a feature is the same for all items: it is centred, not blown up


class ContentEncoder(SASRec):
    """SASRec whose item embedding is a learned projection of frozen features. F is `feature_size`."""

    type = "content"
    SIZES: tuple[str, ...] = (*SASRec.SIZES, "feature_size")

    def __init__(self, num_items: int, feature_size: int, hidden_size: int = 64, **sizes: Any) -> None:
        embedding = TextEmbedding(num_items, feature_size, hidden_size) if num_items else NoItems(hidden_size)
        super().__init__(num_items, hidden_size, **sizes, item_embedding=embedding)
        self.feature_size = feature_size


class TextEmbedding(nn.Module):
    """Items by their text: index → projection of the item's features. Takes the place of nn.Embedding."""

    features: torch.Tensor  # (num_items, F), half precision

    def __init__(self, num_items: int, feature_size: int, hidden_size: int) -> None:
        super().__init__()
        self.projection = nn.Linear(feature_size, hidden_size)
        # standardised features in, vectors of length about 1 out: first scores then have deviation 1. The features are
        # scaled rather than the weights, because one step of Adam moves all F weights of an output at once.
        self.scale = feature_size**-0.5
        nn.init.normal_(self.projection.weight, std=hidden_size**-0.5)
        nn.init.zeros_(self.projection.bias)
        self.register_buffer("features", torch.zeros(num_items, feature_size, dtype=torch.float16))

    def forward(self, items: torch.Tensor) -> torch.Tensor:
        """(…,) item indices → (…, D)."""
        return self._project(self.features[items])

    @property
    def weight(self) -> torch.Tensor:
        """The vectors of all items, (num_items, D)."""
        return self._project(self.features)

    def _project(self, features: torch.Tensor) -> torch.Tensor:
        return self.projection(features.to(self.projection.weight.dtype) * self.scale)

    @torch.no_grad()
    def set_features(self, features: torch.Tensor) -> None:
        """Keep the features (num_items, F), standardised over the items.

        Hidden states share a large common component, in a few dimensions above all: what tells items apart is the rest.

        Raises:
            UserError: another shape, or a feature that is not finite.
        """
        if features.shape != self.features.shape or not torch.isfinite(features).all():
            raise UserError(
                f"item features have shape {tuple(features.shape)}, finite: {bool(torch.isfinite(features).all())}; "
                f"finite ones of shape {tuple(self.features.shape)} are expected: compute them again"
            )
        deviation, mean = torch.std_mean(features.double(), dim=0, correction=0)
        self.features.copy_((features - mean) / torch.where(deviation > MIN_DEVIATION, deviation, 1.0))
