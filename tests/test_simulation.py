"""The real engine over a fake model, through thousands of random days, each made from one number.

The fake model's next token is a hash of the whole context as it finds it through the block tables, so that any mix-up
of blocks, a stale prefix or a lost token changes the text; and what each request must answer is computed from its
prompt and parameters alone. A day's requests come and go at random, share prefixes, are aborted early, late and twice,
run out of cache, and meet steps, rows and allocations that fail. Adapters are loaded, replaced and taken away while
requests run with them, and sometimes cannot be read. A failing day prints its seed: `simulate(seed)` is
that day again, to the last bit.

Set SIMULATED_DAYS for more of them.
"""

import os
import random
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

import pytest

from bestiary.cache import CacheGroup
from bestiary.config import EngineConfig
from bestiary.engine import Engine
from bestiary.errors import AdapterError
from bestiary.inputs import Inputs, Item, Span
from bestiary.output import RequestOutput
from bestiary.sampling.params import SamplingParams
from bestiary.scheduler import Sequence as Tokens
from bestiary.step import StepRow
from bestiary.testing import Expected, FakeExecutor, expected_answer, expected_prompt_logprobs

REQUESTS_PER_DAY = 200
DAYS = int(os.environ.get("SIMULATED_DAYS", "300"))
SHARES = 4


@dataclass
class Asked:
    """One request, when it comes, and whether somebody gives it up."""

    id: str
    prompt: list[int]
    params: SamplingParams
    inputs: Inputs
    salt: str
    final_only: bool
    arrives: int
    abort_after: int | None
    wants_adapter: bool
    #: What its adapter held when it was added.
    adapter: bytes = b""
    outputs: list[RequestOutput] = field(default_factory=list)
    aborted: bool = False


