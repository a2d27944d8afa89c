"""The conformance kit over this plugin."""

from bestiary.testing import Conformance


class TestQwen2ForCausalLM(Conformance):
    architecture = "Qwen2ForCausalLM"


class TestQwen2MoeForCausalLM(Conformance):
    architecture = "Qwen2MoeForCausalLM"


class TestQwen2ForRewardModel(Conformance):
    architecture = "Qwen2ForRewardModel"
