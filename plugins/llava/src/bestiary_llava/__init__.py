"""The LLaVA family, as data: nothing here imports a model, or torch."""

from bestiary.architecture import Architecture, Modality, Task

__all__ = ["LLAVA"]

LLAVA = Architecture(
    name="LlavaForConditionalGeneration",
    model="bestiary_llava.llava",
    processor="bestiary_llava.processor",
    proof="bestiary_llava.proof",
    tasks={Task.GENERATE},
    modalities={"image": Modality(many=True, embeddings=True)},
    lora=True,
    pipeline=True,
    tensor=True,
    examples=("llava-hf/llava-1.5-7b-hf", "mistral-community/pixtral-12b"),
)
