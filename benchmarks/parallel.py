"""What does spreading a model over ranks cost: a pipeline's bubble, and bytes moved per step, beside the formula?"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rig import machine
from rig.entries import parser
from rig.model import Model
from rig.report import measured, spread

from bestiary import LLM, SamplingParams
from bestiary import model as trees
from bestiary.checkpoint import ConfigFile
from bestiary.config import EngineConfig
from bestiary.engine import Engine
from bestiary.errors import SettingError
from bestiary.executor import wire
from bestiary.parallel import Alone, Mesh
from bestiary.planner import Shapes

_TIME = ["on their way", "tokens/s, median (range)", "busy, by rank", "bubble, %", "bubble by formula, %"]
_BYTES = ["bytes between ranks", "bytes by formula", "ratio", "driver to ranks + back, bytes"]
COLUMNS = ["split", "step", *_TIME, *_BYTES]
WARM = 4
"""Tokens of each sequence before a stretch is measured."""
CROWDED = 8
"""Where there are more ranks than cores, a stretch is so many times shorter."""
SETTLE_S = 0.25
"""Until the last acknowledgement has passed."""
FLAG_BYTES = 4
"""Goes before what a stage sends: `Mesh.send`."""
LENGTH_BYTES = 8
"""Goes before a message between driver and rank: `executor/frames.py`."""
PACKET_BYTES = 14 + 20 + 32
"""Heads of a packet: Ethernet, IPv4, TCP with its timestamps."""
NAMESPACE = "BESTIARY_BENCH_LO"
"""Set once this script knows whose loopback interface it uses: its `own`, or the `host`'s."""


@dataclass(frozen=True)
class Work:
    """What a step is for: sequences that grow by a token each, or a prompt that is read."""

    name: str
    sequences: int
    prompt: int
    grows: bool = True

    def on_way(self, stages: int) -> int:
        """As many steps as there are stages, if there are sequences for them."""
        return min(stages, self.sequences)


WORK = (Work("1 sequence", 1, 64), Work("8 sequences", 8, 64), Work("512 tokens of a prompt", 1, 512, grows=False))


@dataclass(frozen=True)
class Formula:
    """What a step must take, from the tree as the engine parts it among ranks."""

    shards: int
    stages: int
    itemsize: int
    width: int
    sums: int
    """Products, and rows of the table, that are added up over the shards, in all stages."""
    absent: int
    """Logits of a token that other ranks make than the one that chooses."""
    read: tuple[float, ...]
    """Bytes of weights by stage."""

    @staticmethod
    def of(shapes: Shapes, shards: int, stages: int) -> "Formula":
        """Counted on a tree of each stage."""
        link, sums, read = Alone(), 0, []
        for stage in range(stages):
            mesh = Mesh(stage, stages, 0, shards, link)
            tree = trees.describe(shapes.architecture, shapes.file).tree
            trees.part(tree, mesh)
            parts = [part for part in tree.modules() if stage == 0 or part is not tree.embed]  # the first one embeds
            sums += sum(getattr(part, "add", None) == link.all_reduce for part in parts)
            read.append(shapes.rank(mesh).weights_read(1))
        words, width = shapes.tree.embed.vocabulary, shapes.tree.embed.width
        absent = words - len(Mesh(shards=shards).share(words))
        return Formula(shards, stages, shapes.dtype.itemsize, width, sums, absent, tuple(read))

    def moved(self, tokens: int, outputs: int) -> int:
        """Bytes of payload that ranks send for a step: stream and flag to each next stage, rings of sums, logits."""
        stream = tokens * self.width * self.itemsize
        onwards = (self.stages - 1) * self.shards * (stream + FLAG_BYTES)
        return onwards + self.sums * 2 * (self.shards - 1) * stream + outputs * self.absent * self.itemsize

    def bubble(self, on_way: int) -> float:
        """The share of their time that ranks wait, where a stage takes as long as its weights take to be read."""
        cycle = max(sum(self.read), on_way * max(self.read))
        return 1 - on_way * sum(self.read) / (self.stages * cycle)


