"""`bestiary plan`: what a model takes of a kind of device, split how, and how fast it could be; reads no weights."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from bestiary.cli.options import AsJson, Model, ModelFlags, flag
from bestiary.cli.terminal import columns, one_line, print_json, size, stored
from bestiary.errors import SettingError

if TYPE_CHECKING:
    from bestiary.checkpoint import ConfigFile
    from bestiary.planner import Ceiling, Device, Plan, Shapes

__all__ = ["command"]

_LIMIT_BYTES = 2**24
_UNITS = {
    f"{prefix}{binary}B": (1024 if binary else 1000) ** power
    for power, prefix in enumerate("KMGT", 1)
    for binary in ("", "i")
}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]i?B|B?)", re.IGNORECASE)
_TOKENS = re.compile(r"([0-9]+)([kKmM]?)")
_FORMULA = (
    "tokens/s = batch / cycle; a rank takes (weights read + batch x cache read) / bandwidth for a step, a stage as "
    "long as its slowest rank, a cycle the sum over the stages, or stages x the slowest where so many groups are "
    "on their way"
)


@Parameter(name="*")
@dataclass(frozen=True)
class _Flags(ModelFlags):
    """Where the model would run, and what for."""

    device: Annotated[str | None, flag("h200, h100, ...; without it this machine (cpu).")] = None
    tp: Annotated[int, flag("Devices that share every matrix.")] = 1
    pp: Annotated[int, flag("Stages of a pipeline.")] = 1
    context: Annotated[
        str | None, flag("Tokens of each sequence, such as 32k; without it all that the model takes.")
    ] = None
    batch: Annotated[int | None, flag("Sequences that must fit at once.")] = None
    memory: Annotated[str | None, flag("Of a device, such as 80GiB.")] = None
    bandwidth: Annotated[str | None, flag("Of its memory, such as 3.35TB/s.")] = None
    measure: Annotated[bool, flag("Measure this machine's bandwidth.")] = False
    gpu_memory_utilization: Annotated[float | None, flag("Share of a GPU's memory to use.")] = None

    def settings(self) -> dict[str, Any]:
        """As for any model; the device is not this machine's, and what else is asked of it is no setting."""
        given, names = super().settings(), ("gpu_memory_utilization", "dtype", "quantization", "revision", "plugin")
        return {name: given[name] for name in names if name in given}

    def target(self) -> Device:
        """The device that is meant. Raises SettingError where it is not known or not described."""
        from bestiary import planner

        memory = None if self.memory is None else _bytes("memory", self.memory)
        rate: float | None = None if self.bandwidth is None else _bytes("bandwidth", self.bandwidth.removesuffix("/s"))
        if self.device is None and memory is not None:
            return planner.Device("given", memory, rate, None, "as given")
        known = planner.device(self.device or "cpu")
        if self.measure:
            rate = _measured(known)
        figures: dict[str, float | None] = {"memory_bytes": memory, "bandwidth": rate}
        changed = {name: value for name, value in figures.items() if value is not None}
        source = f"{known.source}; {', '.join(changed)} as given" if changed else known.source
        return planner.Device(**{**asdict(known), **changed, "source": source})

    def tokens(self, most: int) -> int:
        """The length of a sequence. Raises SettingError for what is no number."""
        if self.context is None:
            return most
        found = _TOKENS.fullmatch(self.context)
        if found is None or not int(found[1]):
            raise SettingError(f"context={self.context!r}: write a number of tokens, such as 32768 or 32k")
        return int(found[1]) * {"": 1, "k": 1024, "m": 1024**2}[found[2].lower()]


_PLAN = _Flags()


@dataclass(frozen=True)
class _Rank:
    """What one device holds. Sizes in bytes."""

    rank: int
    stage: int
    shard: int
    first_layer: int
    layers: int
    weight_bytes: int
    cache_bytes_per_token: int
    cache_bytes_per_sequence: int
    #: Below 0 where the weights alone do not fit.
    free_after_weights_bytes: int


