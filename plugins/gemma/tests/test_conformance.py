"""The conformance kit over this plugin."""

from bestiary.testing import Conformance


class TestGemmaForCausalLM(Conformance):
    architecture = "GemmaForCausalLM"


class TestGemma2ForCausalLM(Conformance):
    architecture = "Gemma2ForCausalLM"


class TestGemma2Model(Conformance):
    architecture = "Gemma2Model"
