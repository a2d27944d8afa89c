"""GPT-2, as data: nothing here imports a model, or torch."""

from bestiary.architecture import Architecture, Task

__all__ = ["GPT2"]

GPT2 = Architecture(
    name="GPT2LMHeadModel",
    model="bestiary_gpt2.gpt2",
    proof="bestiary_gpt2.proof",
    tasks={Task.GENERATE},
    lora=True,
    pipeline=True,
    tensor=True,
    examples=("openai-community/gpt2", "openai-community/gpt2-xl"),
)
