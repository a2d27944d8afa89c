"""The conformance kit over this plugin."""

from bestiary.testing import Conformance


class TestPaliGemmaForConditionalGeneration(Conformance):
    architecture = "PaliGemmaForConditionalGeneration"
