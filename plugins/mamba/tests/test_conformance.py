"""The conformance kit over this plugin."""

from bestiary.testing import Conformance


class TestMambaForCausalLM(Conformance):
    architecture = "MambaForCausalLM"
