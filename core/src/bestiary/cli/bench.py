"""`bestiary bench`: a model's speed on random prompts, and its share of what the machine can do (see `meter`)."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, quantiles
from typing import TYPE_CHECKING, Annotated, Any, get_args

from cyclopts import App, Parameter

from bestiary import __version__
from bestiary.cli.options import EngineFlags, Model
from bestiary.cli.terminal import UsageError, columns, one_line, stored
from bestiary.errors import EngineError

if TYPE_CHECKING:
    from bestiary.cli.meter import Limits, Meter, Phase, Step
    from bestiary.engine import Engine

__all__ = ["command", "latency", "throughput"]

command = App(name="bench")


@dataclass(frozen=True)
class _Workload:
    """Requests that all arrive at once, and how often they do."""

    benchmark: str
    num_requests: int
    input_len: int
    output_len: int
    num_iters: int
    warmup: int

    def __post_init__(self) -> None:
        for name, least in (("num_requests", 1), ("input_len", 1), ("output_len", 1), ("num_iters", 1), ("warmup", 0)):
            if (value := getattr(self, name)) < least:
                raise UsageError(f"{name.replace('_', '-')} is {value}: it must be at least {least}")


@Parameter(name="*")
@dataclass(frozen=True)
class _Flags:
    """How much is asked, and how often."""

    input_len: Annotated[int, Parameter(help="Tokens of each prompt.")] = 32
    output_len: Annotated[int, Parameter(help="Tokens of each answer.")] = 128
    num_iters: Annotated[
        int | None, Parameter(help="Times that all of it runs: 5 for latency and 1 for throughput if not given.")
    ] = None
    warmup: Annotated[
        int, Parameter(name=("--warmup", "--num-iters-warmup"), help="Times before that count for nothing.")
    ] = 1
    json: Annotated[
        Path | None, Parameter(name=("--json", "--output-json"), help="Write the figures to this file.")
    ] = None

    def of(self, benchmark: str, num_requests: int, num_iters: int) -> _Workload:
        """What is asked then, so many times where nobody says how many."""
        times = num_iters if self.num_iters is None else self.num_iters
        return _Workload(benchmark, num_requests, self.input_len, self.output_len, times, self.warmup)


_ENGINE, _WORK = EngineFlags(), _Flags()


_Batch = Annotated[int, Parameter(help="Requests at once.")]
_Prompts = Annotated[int, Parameter(help="Requests, all there from the start.")]


@command.command(name="latency", help="How long one batch of requests takes.")
def latency(model: Model, /, *, batch_size: _Batch = 8, work: _Flags = _WORK, engine: EngineFlags = _ENGINE) -> None:
    """Measure how long a batch takes."""
    _bench(model, work.of("latency", batch_size, 5), engine, work.json)


@command.command(name="throughput", help="How many tokens a second come out of many requests.")
def throughput(
    model: Model, /, *, num_prompts: _Prompts = 64, work: _Flags = _WORK, engine: EngineFlags = _ENGINE
) -> None:
    """Measure tokens per second."""
    _bench(model, work.of("throughput", num_prompts, 1), engine, work.json)


@dataclass(frozen=True)
class _Run:
    """One iteration: when it ended, when each request's first token and end came, and its steps. In seconds."""

    seconds: float
    first: list[float]
    end: list[float]
    steps: list[Step]


@dataclass(frozen=True)
class _Report:
    """The figures. `spread`s are mean, median and 90th percentile, in seconds."""

    benchmark: str
    bestiary: str
    model: str
    dtype: str
    quantization: str | None
    device: str
    threads: int
    workload: dict[str, Any]
    seconds: dict[str, float]
    time_to_first_token: dict[str, float]
    time_per_output_token: float | None
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    phases: dict[str, Phase]
    limits: Limits


def _bench(model: str, workload: _Workload, flags: EngineFlags, file: Path | None) -> None:
    report = _measure(model, workload, flags)
    print(_table(report))
    if file is not None:
        try:
            file.write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{file} cannot be written: {error.strerror}") from error


