"""The conformance kit over this plugin."""

from bestiary.testing import Conformance


class TestBartForConditionalGeneration(Conformance):
    architecture = "BartForConditionalGeneration"
