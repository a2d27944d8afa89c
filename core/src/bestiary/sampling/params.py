"""What a request may ask of the sampler, checked where it is made. Names and defaults are vLLM's. Imports no torch."""

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec.structs import replace

from bestiary.errors import RequestError

__all__ = ["GREEDY_BELOW", "SamplingParams"]

#: A temperature below this is greedy decoding: dividing by it would only lose precision.
GREEDY_BELOW = 1e-5
_MAX_INT = 2**31 - 1


class SamplingParams(msgspec.Struct, kw_only=True, omit_defaults=True):
    """How one request's tokens are chosen.

    Raises RequestError (a ValueError) for a value out of its range and TypeError for a name that does not exist.
    """

    #: Answers per prompt.
    n: int = 1
    #: Taken from the logit of a token that stands in the answer; positive values favour new tokens. [-2, 2]
    presence_penalty: float = 0.0
    #: Taken once per occurrence in the answer. [-2, 2]
    frequency_penalty: float = 0.0
    #: Divides the logits of tokens of prompt and answer (multiplies where negative); 1: none.
    repetition_penalty: float = 1.0
    #: 0: greedy.
    temperature: float = 1.0
    #: The smallest set of tokens whose probabilities reach this. (0, 1]
    top_p: float = 1.0
    #: The most probable tokens; 0 or -1: all.
    top_k: int = 0
    #: Tokens at least this probable, relative to the most probable. [0, 1]
    min_p: float = 0.0
    #: The same seed gives the same text, whatever else is in the batch.
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    #: None: as long as the context lasts.
    max_tokens: int | None = 16
    #: No stop, and no end token, before this many.
    min_tokens: int = 0
    #: Log-probabilities of this many most likely tokens, and of the chosen one, at each step.
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    #: Added to the logits of these tokens. [-100, 100]
    logit_bias: Mapping[int, float] | None = None

    def __post_init__(self) -> None:
        for name, (low, high, null) in _INTEGERS.items():
            _integer(name, getattr(self, name), low, high, null)
        for name, (lowest, highest) in _NUMBERS.items():
            _number(name, getattr(self, name), lowest, highest)
        if self.repetition_penalty == 0 or self.top_p == 0:
            name = "repetition_penalty" if self.repetition_penalty == 0 else "top_p"
            raise RequestError(f"{name}=0: it must be above 0; 1 switches it off")
        for name in ("include_stop_str_in_output", "ignore_eos", "detokenize", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name}={_shown(getattr(self, name))}: it must be true or false")
        self.stop = _stops(self.stop)
        self.stop_token_ids = _token_ids("stop_token_ids", self.stop_token_ids)
        self.logit_bias = _biases(self.logit_bias)
        if self.stop and not self.detokenize:
            raise RequestError("stop is a text to find: leave detokenize=True, or use stop_token_ids")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}")

    @property
    def is_greedy(self) -> bool:
        """The most likely token is taken, always."""
        return self.temperature < GREEDY_BELOW

    def clone(self) -> "SamplingParams":
        """A copy, checked anew: fields may have been set since this was made."""
        return replace(self)

    def check_vocabulary(self, size: int) -> None:
        """Raise RequestError for a token id that the model does not have."""
        for name, ids in (("logit_bias", self.logit_bias or ()), ("stop_token_ids", self.stop_token_ids or ())):
            if (worst := max(ids, default=-1)) >= size:
                raise RequestError(f"{name} has token id {worst}, and the model's ids end at {size - 1}")


#: name -> lowest, highest, may be None
_INTEGERS: dict[str, tuple[int, int, bool]] = {
    "n": (1, 16384, False),
    "top_k": (-1, _MAX_INT, False),
    "seed": (-(2**63), 2**63 - 1, True),
    "max_tokens": (1, _MAX_INT, True),
    "min_tokens": (0, _MAX_INT, False),
    "logprobs": (0, _MAX_INT, True),
    "prompt_logprobs": (0, _MAX_INT, True),
}
_NUMBERS: dict[str, tuple[float, float]] = {
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (0, 100),
    "temperature": (0, 100),
    "top_p": (0, 1),
    "min_p": (0, 1),
}
_MAX_STOPS, _MAX_STOP_LENGTH, _MAX_IDS = 64, 1024, 1024


def _integer(name: str, value: Any, low: int, high: int, null: bool) -> None:
    if value is None and null:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name}={_shown(value)}: it must be a whole number{' or None' if null else ''}")
    if not low <= value <= high:
        raise RequestError(f"{name}={_shown(value)}: it must be from {low} to {high}")


def _number(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RequestError(f"{name}={_shown(value)}: it must be a number")
    if not low <= value <= high:  # false for NaN too
        raise RequestError(f"{name}={_shown(value)}: it must be from {low} to {high}")


def _stops(stop: Any) -> list[str]:
    stops = [stop] if isinstance(stop, str) else _list("stop", stop, _MAX_STOPS)
    for text in stops:
        if not isinstance(text, str) or not text:
            raise RequestError(f"stop={_shown(text)}: each stop string must be a text that is not empty")
        if len(text) > _MAX_STOP_LENGTH:
            raise RequestError(f"stop has a text of {len(text)} characters: at most {_MAX_STOP_LENGTH} are allowed")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise RequestError(f"stop={_shown(text)}: no text has half a surrogate pair, so it would never be found")
    return stops


def _token_ids(name: str, ids: Any) -> list[int]:
    found = _list(name, ids, _MAX_IDS)
    for token in found:
        _integer(f"an entry of {name}", token, 0, _MAX_INT, False)
    return found


def _biases(biases: Any) -> dict[int, float] | None:
    if biases is None:
        return None
    if not isinstance(biases, Mapping):
        raise RequestError(f"logit_bias={_shown(biases)}: it must map token ids to numbers")
    for token in _token_ids("logit_bias", list(biases)):
        _number(f"logit_bias[{token}]", biases[token], -100, 100)
    return {token: float(bias) for token, bias in biases.items()}


def _list(name: str, value: Any, longest: int) -> list[Any]:
    """A list of bounded length; None stands for the empty one."""
    if value is None:
        return []
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise RequestError(f"{name}={_shown(value)}: it must be a list")
    if len(value) > longest:
        raise RequestError(f"{name} has {len(value)} entries: at most {longest} are allowed")
    return list(value)


def _shown(value: object) -> str:
    """A value as an error quotes it: short, whatever it is."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    return reprlib.repr(value)
