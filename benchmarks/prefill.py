"""How fast does each engine read prompts? Eight of 2,000 tokens, one new token each; llama.cpp gets one of them."""

import statistics

from rig.contender import running
from rig.entries import Sizes, entries, parser
from rig.model import Model
from rig.report import measured, ratios, spread

COLUMNS = ["engine", "prompts", "tokens/s, median (range)", "seconds", "of the cores' best product", "first / this"]


def main() -> None:
    """Measure."""
    options_parser = parser(__doc__, "bestiary,vllm,llamacpp")
    options_parser.add_argument("--prompts", type=int, default=8)
    options_parser.add_argument("--length", type=int, default=2000, help="tokens of each prompt")
    options_parser.add_argument("--step", type=int, default=2048, help="most tokens that a step may take")
    options = options_parser.parse_args()
    model = Model.read(options.model)
    prompts = model.prompts(options.prompts, options.length)
    title = f"Prefill, {options.prompts} × {options.length:,} tokens, bf16"
    with (
        measured(options, model, title, COLUMNS) as report,
        running(entries(options, model, Sizes(options.length + 8, options.prompts, options.step))) as contenders,
    ):
        report.versions(contenders)
        report.notes.append("Time from the request to one new token of each prompt; llama.cpp reads one prompt.")
        asked = {c.entry.name: prompts[:1] if c.entry.program == "llamacpp" else prompts for c in contenders}
        rates: dict[str, list[float]] = {name: [] for name in asked}
        seconds: dict[str, list[float]] = {name: [] for name in asked}
        for i in range(options.pairs + 1):
            for contender in contenders:
                name = contender.entry.name
                with contender.turn():
                    taken = contender.ask(asked[name], 1).seconds
                rate = len(asked[name]) * options.length / taken
                print(f"round {i}{' (warm-up)' * (i == 0)}: {name} {rate:,.0f} tokens/s", flush=True)
                if i:
                    rates[name].append(rate)
                    seconds[name].append(taken)
        first = contenders[0].entry.name
        for name, found in rates.items():
            flops = model.prefill_flops(options.length) / options.length * statistics.median(found)
            report.rows.append(
                [
                    name,
                    str(len(asked[name])),
                    spread(found, 0),
                    spread(seconds[name], 2),
                    f"{flops / report.probe.product_gflop_s / 1e9:.0%}",
                    "" if name == first else spread(ratios(rates[first], found), 2),
                ]
            )
        report.raw["seconds"] = seconds


if __name__ == "__main__":
    main()
