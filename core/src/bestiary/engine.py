"""Requests in, results out: owns scheduler, executor and output. Knows no model and no tensor."""

import random
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bestiary import executor as executors
from bestiary import hub, limits, model, registry
from bestiary.architecture import Architecture
from bestiary.cache import BlockTable, PagedCache
from bestiary.cache.tables import root_key
from bestiary.checkpoint import ConfigFile, generation
from bestiary.config import EngineConfig
from bestiary.errors import EngineError, RequestError, WorkerDied
from bestiary.executor import Executor
from bestiary.flights import Flights
from bestiary.inputs import NOTHING, Inputs
from bestiary.loras import Adapters
from bestiary.media import Admission
from bestiary.output import FinishReason, Logprob, OutputText, RequestOutput
from bestiary.prompts import TEXT_ALONE, Processor
from bestiary.request import Answer, Request, seen_from_the_start
from bestiary.sampling.params import SamplingParams
from bestiary.sampling.sampler import Row, TopLogprobs
from bestiary.scheduler import Scheduled, Scheduler
from bestiary.scheduler import Sequence as Tokens
from bestiary.step import StepResult, StepRow
from bestiary.text import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Engine"]


#: A request for vectors asks nothing of a sampler.
_NO_PARAMS = SamplingParams(detokenize=False)