@dataclass(frozen=True)
class _Facts:
    """The answer."""

    model: str
    architecture: str
    parameters: int
    dtype: str
    quantization: str | None
    weight_bytes: int
    #: Of the files at hand; None where there are none.
    checkpoint_bytes: int | None
    #: Of what the ranks hold, what another one holds too.
    replicated_bytes: int
    device: Device
    usable_bytes: int
    tp: int
    pp: int
    context: int
    ranks: tuple[_Rank, ...]
    #: Sequences that must fit, and how many do.
    batch: int
    fits: bool
    largest_batch: int
    #: The fewest devices that hold `batch` sequences; None: no split tried does.
    smallest_split: tuple[int, int] | None
    ceilings: tuple[Ceiling, ...]
    formula: str


def command(model: Model, /, *, json: AsJson = False, options: _Flags = _PLAN) -> None:
    """Print what a model takes of devices, and how fast they could serve it at most."""
    from bestiary.config import EngineConfig
    from bestiary.planner import Shapes

    if options.batch is not None and options.batch < 1:
        raise SettingError(f"batch={options.batch}: it must be at least 1")
    config = EngineConfig.resolve(
        model=model, tensor_parallel_size=options.tp, pipeline_parallel_size=options.pp, **options.settings()
    )
    facts = _facts(Shapes(_file(model, config.revision), config), options)
    if json:
        print_json(asdict(facts))
    else:
        print("\n".join(_text(facts)))


def _file(name: str, revision: str | None) -> ConfigFile:
    """The configuration of a model, or a file that is one."""
    from bestiary import hub
    from bestiary.checkpoint import ConfigFile
    from bestiary.checkpoint.jsonfile import read_object

    path = Path(name).expanduser()
    if path.suffix == ".json" and path.is_file():
        return ConfigFile(read_object(path, _LIMIT_BYTES), path)
    return ConfigFile.load(hub.locate(name, revision))


def _facts(shapes: Shapes, options: _Flags) -> _Facts:
    from bestiary import model

    target, context, batch = options.target(), options.tokens(shapes.tree.context), options.batch or 1
    plan = shapes.plan(target, options.tp, options.pp, context)
    fits, whole = plan.fits(batch), shapes.weight_bytes
    sizes = sorted({1, batch, plan.largest_batch}) if fits and not shapes.pools else ()
    ceilings = (plan.ceiling(n) for n in sizes)
    return _Facts(
        model=shapes.config.model,
        architecture=shapes.architecture.name,
        parameters=model.num_parameters(shapes.tree),
        dtype=str(shapes.dtype).removeprefix("torch."),
        quantization=shapes.config.quantization,
        weight_bytes=whole,
        checkpoint_bytes=_at_hand(shapes.file.path.parent),
        replicated_bytes=sum(rank.weight_bytes for rank in plan.ranks) - whole,
        device=plan.device,
        usable_bytes=plan.usable_bytes,
        tp=options.tp,
        pp=options.pp,
        context=context,
        ranks=tuple(_ranks(plan)),
        batch=batch,
        fits=fits,
        largest_batch=plan.largest_batch,
        smallest_split=(options.tp, options.pp) if fits else shapes.smallest_split(target, context, batch),
        ceilings=tuple(ceiling for ceiling in ceilings if ceiling is not None),
        formula=_FORMULA,
    )


def _ranks(plan: Plan) -> Iterator[_Rank]:
    for i, (rank, held) in enumerate(zip(plan.ranks, plan.held, strict=True)):
        span = rank.layers
        yield _Rank(
            i, rank.stage, rank.shard, span.start, len(span), rank.weight_bytes, rank.token_bytes, held, plan.room(i)
        )


def _at_hand(folder: Path) -> int | None:
    """Bytes of the tensors in a folder, by their headers."""
    from bestiary.checkpoint import Checkpoint
    from bestiary.errors import CheckpointNotFound

    try:
        with Checkpoint.open(folder) as checkpoint:
            return checkpoint.nbytes
    except CheckpointNotFound:
        return None


def _bytes(name: str, text: str) -> int:
    """80GiB, 80 GB, 3.35TB or a bare number."""
    found = _SIZE.fullmatch(text.strip())
    unit = found[2].upper().replace("I", "i") if found else ""
    value = int(float(found[1]) * _UNITS.get(unit, 1)) if found else 0
    if value < 1:
        raise SettingError(f"{name}={text!r}: write a size, such as 80GiB or 3.35TB")
    return value


