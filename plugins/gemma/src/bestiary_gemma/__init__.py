"""The Gemma family, as data: nothing here imports a model, or torch."""

from bestiary.architecture import Architecture, Task

__all__ = ["GEMMA", "GEMMA2", "GEMMA2_EMBEDDING"]

GEMMA = Architecture(
    name="GemmaForCausalLM",
    model="bestiary_gemma.gemma",
    proof="bestiary_gemma.proof",
    tasks={Task.GENERATE},
    lora=True,
    pipeline=True,
    tensor=True,
    examples=("google/gemma-2b-it", "google/gemma-7b"),
)

GEMMA2 = Architecture(
    name="Gemma2ForCausalLM",
    model="bestiary_gemma.gemma2",
    proof="bestiary_gemma.proof2",
    tasks={Task.GENERATE},
    lora=True,
    pipeline=True,
    tensor=True,
    examples=("google/gemma-2-9b-it", "google/gemma-2-2b"),
)

GEMMA2_EMBEDDING = Architecture(
    name="Gemma2Model",
    model="bestiary_gemma.embedding",
    proof="bestiary_gemma.proof_embedding",
    tasks={Task.EMBED},
    lora=True,
    pipeline=True,
    tensor=True,
    examples=("BAAI/bge-multilingual-gemma2",),
)
