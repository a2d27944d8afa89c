"""`bestiary run`: one prompt, one answer, printed as it comes."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from bestiary.cli.media import check_files, in_prompt, question, read_parts
from bestiary.cli.options import EngineFlags, MediaFlags, Model, SamplingFlags, System
from bestiary.cli.terminal import StreamedText, UsageError, note
from bestiary.errors import EngineError, RequestError

if TYPE_CHECKING:
    from bestiary.output import RequestOutput

__all__ = ["command"]

_ENGINE, _SAMPLING, _MEDIA = EngineFlags(), SamplingFlags(), MediaFlags()


def command(
    model: Model,
    prompt: Annotated[str, Parameter(help="The prompt; - reads the standard input.", allow_leading_hyphen=True)],
    /,
    *,
    chat: Annotated[
        bool | None,
        Parameter(help="Put the prompt as a question, or complete it. Default: a question, if the model can chat."),
    ] = None,
    system: System = None,
    stats: Annotated[
        bool, Parameter(help="Tell tokens and speed at the end.", negative="", show_default=False)
    ] = False,
    media: MediaFlags = _MEDIA,
    sampling: SamplingFlags = _SAMPLING,
    engine: EngineFlags = _ENGINE,
) -> None:
    """Answer one prompt."""
    if system is not None and chat is False:
        raise UsageError("--system belongs to a conversation: leave out --no-chat")
    if prompt.startswith("--"):
        raise UsageError(f"unknown option: {prompt} (a prompt that begins so comes through the standard input, with -)")
    check_files(media.named())
    engine.adapter()
    text = _read_input() if prompt == "-" else prompt
    if chat is not False:
        _warm_templates()
    llm = engine.load(model)
    params = sampling.over(llm.get_default_sampling_params())
    has_template = llm.has_chat_template()
    if not has_template and (chat or system is not None):
        raise RequestError(f"{model} has no chat template: without --chat and --system it completes the prompt")
    parts = read_parts(llm, media.named())
    clock, written, output = _Clock(time.perf_counter()), StreamedText(sys.stdout), None
    is_question = has_template and chat is not False
    asked = _conversation(text, system, parts) if is_question else in_prompt(text, parts)
    with closing(llm.stream(asked, params, lora=engine.adapter())) as answers:
        for output in answers:
            clock.tick()
            written.update(output.outputs[0].text)
    written.end()
    if output is not None and stats:
        note(clock.report(output))
    if output is not None and output.outputs[0].finish_reason == "error":
        raise EngineError(f"the answer ended with an error: {output.outputs[0].stop_reason}")


def _warm_templates() -> None:
    """Start what renders the conversation while the model is being loaded."""
    from bestiary.text import ChatTemplate

    ChatTemplate.warm()


def _conversation(text: str, system: str | None, parts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    before = [] if system is None else [{"role": "system", "content": system}]
    return [*before, question(text, parts)]


def _read_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UsageError(f"the standard input is not {error.encoding} text: {error.reason}") from None


@dataclass
class _Clock:
    """When the request started, and when its first and latest tokens came."""

    started: float
    first: float | None = None
    last: float = 0.0

    def tick(self) -> None:
        self.last = time.perf_counter()
        self.first = self.first or self.last

    def report(self, output: RequestOutput) -> str:
        tokens, prompt = len(output.outputs[0].token_ids), len(output.prompt_token_ids)
        first = self.first or self.last
        # The first token belongs to reading the prompt; what is left is the speed of writing.
        speed = f"{(tokens - 1) / (self.last - first):.1f} tokens/s" if tokens > 1 else "a single token"
        return (
            f"prompt {prompt} tokens ({output.num_cached_tokens} of them cached), answer {tokens} tokens "
            f"({output.outputs[0].finish_reason}); first token after {first - self.started:.3f} s, then {speed}"
        )
