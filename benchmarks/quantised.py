"""How much faster does a model decode when its weights take fewer bits and nothing else changes?"""

import os
import time
from importlib import metadata

import torch
from rig.entries import parser
from rig.machine import Memory
from rig.model import Model
from rig.report import measured, ratios, shares, spread

from bestiary import LLM, SamplingParams
from bestiary.checkpoint import ConfigFile
from bestiary.config import EngineConfig
from bestiary.parallel import Mesh
from bestiary.planner import Shapes

COLUMNS = ["batch", "weights", "tokens/s, median (range)", "of 16 bits", "at most, by bytes", "of the floor"]
PLAIN, SQUEEZED = "bf16, 16 bits", "bf16, 12 bits"
KINDS = {PLAIN: None, SQUEEZED: None, "int8": "int8", "int4": "int4"}


def main() -> None:
    """Pairs in one process: the same prompts with each kind of weights, in turns."""
    options_parser = parser(__doc__, "bestiary")
    options_parser.add_argument("--batches", default="1,16")
    options_parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    options_parser.add_argument("--new", type=int, default=96, help="new tokens of each sequence")
    options = options_parser.parse_args()
    model = Model.read(options.model)
    torch.set_num_threads(options.threads)
    batches = [int(size) for size in options.batches.split(",")]
    context = round(options.prompt + options.new / 2)
    title = f"Weights of few bits, {options.prompt} + {options.new} tokens, greedy, decode"
    with measured(options, model, title, COLUMNS) as report, Memory(options.python, options.threads) as memory:
        engines = {kind: _llm(model, kind, max(batches)) for kind in KINDS}
        for batch in batches:
            prompts = model.prompts(batch, options.prompt)
            rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
            speeds: dict[str, list[float]] = {kind: [] for kind in KINDS}
            for i in range(options.pairs + 1):
                for kind, llm in engines.items():
                    with memory.beside(speeds[kind]):
                        rate = _rate(llm, prompts, options.new)
                    print(f"batch {batch}, round {i}{' (warm-up)' * (i == 0)}: {kind} {rate:.1f} tokens/s", flush=True)
                    if i:
                        rates[kind].append(rate)
                    else:
                        speeds[kind].clear()
            read = {kind: _step_bytes(model, kind, batch, context) for kind in KINDS}
            for kind, found in rates.items():
                floors = [gb_s * 1e9 / read[kind] * batch for gb_s in speeds[kind]]
                against = "" if kind == PLAIN else spread(ratios(found, rates[PLAIN]), 2)
                most = "" if kind == PLAIN else f"{read[PLAIN] / read[kind]:.2f}"
                report.rows.append([str(batch), kind, spread(found), against, most, shares(ratios(found, floors))])
            report.raw[f"batch {batch}"], report.raw[f"batch {batch} memory, GB/s"] = rates, speeds
        report.facts["versions"] = {name: {name: metadata.version(name)} for name in ("bestiary", "torch")}
        report.notes += [
            "Rate = batch x (new - 1) / (time for all new tokens - time for one); a round is one turn of each.",
            "Floor: what the planner says that a step reads, weights and cache, at the bandwidth that a probe reads "
            "with right before and after each turn (the mean); median and range over the rounds.",
            "12 bits: the same numbers, and the same text; what is served where nothing else is asked for.",
            "With int8 and int4 the head stays in bf16 of 12 bits: a large part of what is read of a small model.",
        ]


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


if __name__ == "__main__":
    main()
