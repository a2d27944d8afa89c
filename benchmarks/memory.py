"""How much memory does the engine take beyond its imports, against 1.3 × the weights and the cache asked for?"""

from rig.contender import Contender
from rig.entries import Sizes, entries, parser
from rig.model import Model
from rig.report import measured, spread

MIB = 2**20
LIMIT = 1.3
COLUMNS = ["engine", "peak - imports, MiB", "anonymous now - imports, MiB", "allowed, MiB", "peak / allowed"]


def main() -> None:
    """Load, generate, read the kernel's counts."""
    options_parser = parser(__doc__, "bestiary")
    options_parser.add_argument("--cache-mib", type=int, default=512, help="cache asked for")
    options_parser.add_argument("--batch", type=int, default=8)
    options = options_parser.parse_args()
    model = Model.read(options.model)
    sizes = Sizes(1024, options.batch, 2048, options.cache_mib * MIB)
    allowed = LIMIT * model.stored_bytes + sizes.cache_bytes
    chosen = entries(options, model, sizes)
    with measured(options, model, "Peak memory after loading and generating", COLUMNS) as report:
        report.notes += [
            f"Allowed: {LIMIT} × {model.stored_bytes / MIB:.0f} MiB of weights + {options.cache_mib} MiB of cache.",
            "VmHWM and RssAnon of all its processes, less those of the first one when its imports were done.",
        ]
        for entry in chosen:
            peaks, anonymous = [], []
            for i in range(options.pairs):
                contender = Contender(entry)
                contender.ask(model.prompts(options.batch, 256), 64)
                now, imported = contender.memory(), contender.ready["imported"]
                report.versions([contender])
                contender.close()
                peaks.append((now["VmHWM"] - imported["VmHWM"]) / MIB)
                anonymous.append((now["RssAnon"] - imported["RssAnon"]) / MIB)
                print(f"round {i + 1}: {entry.name} peak {peaks[-1]:,.0f} MiB beyond its imports", flush=True)
            within = [peak * MIB / allowed for peak in peaks]
            report.rows.append(
                [entry.name, spread(peaks, 0), spread(anonymous, 0), f"{allowed / MIB:,.0f}", spread(within, 2)]
            )
            report.raw[entry.name] = {"peak_mib": peaks, "anonymous_mib": anonymous}


if __name__ == "__main__":
    main()
