"""A case made real: an oracle, the tiny checkpoint that it saves, variants of that, and engines over them."""

import json
import random
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bestiary import executor as executors
from bestiary import registry
from bestiary.architecture import Architecture
from bestiary.config import EngineConfig
from bestiary.engine import Engine
from bestiary.errors import BestiaryError
from bestiary.prompts import ParsedPrompt, parse_prompts
from bestiary.sampling.params import SamplingParams
from bestiary.testing import threads
from bestiary.testing.cases import Case, Naming
from bestiary.testing.references import Oracle, write_config
from bestiary.testing.samples import Sample

__all__ = ["NEW_TOKENS", "Answer", "Fixture", "Unfit"]

NEW_TOKENS = 32
#: Tokens of a prompt that goes through kernels for many rows.
_MANY_TOKENS = 80
#: Tokens of answers that are compared with each other and not with the reference.
_FEW_TOKENS = 12
#: What is asked of a tiny model, or its answer proves nothing.
_LEAST_DISTINCT, _LEAST_MARGIN, _MOST_SEEDS = 6, 1e-3, 40


class Unfit(BestiaryError):
    """No random weights made this configuration answer with more than a few tokens, or with any certainty."""


@dataclass(frozen=True)
class Answer:
    """What the engine made of one prompt."""

    tokens: list[int]
    #: [tokens, vocabulary], and [prompt - 1, vocabulary] where they were asked for.
    logprobs: Tensor
    prompt_logprobs: Tensor
    num_cached: int
    #: [rows, width] of a model that pools.
    vectors: Tensor


