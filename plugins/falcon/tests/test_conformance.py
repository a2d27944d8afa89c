"""The conformance kit over this plugin."""

from bestiary.testing import Conformance


class TestFalconForCausalLM(Conformance):
    architecture = "FalconForCausalLM"
