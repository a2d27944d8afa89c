"""What proves Qwen2 as a judge: the class's hidden states under a network of torch's own products."""

from typing import TYPE_CHECKING, Any

from bestiary.testing import Case, Transformers
from bestiary_qwen2.proof import PUBLISHED

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CASES"]


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """What stands on top of the trunk."""
    width = config["hidden_size"]
    return {
        "score.0.weight": (width, width),
        "score.0.bias": (width,),
        "score.2.weight": (1, width),
        "score.2.bias": (1,),
    }


def _rewards(hidden_TD: "Tensor", score: "dict[str, Tensor]") -> "Tensor":
    """[T, 1] a number for every token."""
    inner = (hidden_TD @ score["score.0.weight"].T + score["score.0.bias"]).relu()
    return inner @ score["score.2.weight"].T + score["score.2.bias"]


CASES = (
    Case(
        "Math-RM",
        PUBLISHED,
        Transformers(
            "Qwen2Model",
            kind="reward",
            vectors=_rewards,
            extra=_shapes,
            tensors=lambda tensors: {f"model.{name}": tensor for name, tensor in tensors.items()},
        ),
        mutations={"the norms' epsilon": {"rms_norm_eps": 0.5}, "the base": {"rope_theta": 100.0}},
    ),
)
