"""The conformance kit over this plugin."""

from bestiary.testing import Conformance


class TestBloomForCausalLM(Conformance):
    architecture = "BloomForCausalLM"
