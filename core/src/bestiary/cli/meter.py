"""What the steps of a benchmark are made of, what they must read and compute, and the machine's limits for both.

It stands between engine and executor as one more executor, and knows no verb. The figures are what a step cannot do
without: each weight read once (an embedding's only where the head shares them, and experts as far as so many tokens
choose them), keys and values of every token in context read once; two operations for each weight that a token meets,
and for each number of a key or value that a head meets.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bestiary.blocks import Attention

if TYPE_CHECKING:
    import torch

    from bestiary.blocks import Decoder
    from bestiary.executor import Executor
    from bestiary.planner import Rank
    from bestiary.step import StepResult, StepRow

__all__ = ["Costs", "Kind", "Limits", "Meter", "Phase", "Step"]

#: A step that only reads prompts, one that only writes answers, or one that does both.
Kind = Literal["prefill", "decode", "mixed"]


@dataclass(frozen=True)
class Costs:
    """What a model's tokens cost, from its description."""

    #: Bytes of weights that a step of so many tokens reads.
    weights_read: Callable[[float], float]
    #: Weights that every token meets, and those that only tokens with logits meet.
    body_parameters: float
    head_parameters: int
    #: Bytes of keys and values of one token in context.
    kv_bytes: int
    #: Operations of attention for one token that sees one other.
    attention_flops: int

    @classmethod
    def of(cls, tree: Decoder, rank: Rank) -> Costs:
        """The costs of a described tree that one rank has whole, as the planner sees it."""
        table = tree.embed.vocabulary * tree.embed.width
        mixers = (block for block in tree.modules() if isinstance(block, Attention))
        return cls(
            weights_read=rank.weights_read,
            body_parameters=rank.flops(1) / 2 - table,
            head_parameters=table,
            kv_bytes=rank.token_bytes,
            attention_flops=sum(4 * m.heads * m.head_dim for m in mixers),
        )


@dataclass(frozen=True)
class Step:
    """One step of the engine, and how long it took from the end of the one before."""

    kind: Kind
    seconds: float
    num_tokens: int
    num_bytes: int
    num_flops: int
    #: Answers whose first token it brought.
    num_first: int


class Meter:
    """An executor that notes what goes through it to another one."""

    def __init__(self, executor: Executor, costs: Costs) -> None:
        self._executor, self._costs = executor, costs
        self.vocabulary, self.max_model_len = executor.vocabulary, executor.max_model_len
        self.groups, self.block_size = executor.groups, executor.block_size
        self.pools, self.most_crossed = executor.pools, executor.most_crossed
        self.depth, self.width, self.runs_ahead = executor.depth, executor.width, executor.runs_ahead
        self._under_way: deque[Sequence[StepRow]] = deque()
        self.steps: list[Step] = []
        self._last = 0.0

    def start(self) -> None:
        """Forget the steps so far; the next one is timed from here."""
        self.steps = []
        self._last = time.perf_counter()

    def submit(self, rows: Sequence[StepRow]) -> None:
        """Send a step on its way."""
        self._executor.submit(rows)
        self._under_way.append(rows)

    def execute(self, rows: Sequence[StepRow]) -> list[StepResult]:
        """Run a step and note it."""
        self.submit(rows)
        return self.collect()

    def collect(self) -> list[StepResult]:
        """Wait for a step and note it."""
        results, rows = self._executor.collect(), self._under_way.popleft()
        now = time.perf_counter()
        self.steps.append(self._step(rows, now - self._last))
        self._last = now
        return results

    def add_adapter(self, key: str, folder: Path) -> bytes:
        """As the other executor does."""
        return self._executor.add_adapter(key, folder)

    def place_adapter(self, key: str, slot: int) -> None:
        """As the other executor does."""
        self._executor.place_adapter(key, slot)

    def remove_adapter(self, key: str) -> None:
        """As the other executor does."""
        self._executor.remove_adapter(key)

    def close(self) -> None:
        """Close the other executor."""
        self._executor.close()

    def _step(self, rows: Sequence[StepRow], seconds: float) -> Step:
        costs, num_tokens = self._costs, sum(len(row.tokens) for row in rows)
        context = sum(row.start + len(row.tokens) for row in rows)
        # Token number i of a row sees the row's start, and i tokens of the row itself.
        pairs = sum(len(row.tokens) * row.start + len(row.tokens) * (len(row.tokens) + 1) // 2 for row in rows)
        num_logits = sum(row.sampling is not None for row in rows)
        matrices = num_tokens * costs.body_parameters + num_logits * costs.head_parameters
        writing = {_writes_answer(row) for row in rows}
        return Step(
            kind="mixed" if len(writing) == 2 else "decode" if True in writing else "prefill",
            seconds=seconds,
            num_tokens=num_tokens,
            num_bytes=round(costs.weights_read(num_tokens)) + context * costs.kv_bytes,
            num_flops=round(2 * matrices) + pairs * costs.attention_flops,
            num_first=sum(_ends_prompt(row) for row in rows),
        )


def _writes_answer(row: StepRow) -> bool:
    return row.sampling is not None and row.start >= row.sampling.num_prompt


def _ends_prompt(row: StepRow) -> bool:
    return row.sampling is not None and row.start + len(row.tokens) == row.sampling.num_prompt


@dataclass(frozen=True)
class Limits:
    """What the machine does at best, per second, as measured; None where that is not known."""

    read_bytes: float | None
    flops: float

    @classmethod
    def measure(cls, dtype: torch.dtype, device: torch.device) -> Limits:
        """Measure both, with as many threads as the model has. The bandwidth of a GPU is not measured."""
        import bestiary_kernels

        read = bestiary_kernels.read_bandwidth() if device.type == "cpu" else None
        return cls(read, bestiary_kernels.matmul_flops(dtype, device=device))


@dataclass(frozen=True)
class Phase:
    """All steps of one kind together. Shares are of the machine's limits; 1 is all that it can do."""

    num_steps: int
    seconds: float
    num_tokens: int
    tokens_per_s: float
    bandwidth_share: float | None
    flops_share: float

    @classmethod
    def of(cls, steps: Iterable[Step], kind: Kind, limits: Limits) -> Phase | None:
        """The steps of this kind; None where there are none."""
        chosen = [step for step in steps if step.kind == kind]
        if not chosen:
            return None
        seconds, num_tokens = sum(step.seconds for step in chosen), sum(step.num_tokens for step in chosen)
        read, flops = sum(step.num_bytes for step in chosen), sum(step.num_flops for step in chosen)
        share = None if limits.read_bytes is None else read / seconds / limits.read_bytes
        return cls(len(chosen), seconds, num_tokens, num_tokens / seconds, share, flops / seconds / limits.flops)
