"""An executor without a model: the next token is a hash of the whole context, as it stands in the cache.

Its paged memory is real: a token is stored where the block table says, and read back from there. So a block given to
two sequences, a prefix of somebody else or a token that got lost changes every later token, and equality with
`expected_answer`, which never sees a cache, is an exact test of engine, scheduler and cache. Knows no tensor.
"""

import math
from array import array
from collections import deque
from collections.abc import Callable, Collection, Sequence
from hashlib import blake2b
from pathlib import Path
from struct import pack
from typing import NamedTuple

from bestiary.cache import CacheGroup
from bestiary.errors import AdapterError, EngineError
from bestiary.inputs import NOTHING, Inputs
from bestiary.sampling.params import SamplingParams
from bestiary.sampling.sampler import Choice, Row, TopLogprobs
from bestiary.step import StepResult, StepRow

__all__ = ["Expected", "FakeExecutor", "expected_answer", "expected_prompt_logprobs"]

_NEVER_WRITTEN, _NAN = -1, -2
_TOKEN_BYTES = 8
_SPOILED = pack("<q", _NAN)

#: Called at each step when the rows' tokens are in the memory. It may raise, which fails the step, or return the
#: numbers of rows whose keys, values and logits become NaN.
Fault = Callable[[Sequence[StepRow]], Collection[int]]