def _measured(known: Device) -> float:
    """Bytes per second that this machine's cores read. Raises SettingError for another device."""
    import bestiary_kernels

    if not known.is_shared:
        raise SettingError(f"measure: device={known.name} is not this machine's cpu; give its --bandwidth instead")
    return bestiary_kernels.read_bandwidth()


def _text(facts: _Facts) -> Iterator[str]:
    on, at_hand = facts.device, facts.checkpoint_bytes
    memory = f"{size(facts.usable_bytes)} of {size(on.memory_bytes)} for weights and cache"
    speed = "" if on.bandwidth is None else f"; {on.bandwidth / 1e9:,.0f} GB/s"
    yield columns(
        [
            ("model", one_line(facts.model)),
            ("architecture", one_line(facts.architecture)),
            ("parameters", f"{facts.parameters:,}"),
            ("weights", f"{size(facts.weight_bytes)} in {stored(facts.dtype, facts.quantization)}"),
            *([("at hand", f"{size(at_hand)} of checkpoint")] if at_hand is not None else []),
            ("split", f"tp {facts.tp} x pp {facts.pp}: {facts.tp * facts.pp} x {on.name}"),
            ("each has", f"{memory}{speed}"),
            ("figures", one_line(on.source)),
            *([("held twice", size(facts.replicated_bytes))] if facts.replicated_bytes else []),
        ]
    )
    yield ""
    yield columns([_RANK_TITLES, *_rank_rows(facts)])
    yield ""
    yield columns(list(_verdict(facts)))
    if facts.ceilings:
        yield ""
        yield columns([_CEILING_TITLES, *map(_ceiling_row, facts.ceilings)])
        yield facts.formula


_RANK_TITLES = ("ranks", "stage", "layers", "weights", "left", "cache of a token", "of a sequence")
_CEILING_TITLES = ("batch", "weights read", "cache read", "tokens/s at most", "by arithmetic")


def _rank_rows(facts: _Facts) -> Iterator[tuple[str, ...]]:
    """Shards of a stage that are alike in one row."""

    def alike(rank: _Rank) -> tuple[int, ...]:
        return rank.stage, rank.weight_bytes, rank.cache_bytes_per_token, rank.cache_bytes_per_sequence

    for _, group in groupby(facts.ranks, alike):
        first, *others = group
        left = first.free_after_weights_bytes
        yield (
            f"{first.rank}-{others[-1].rank}" if others else f"{first.rank}",
            f"{first.stage}",
            f"{first.first_layer}-{first.first_layer + first.layers - 1}",
            size(first.weight_bytes),
            size(left) if left >= 0 else f"-{size(-left)}",
            size(first.cache_bytes_per_token),
            size(first.cache_bytes_per_sequence),
        )


def _verdict(facts: _Facts) -> Iterator[tuple[str, str]]:
    yield "context", f"{facts.context:,} tokens"
    yield "largest batch", f"{facts.largest_batch:,} sequences of that length"
    if facts.fits:
        return
    over = [rank for rank in facts.ranks if rank.free_after_weights_bytes < 0]
    what = f"the weights on {len(over)} of {len(facts.ranks)} devices" if over else f"{facts.batch:,} sequences at once"
    yield "does not fit", what
    split = facts.smallest_split
    if split is None:
        yield "smallest split", "none of those tried (tp up to 8, 64 devices): choose a larger device"
    else:
        yield "smallest split", f"tp {split[0]} x pp {split[1]}: {split[0] * split[1]} x {facts.device.name}"


def _ceiling_row(ceiling: Ceiling) -> tuple[str, ...]:
    arithmetic = ceiling.arithmetic_tokens_per_second
    return (
        f"{ceiling.batch:,}",
        size(ceiling.weight_bytes),
        size(ceiling.cache_bytes),
        f"{ceiling.tokens_per_second:,.1f}",
        "" if arithmetic is None else f"{arithmetic:,.1f}",
    )
