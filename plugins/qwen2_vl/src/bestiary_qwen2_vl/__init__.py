"""Qwen2-VL, as data: nothing here imports a model, or torch."""

from bestiary.architecture import Architecture, Modality, Task

__all__ = ["QWEN2_VL"]

QWEN2_VL = Architecture(
    name="Qwen2VLForConditionalGeneration",
    model="bestiary_qwen2_vl.qwen2_vl",
    processor="bestiary_qwen2_vl.processor",
    proof="bestiary_qwen2_vl.proof",
    tasks={Task.GENERATE},
    modalities={
        "image": Modality(many=True, embeddings=True),
        "video": Modality(many=True, embeddings=True),
    },
    lora=True,
    pipeline=True,
    tensor=True,
    examples=("Qwen/Qwen2-VL-2B-Instruct", "Qwen/Qwen2-VL-7B-Instruct"),
)
