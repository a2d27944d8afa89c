"""The Qwen2 family, as data: nothing here imports a model, or torch."""

from bestiary.architecture import Architecture, Task

__all__ = ["QWEN2", "QWEN2_MOE", "QWEN2_REWARD"]

QWEN2 = Architecture(
    name="Qwen2ForCausalLM",
    model="bestiary_qwen2.qwen2",
    proof="bestiary_qwen2.proof",
    tasks={Task.GENERATE},
    lora=True,
    pipeline=True,
    tensor=True,
    examples=("Qwen/Qwen2-7B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct", "Qwen/QwQ-32B-Preview"),
)

QWEN2_MOE = Architecture(
    name="Qwen2MoeForCausalLM",
    model="bestiary_qwen2.qwen2_moe",
    proof="bestiary_qwen2.proof_moe",
    tasks={Task.GENERATE},
    lora=True,
    pipeline=True,
    tensor=True,
    examples=("Qwen/Qwen1.5-MoE-A2.7B-Chat", "Qwen/Qwen2-57B-A14B-Instruct"),
)

QWEN2_REWARD = Architecture(
    name="Qwen2ForRewardModel",
    model="bestiary_qwen2.reward",
    proof="bestiary_qwen2.proof_reward",
    tasks={Task.REWARD},
    lora=True,
    pipeline=True,
    tensor=True,
    examples=("Qwen/Qwen2.5-Math-RM-72B",),
)
