"""Falcon, as data: nothing here imports a model, or torch."""

from bestiary.architecture import Architecture, Task

__all__ = ["FALCON"]

FALCON = Architecture(
    name="FalconForCausalLM",
    aliases=("RWForCausalLM",),
    model="bestiary_falcon.falcon",
    proof="bestiary_falcon.proof",
    tasks={Task.GENERATE},
    lora=True,
    pipeline=True,
    tensor=True,
    examples=("tiiuae/falcon-7b", "tiiuae/falcon-40b", "tiiuae/falcon-rw-7b"),
)
