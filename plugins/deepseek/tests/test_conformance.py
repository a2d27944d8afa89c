"""The conformance kit over this plugin."""

from bestiary.testing import Conformance


class TestDeepseekForCausalLM(Conformance):
    architecture = "DeepseekForCausalLM"


class TestDeepseekV2ForCausalLM(Conformance):
    architecture = "DeepseekV2ForCausalLM"
