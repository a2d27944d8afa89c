"""The conformance kit over this plugin."""

from bestiary.testing import Conformance


class TestMistralForCausalLM(Conformance):
    architecture = "MistralForCausalLM"


class TestMistralModel(Conformance):
    architecture = "MistralModel"