class Tap:
    """One of the driver's queues, and what has passed through it."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue
        self.passed: list[list[bytes]] = []

    def put(self, messages: list[bytes] | None) -> None:
        """One for each rank; None is the last."""
        self.passed.append(messages or [])
        self._queue.put(messages)

    def get(self, timeout: float) -> tuple[int, bytes | str]:
        """What a rank says."""
        rank, data = self._queue.get(timeout=timeout)
        self.passed.append([data] if isinstance(data, bytes) else [])
        return rank, data

    def size(self) -> int:
        """Bytes of all that passed."""
        return sum(len(message) + LENGTH_BYTES for messages in self.passed for message in messages)


class Split:
    """The model on the ranks of one split, and the ends at which it is measured."""

    def __init__(self, folder: Path, formula: Formula) -> None:
        self.formula, self.ranks = formula, formula.shards * formula.stages
        parts = {"tp": formula.shards, "pp": formula.stages}
        self.name = " x ".join(f"{name} {count}" for name, count in parts.items() if count > 1) or "alone"
        self.is_crowded = self.ranks > machine.cores()
        self.llm = LLM(
            str(folder),
            dtype="bfloat16",
            skip_tokenizer_init=True,
            max_model_len=1024,
            max_num_seqs=max(work.sequences for work in WORK),
            max_num_batched_tokens=1024,
            kv_cache_memory_bytes=2**28,
            enable_prefix_caching=False,
            tensor_parallel_size=formula.shards,
            pipeline_parallel_size=formula.stages,
        )
        self.pids, self._sent, self._back = [os.getpid()], Tap(None), Tap(None)
        if self.ranks > 1:
            executor: Any = self.llm.engine.executor
            self.pids = [worker._process.pid for _, worker in sorted(executor._team._workers.items())]
            self._sent, self._back = Tap(executor._outbox), Tap(executor._inbox)
            executor._outbox, executor._inbox = self._sent, self._back

    def stretch(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        """Decode for a while, and look at the ranks before and after; by rank, shares of that time."""
        engine, new = self.llm.engine, max(1, new // CROWDED) if self.is_crowded else new
        ids = [f"stretch {i}" for i in range(len(prompts))]
        for name, prompt in zip(ids, prompts, strict=True):
            engine.add_request(name, prompt, _params(2 * WARM + new))
        _land(engine, WARM * len(prompts))
        before, start = [_spent(pid) for pid in self.pids], time.perf_counter()
        tokens = _land(engine, new * len(prompts))
        seconds, after = time.perf_counter() - start, [_spent(pid) for pid in self.pids]
        engine.abort(ids)
        for _ in range(self.formula.stages):  # what is on its way comes back
            engine.step()
        spent = [[(b - a) / 1e9 for a, b in zip(*pair, strict=True)] for pair in zip(before, after, strict=True)]
        shares = [[part / seconds for part in rank] for rank in spent]
        found: dict[str, Any] = {"tokens_s": tokens / seconds, "work_ms": 1e3 * sum(rank[0] for rank in spent) / tokens}
        found |= dict(zip(("busy", "core_wait", "other_threads"), zip(*shares, strict=True), strict=True))
        return found | {"bubble": 1 - statistics.mean(found["busy"])}

    def moved(self, work: Work, prompts: list[list[int]], new: int) -> dict[str, float]:
        """Bytes of one step of each sequence: those of a run, less those of one that ends with the first token."""
        first = self._run(prompts, 1)
        if not work.grows:
            return first
        more = self._run(prompts, 1 + new)
        return {name: (more[name] - first[name]) / new for name in more}

    def _run(self, prompts: list[list[int]], new: int) -> dict[str, float]:
        """What passes from one moment at which nothing is on its way to the next."""
        time.sleep(SETTLE_S)
        self._sent.passed, self._back.passed, before = [], [], _loopback()
        self.llm.generate(prompts, _params(new), use_tqdm=False)
        time.sleep(SETTLE_S)
        sizes, packets = (b - a for a, b in zip(before, _loopback(), strict=True))
        steps = [wire.read(messages[0], "command").rows for messages in self._sent.passed]
        formula = sum(
            self.formula.moved(sum(len(row.tokens) for row in rows), sum(row.sampling is not None for row in rows))
            for rows in steps
        )
        driver = {"to_ranks": self._sent.size(), "back": self._back.size()}
        return {"bytes": sizes, "packets": packets, "formula": formula, "steps": len(steps), **driver}


def main() -> None:
    """Every split is loaded at once; a round gives each its turn."""
    options_parser = parser(__doc__, "bestiary")
    options_parser.set_defaults(threads=1)
    options_parser.add_argument("--new", type=int, default=96, help="tokens of each sequence in a stretch")
    options_parser.add_argument("--counted", type=int, default=16, help="and while bytes are counted")
    options = options_parser.parse_args()
    _enter_namespace()
    model = Model.read(options.model)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # the ranks' too
    torch.set_num_threads(options.threads)
    shapes = Shapes(ConfigFile.load(model.folder), EngineConfig.resolve(model=str(model.folder), dtype="bfloat16"))
    shards = _fewest_shards(shapes)
    formulas = [Formula.of(shapes, *split) for split in ((1, 1), (1, 2), (shards, 1), (shards, 2))]
    with measured(options, model, "Ranks: bubble and bytes, bf16", COLUMNS) as report, ExitStack() as loaded:
        splits = []
        for formula in formulas:
            splits.append(Split(model.folder, formula))
            loaded.callback(splits[-1].llm.close)
        found = _rounds(options, model, splits)
        for (split, work), rounds in found.items():
            report.rows.append(_row(split, work, rounds))
            report.raw[f"{split.name}, {work.name}"] = rounds
        report.facts["versions"] = {name: {name: metadata.version(name)} for name in ("bestiary", "torch")}
        report.notes += [*_about_time(options, found), *_about_bytes(found)]
        report.notes.append(f"tp {shards}: no fewer shards can share this model's heads evenly.")


Found = dict[tuple[Split, Work], list[dict[str, Any]]]


def _rounds(options: argparse.Namespace, model: Model, splits: list[Split]) -> Found:
    found: Found = {(split, work): [] for split in splits for work in WORK if work.grows or split.ranks > 1}
    for i in range(options.pairs + 1):
        for (split, work), rounds in found.items():
            prompts = model.prompts(work.sequences, work.prompt)
            one = split.stretch(prompts, options.new) if work.grows else {}
            one |= split.moved(work, prompts, options.counted) if split.ranks > 1 else {}
            told = ", ".join(f"{name} {one[name]:,.2f}" for name in ("tokens_s", "bubble", "bytes") if name in one)
            print(f"round {i}{' (warm-up)' * (i == 0)}: {split.name}, {work.name}: {told}", flush=True)
            if i:
                rounds.append(one)
    return found


def _row(split: Split, work: Work, rounds: list[dict[str, Any]]) -> list[str]:
    timed, alone = work.grows and not split.is_crowded, split.ranks == 1
    on_way = work.on_way(split.formula.stages)
    bytes_, formula = _median(rounds, "bytes"), _median(rounds, "formula")
    return [
        split.name,
        work.name,
        str(on_way),
        spread([one["tokens_s"] for one in rounds]) if work.grows else "-",
        ", ".join(f"{share:.0%}" for share in _by_rank(rounds, "busy")) if timed else "-",
        spread([100 * one["bubble"] for one in rounds]) if timed else "-",
        f"{100 * split.formula.bubble(on_way):.1f}" if timed else "-",
        "-" if alone else f"{bytes_:,.0f}",
        "-" if alone else f"{formula:,.0f}",
        "-" if alone else f"{bytes_ / formula:.2f}",
        "-" if alone else f"{_median(rounds, 'to_ranks'):,.0f} + {_median(rounds, 'back'):,.0f}",
    ]


def _about_time(options: argparse.Namespace, found: Found) -> Iterator[str]:
    timed = {key: rounds for key, rounds in found.items() if key[1].grows and not key[0].is_crowded}
    yield (
        f"Rate and busy: of a stretch of {options.new} tokens a sequence, after {WARM}. More ranks than cores take "
        f"turns: their stretch has {max(1, options.new // CROWDED)}, and no bubble is told of them."
    )
    yield (
        "Busy: CPU time of a rank's main thread, which computes, of the stretch's wall time (schedstat in /proc, good "
        "to a tick of the kernel's clock). Bubble: 1 - the mean over the ranks."
    )
    read = next(split.formula.read for split, _ in found if split.formula.stages > 1 and split.formula.shards == 1)
    yield (
        "By formula, with g groups of sequences on their way over p stages: 1 - g sum(t) / (p max(sum(t), g max(t))), "
        "where a stage's time t is as the bytes of weights that it reads: "
        f"{', '.join(f'{size / 1e6:.0f} MB' for size in read)}, the head's in the last. Driver and gloo, which need "
        "cores too, are not in it."
    )

    def worst(what: str) -> str:
        return "; ".join(f"{split.name}, {w.name} {max(_by_rank(one, what)):.1%}" for (split, w), one in timed.items())

    yield f"Main threads that could run waited for a core, which counts as bubble; worst rank: {worst('core_wait')}."
    yield (
        "Gloo's waiting, if it spun, would be among what a rank's other threads took of a core; worst rank: "
        f"{worst('other_threads')}."
    )
    work = (f"{split.name}, {w.name} {_median(one, 'work_ms'):.2f} ms" for (split, w), one in timed.items())
    yield (
        f"Main threads' CPU time a token, all ranks: {'; '.join(work)}. A model alone replays recorded steps, ranks do "
        "not; and where 8 sequences go as two steps of 4, weights are read twice for them."
    )


def _about_bytes(found: Found) -> Iterator[str]:
    own = os.environ.get(NAMESPACE) == "own"
    whose = "in a network namespace of its own" if own else "the host's, with what others sent meanwhile"
    yield (
        f"Bytes: what the loopback interface ({whose}) sent, from idle to idle, less the same run with one new token; "
        "for one token of each sequence, so of all steps that are on their way together. Medians."
    )
    formulas = {split.name: split.formula for split in _several(found)}
    counts = (f"{name}: p {one.stages}, n {one.shards}, S {one.sums}" for name, one in formulas.items())
    yield (
        "By formula, for T tokens, R of which are answered: (p - 1) n (2 T width + 4) between stages; S sums in rings, "
        "each 2 (n - 1) 2 T width; and 2 R times the words that the answering rank lacks. "
        f"{'; '.join(counts)}: two sums a layer, one for the table, counted on the parted trees."
    )
    for split in _several(found):
        rounds = found[split, WORK[0]]
        packets, bytes_, formula = (_median(rounds, name) for name in ("packets", "bytes", "formula"))
        heads = packets * PACKET_BYTES
        yield (
            f"Beyond the formula, {split.name}, {WORK[0].name}: heads of {packets:,.0f} packets, {heads:,.0f} bytes "
            f"({PACKET_BYTES} each: Ethernet, IPv4, TCP); gloo's own, the other {bytes_ - formula - heads:,.0f}."
        )
    yield (
        "Gloo's ring (gloo/allreduce.cc) cuts each sum into 2 n parts, which makes 4 n (n - 1) messages; most are "
        "announced by another one, or asked for."
    )
    yield (
        f"Driver: messages as they are packed and {LENGTH_BYTES} bytes of length each, to all ranks and back; without "
        f"the beats ({LENGTH_BYTES} bytes, five times a second)."
    )


def _several(found: Found) -> list[Split]:
    return list(dict.fromkeys(split for split, _ in found if split.ranks > 1))


def _median(rounds: list[dict[str, Any]], name: str) -> float:
    return statistics.median(one[name] for one in rounds) if name in rounds[0] else 0.0


def _by_rank(rounds: list[dict[str, Any]], name: str) -> list[float]:
    return [statistics.median(shares) for shares in zip(*(one[name] for one in rounds), strict=True)]


def _params(new: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)


def _land(engine: Engine, tokens: int) -> int:
    """Step until so many tokens are there, or a few more; how many."""
    count = 0
    while count < tokens:
        count += len(engine.step())
    return count


def _spent(pid: int) -> tuple[int, int, int]:
    """Nanoseconds: of the main thread on a core, of the same waiting for one, of all other threads on one."""
    os.sched_yield()  # the kernel brings this process's own count up to date
    main = others = waiting = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that ended
            ran, waited, _ = map(int, (task / "schedstat").read_text().split())
            if task.name == str(pid):
                main, waiting = ran, waited
            else:
                others += ran
    return main, waiting, others


def _loopback() -> tuple[int, int]:
    """Bytes and packets that the loopback interface has sent so far."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    fields = next(line.partition(":")[2].split() for line in lines if line.strip().startswith("lo:"))
    return int(fields[8]), int(fields[9])


def _fewest_shards(shapes: Shapes) -> int:
    for shards in range(2, 65):
        with suppress(SettingError):
            shapes.rank(Mesh(shards=shards))
            return shards
    raise SystemExit("the heads of this model cannot be divided among shards")


def _enter_namespace() -> None:
    """Run this script again in a network namespace of its own, where that can be made."""
    if NAMESPACE in os.environ:
        return
    for flags in ("-n", "-rn"):
        command = ["unshare", flags, "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
        with suppress(FileNotFoundError):
            if subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0:
                os.environ[NAMESPACE] = "own"
                os.execvp(command[0], [*command, sys.executable, *sys.orig_argv[1:]])
    os.environ[NAMESPACE] = "host"


if __name__ == "__main__":
    main()
