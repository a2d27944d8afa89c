"""What tests of Bestiary and of its plugins are made with. Nothing that serves a user imports it."""

from bestiary.testing.fake_model import Expected, FakeExecutor, expected_answer, expected_prompt_logprobs

__all__ = ["Expected", "FakeExecutor", "expected_answer", "expected_prompt_logprobs"]
