"""Jamba, as data: nothing here imports a model, or torch."""

from bestiary.architecture import Architecture, Task

__all__ = ["JAMBA"]

JAMBA = Architecture(
    name="JambaForCausalLM",
    model="bestiary_jamba.jamba",
    proof="bestiary_jamba.proof",
    tasks={Task.GENERATE},
    lora=True,
    pipeline=True,
    tensor=True,
    examples=("ai21labs/AI21-Jamba-1.5-Mini", "ai21labs/Jamba-v0.1"),
)
