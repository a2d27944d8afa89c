"""How long from starting the process to its first token? Imports, loading and, where there is one, the compiler."""

import time

from rig.contender import Contender
from rig.entries import Sizes, entries, parser
from rig.model import Model
from rig.report import measured, ratios, spread

COLUMNS = ["engine", "seconds, median (range)", "this / first", "of it before ready"]


def main() -> None:
    """Start each once to warm the caches of files and compilers, then in turns."""
    options_parser = parser(__doc__, "bestiary,vllm,vllm-eager,transformers")
    options_parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    options = options_parser.parse_args()
    model = Model.read(options.model)
    prompts = model.prompts(1, options.prompt)
    chosen = entries(options, model, Sizes(2048, 8, 2048))
    seconds: dict[str, list[float]] = {entry.name: [] for entry in chosen}
    ready: dict[str, list[float]] = {entry.name: [] for entry in chosen}
    with measured(options, model, "From the start of the process to the first token", COLUMNS) as report:
        report.notes.append("Files and compiled code are cached by a start before the measured ones.")
        for i in range(options.pairs + 1):
            for entry in chosen:
                contender = Contender(entry)
                ready_s = time.perf_counter() - contender.started_at
                contender.ask(prompts, 1)
                taken = time.perf_counter() - contender.started_at
                report.versions([contender])
                contender.close()
                print(f"round {i}{' (warm-up)' * (i == 0)}: {entry.name} {taken:.2f} s", flush=True)
                if i:
                    seconds[entry.name].append(taken)
                    ready[entry.name].append(ready_s)
                else:
                    report.raw.setdefault("first start", {})[entry.name] = taken
        first = chosen[0].name
        for name, found in seconds.items():
            against = "" if name == first else spread(ratios(found, seconds[first]), 1)
            report.rows.append([name, spread(found, 2), against, spread(ready[name], 2)])
        report.raw["seconds"] = seconds


if __name__ == "__main__":
    main()