class Fixture:
    """One case of one architecture, in a folder of its own. Everything is made when it is first needed."""

    def __init__(self, architecture: str, case: Case, folder: Path, device: str = "cpu") -> None:
        self.architecture, self.case, self._root, self.device = architecture, case, folder, device
        self.vocabulary = int(_vocabulary(case.config))
        self._engines: dict[str, Engine] = {}

    @cached_property
    def samples(self) -> list[Sample]:
        """The case's own, or random tokens of different lengths, the first as many as the case says."""
        if self.case.samples is not None:
            return list(self.case.samples())
        draw = random.Random(self.case.name)
        n = self.case.prompt_length
        return [Sample(tuple(draw.choices(range(3, self.vocabulary), k=k))) for k in (n, n // 2, 3, n - 5)]

    @cached_property
    def long_sample(self) -> Sample:
        """More tokens than kernels for a few rows take in a step, drawn at random."""
        return Sample(tuple(random.Random(self.case.name).choices(range(3, self.vocabulary), k=_MANY_TOKENS)))

    @cached_property
    def oracle(self) -> Oracle:
        """The reference, with the first seed that makes it answer usefully."""
        return self._found[0]

    @property
    def seed(self) -> int | None:
        """That seed, where a check needed the reference."""
        return self._found[1] if "_found" in vars(self) else None

    @cached_property
    def expected(self) -> list[int]:
        """The oracle's own greedy answer to the first prompt, token by token."""
        return self._found[2]

    @cached_property
    def _found(self) -> tuple[Oracle, int, list[int]]:
        for seed in range(_MOST_SEEDS):
            oracle = self.case.reference.build(self.case.config, seed)
            if self.pools:
                return oracle, seed, []
            answer, margin = _greedy(oracle, self.samples[0])
            if len(set(answer)) >= _LEAST_DISTINCT and margin > _LEAST_MARGIN:
                return oracle, seed, answer
        raise Unfit(
            f"{self.architecture}, case {self.case.name!r}: with none of {_MOST_SEEDS} seeds the reference gives "
            f"{_LEAST_DISTINCT} different tokens of {NEW_TOKENS} with a margin of {_LEAST_MARGIN}; change the sizes"
        )

    @property
    def declared(self) -> Architecture:
        """What the plugin declares."""
        return registry.find(self.architecture).load()

    @property
    def pools(self) -> bool:
        """The model answers with vectors."""
        return getattr(self.case.reference, "kind", "decoder") in ("embedding", "reward")

    @cached_property
    def folder(self) -> Path:
        """The checkpoint: tensors as the reference publishes them, config.json as the case says."""
        folder = self._fresh("published")
        self.oracle.save(folder)
        (folder / "config.json").rename(folder / "config.reference.json")
        write_config(folder, self.case.config, self.architecture)
        for name, values in self.case.files.items():
            (folder / name).write_text(json.dumps(values))
        return folder

    def variant(self, name: str, changes: Mapping[str, Any]) -> Path:
        """The same tensors under a changed configuration; None leaves a key out."""
        folder = self._copy(name)
        dropped = [key for key, value in changes.items() if value is None]
        values = {key: value for key, value in {**self.case.config, **changes}.items() if key not in dropped}
        write_config(folder, values, self.architecture)
        return folder

    def in_reference_dialect(self) -> Path:
        """The same tensors under the config.json that the reference wrote."""
        folder = self._copy("reference dialect")
        values = json.loads((folder / "config.reference.json").read_text())
        write_config(folder, values, self.architecture)
        return folder

    def renamed(self, naming: Naming) -> Path:
        """The same tensors under other names."""
        return self.rewritten(naming.name, lambda tensors: _rename(tensors, naming))

    def rewritten(self, name: str, rewrite: Any) -> Path:
        """A copy of the checkpoint with other tensors."""
        from safetensors.torch import load_file, save_file

        folder = self._copy(name)
        path = folder / "model.safetensors"
        tensors = rewrite(load_file(path))
        path.unlink()
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, {"format": "pt"})
        return folder

    def tensor_names(self) -> list[str]:
        """What the checkpoint holds."""
        from safetensors import safe_open

        with safe_open(self.folder / "model.safetensors", "pt") as file:
            return sorted(file.keys())

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of what the checkpoint holds."""
        from safetensors import safe_open

        with safe_open(self.folder / "model.safetensors", "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping

    def place(self, name: str) -> Path:
        """An empty folder of that name."""
        return self._fresh(name)

    def _fresh(self, name: str) -> Path:
        folder = self._root / re.sub(r"\W+", "-", name)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def _copy(self, name: str) -> Path:
        folder = self._fresh(name)
        for file in self.folder.iterdir():
            shutil.copy(file, folder / file.name)
        return folder

    def engine(self, folder: Path | None = None, **settings: Any) -> Engine:
        """An engine in float32 over the checkpoint, or over a variant of it. Those over the checkpoint are kept,
        but for one that is spread over ranks, which whoever asks for it closes.
        """
        if "max_num_batched_tokens" in settings:
            settings["max_num_batched_tokens"] = max(settings["max_num_batched_tokens"], self._uncut)
        key = repr(sorted(settings.items()))
        if folder is None and key in self._engines:
            return self._engines[key]
        config = EngineConfig.resolve(
            model=str(folder or self.folder),
            **{
                "dtype": "float32",
                "device": self.device,
                "skip_tokenizer_init": True,
                "max_num_seqs": 4,
                "max_logprobs": self.vocabulary,
                "kv_cache_memory_bytes": 2**24,
                **settings,
            },
        )
        is_spread = config.tensor_parallel_size * config.pipeline_parallel_size > 1
        engine = Engine.load(config, folder or self.folder, threads.executor if is_spread else executors.start)
        if folder is None and not is_spread:
            self._engines[key] = engine
        return engine

    @cached_property
    def _uncut(self) -> int:
        """Tokens that the engine computes in one step or not at all."""
        if self.case.samples is None:
            return 0
        engine = self.engine()
        return max(self.parsed(engine, sample).inputs.prefix for sample in self.samples)

    def parsed(self, engine: Engine, sample: Sample) -> ParsedPrompt:
        """A prompt as the engine takes it, by the way of every user's prompt."""
        return parse_prompts(sample.prompt(), None, engine.processor, engine.admission)[0]

    def add(
        self,
        engine: Engine,
        name: str,
        sample: Sample | ParsedPrompt,
        *,
        logprobs: bool = False,
        lora: str | None = None,
    ) -> None:
        """Queue a prompt for a greedy answer, or for vectors."""
        parsed = self.parsed(engine, sample) if isinstance(sample, Sample) else sample
        shown = self.vocabulary if logprobs else None
        params = SamplingParams(
            temperature=0,
            max_tokens=NEW_TOKENS if logprobs else _FEW_TOKENS,
            ignore_eos=True,
            detokenize=False,
            logprobs=shown,
            prompt_logprobs=shown,
        )
        asked = None if self.pools else params
        engine.add_request(name, parsed.token_ids, asked, inputs=parsed.inputs, final_only=True, lora=lora)

    def answers(
        self,
        engine: Engine,
        samples: Sequence[Sample | ParsedPrompt],
        *,
        logprobs: bool = False,
        lora: Sequence[str | None] | None = None,
    ) -> list[Answer]:
        """Serve prompts together, each with its adapter.

        Raises EngineError where one ends with an error; nothing may stay behind.
        """
        for i, (sample, name) in enumerate(zip(samples, lora or [None] * len(samples), strict=True)):
            self.add(engine, str(i), sample, logprobs=logprobs, lora=name)
        found = self.drain(engine)
        return [found[str(i)] for i in range(len(samples))]

    def drain(self, engine: Engine) -> dict[str, Answer]:
        """Step until everything that was asked is answered; a step that fails raises, though its rows alone do not."""
        found: dict[str, Answer] = {}
        while engine.has_unfinished_requests():
            with warnings.catch_warnings():
                warnings.filterwarnings("error", "a step of .* failed", RuntimeWarning)
                outputs = engine.step()
            for output in outputs:
                (one,) = output.outputs
                if one.finish_reason == "error":
                    raise BestiaryError(f"request {output.request_id} failed: {one.stop_reason}")
                found[output.request_id] = Answer(
                    list(one.token_ids),
                    self._table(one.logprobs or []),
                    self._table((output.prompt_logprobs or [])[1:]),
                    output.num_cached_tokens,
                    torch.cat(output.vectors) if output.vectors else torch.empty(0),
                )
        engine.check_integrity()
        if not engine.scheduler.cache.is_empty:
            raise BestiaryError("blocks of the cache are still held though every request has ended")
        return found

    def _table(self, rows: Sequence[Any]) -> Tensor:
        """[rows, vocabulary] of the dictionaries in which the engine gives log-probabilities."""
        found = torch.full((len(rows), self.vocabulary), float("nan"))
        for i, row in enumerate(rows):
            for token, entry in row.items():
                if token < self.vocabulary:  # beyond are those that stand in prompts alone
                    found[i, token] = entry.logprob
        return found


def _vocabulary(config: Mapping[str, Any]) -> Any:
    return config.get("vocab_size") or config["text_config"]["vocab_size"]


def _greedy(oracle: Oracle, sample: Sample) -> tuple[list[int], float]:
    """The answer, and the least difference between the best token and the next."""
    answer: list[int] = []
    margin = float("inf")
    for _ in range(NEW_TOKENS):
        best = oracle.judge(sample, [*answer, 0])[-1].topk(2)
        answer.append(int(best.indices[0]))
        margin = min(margin, float(best.values[0] - best.values[1]))
        if margin <= _LEAST_MARGIN:
            break  # no use for it
    return answer, margin


def _rename(tensors: dict[str, Tensor], naming: Naming) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        new = name
        for pattern, replacement in naming.rewrites:
            new = re.sub(pattern, replacement, new)
        if new:
            found[new] = tensor
        for old, also in naming.repeats:
            if old == name:
                found[also] = tensor.clone()
    return found
