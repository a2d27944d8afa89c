"""Mamba, as data: nothing here imports a model, or torch."""

from bestiary.architecture import Architecture, Task

__all__ = ["MAMBA"]

MAMBA = Architecture(
    name="MambaForCausalLM",
    model="bestiary_mamba.mamba",
    proof="bestiary_mamba.proof",
    tasks={Task.GENERATE},
    lora=True,
    pipeline=True,
    tensor=True,
    examples=("state-spaces/mamba-130m-hf", "state-spaces/mamba-2.8b-hf"),
)
