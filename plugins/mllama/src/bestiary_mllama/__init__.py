"""Llama 3.2 Vision, as data: nothing here imports a model, or torch."""

from bestiary.architecture import Architecture, Modality, Task

__all__ = ["MLLAMA"]

MLLAMA = Architecture(
    name="MllamaForConditionalGeneration",
    model="bestiary_mllama.mllama",
    processor="bestiary_mllama.processor",
    proof="bestiary_mllama.proof",
    tasks={Task.GENERATE},
    modalities={"image": Modality()},
    lora=True,
    pipeline=True,
    tensor=True,
    examples=("meta-llama/Llama-3.2-11B-Vision-Instruct",),
)
