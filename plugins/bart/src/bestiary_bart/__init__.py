"""BART, as data: nothing here imports a model, or torch."""

from bestiary.architecture import Architecture, Task

__all__ = ["BART"]

BART = Architecture(
    name="BartForConditionalGeneration",
    aliases=("BartModel",),
    model="bestiary_bart.bart",
    processor="bestiary_bart.processor",
    proof="bestiary_bart.proof",
    tasks={Task.GENERATE},
    lora=True,
    pipeline=True,
    tensor=True,
    examples=("facebook/bart-large-cnn", "facebook/bart-base"),
)
