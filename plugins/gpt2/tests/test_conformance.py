"""The conformance kit over this plugin."""

from bestiary.testing import Conformance


class TestGPT2LMHeadModel(Conformance):
    architecture = "GPT2LMHeadModel"
