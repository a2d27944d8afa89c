"""How many tokens a second does each engine decode, at batch 1, 8 and 32, how near the memory's limit?"""

import statistics
from argparse import Namespace
from itertools import takewhile
from operator import eq

from rig.contender import Contender, running
from rig.entries import Sizes, entries, parser, weight_bits
from rig.machine import Memory
from rig.model import Model
from rig.report import Report, measured, ratios, shares, spread

ONE_AT_A_TIME = "llamacpp-python"
COLUMNS = ["batch", "engine", "tokens/s, median (range)", "of the floor", "first / this", "same tokens as first"]


def main() -> None:
    """Measure all batch sizes."""
    options_parser = parser(__doc__, "bestiary,vllm,llamacpp,llamacpp-python,transformers")
    options_parser.add_argument("--batches", default="1,8,32")
    options_parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    options_parser.add_argument("--new", type=int, default=128, help="new tokens of each sequence")
    options = options_parser.parse_args()
    model = Model.read(options.model)
    batches = [int(size) for size in options.batches.split(",")]
    # All prompts of the largest batch fit into one step, so that no engine decodes some while it still reads others.
    sizes = Sizes(options.prompt + options.new + 8, max(batches), max(batches) * options.prompt)
    with (
        measured(options, model, f"Decode, {options.prompt} + {options.new} tokens, greedy, bf16", COLUMNS) as report,
        running(entries(options, model, sizes)) as contenders,
        Memory(options.python, options.threads) as memory,
    ):
        report.versions(contenders)
        report.notes += [
            "Rate = batch × (new - 1) / (time for all new tokens - time for one), measured one after the other.",
            "Floor: all weights once and the sequences' keys and values, each step, at the bandwidth that a probe reads"
            " with right before and after each turn (the mean); median and range over the rounds. A weight is 16 bits; "
            "in bestiary 12, without loss, where the machine can read them (BESTIARY_SQUEEZE=0: 16).",
        ]
        for batch in batches:
            _measure(batch, contenders, memory, model, options, report)


def _measure(
    batch: int, contenders: list[Contender], memory: Memory, model: Model, options: Namespace, report: Report
) -> None:
    prompts = model.prompts(batch, options.prompt)
    able = [c for c in contenders if batch == 1 or c.entry.name != ONE_AT_A_TIME]
    rates: dict[str, list[float]] = {c.entry.name: [] for c in able}
    speeds: dict[str, list[float]] = {c.entry.name: [] for c in able}
    outputs: dict[str, list[list[int]]] = {}
    for i in range(options.pairs + 1):
        for contender in able:
            name = contender.entry.name
            with memory.beside(speeds[name]), contender.turn():
                one = contender.ask(prompts, 1)
                full = contender.ask(prompts, options.new)
            rate = batch * (options.new - 1) / (full.seconds - one.seconds)
            print(f"batch {batch}, round {i}{' (warm-up)' * (i == 0)}: {name} {rate:.1f} tokens/s", flush=True)
            if i:
                rates[name].append(rate)
                outputs[name] = full.token_ids
            else:
                speeds[name].clear()
            report.raw.setdefault(f"batch {batch}", {}).setdefault(name, []).append(
                {"one_s": one.seconds, "full_s": full.seconds, "first_token_s": full.first_token_s}
            )
    report.raw[f"batch {batch} memory, GB/s"] = speeds
    context = options.prompt + options.new / 2
    first = able[0].entry.name
    for name, found in rates.items():
        step_bytes = model.decode_step_bytes(batch, context, weight_bits(name))
        floors = [gb_s * 1e9 / step_bytes * batch for gb_s in speeds[name]]
        against = "" if name == first else spread(ratios(rates[first], found), 2)
        same = "" if name == first else _same(outputs[first], outputs[name])
        report.rows.append([str(batch), name, spread(found), shares(ratios(found, floors)), against, same])
    report.raw[f"batch {batch} tokens"] = outputs


def _same(ours: list[list[int]], theirs: list[list[int]]) -> str:
    """How many sequences are equal, and how many tokens agree before the first difference."""
    agreed = [len(list(takewhile(bool, map(eq, x, y)))) for x, y in zip(ours, theirs, strict=True)]
    equal = sum(count == len(x) for count, x in zip(agreed, ours, strict=True))
    return f"{equal} of {len(ours)}; first {statistics.median(agreed):.0f}"


if __name__ == "__main__":
    main()
