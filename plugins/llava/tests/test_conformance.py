"""The conformance kit over this plugin."""

from bestiary.testing import Conformance


class TestLlavaForConditionalGeneration(Conformance):
    architecture = "LlavaForConditionalGeneration"
