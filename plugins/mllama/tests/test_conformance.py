"""The conformance kit over this plugin."""

from bestiary.testing import Conformance


class TestMllamaForConditionalGeneration(Conformance):
    architecture = "MllamaForConditionalGeneration"
