"""What proves Gemma 2 as a reader: the class's last hidden state, cut down to length 1."""

from bestiary.testing import Case, Naming, Transformers, last_token
from bestiary_gemma.proof2 import PUBLISHED

__all__ = ["CASES"]

CASES = (
    Case(
        "bge-multilingual-gemma2",
        PUBLISHED,
        Transformers("Gemma2Model", kind="embedding", vectors=last_token),
        mutations={"the window": {"sliding_window": 64}, "the cap of scores": {"attn_logit_softcapping": None}},
        namings=(Naming("under a first level", ((r"^", "model."),)),),
    ),
)
