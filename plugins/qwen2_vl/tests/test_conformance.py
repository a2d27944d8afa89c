"""The conformance kit over this plugin."""

from bestiary.testing import Conformance


class TestQwen2VLForConditionalGeneration(Conformance):
    architecture = "Qwen2VLForConditionalGeneration"
