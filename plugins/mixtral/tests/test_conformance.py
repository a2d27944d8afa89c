"""The conformance kit over this plugin."""

from bestiary.testing import Conformance


class TestMixtralForCausalLM(Conformance):
    architecture = "MixtralForCausalLM"
