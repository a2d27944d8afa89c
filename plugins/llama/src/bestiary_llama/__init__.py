"""The Llama family, as data: nothing here imports a model, or torch."""

from bestiary.architecture import Architecture, Task

__all__ = ["LLAMA"]

LLAMA = Architecture(
    name="LlamaForCausalLM",
    aliases=("LLaMAForCausalLM",),
    model="bestiary_llama.llama",
    proof="bestiary_llama.proof",
    tasks={Task.GENERATE},
    lora=True,
    pipeline=True,
    tensor=True,
    examples=(
        "meta-llama/Llama-3.1-8B-Instruct",
        "meta-llama/Llama-2-7b-hf",
        "01-ai/Yi-34B",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
)
