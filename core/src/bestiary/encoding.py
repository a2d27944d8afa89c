"""Items to vectors, each once: the model's encoder, and a cache of what came out of it. Knows no request.

An item's vectors never depend on what else is in the step: each goes through the encoder alone.
"""

from collections import OrderedDict

import torch
from torch import Tensor

from bestiary.blocks import Encoder
from bestiary.errors import EngineError
from bestiary.inputs import Item

__all__ = ["Encoding"]


class Encoding:
    """The vectors of the items that were seen last, up to `room` vectors in all."""

    def __init__(self, encoder: Encoder | None, room: int, dtype: torch.dtype, device: torch.device) -> None:
        self._encoder, self._room, self._dtype, self._device = encoder, room, dtype, device
        self._known: OrderedDict[tuple[bytes, str], Tensor] = OrderedDict()
        self._num_vectors = 0

    def __call__(self, item: Item, adapter: str = "") -> Tensor:
        """[num_vectors, width] of an item, by the encoder with an adapter, or with none.

        Raises EngineError where the encoder gives another number of vectors.
        """
        key = (item.digest, adapter)
        found = self._known.get(key)
        if found is None:
            found = self._encode(item)
            self._keep(key, found)
        else:
            self._known.move_to_end(key)
        return found

    def forget(self) -> None:
        """Keep nothing of what was encoded."""
        self._known.clear()
        self._num_vectors = 0

    def _encode(self, item: Item) -> Tensor:
        inputs = {name: tensor.to(self._device) for name, tensor in item.tensors.items()}
        if "embeddings" in inputs:
            found = inputs["embeddings"].to(self._dtype)
        elif self._encoder is None:
            raise EngineError(f"the model has no encoder for {item.modality} input")
        else:
            found = self._encoder(item.modality, inputs)
        if found.shape[0] != item.num_vectors:
            raise EngineError(f"the encoder made {found.shape[0]} vectors of an item of {item.num_vectors}")
        return found

    def _keep(self, key: tuple[bytes, str], vectors: Tensor) -> None:
        """Forget the oldest until there is room; what is larger than all of it is not kept."""
        if len(vectors) > self._room:
            return
        while self._num_vectors + len(vectors) > self._room:
            _, gone = self._known.popitem(last=False)
            self._num_vectors -= len(gone)
        self._known[key] = vectors
        self._num_vectors += len(vectors)