class Engine:
    """Serves requests step by step. Nothing here blocks or starts a thread: the caller drives `step`."""

    def __init__(
        self,
        config: EngineConfig,
        executor: Executor,
        tokenizer: Tokenizer | None = None,
        end_ids: Iterable[int] = (),
    ) -> None:
        self.config, self.tokenizer = config, tokenizer
        self._restart: Callable[[], Executor] | None = None
        #: What the model's plugin declares, where the engine was loaded from a folder.
        self.architecture: Architecture | None = None
        #: The plugin's own way from a prompt to tokens and inputs, where it has one.
        self.processor: Processor | None = None
        #: What prompts may bring beside text.
        self.admission = TEXT_ALONE
        self._end_ids = [end for end in end_ids if 0 <= end < executor.vocabulary]  # a config may name others
        self._requests: dict[str, Request] = {}
        self._answers: dict[Tokens, Answer] = {}
        self._seeds = random.Random(config.seed)
        #: Why nothing runs any more, until `restart`.
        self.failure: WorkerDied | None = None
        self.adapters = Adapters(config, lambda: self.executor)
        self._serve_with(executor)

    def _serve_with(self, executor: Executor) -> None:
        """From here on steps run there, over a cache that is empty."""
        config = self.config
        cache = PagedCache(executor.groups, executor.block_size, share_prefixes=config.enable_prefix_caching)
        holds = cache.longest(config.max_num_batched_tokens, executor.max_model_len)
        if executor.max_model_len > holds:
            raise EngineError(
                f"the executor promises contexts of {executor.max_model_len} tokens, its cache holds {holds}"
            )
        self.executor = executor
        early = executor.max_model_len if executor.runs_ahead else 0
        seats, budget = config.max_num_seqs, config.max_num_batched_tokens
        self.scheduler = Scheduler(cache, seats, budget, self.adapters.book, early)
        self.adapters.book.clear_slots()
        self._flights = Flights(lambda: self.executor, self.scheduler, self.adapters, self._row)

    @classmethod
    def load(
        cls,
        config: EngineConfig,
        folder: Path,
        start: Callable[[EngineConfig, Architecture, Path], Executor] = executors.start,
    ) -> "Engine":
        """Find the plugin and the tokenizer of the model in `folder`, load it and be ready.

        `start` makes the executor, where it is not the one that the settings ask for.
        """
        file = ConfigFile.load(folder)
        architecture = registry.resolve(file.architectures, prefer=config.plugin)
        texts = folder if config.tokenizer is None else hub.locate(config.tokenizer)
        tokenizer = None if config.skip_tokenizer_init else Tokenizer.load(texts)
        # generation_config.json knows what ends an answer better than config.json, which is often the base model's.
        # Both may be that, where a model was taught a new end of turn: the tokenizer's ends an answer too, as in vLLM.
        ends = generation(folder).get("eos_token_id") or file.token_ids("eos_token_id")
        own = () if tokenizer is None or tokenizer.eos_id is None else (tokenizer.eos_id,)
        shards, stages = config.tensor_parallel_size, config.pipeline_parallel_size
        registry.require(architecture, tensor=shards > 1, pipeline=stages > 1)
        engine = cls(config, start(config, architecture, folder), tokenizer, (*ends, *own))
        engine._restart = partial(start, config, architecture, folder)
        engine.architecture = engine.adapters.architecture = architecture
        engine.admission = Admission.of(architecture, config, engine.executor.width)
        if architecture.processor is not None:
            engine.processor = model.processor(architecture)(file, folder, tokenizer)
        for name, path in config.lora_modules.items():
            engine.adapters.load(name, Path(path))
        return engine

    def has_unfinished_requests(self) -> bool:
        """Something waits or runs."""
        return bool(self._requests)

    def check(self, prompt_ids: Sequence[int], params: SamplingParams | None, inputs: Inputs = NOTHING) -> None:
        """Raise RequestError for a request that can never be served here, before anything is taken for it.

        Without `params` it is one for vectors, of a model that pools. Raises EngineError where nothing runs any more.
        """
        if self.failure is not None:
            raise EngineError(f"the model does not run any more ({self.failure})")
        limits.check(self.config, self.executor, self.tokenizer is not None, prompt_ids, params, inputs)

    def add_request(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams | None,
        *,
        prompt: str | None = None,
        cache_salt: str = "",
        final_only: bool = False,
        inputs: Inputs = NOTHING,
        lora: str | None = None,
    ) -> None:
        """Queue a request; without `params`, one for vectors of a model that pools. `inputs` go with the prompt.

        Its outputs come from `step`: all along, or only the finished one with `final_only`. Requests with different
        `cache_salt`, or different adapters, never share cached blocks. `lora` is the name of an adapter.
        """
        if request_id in self._requests:
            raise RequestError(f"request id {request_id!r} is in use: give each request its own")
        self.check(prompt_ids, params, inputs)
        adapter = None if lora is None else self.adapters.find(lora)
        params = _NO_PARAMS if params is None else params.clone()
        own_ends = [] if params.ignore_eos else self._end_ids
        ends = list(dict.fromkeys([*own_ends, *(params.stop_token_ids or ())]))
        request = Request(request_id, prompt, list(prompt_ids), params, final_only, ends)
        if params.prompt_logprobs is not None:
            request.prompt_logprobs = [None]
        base = self._seeds.getrandbits(63) if params.seed is None else params.seed
        seen = seen_from_the_start(prompt_ids, inputs)
        content = b"" if adapter is None else adapter.digest
        table = partial(BlockTable, root_key(cache_salt, seen, adapter=content), inputs=inputs)
        if adapter is not None:
            request.adapter = adapter
            adapter.requests += 1
        request.answers = [self._answer(request, index, base + index, table()) for index in range(params.n)]
        self._requests[request_id] = request
        for answer in request.answers:
            self._answers[answer.sequence] = answer
            self.scheduler.add(answer.sequence)

    def _answer(self, request: Request, index: int, seed: int, table: BlockTable) -> Answer:
        params = request.params
        sequence = Tokens(f"{request.id}/{index}", list(request.prompt_ids), table, adapter=request.adapter)
        # What is wanted of each of a prompt's tokens cannot be had of those that are found in the cache.
        sequence.reads_prompt = (index == 0 and params.prompt_logprobs is not None) or self.executor.pools == "all"
        text = OutputText(
            self.tokenizer if params.detokenize else None,
            request.prompt_ids,
            stop=list(params.stop or ()),
            include_stop=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
            at_end=request.final_only and not self.executor.runs_ahead,
        )
        logprobs: list[dict[int, Logprob]] | None = None if params.logprobs is None else []
        seed = (seed + 2**63) % 2**64 - 2**63
        row = Row(params, sequence.tokens, sequence.num_prompt, seed, request.end_ids, unread=request.final_only)
        return Answer(request, index, sequence, text, row, logprobs)

    def abort(self, request_ids: Iterable[str]) -> list[RequestOutput]:
        """End requests now, with what they have. Unknown and finished ids are passed over: an abort may come late."""
        outputs = []
        for request_id in request_ids:
            if request := self._requests.get(request_id):
                for answer in request.answers:
                    if answer.finish_reason is None:
                        self._abort(answer)
                outputs.append(self._retire(request))
        return outputs

    def _abort(self, answer: Answer) -> None:
        """End an answer and release the text that it held back."""
        self._finish(answer, "abort", None)
        try:
            answer.text.finish()
        except Exception as failure:  # the blocks are free already; the answer says what became of its text
            answer.finish_reason, answer.stop_reason = "error", f"{type(failure).__name__}: {failure}"

    def step(self) -> list[RequestOutput]:
        """Run one step and return the requests that it moved on.

        Where the model is a pipeline, as many steps are on their way as it has stages, and the oldest is waited for.
        """
        self._flights.depart()
        found = self._flights.land()
        if found and isinstance(found[0][1], WorkerDied):
            return self._die(found[0][1])
        self.scheduler.commit([entry for entry, result in found if not isinstance(result, Exception)])
        touched: dict[str, Request] = {}
        for entry, result in found:
            answer, samples = self._answers[entry.sequence], entry.samples
            try:
                if isinstance(result, Exception):
                    raise result
                self._take_in(answer, entry, result)
            except Exception as failure:  # whatever is raised for one answer ends that answer, and nothing else
                self._finish(answer, "error", f"{type(failure).__name__}: {failure}")
            if answer.finish_reason or samples:
                touched[answer.request.id] = answer.request
        outputs = []
        for request in touched.values():
            if request.finished:
                outputs.append(self._retire(request))
            elif not request.final_only:
                outputs.append(request.output())
        return outputs

    def _die(self, failure: WorkerDied) -> list[RequestOutput]:
        """End everything with the reason; what the cache held is lost."""
        self.failure = failure
        self._flights.clear()
        for answer in list(self._answers.values()):
            self._finish(answer, "error", f"{type(failure).__name__}: {failure}")
        return [self._retire(request) for request in list(self._requests.values())]

    def restart(self) -> None:
        """Load the model anew and serve on. Requests that are under way end as if they were aborted."""
        if self._restart is None:
            raise EngineError("this engine was not loaded from a folder: make a new one")
        self.abort(list(self._requests))
        self._flights.clear()
        self.executor.close()
        self._serve_with(self._restart())
        self.failure = None

    def _row(self, entry: Scheduled) -> StepRow:
        sequence, answer = entry.sequence, self._answers[entry.sequence]
        params = answer.request.params
        end = entry.start + entry.count
        row = StepRow(sequence.tokens[entry.start : end], entry.start, sequence.table.blocks, None)
        if self.executor.pools is not None:
            row.num_vectors = entry.count if self.executor.pools == "all" else int(entry.samples)
        elif entry.samples:
            row.sampling = answer.row
        row.adapter = self.adapters.slot(sequence.adapter)
        row.inputs, row.is_crossed = sequence.table.inputs, sequence.has_crossed
        if params.prompt_logprobs is not None and sequence.reads_prompt and entry.start < sequence.num_prompt:
            row.prompt_logprobs = params.prompt_logprobs
            row.successors = sequence.tokens[entry.start + 1 : min(end + 1, sequence.num_prompt)]
        return row

    def _take_in(self, answer: Answer, entry: Scheduled, result: StepResult) -> None:
        """Record what a step found for an answer, and see whether the answer ends with it."""
        prompt = answer.request.prompt_logprobs
        if prompt is not None and result.prompt:
            # After a preemption the prompt is read again; what is known already stays.
            known = len(prompt) - 1 - entry.start
            prompt.extend(self._logprobs(top) for top in result.prompt[known:])
            answer.sequence.reads_prompt = len(prompt) < answer.sequence.num_prompt
        if result.vectors is not None:
            self._take_vectors(answer, entry, result.vectors)
        if result.choice is None:
            return
        token = result.choice.token
        if token is None:
            # Keys and values may not be finite either: nobody else may find them.
            self.scheduler.cache.forget(answer.sequence.table)
            raise EngineError("the model's logits are not finite numbers")
        answer.sequence.tokens.append(token)
        if answer.logprobs is not None and result.choice.logprobs is not None:
            answer.logprobs.append(self._logprobs(result.choice.logprobs))
            answer.cumulative_logprob += result.choice.logprobs.logprobs[0]
        self._check_end(answer, token)

    def _take_vectors(self, answer: Answer, entry: Scheduled, vectors: "Tensor") -> None:
        """Record what a model that pools found; after a preemption the prompt is read again from its start."""
        if not bool(vectors.isfinite().all()):
            self.scheduler.cache.forget(answer.sequence.table)
            raise EngineError("the model's vectors are not finite numbers")
        answer.vectors = [*answer.vectors, vectors] if entry.start else [vectors]
        if entry.samples:
            self._finish(answer, "stop", None)

    def _check_end(self, answer: Answer, token: int) -> None:
        """Does this token end the answer: an end token, a stop string, or no more room?"""
        request, sequence = answer.request, answer.sequence
        params = request.params
        # Below min_tokens the sampler forbids end tokens, and stop strings do not count.
        may_stop = sequence.num_output > params.min_tokens or params.min_tokens == 0
        is_end = may_stop and token in request.end_ids
        full = answer.row.left <= 0 or len(sequence.tokens) >= self.executor.max_model_len
        found = answer.text.push(token, final=full, stop_token=is_end, may_stop=may_stop).stopped_by
        if is_end:
            self._finish(answer, "stop", token if token in (params.stop_token_ids or ()) else None)
        elif found is not None:
            self._finish(answer, "stop", found)
        elif full:
            self._finish(answer, "length", None)

    def _logprobs(self, top: TopLogprobs) -> dict[int, Logprob]:
        """vLLM's form: the most likely tokens, and the chosen one whether it is among them or not."""
        ranks = [top.rank, *range(1, len(top.token_ids))]
        entries = zip(top.token_ids, top.logprobs, ranks, strict=True)
        found: dict[int, Logprob] = {}
        for token, logprob, rank in entries:
            text = None if self.tokenizer is None else self.tokenizer.decode([token], skip_special_tokens=False)
            found.setdefault(token, Logprob(logprob, rank, text))
        return found

    def _finish(self, answer: Answer, reason: FinishReason, stop_reason: int | str | None) -> None:
        answer.finish_reason, answer.stop_reason = reason, stop_reason
        self.scheduler.remove(answer.sequence)
        del self._answers[answer.sequence]

    def _retire(self, request: Request) -> RequestOutput:
        del self._requests[request.id]
        if request.adapter is not None:
            request.adapter.requests -= 1
            if self.failure is None:
                self.adapters.tidy()
        return request.output()

    def check_integrity(self) -> None:
        """Raise EngineError where blocks, sequences and requests do not add up."""
        sequences = list(self.scheduler)
        if len(sequences) != len(self._answers) or set(sequences) != self._answers.keys():
            raise EngineError("the scheduler and the engine know different sequences")
        self.scheduler.cache.check_integrity(s.table for s in sequences)
        self.adapters.book.check_integrity([s.adapter for s in self.scheduler.running if s.adapter is not None])

    def close(self) -> None:
        """End everything and let the model go."""
        self.abort(list(self._requests))
        self.executor.close()
