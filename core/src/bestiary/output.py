"""Tokens to text, as they come: whole characters, stop strings, and the results that users get. Knows no engine."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, Literal, NamedTuple, TypeVar

from bestiary.errors import EngineError, RequestError
from bestiary.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "ClassificationOutput",
    "CompletionOutput",
    "Delta",
    "Detokenizer",
    "EmbeddingOutput",
    "FinishReason",
    "Logprob",
    "OutputText",
    "PooledRequestOutput",
    "PoolingOutput",
    "RequestOutput",
]

FinishReason = Literal["stop", "length", "abort", "error"]

_BROKEN = "\N{REPLACEMENT CHARACTER}"
#: A character has at most four bytes; what stays broken over this many tokens is no character in the making.
_MAX_HELD = 32
#: So many tokens to the left settle how a token is spelled.
_NUM_CONTEXT = 8
_MAX_CONTEXT = 256


class Detokenizer:
    """Turns one sequence's tokens into text, piece by piece; what was released is never taken back.

    The text of a token depends on its neighbours: several tokens may spell one character, and a word's leading space
    goes where a text begins. So a window of tokens is decoded each time, and what it says beyond `shown`, the text of
    its first `num_shown` tokens, is new:

        prompt ... [ context ][ pending ]        window = context + pending
                    <-shown-> <-- new -->        new is released unless it ends in half a character

    Bytes at the prompt's end that need the first tokens of the answer to be a character belong to the answer.

    The library's own DecodeStream goes the same way, in half the time (1 µs a token). It is not used, because it
    raises where a byte makes an earlier one invalid, repeats the prompt where that ends within a character, and
    decodes all that it holds again for each invalid byte; each would need this class around it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        size = _NUM_CONTEXT
        self._window = list(prompt_ids[-size:])
        # A window that starts within a character, or has no text at all, settles nothing.
        while self._decode(self._window)[:1] in ("", _BROKEN) and size < min(len(prompt_ids), _MAX_CONTEXT):
            size *= 4
            self._window = list(prompt_ids[-size:])
        self._num_shown = len(self._window)
        self._shown = self._prompt_text()

    def push(self, token_id: int) -> str:
        """Takes the next token and returns the text that is certain now, which may be none."""
        self._window.append(token_id)
        text = self._decode(self._window)
        unsure = text.endswith(_BROKEN)
        if unsure and len(self._window) - self._num_shown < _MAX_HELD:
            return ""
        return self._release(text, unsure)

    def flush(self) -> str:
        """Returns what was held back, as it stands: the sequence is over."""
        return self._release(self._decode(self._window), unsure=False)

    def _release(self, text: str, unsure: bool) -> str:
        """Returns what the window's text has beyond what was shown, and moves the window on.

        With `unsure` its last character, a broken one, stays held, unless it is all there is.
        """
        shown = self._shown
        if not text.startswith(shown):
            text, shown = self._realigned()
        unsure = unsure and len(text) - len(shown) > 1
        piece = text[len(shown) : len(text) - unsure]
        if piece:
            self._move(unsure)
        elif len(self._window) - self._num_shown >= _MAX_HELD:
            del self._window[self._num_shown :]
        return piece

    def _move(self, unsure: bool) -> None:
        """Makes what was pending the context, with a few tokens more where it starts within a character."""
        first = max(self._num_shown, len(self._window) - _NUM_CONTEXT)
        for start in range(first, max(first - 4, -1), -1):
            text = self._decode(self._window[start:])
            if not text.startswith(_BROKEN):
                break
        else:
            start, text = first, self._decode(self._window[first:])
        self._window = self._window[start:]
        self._num_shown = len(self._window)
        self._shown = text[: len(text) - unsure]

    def _realigned(self) -> tuple[str, str]:
        """Returns the window's text, and what of it was shown, from the first token on that still says the same.

        A new token can change what was shown: it makes the half character at a prompt's end whole, or the run of bytes
        that it goes on with invalid, a whole character of which was released.
        """
        for start in range(self._num_shown):
            shown = self._decode(self._window[start : self._num_shown]) if start else self._shown
            text = self._decode(self._window[start:])
            while not text.startswith(shown) and shown.endswith(_BROKEN):
                shown = shown[:-1]
            if text.startswith(shown):
                return text, shown
        return self._decode(self._window[self._num_shown :]), ""

    def _prompt_text(self) -> str:
        """Returns the window's text, with no more of it broken than the character that it may end within.

        A decoder with byte fallback breaks all characters of a run of bytes, if the last of them is not whole.
        """
        text = self._decode(self._window)
        for size in (1, 2, 3) if text.endswith(_BROKEN) else ():
            before, after = self._decode(self._window[:-size]), self._decode(self._window[-size:])
            if not (before.endswith(_BROKEN) or after.strip(_BROKEN)):
                return before + after
        return text

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, self._skip)


def _first_stop(text: str, stops: Sequence[str], num_old: int) -> tuple[int, str] | None:
    """Returns the stop string that is completed first beyond the `num_old` characters that were searched, and its end.

    Where one character completes several, it is the one that was named first.
    """
    found = []
    for stop in stops:
        start = text.find(stop, max(0, num_old - len(stop) + 1))
        if start >= 0:
            found.append((start + len(stop), stop))
    return min(found, key=lambda place: place[0], default=None)


