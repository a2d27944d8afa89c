"""The conformance kit over this plugin."""

from bestiary.testing import Conformance


class TestLlamaForCausalLM(Conformance):
    architecture = "LlamaForCausalLM"
