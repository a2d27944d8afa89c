"""`bestiary chat`: a conversation at the terminal. Ctrl-C stops the answer, ctrl-D ends the program."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any

from bestiary.cli.media import check_files, kinds_of, question, read_parts
from bestiary.cli.options import EngineFlags, MediaFlags, Model, SamplingFlags, System
from bestiary.cli.terminal import StreamedText, note, one_line
from bestiary.errors import CapabilityMissing, RequestError

if TYPE_CHECKING:
    from bestiary.llm import LLM
    from bestiary.output import CompletionOutput
    from bestiary.sampling.params import SamplingParams

__all__ = ["Conversation", "command"]

_HELP = """\
/image PATH    show a picture, a file or an address, with the next question
/audio PATH    a recording
/video PATH    a video
/clear         forget the conversation so far, and what was attached
/system TEXT   what the model is told before it; without TEXT nothing
/help          this list
/exit          leave, as ctrl-D does
ctrl-C         stop the answer; what was said stays in the conversation"""

_ENGINE, _SAMPLING, _MEDIA = EngineFlags(), SamplingFlags(), MediaFlags()


def command(
    model: Model,
    /,
    *,
    system: System = None,
    media: MediaFlags = _MEDIA,
    sampling: SamplingFlags = _SAMPLING,
    engine: EngineFlags = _ENGINE,
) -> None:
    """Talk with a model."""
    check_files(media.named())
    llm = engine.load(model)
    if not llm.has_chat_template():
        raise RequestError(f"{model} has no chat template, as base models often have not: use `bestiary run` with it")
    talk = Conversation(llm, sampling.over(llm.get_default_sampling_params()), system)
    talk.attach(media.named())
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        with suppress(ImportError):  # Python may be built without it; then lines are edited as the terminal does it
            import readline  # noqa: F401
        note(f"{one_line(model)} is ready. /help lists the commands, ctrl-D ends.")
    for line in _lines(is_terminal):
        if not talk.take(line):
            break


def _lines(is_terminal: bool) -> Iterator[str]:
    """What the user types; ctrl-C gives the line up."""
    while True:
        try:
            line = input("> " if is_terminal else "").strip()
        except EOFError:
            if is_terminal:
                print()
            return
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print()
            continue
        except UnicodeDecodeError as error:
            note(f"this line is not {error.encoding} text: {error.reason}")
            continue
        if line:
            yield line


@dataclass
class Conversation:
    """What was said so far, and the model that says more."""

    llm: LLM
    params: SamplingParams
    system: str | None = None
    turns: list[dict[str, Any]] = field(default_factory=list)
    #: The parts that go with the next question.
    attached: list[dict[str, Any]] = field(default_factory=list)
    #: The adapter that answers.
    lora: str | None = None

    def take(self, line: str) -> bool:
        """Answer a line, or do what a command says. False when it ends the conversation."""
        word, _, rest = line.partition(" ")
        match word:
            case "/exit":
                return False
            case "/clear":
                self.turns.clear()
                self.attached.clear()
            case "/system":
                self.system = rest.strip() or None
            case "/image" | "/audio" | "/video":
                self._take_medium(word[1:], rest.strip())
            case "/help":
                print(_HELP)
            case _ if word[:1] == "/" and word[1:].isalpha():
                note(f"there is no command {word}; /help lists them")
            case _:
                self.ask(line)
        return True

    def attach(self, named: Sequence[tuple[str, str]]) -> None:
        """Read media that go with the next question. Raises RequestError, and then attaches none of them."""
        before = kinds_of([*self.turns, question("", self.attached)])
        self.attached += read_parts(self.llm, named, before)

    def _take_medium(self, kind: str, place: str) -> None:
        if not place:
            note(f"which one? /{kind} PATH")
            return
        try:
            self.attach([(kind, os.path.expanduser(place))])  # noqa: PTH111 - a Path would spoil an address
        except RequestError as error:
            note(str(error))

    def ask(self, text: str) -> None:
        """Print the answer as it comes. What an interrupt leaves of it stays said, but no question without answer."""
        parts, self.attached = self.attached, []
        self.turns.append(question(text, parts))
        written, output = StreamedText(sys.stdout), None
        with _interrupt() as is_interrupted:
            try:
                with closing(self.llm.stream(self._messages(), self.params, lora=self.lora)) as answers:
                    for output in answers:
                        written.update(output.outputs[0].text)
                        if is_interrupted():
                            break
            except (RequestError, CapabilityMissing) as error:
                note(f"{error}\n(/clear forgets the conversation so far)")
            except KeyboardInterrupt:
                pass  # the second one: the step was not waited for
            if output is not None:
                written.end()
                _tell_end(output.outputs[0])
            if output is None or not output.outputs[0].text:
                self.turns.pop()
                # An error may be theirs; then they would spoil the next question too.
                self.attached = parts if is_interrupted() else []
            else:
                self.turns.append({"role": "assistant", "content": output.outputs[0].text})

    def _messages(self) -> list[dict[str, Any]]:
        return self.turns if self.system is None else [{"role": "system", "content": self.system}, *self.turns]


def _tell_end(answer: CompletionOutput) -> None:
    """Say it where an answer did not end by itself."""
    if answer.finish_reason == "length":
        note("(cut off: --max-tokens is reached, or the context is full)")
    elif answer.finish_reason == "error":
        note(f"(the answer ended with an error: {answer.stop_reason})")


@contextmanager
def _interrupt() -> Iterator[Callable[[], bool]]:
    """Note the first ctrl-C instead of raising, so that a step is never cut in two; a second one raises at once."""
    noted = False

    def note_it(number: int, frame: FrameType | None) -> None:
        nonlocal noted
        if noted:
            raise KeyboardInterrupt
        noted = True

    before = signal.signal(signal.SIGINT, note_it)
    try:
        yield lambda: noted
    finally:
        signal.signal(signal.SIGINT, before)
