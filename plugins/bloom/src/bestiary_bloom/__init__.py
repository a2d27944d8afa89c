"""BLOOM, as data: nothing here imports a model, or torch."""

from bestiary.architecture import Architecture, Task

__all__ = ["BLOOM"]

BLOOM = Architecture(
    name="BloomForCausalLM",
    model="bestiary_bloom.bloom",
    proof="bestiary_bloom.proof",
    tasks={Task.GENERATE},
    lora=True,
    pipeline=True,
    tensor=True,
    examples=("bigscience/bloom-560m", "bigscience/bloomz"),
)