class FakeExecutor:
    """An Executor over `num_blocks` blocks of `block_size` token ids each, or over several groups of blocks.

    What stands for a token depends on the item that it belongs to, on a whole prefix that sees itself both ways, and on
    the adapter in the row's slot: what is in the file `content` of an adapter's folder.
    Of a group with a window the next token sees the last so many tokens; of one with a state a hash of all of them,
    which is carried from one slot to the other.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        vocabulary: int = 256,
        max_model_len: int | None = None,
        fault: Fault | None = None,
        groups: Sequence[CacheGroup] = (),
        depth: int = 1,
        runs_ahead: bool = False,
    ) -> None:
        self.groups = tuple(groups) or (CacheGroup(num_blocks),)
        self.block_size, self.vocabulary = block_size, vocabulary
        self.max_model_len = max_model_len or num_blocks * block_size
        self.fault = fault
        self.pools, self.most_crossed = None, 0
        self.depth, self.width, self.runs_ahead = depth, 1, runs_ahead
        self._under_way: deque[list[StepResult] | Exception] = deque()
        #: Steps that were asked for, those that failed included.
        self.num_steps = 0
        self._memories = [array("q", [_NEVER_WRITTEN]) * (group.num_blocks * block_size) for group in self.groups]
        self._bytes = [memoryview(memory).cast("B") for memory in self._memories]
        self._states = [[b"never written"] * group.num_blocks for group in self.groups]
        self._is_spoiled = False
        #: Adapters in memory by key, and who is in a slot.
        self.adapters: dict[str, bytes] = {}
        self._slots: dict[int, bytes] = {-1: b""}

    def submit(self, rows: Sequence[StepRow]) -> None:
        """Run it now, as a first stage would begin to; what comes of it is seen when it is collected."""
        if len(self._under_way) == self.depth:
            raise RuntimeError(f"{self.depth} steps are on their way already")
        try:
            self._under_way.append(self.execute(rows))
        except Exception as failure:
            self._under_way.append(failure)

    def collect(self) -> list[StepResult]:
        """What came of the step that was submitted first."""
        found = self._under_way.popleft()
        if isinstance(found, Exception):
            raise found
        return found

    def execute(self, rows: Sequence[StepRow]) -> list[StepResult]:
        """Write the rows' tokens to the memory, and choose from what the memory then says."""
        self.num_steps += 1
        for row in rows:
            self._write(row, _values(row.tokens, row.start, row.inputs, self._slots[row.adapter]))
        for number in self._faults(rows):
            self._write(rows[number], [_NAN] * len(rows[number].tokens))
            self._is_spoiled = True
        results = [self._result(row) for row in rows]
        for row, result in zip(rows, results, strict=True):
            if self.runs_ahead and result.choice is not None and result.choice.token is not None:
                self._run_ahead(row, result.choice.token)
        return results

    def _run_ahead(self, row: StepRow, token: int) -> None:
        """Write what the sequence's next step would, which may never come."""
        start = row.start + len(row.tokens)
        paged = [blocks for group, blocks in zip(self.groups, row.blocks, strict=True) if group.fixed is None]
        if all(start < len(blocks) * self.block_size for blocks in paged) and start < self.max_model_len:
            swapped = [b if g.fixed is None else b[::-1] for g, b in zip(self.groups, row.blocks, strict=True)]
            values = _values([token], start, NOTHING, self._slots[row.adapter])
            self._write(StepRow([token], start, swapped, None), values)

    def add_adapter(self, key: str, folder: Path) -> bytes:
        """Remember what is in it."""
        try:
            self.adapters[key] = (folder / "content").read_bytes()
        except OSError as error:
            raise AdapterError(f"the adapter in {folder} cannot be read: {error}") from None
        return self.adapters[key]

    def place_adapter(self, key: str, slot: int) -> None:
        """From now on rows with this slot use it."""
        self._slots[slot] = self.adapters[key]

    def remove_adapter(self, key: str) -> None:
        """Forget it; its slot stays as it is."""
        self.adapters.pop(key, None)

    def close(self) -> None:
        """Nothing to let go: the memory is this object's own."""

    def _faults(self, rows: Sequence[StepRow]) -> Collection[int]:
        try:
            return self.fault(rows) if self.fault else ()
        except BaseException:
            for row in rows:  # a step that failed leaves anything behind
                self._write(row, [_NEVER_WRITTEN] * len(row.tokens))
            raise

    def _write(self, row: StepRow, values: Sequence[int]) -> None:
        size = self.block_size
        for group, blocks, memory, states in zip(self.groups, row.blocks, self._memories, self._states, strict=True):
            if group.fixed is not None:
                before = states[blocks[0]] if row.start else b""
                states[blocks[1]] = _state(before, array("q", values).tobytes())
                continue
            for position, value in enumerate(values, row.start):
                memory[blocks[position // size] * size + position % size] = value

    def _read(self, row: StepRow, num_tokens: int) -> bytes:
        """What the first `num_tokens` tokens of a row's context have left, as the block tables find it."""
        width, found = self.block_size * _TOKEN_BYTES, b""
        for group, blocks, memory, states in zip(self.groups, row.blocks, self._bytes, self._states, strict=True):
            if group.fixed is not None:
                found += states[blocks[1]]
                continue
            first = 0 if group.window is None else max(0, num_tokens - group.window)
            seen = blocks[first // self.block_size :]
            tokens = b"".join([memory[block * width : (block + 1) * width] for block in seen])
            skipped = first // self.block_size * self.block_size
            found += _view(group, tokens[: (num_tokens - skipped) * _TOKEN_BYTES], num_tokens)
        return found

    def _result(self, row: StepRow) -> StepResult:
        result = StepResult()
        if row.prompt_logprobs is not None:
            result.prompt = [self._of_prompt(row, place) for place in range(len(row.successors))]
        if row.sampling is not None:
            result.choice = self._choose(self._read(row, row.start + len(row.tokens)), row.sampling)
        return result

    def _of_prompt(self, row: StepRow, place: int) -> TopLogprobs:
        context, successor = self._read(row, row.start + place + 1), row.successors[place]
        return TopLogprobs([successor], [math.nan], 1) if self._has_nan(context) else _logprobs(context, successor)

    def _has_nan(self, context: bytes) -> bool:
        return self._is_spoiled and _NAN in memoryview(context).cast("q")

    def _choose(self, context: bytes, row: Row) -> Choice:
        if self._has_nan(context):
            return Choice(None)
        token = _next_token(context, row.params, row.seed, row.num_output, row.end_ids, self.vocabulary)
        return Choice(token, None if row.params.logprobs is None else _logprobs(context, token))


class Expected(NamedTuple):
    """One answer as it must come out of the engine."""

    tokens: list[int]
    finish_reason: str
    stop_reason: int | None
    #: Of each token of the answer, if the parameters ask for them.
    logprobs: list[float]


def expected_answer(
    prompt_ids: Sequence[int],
    params: SamplingParams,
    *,
    vocabulary: int,
    max_model_len: int,
    end_ids: Sequence[int] = (),
    index: int = 0,
    groups: Sequence[CacheGroup] = (CacheGroup(0),),
    inputs: Inputs = NOTHING,
    adapter: bytes = b"",
) -> Expected:
    """What an engine over a FakeExecutor must answer: computed from prompt and parameters alone.

    `index` is the answer's number where `n` is above 1, `adapter` the content of one. Give a seed where the parameters
    are not greedy.
    """
    stops = params.stop_token_ids or ()
    ends = [*stops, *(() if params.ignore_eos else end_ids)]
    tokens, values, logprobs = list[int](), array("q", _values(prompt_ids, 0, inputs, adapter)), list[float]()
    limit = max_model_len - len(prompt_ids)
    limit = limit if params.max_tokens is None else min(limit, params.max_tokens)
    for num_output in range(limit):
        context = _context(values.tobytes(), groups)
        token = _next_token(context, params, (params.seed or 0) + index, num_output, ends, vocabulary)
        tokens.append(token)
        values.extend(_values([token], len(values), NOTHING, adapter))
        if params.logprobs is not None:
            logprobs += _logprobs(context, token).logprobs
        if token in ends:
            return Expected(tokens, "stop", token if token in stops else None, logprobs)
    return Expected(tokens, "length", None, logprobs)


def expected_prompt_logprobs(
    prompt_ids: Sequence[int],
    groups: Sequence[CacheGroup] = (CacheGroup(0),),
    inputs: Inputs = NOTHING,
    adapter: bytes = b"",
) -> list[float]:
    """What the same engine must say of a prompt's tokens from the second on; no group may have a state."""
    tokens = array("q", _values(prompt_ids, 0, inputs, adapter)).tobytes()
    contexts = (_context(tokens[: place * _TOKEN_BYTES], groups) for place in range(1, len(prompt_ids)))
    return [_logprobs(context, token).logprobs[0] for context, token in zip(contexts, prompt_ids[1:], strict=True)]


def _values(tokens: Sequence[int], start: int, inputs: Inputs, adapter: bytes) -> list[int]:
    """What stands for some of a sequence's tokens, the first of which is at `start`."""
    values = list(tokens)
    for span in inputs.spans:
        places, which = span.between(start, start + len(values))
        for place, number in zip(places, which, strict=True):
            values[place - start] = _hash(span.item.digest, number)
    if start < inputs.prefix:
        if start or len(values) < inputs.prefix:
            raise EngineError("a prefix that sees itself both ways was cut")
        whole = array("q", values[: inputs.prefix]).tobytes()
        values[: inputs.prefix] = [_hash(whole, place) for place in range(inputs.prefix)]
    return [_hash(adapter, value) for value in values] if adapter else values


def _hash(content: bytes, number: int) -> int:
    return int.from_bytes(blake2b(content, digest_size=7, salt=pack("<q", number)).digest(), "little")


def _context(tokens: bytes, groups: Sequence[CacheGroup]) -> bytes:
    """What groups of layers have left of these tokens."""
    num_tokens = len(tokens) // _TOKEN_BYTES
    return b"".join(_state(b"", tokens) if group.fixed else _view(group, tokens, num_tokens) for group in groups)


def _view(group: CacheGroup, tokens: bytes, num_tokens: int) -> bytes:
    """What can be seen of tokens of which the last ones, at least, are there."""
    if group.window is None:
        return tokens
    return pack("<q", num_tokens) + tokens[-min(group.window, num_tokens) * _TOKEN_BYTES :]


def _state(before: bytes, tokens: bytes) -> bytes:
    """The state after some more tokens: a hash over all of them in turn, however they are cut."""
    for at in range(0, len(tokens), _TOKEN_BYTES):
        token = tokens[at : at + _TOKEN_BYTES]
        is_spoiled = token == pack("<q", _NAN) or before == _SPOILED
        before = _SPOILED if is_spoiled else blake2b(before + token, digest_size=_TOKEN_BYTES).digest()
    return before


def _next_token(
    context: bytes, params: SamplingParams, seed: int, num_output: int, end_ids: Sequence[int], vocabulary: int
) -> int:
    """The hash of the context, and of the seed where it is not greedy; the next id that is allowed."""
    drawn = b"" if params.is_greedy else pack("<q", seed)
    token = int.from_bytes(blake2b(context, digest_size=8, key=drawn).digest(), "little") % vocabulary
    while num_output < params.min_tokens and token in end_ids:
        token = (token + 1) % vocabulary
    return token


def _logprobs(context: bytes, token: int) -> TopLogprobs:
    """A made-up log-probability of a token after a context."""
    digest = blake2b(context, digest_size=6, salt=pack("<q", token)).digest()
    return TopLogprobs([token], [-int.from_bytes(digest, "little") / 2**44], 1)
