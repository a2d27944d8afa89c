"""What proves Mistral as a reader: the class's last hidden state, cut down to length 1."""

from bestiary.testing import Case, Naming, Transformers, last_token
from bestiary_mistral.proof import PUBLISHED

__all__ = ["CASES"]

CASES = (
    Case(
        "e5-mistral",
        PUBLISHED,
        Transformers("MistralModel", kind="embedding", vectors=last_token),
        mutations={"the window": {"sliding_window": None}, "the norms' epsilon": {"rms_norm_eps": 0.5}},
        namings=(Naming("under a first level", ((r"^", "model."),)),),
    ),
)