def _measure(model: str, workload: _Workload, flags: EngineFlags) -> _Report:
    import torch

    from bestiary import hub
    from bestiary.checkpoint import ConfigFile
    from bestiary.cli.meter import Costs, Kind, Limits, Meter, Phase
    from bestiary.llm import LLM
    from bestiary.model import choose_device
    from bestiary.parallel import Mesh
    from bestiary.planner import Shapes

    flags.join_nodes(model)
    settings = {"max_model_len": workload.input_len + workload.output_len, **flags.settings()}
    folder = hub.locate(model, settings.pop("revision", None))
    llm = LLM(str(folder), **settings, skip_tokenizer_init=True, enable_prefix_caching=False)
    config, device = llm.config, choose_device(llm.config.device)
    shapes = Shapes(ConfigFile.load(folder), config)
    dtype, whole = shapes.dtype, shapes.rank(Mesh(), here=device.type == "cpu")
    llm.engine.executor = meter = Meter(llm.engine.executor, Costs.of(shapes.tree, whole))
    for _ in range(workload.warmup):
        _run(llm.engine, meter, workload)
    runs = [_run(llm.engine, meter, workload) for _ in range(workload.num_iters)]
    limits = Limits.measure(dtype, device)
    steps = [step for run in runs for step in run.steps]
    phases = {kind: phase for kind in get_args(Kind) if (phase := Phase.of(steps, kind, limits)) is not None}
    seconds, num_requests = sum(run.seconds for run in runs), workload.num_requests * workload.num_iters
    writing = sum(sum(run.end) - sum(run.first) for run in runs) / num_requests
    return _Report(
        benchmark=workload.benchmark,
        bestiary=__version__,
        model=model,
        dtype=str(dtype).removeprefix("torch."),
        quantization=config.quantization,
        device=str(device),
        threads=torch.get_num_threads(),
        workload=asdict(workload),
        seconds=_spread([run.seconds for run in runs]),
        time_to_first_token=_spread([first for run in runs for first in run.first]),
        time_per_output_token=writing / (workload.output_len - 1) if workload.output_len > 1 else None,
        requests_per_s=num_requests / seconds,
        output_tokens_per_s=num_requests * workload.output_len / seconds,
        total_tokens_per_s=num_requests * (workload.input_len + workload.output_len) / seconds,
        phases=phases,
        limits=limits,
    )


def _run(engine: Engine, meter: Meter, workload: _Workload) -> _Run:
    """Serve the workload once. Raises EngineError where an answer is not as long as it must be."""
    from bestiary.sampling.params import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=workload.output_len, ignore_eos=True, detokenize=False)
    draw = random.Random(0)
    for number in range(workload.num_requests):
        prompt = [draw.randrange(engine.executor.vocabulary) for _ in range(workload.input_len)]
        engine.add_request(str(number), prompt, params, final_only=True)
    meter.start()
    started, end = time.perf_counter(), []
    while engine.has_unfinished_requests():
        for output in engine.step():
            end.append(time.perf_counter() - started)
            answer = output.outputs[0]
            if len(answer.token_ids) != workload.output_len:
                raise EngineError(f"an answer ended after {len(answer.token_ids)} tokens: {answer.stop_reason}")
    return _Run(time.perf_counter() - started, _first_tokens(meter.steps), end, meter.steps)


def _first_tokens(steps: Sequence[Step]) -> list[float]:
    """When the first tokens came, in seconds."""
    found, now = [], 0.0
    for step in steps:
        now += step.seconds
        found += [now] * step.num_first
    return found


def _spread(values: Sequence[float]) -> dict[str, float]:
    cuts = quantiles(values, n=10, method="inclusive") if len(values) > 1 else [values[0]] * 9
    return {"mean": fmean(values), "median": cuts[4], "p90": cuts[8]}


def _table(report: _Report) -> str:
    work = report.workload
    title = (
        f"{report.benchmark} of {one_line(report.model)}: {work['num_requests']} requests at once, {work['input_len']} "
        f"tokens in, {work['output_len']} out, {work['num_iters']} times "
        f"({stored(report.dtype, report.quantization)}, {report.device}, {report.threads} threads)"
    )
    each = report.time_per_output_token
    figures = [
        ("seconds", _spread_text(report.seconds)),
        ("time to first token", _spread_text(report.time_to_first_token)),
        ("time per output token", "-" if each is None else f"{each * 1000:.2f} ms"),
        ("tokens out per second", f"{report.output_tokens_per_s:,.1f}"),
        ("tokens in and out per second", f"{report.total_tokens_per_s:,.1f}"),
        ("requests per second", f"{report.requests_per_s:.3f}"),
    ]
    return (
        f"{title}\n\n{columns(figures)}\n\n{columns([_PHASE_TITLES, *_phase_rows(report)])}\n\n{_limits_text(report)}"
    )


_PHASE_TITLES = ("steps", "number", "seconds", "tokens/s", "of bandwidth", "of FLOP/s")


def _phase_rows(report: _Report) -> list[tuple[str, ...]]:
    def percent(share: float | None) -> str:
        return "-" if share is None else f"{share:.1%}"

    return [
        (
            kind,
            f"{phase.num_steps}",
            f"{phase.seconds:.2f}",
            f"{phase.tokens_per_s:,.1f}",
            percent(phase.bandwidth_share),
            percent(phase.flops_share),
        )
        for kind, phase in report.phases.items()
    ]


def _spread_text(spread: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in spread.items())


def _limits_text(report: _Report) -> str:
    read = report.limits.read_bytes
    bandwidth = "the bandwidth of this device is not measured" if read is None else f"{read / 1e9:.1f} GB/s read"
    return f"measured limits of this machine: {bandwidth}, {report.limits.flops / 1e9:,.0f} GFLOP/s in {report.dtype}"
