"""The conformance kit over this plugin."""

from bestiary.testing import Conformance


class TestJambaForCausalLM(Conformance):
    architecture = "JambaForCausalLM"