def _num_ambiguous(text: str, stops: Sequence[str]) -> int:
    """Returns how many characters at the text's end may be the beginning of a stop string."""
    longest = 0
    for stop in stops:
        start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
        while start >= 0 and len(text) - start > longest:
            if stop.startswith(text[start:]):
                longest = len(text) - start
            start = text.find(stop[0], start + 1)
    return longest


class Delta(NamedTuple):
    """What one token adds: text to show, and the stop string that ended the sequence, if one did."""

    text: str
    stopped_by: str | None


class OutputText:
    """The text of one sequence in the making. What is released is final: `text` only grows.

    Text is held back while it ends in half a character, or may turn out to be a stop string. A stop string that is
    found is cut off, or kept as the last text with `include_stop`. Without a tokenizer there is no text, and nothing
    is found. Raises RequestError for stop strings without a tokenizer to find them with.

    With `at_end` nobody reads the text before the end, and without stop strings nothing is made of a token before then:
    a tokenizer that each step finds driven out of the caches takes thirty times as long.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        prompt_ids: Sequence[int] = (),
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        at_end: bool = False,
    ) -> None:
        if stop and tokenizer is None:
            raise RequestError("stop strings need text: load the model with its tokenizer, or use stop_token_ids")
        if "" in stop:
            raise RequestError("a stop string is empty: it would stop everything")
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer, prompt_ids, skip_special_tokens)
        self._stops = tuple(stop)
        self._include_stop = include_stop
        self._pieces: list[str] = []
        self._held = ""
        self._ended = False
        self._puts_off, self._later = at_end and not stop, list[int]()

    @property
    def text(self) -> str:
        """All text that was released so far."""
        if self._later:
            self._take(self._caught_up(), may_stop=False)
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    def push(self, token_id: int, *, final: bool = False, stop_token: bool = False, may_stop: bool = True) -> Delta:
        """Takes the next token and returns what it adds.

        `final`: it is the last, so nothing is held back. `stop_token`: it is the last because it is an end token or one
        of stop_token_ids, which is shown only with `include_stop`. Without `may_stop` (below min_tokens) stop strings
        that it completes do not count. Raises EngineError after the end.
        """
        if self._ended:
            raise EngineError("a token came after the end of its sequence")
        self._ended = final or stop_token
        if self._detokenizer is None:
            return Delta("", None)
        if self._puts_off and not self._ended:
            self._later.append(token_id)
            return Delta("", None)
        new = self._caught_up()
        new += "" if stop_token and not self._include_stop else self._detokenizer.push(token_id)
        if self._ended:
            new += self._detokenizer.flush()
        return self._take(new, may_stop)

    def finish(self) -> Delta:
        """Returns what is still held back; the sequence ends without another token. Does nothing after the end."""
        if self._ended or self._detokenizer is None:
            return Delta("", None)
        self._ended = True
        return self._take(self._caught_up() + self._detokenizer.flush(), may_stop=False)

    def _caught_up(self) -> str:
        """The text of the tokens that were put off."""
        later, self._later = self._later, []
        return "".join(self._detokenizer.push(token) for token in later) if self._detokenizer else ""

    def _take(self, new: str, may_stop: bool) -> Delta:
        text, num_old = self._held + new, len(self._held)
        if may_stop and (found := _first_stop(text, self._stops, num_old)):
            end, stop = found
            self._ended, self._held = True, ""
            return self._emit(text[: end if self._include_stop else end - len(stop)], stop)
        certain = len(text) if self._ended else len(text) - _num_ambiguous(text, self._stops)
        self._held = text[certain:]
        return self._emit(text[:certain], None)

    def _emit(self, text: str, stopped_by: str | None) -> Delta:
        if text:
            self._pieces.append(text)
        return Delta(text, stopped_by)


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token's log-probability, its rank among all tokens (1: the most likely), and its text standing alone."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One answer to a prompt.

    `finish_reason` is None while it grows; "stop" (an end token, or `stop_reason`: the stop string or token id that
    was asked for), "length", "abort", or "error" with the reason in `stop_reason`.
    """

    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        """Has this answer ended?"""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """A request with its answers as far as they are."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    #: One entry per prompt token; the first is None, because nothing precedes it.
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    #: Prompt tokens whose keys and values were found in the cache.
    num_cached_tokens: int = 0
    #: Of a model that pools: [rows, width] float32 each, of the prompt's tokens in order.
    vectors: list["Tensor"] = field(default_factory=list)


@dataclass(slots=True)
class EmbeddingOutput:
    """A prompt's vector."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        """Numbers of the vector."""
        return len(self.embedding)


@dataclass(slots=True)
class ClassificationOutput:
    """The probability of each label."""

    probs: list[float]

    @property
    def num_classes(self) -> int:
        """Labels there are."""
        return len(self.probs)


@dataclass(slots=True)
class PoolingOutput:
    """The numbers of each of a prompt's tokens, [tokens, labels] float32; those of the last stand for the sequence."""

    data: "Tensor"


Pooled = TypeVar("Pooled")


@dataclass(slots=True)
class PooledRequestOutput(Generic[Pooled]):
    """A request for vectors, answered."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: Pooled
    finished: bool = True
    #: Prompt tokens that were found in the cache.
    num_cached_tokens: int = 0
