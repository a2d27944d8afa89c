"""PaliGemma, as data: nothing here imports a model, or torch."""

from bestiary.architecture import Architecture, Modality, Task

__all__ = ["PALIGEMMA"]

PALIGEMMA = Architecture(
    name="PaliGemmaForConditionalGeneration",
    model="bestiary_paligemma.paligemma",
    processor="bestiary_paligemma.processor",
    proof="bestiary_paligemma.proof",
    tasks={Task.GENERATE},
    modalities={"image": Modality(embeddings=True)},
    lora=True,
    pipeline=True,
    tensor=True,
    examples=("google/paligemma-3b-mix-224", "google/paligemma2-3b-pt-224"),
)
