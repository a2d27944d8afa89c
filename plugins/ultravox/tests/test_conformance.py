"""The conformance kit over this plugin."""

from bestiary.testing import Conformance


class TestUltravoxModel(Conformance):
    architecture = "UltravoxModel"