class Day:
    """One workload on one engine."""

    def __init__(self, seed: int, shelf: Path) -> None:
        self.random = chance = random.Random(seed)
        #: Folders of adapters, and which content a name stands for now.
        self.shelf, self.named = sorted(shelf.iterdir()), dict[str, bytes]()
        block_size = chance.choice((1, 3, 16))
        longest = chance.randint(6, 48)
        max_loras = chance.choice((1, 1, 2, 3))
        config = EngineConfig(
            model="fake",
            max_loras=max_loras,
            max_cpu_loras=max_loras + chance.choice((0, 1, 2)),
            max_num_seqs=chance.choice((1, 4, 12, 40)),
            max_num_batched_tokens=chance.choice((1, 6, 8, 16, 32, 64, 64)),
            enable_prefix_caching=chance.random() < 0.8,
        )
        self.executor = FakeExecutor(
            0,
            block_size,
            vocabulary=chance.choice((4, 30, 1000)),
            max_model_len=longest,
            fault=self.fault,
            groups=self._groups(block_size, longest, config.max_num_batched_tokens),
            depth=chance.choice((1, 1, 1, 2, 3)),
            runs_ahead=chance.random() < 0.5,
        )
        self.end_ids = chance.sample(range(self.executor.vocabulary), chance.randint(0, 2))
        self.engine = Engine(config, self.executor, None, self.end_ids)
        #: request id -> its answers that end with an error, because the fault was theirs.
        self.blamed: Counter[str] = Counter()
        self.happened: Counter[str] = Counter(requests=REQUESTS_PER_DAY)
        self.prefixes = [self._tokens(longest - 1) for _ in range(3)]
        self.asked = {str(i): self._ask(str(i)) for i in range(REQUESTS_PER_DAY)}
        self.culprits = chance.sample(sorted(self.asked), 4)
        self.trace: list[tuple[object, ...]] = []
        self._fail_allocations(chance)
        self._fail_reading(chance)
        self._count_preemptions()

    def _groups(self, block_size: int, longest: int, chunk: int) -> list[CacheGroup]:
        """Layers that keep all, a window, or a state, mostly one kind, with room for one sequence or for more."""
        chance = self.random
        plain, window, state = CacheGroup(0), CacheGroup(0, window=chance.choice((1, 3, 8, 20))), CacheGroup(0, fixed=2)
        kinds = chance.choice(
            ([plain], [plain], [plain], [window], [plain, window], [window, plain], [state], [plain, state])
        )
        self.has_state = state in kinds
        times, more = chance.choice(((1, 0), (2, 1), (5, 0), (12, 0)))
        return [
            replace(group, num_blocks=times * group.most_held(longest, chunk, block_size) + more) for group in kinds
        ]

    # ---- the workload ------------------------------------------------------------------------------------------------

    def _tokens(self, n: int) -> list[int]:
        return self.random.choices(range(self.executor.vocabulary), k=n)

    def _ask(self, request_id: str) -> Asked:
        chance, longest = self.random, self.executor.max_model_len
        head = chance.choice(self.prefixes)[: chance.randint(0, longest)]
        prompt = (head + self._tokens(chance.randint(1, 4)))[-(longest - 1) :]
        inputs = self._inputs(prompt)
        max_tokens = chance.randint(1, chance.choice((3, 10, 30)))
        params = SamplingParams(
            temperature=chance.choice((0.0, 1.0)),
            seed=chance.getrandbits(60),
            n=chance.choice((1, 1, 1, 1, 2, 3)),
            max_tokens=None if chance.random() < 0.03 else max_tokens,
            min_tokens=chance.choice((0, 0, 1, max_tokens)) if self.executor.vocabulary > 4 else 0,
            stop_token_ids=self._tokens(chance.choice((0, 0, 1, 3))),
            ignore_eos=chance.random() < 0.3,
            logprobs=chance.choice((None, None, None, 0)),
            prompt_logprobs=0 if chance.random() < 0.1 and not self.has_state else None,
            detokenize=False,
        )
        return Asked(
            request_id,
            prompt,
            params,
            inputs,
            salt=chance.choice(("", "", "tenant")),
            final_only=chance.random() < 0.5,
            arrives=int(request_id) // chance.choice((1, 4, 50)),
            abort_after=chance.choice((0, 0, 1, 2, 5, 20)) if chance.random() < 0.15 else None,
            wants_adapter=chance.random() < 0.4,
        )

    def _inputs(self, prompt: list[int]) -> Inputs:
        """Sometimes a picture among the tokens, whose places all hold the same token, or a prefix that sees itself."""
        chance, prefix = self.random, 0
        spans = []
        if chance.random() < 0.2:
            start = chance.randrange(len(prompt))
            takes = tuple(chance.random() < 0.8 for _ in range(chance.randint(1, len(prompt) - start)))
            prompt[start : start + len(takes)] = [0] * len(takes)
            digest = chance.choice((b"griffin", b"sphinx"))
            spans.append(Span(Item("image", {}, sum(takes), digest + bytes([len(takes)])), start, takes))
        if chance.random() < 0.1:
            prefix = chance.randint(1, min(len(prompt), self.engine.config.max_num_batched_tokens))
        self.happened["pictures"] += len(spans)
        self.happened["prefixes"] += prefix > 0
        return Inputs(spans=spans, prefix=prefix)

    # ---- what goes wrong ---------------------------------------------------------------------------------------------

    def fault(self, rows: Sequence[StepRow]) -> Collection[int]:
        """Rows of two culprits always fail, rows of another two turn into NaN; some steps fail as a whole."""
        owners = {id(s.table.blocks): s.id.partition("/")[0] for s in self.engine.scheduler.running}
        requests = [owners[id(row.blocks)] for row in rows]
        raising, spoiling = self.culprits[:2], self.culprits[2:]
        for request in requests:
            if request in raising and self.random.random() < 0.7:
                self._blame(rows, request, "rows failed")
        if self.random.random() < 0.01:
            self._blame(rows, requests[0], "steps failed")
        return [i for i, request in enumerate(requests) if request in spoiling and rows[i].sampling]

    def _blame(self, rows: Sequence[StepRow], request: str, kind: str) -> None:
        """Fail the step; alone in it, the request pays for it."""
        self.happened[kind] += 1
        self.blamed[request] += len(rows) == 1
        raise RuntimeError(f"{kind}, as planned")

    def _fail_allocations(self, chance: random.Random) -> None:
        for pool in self.engine.scheduler.cache.pools:

            def sometimes(n: int, take: Callable[[int], list[int] | None] = pool.take) -> list[int] | None:
                if chance.random() < 0.01:
                    self.happened["allocations failed"] += 1
                    return None
                return take(n)

            pool.take = sometimes  # type: ignore[method-assign]

    def _fail_reading(self, chance: random.Random) -> None:
        read = self.executor.add_adapter

        def sometimes(key: str, folder: Path) -> bytes:
            if chance.random() < 0.1:
                self.happened["adapters not read"] += 1
                raise AdapterError("not read, as planned")
            return read(key, folder)

        self.executor.add_adapter = sometimes  # type: ignore[method-assign]

    def _count_preemptions(self) -> None:
        preempt = self.engine.scheduler.preempt

        def counted(sequence: Tokens) -> None:
            self.happened["preemptions"] += 1
            preempt(sequence)

        self.engine.scheduler.preempt = counted  # type: ignore[method-assign]

    # ---- the day -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Let it all happen, and check each answer as it comes."""
        waiting = sorted(self.asked.values(), key=lambda one: one.arrives)
        aborts: list[tuple[int, str]] = []
        for now in count():
            if self.random.random() < 0.2:
                self._change_adapters()
            while waiting and waiting[0].arrives <= now:
                one = waiting.pop(0)
                self._add(one)
                if one.abort_after is not None:
                    aborts.append((now + one.abort_after, one.id))
            for when, request_id in list(aborts):
                if when <= now:
                    aborts.remove((when, request_id))
                    self._abort(request_id)
            if not (waiting or aborts or self.engine.has_unfinished_requests()):
                break
            self.happened["steps"] += 1
            for output in self.engine.step():
                self._take(output)
            self.engine.check_integrity()
            assert now < 400 * REQUESTS_PER_DAY, "somebody starves"
        self._check_end()

    def _change_adapters(self) -> None:
        """A name gets content, other content, or is taken away."""
        name, adapters = self.random.choice("abc"), self.engine.adapters
        if name in self.named and self.random.random() < 0.3:
            adapters.unload(name)
            del self.named[name]
            self.happened["adapters unloaded"] += 1
            return
        folder = self.random.choice(self.shelf)
        try:
            adapters.load(name, folder)
        except AdapterError:
            assert self.named.get(name) == next((entry.digest for entry in adapters if entry.name == name), None)
            return
        self.happened["adapters replaced" if name in self.named else "adapters loaded"] += 1
        self.named[name] = (folder / "content").read_bytes()

    def _add(self, one: Asked) -> None:
        lora = self.random.choice(sorted(self.named)) if one.wants_adapter and self.named else None
        one.adapter = b"" if lora is None else self.named[lora]
        self.happened["requests with an adapter"] += lora is not None
        self.engine.add_request(
            one.id, one.prompt, one.params, cache_salt=one.salt, final_only=one.final_only, inputs=one.inputs, lora=lora
        )

    def _abort(self, request_id: str) -> None:
        """Once in a while together with one that is gone already, one that never was, and a second time."""
        ids = [request_id, "nobody"] if self.random.random() < 0.5 else [request_id]
        outputs = self.engine.abort(ids)
        finished = any(output.finished for output in self.asked[request_id].outputs)
        assert [output.request_id for output in outputs] == ([] if finished else [request_id])
        self.happened["aborts after the end" if finished else "aborts"] += 1
        for output in outputs:
            self.asked[request_id].aborted = True
            self._take(output)
        assert self.engine.abort(ids) == []

    def _take(self, output: RequestOutput) -> None:
        one = self.asked[output.request_id]
        before = one.outputs[-1] if one.outputs else None
        if before is not None:
            assert not before.finished, "an output after the last"
            for old, new in zip(before.outputs, output.outputs, strict=True):
                assert list(new.token_ids[: len(old.token_ids)]) == list(old.token_ids), "a token was taken back"
        assert output.finished or not one.final_only
        one.outputs.append(output)
        answers = [(tuple(a.token_ids), a.finish_reason, a.stop_reason) for a in output.outputs]
        self.trace.append((output.request_id, output.num_cached_tokens, *answers))

    # ---- the verdict -------------------------------------------------------------------------------------------------

    def _check_end(self) -> None:
        assert len(self.engine.scheduler) == 0 and self.engine.scheduler.cache.is_empty
        assert all(entry.running == entry.requests == 0 for entry in self.engine.adapters)
        assert len(self.executor.adapters) <= (self.engine.config.max_cpu_loras or 0)
        for one in self.asked.values():
            self._check(one, one.outputs[-1])

    def _check(self, one: Asked, output: RequestOutput) -> None:
        size = self.executor.block_size
        assert output.finished and len(output.outputs) == one.params.n
        assert output.num_cached_tokens % size == 0 and output.num_cached_tokens < len(one.prompt)
        if self.has_state or not self.engine.config.enable_prefix_caching or one.params.prompt_logprobs is not None:
            assert output.num_cached_tokens == 0
        self.happened["cached tokens"] += output.num_cached_tokens
        num_errors = num_lost = 0
        for answer in output.outputs:
            expected = self._expected(one, answer.index)
            tokens = list(answer.token_ids)
            self.happened["tokens"] += len(tokens)
            if answer.finish_reason in ("abort", "error"):
                assert tokens == expected.tokens[: len(tokens)]
                is_lost = "cannot be had any more: not read, as planned" in str(answer.stop_reason)
                self.happened["adapters lost"] += is_lost
                assert not is_lost or one.adapter
                num_errors += answer.finish_reason == "error" and not is_lost
                num_lost += is_lost
            else:
                assert (tokens, answer.finish_reason, answer.stop_reason) == expected[:3]
            if answer.finish_reason == "abort":
                assert one.aborted
            if answer.logprobs is not None:
                found = [entry[token].logprob for entry, token in zip(answer.logprobs, tokens, strict=True)]
                assert found == expected.logprobs[: len(tokens)]
        spoiled = one.id in self.culprits[2:]
        if spoiled:
            assert one.aborted or num_errors + num_lost == one.params.n
            self.happened["not finite"] += num_errors
        else:
            assert num_errors == self.blamed[one.id]
        if not spoiled:
            self._check_prompt(one, output, whole=not one.aborted and num_errors + num_lost == 0)

    def _expected(self, one: Asked, index: int) -> Expected:
        executor = self.executor
        return expected_answer(
            one.prompt,
            one.params,
            vocabulary=executor.vocabulary,
            max_model_len=executor.max_model_len,
            end_ids=self.end_ids,
            index=index,
            groups=executor.groups,
            inputs=one.inputs,
            adapter=one.adapter,
        )

    def _check_prompt(self, one: Asked, output: RequestOutput, whole: bool) -> None:
        if one.params.prompt_logprobs is None:
            assert output.prompt_logprobs is None
            return
        assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
        read = zip(output.prompt_logprobs[1:], one.prompt[1:], strict=whole)
        found = [entry[token].logprob for entry, token in read if entry is not None]
        expected = expected_prompt_logprobs(one.prompt, self.executor.groups, one.inputs, one.adapter)
        assert found == expected[: len(found)]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters that differ."""
    at = tmp_path_factory.mktemp("shelf")
    for name in ("air", "earth", "fire", "water"):
        (at / name).mkdir()
        (at / name / "content").write_text(name)
    return at


def simulate(seed: int, shelf: Path) -> Day:
    """The day of this seed; says which it was if it fails."""
    day = Day(seed, shelf)
    try:
        day.run()
    except BaseException as failure:
        failure.add_note(f"simulate({seed})")
        raise
    return day


@pytest.mark.filterwarnings("ignore:a step of .* failed:RuntimeWarning")
@pytest.mark.parametrize("share", range(SHARES))
def test_every_request_of_every_day_is_answered_exactly(share: int, shelf: Path) -> None:
    happened: Counter[str] = Counter()
    for seed in range(share, DAYS, SHARES):
        happened += simulate(seed, shelf).happened
    print(dict(happened))
    assert happened["requests"] == REQUESTS_PER_DAY * len(range(share, DAYS, SHARES))
    for kind in (
        "rows failed",
        "steps failed",
        "allocations failed",
        "aborts",
        "aborts after the end",
        "not finite",
        "adapters replaced",
        "adapters unloaded",
        "adapters lost",
    ):
        assert happened[kind] > 0, kind


@pytest.mark.filterwarnings("ignore:a step of .* failed:RuntimeWarning")
@pytest.mark.parametrize("seed", range(3))
def test_a_day_replays_to_the_last_bit(seed: int, shelf: Path) -> None:
    assert simulate(seed, shelf).trace == simulate(seed, shelf).trace
