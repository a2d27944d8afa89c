"""A request and its answers in the making: what the engine remembers between steps. Knows no executor."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bestiary.adapters import Entry
from bestiary.inputs import Inputs
from bestiary.output import CompletionOutput, FinishReason, Logprob, OutputText, RequestOutput
from bestiary.sampling.params import SamplingParams
from bestiary.scheduler import Sequence as Tokens

if TYPE_CHECKING:
    from torch import Tensor

    from bestiary.sampling.sampler import Row

__all__ = ["Answer", "Request", "seen_from_the_start"]


@dataclass(slots=True, eq=False)
class Answer:
    """One of a request's answers in the making."""

    request: "Request"
    index: int
    sequence: Tokens
    text: OutputText
    #: What the sampler knows of it.
    row: "Row"
    logprobs: list[dict[int, Logprob]] | None
    #: What a model that pools has given so far, in chunks of the prompt's rows.
    vectors: list["Tensor"] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def output(self) -> CompletionOutput:
        """As far as it is."""
        tokens = self.sequence.tokens[self.sequence.num_prompt :]
        logprobs = None if self.logprobs is None else list(self.logprobs)
        total = None if self.logprobs is None else self.cumulative_logprob
        return CompletionOutput(
            self.index, self.text.text, tokens, total, logprobs, self.finish_reason, self.stop_reason
        )


@dataclass(slots=True, eq=False)
class Request:
    """What was asked, and its answers."""

    id: str
    prompt: str | None
    prompt_ids: list[int]
    params: SamplingParams
    final_only: bool
    end_ids: list[int]
    answers: list[Answer] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    adapter: Entry | None = None

    @property
    def finished(self) -> bool:
        """All answers have ended."""
        return all(answer.finish_reason for answer in self.answers)

    def output(self) -> RequestOutput:
        """With its answers as far as they are."""
        return RequestOutput(
            request_id=self.id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_ids,
            prompt_logprobs=self.prompt_logprobs,
            outputs=[answer.output() for answer in self.answers],
            finished=self.finished,
            num_cached_tokens=self.answers[0].sequence.num_cached,
            vectors=list(self.answers[0].vectors),
        )


def seen_from_the_start(prompt_ids: Sequence[int], inputs: Inputs) -> list[bytes]:
    """What even the first token's keys depend on: items that all look at, and a prefix that sees itself both ways."""
    if not inputs.prefix:
        return [item.digest for item in inputs.crossed]
    prefix = prompt_ids[: inputs.prefix]
    return [struct.pack(f"<{len(prefix)}q", *prefix), *(item.digest for item in inputs.items)]
