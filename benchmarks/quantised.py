"""How much faster does a model decode when its weights take fewer bits, and how does llama.cpp with as many?"""

import os
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from importlib import metadata

import torch
from rig.contender import Contender, running
from rig.entries import Sizes, entries, parser
from rig.machine import Memory
from rig.model import Model
from rig.report import Report, measured, ratios, shares, spread

from bestiary import LLM, SamplingParams
from bestiary.checkpoint import ConfigFile
from bestiary.config import EngineConfig
from bestiary.parallel import Mesh
from bestiary.planner import Shapes

COLUMNS = [
    "batch",
    "weights",
    "tokens/s, median (range)",
    "of 16 bits",
    "at most, by bytes",
    "of the floor",
    "of llama.cpp's",
]
PLAIN, SQUEEZED = "bf16, 16 bits", "bf16, 12 bits"
KINDS = {PLAIN: None, SQUEEZED: None, "int8": "int8", "int4": "int4"}
Rate = Callable[[list[list[int]], int], float]
"""Tokens a second, of prompts and so many new tokens."""
PEERS = {"int8": "llamacpp-q8_0", "int4": "llamacpp-q4_0"}
"""The peer with as many bits, of each kind that has one."""


def main() -> None:
    """The same prompts with each kind of weights, in turns: ours in this process, the peers in theirs."""
    options_parser = parser(__doc__, "llamacpp-q8_0,llamacpp-q4_0")
    options_parser.add_argument("--batches", default="1,16")
    options_parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    options_parser.add_argument("--new", type=int, default=96, help="new tokens of each sequence")
    options = options_parser.parse_args()
    model = Model.read(options.model)
    torch.set_num_threads(options.threads)
    batches = [int(size) for size in options.batches.split(",")]
    sizes = Sizes(options.prompt + options.new + 8, max(batches), max(batches) * options.prompt)
    title = f"Weights of few bits, {options.prompt} + {options.new} tokens, greedy, decode"
    with (
        measured(options, model, title, COLUMNS) as report,
        Memory(options.python, options.threads) as memory,
        running(entries(options, model, sizes) if options.contenders else []) as contenders,
    ):
        report.versions(contenders)
        report.facts["versions"]["bestiary"] = {name: metadata.version(name) for name in ("bestiary", "torch")}
        ours: dict[str, Rate] = {kind: partial(_rate, _llm(model, kind, max(batches))) for kind in KINDS}
        theirs: dict[str, Rate] = {c.entry.name: partial(_their_rate, c) for c in contenders}
        for batch in batches:
            _measure(batch, ours | theirs, memory, model, options, report)
        report.notes += [
            "Rate = batch x (new - 1) / (time for all new tokens - time for one); a round is one turn of each.",
            "Floor: what the planner says that a step reads, weights and cache, at the bandwidth that a probe reads "
            "with right before and after each turn (the mean); median and range over the rounds.",
            "12 bits: the same numbers, and the same text; what is served where nothing else is asked for.",
            "With int8 and int4 the head stays in bf16 of 12 bits: a large part of what is read of a small model.",
            "llama.cpp has a scale for every 32 weights, its head in 8 bits (Q8_0) or 6 (Q4_0), and rounds what goes "
            "into a product to 8 bits, which ours does not. With few bits on AMX it ends with a segmentation fault, so "
            "that it has AVX-512 there.",
        ]


def _measure(
    batch: int, all_rates: dict[str, Rate], memory: Memory, model: Model, options: Namespace, report: Report
) -> None:
    prompts, context = model.prompts(batch, options.prompt), round(options.prompt + options.new / 2)
    rates: dict[str, list[float]] = {name: [] for name in all_rates}
    speeds: dict[str, list[float]] = {name: [] for name in all_rates}
    for i in range(options.pairs + 1):
        for name, measure in all_rates.items():
            with memory.beside(speeds[name]):
                rate = measure(prompts, options.new)
            print(f"batch {batch}, round {i}{' (warm-up)' * (i == 0)}: {name} {rate:.1f} tokens/s", flush=True)
            if i:
                rates[name].append(rate)
            else:
                speeds[name].clear()
    read = {kind: _step_bytes(model, kind, batch, context) for kind in KINDS}
    for name, found in rates.items():
        if name not in KINDS:
            report.rows.append([str(batch), name, spread(found), "", "", "", ""])
            continue
        floors = [gb_s * 1e9 / read[name] * batch for gb_s in speeds[name]]
        against = "" if name == PLAIN else spread(ratios(found, rates[PLAIN]), 2)
        most = "" if name == PLAIN else f"{read[PLAIN] / read[name]:.2f}"
        peer = rates.get(PEERS.get(name, ""))
        of_peer = spread(ratios(found, peer), 2) if peer else ""
        report.rows.append([str(batch), name, spread(found), against, most, shares(ratios(found, floors)), of_peer])
    report.raw[f"batch {batch}"], report.raw[f"batch {batch} memory, GB/s"] = rates, speeds


def _llm(model: Model, kind: str, batch: int) -> LLM:
    os.environ["BESTIARY_SQUEEZE"] = "0" if kind == PLAIN else "1"
    return LLM(
        str(model.folder),
        dtype="bfloat16",
        quantization=KINDS[kind],
        skip_tokenizer_init=True,
        max_model_len=512,
        max_num_seqs=batch,
        enable_prefix_caching=False,
    )


def _step_bytes(model: Model, kind: str, batch: int, context: int) -> float:
    """What a step of so many sequences reads at least."""
    config = EngineConfig(str(model.folder), dtype="bfloat16", quantization=KINDS[kind])
    rank = Shapes(ConfigFile.load(model.folder), config).rank(Mesh())
    weights = rank.weights_read(batch)
    head = 2 * model.config["hidden_size"] * model.config["vocab_size"]
    squeezed = {PLAIN: 0, SQUEEZED: weights}.get(kind, head)
    return weights - squeezed / 4 + rank.cache_read(context) * batch


def _params(new: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)


def _rate(llm: LLM, prompts: list[list[int]], new: int) -> float:
    seconds = []
    for count in (1, new):
        start = time.perf_counter()
        llm.generate(prompts, _params(count), use_tqdm=False)
        seconds.append(time.perf_counter() - start)
    return len(prompts) * (new - 1) / (seconds[1] - seconds[0])


def _their_rate(contender: Contender, prompts: list[list[int]], new: int) -> float:
    with contender.turn():
        one, full = contender.ask(prompts, 1), contender.ask(prompts, new)
    return len(prompts) * (new - 1) / (full.seconds - one.seconds)


if __name__ == "__main__":
    main()
