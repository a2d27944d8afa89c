"""The DeepSeek family: what it declares. Nothing heavy is imported here."""

from bestiary.architecture import Architecture, Task

__all__ = ["DEEPSEEK", "DEEPSEEK_V2"]

DEEPSEEK = Architecture(
    name="DeepseekForCausalLM",
    model="bestiary_deepseek.deepseek",
    proof="bestiary_deepseek.proof",
    tasks={Task.GENERATE},
    lora=True,
    pipeline=True,
    tensor=True,
    examples=("deepseek-ai/deepseek-moe-16b-base", "deepseek-ai/deepseek-moe-16b-chat"),
)

DEEPSEEK_V2 = Architecture(
    name="DeepseekV2ForCausalLM",
    model="bestiary_deepseek.deepseek_v2",
    proof="bestiary_deepseek.proof_v2",
    tasks={Task.GENERATE},
    lora=True,
    pipeline=True,
    tensor=True,
    examples=("deepseek-ai/DeepSeek-V2-Lite-Chat", "deepseek-ai/DeepSeek-V2"),
)
