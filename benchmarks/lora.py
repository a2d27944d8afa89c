"""What do LoRA adapters cost a batch: 8 different ones in a batch of 8, and adapters that are loaded and not used?"""

import json
import statistics
import tempfile
import time
from importlib import metadata
from pathlib import Path

import torch
from rig.entries import parser
from rig.model import Model
from rig.report import measured, ratios, spread
from safetensors import safe_open
from safetensors.torch import save_file

from bestiary import LLM, SamplingParams

COLUMNS = ["adapters", "beside", "tokens/s, median (range)", "of none", "adapters' bytes a step / the model's"]
SETS = {"q and v": ("q_proj", "v_proj"), "every matrix": ("q_proj", "k_proj", "v_proj", "o_proj", "gate", "up", "down")}


def main() -> None:
    """Pairs in one process: the same prompts, with adapters and without, in turns."""
    options_parser = parser(__doc__, "bestiary")
    options_parser.add_argument("--batch", type=int, default=8)
    options_parser.add_argument("--rank", type=int, default=16)
    options_parser.add_argument("--new", type=int, default=96)
    options = options_parser.parse_args()
    model = Model.read(options.model)
    torch.set_num_threads(options.threads)
    prompts, batch = model.prompts(options.batch, 64), options.batch
    with (
        measured(options, model, f"LoRA, batch {batch}, rank {options.rank}, bf16, decode", COLUMNS) as report,
        tempfile.TemporaryDirectory() as folder,
    ):
        plain, unused = _llm(model, batch), _llm(model, batch)
        used = {name: _llm(model, batch) for name in SETS}
        share: dict[str, float] = {}
        for kind, modules in SETS.items():
            for number in range(batch):
                path = Path(folder) / f"{len(modules)}-{number}"
                share[kind] = batch * _adapter(model, path, modules, options.rank, number) / model.weight_bytes
                used[kind].load_lora(f"a{number}", path)
                if kind == "q and v":
                    unused.load_lora(f"a{number}", path)
        names = [f"a{number}" for number in range(batch)]
        turns = {("none", ""): (plain, None), ("loaded, not used", "q and v"): (unused, None)}
        turns |= {(f"{batch} different", kind): (llm, names) for kind, llm in used.items()}
        unused.generate(prompts[:1], _params(2), use_tqdm=False, lora="a0")  # the leaves have room for it now
        rates: dict[tuple[str, str], list[float]] = {turn: [] for turn in turns}
        for i in range(options.pairs + 1):
            for turn, (llm, lora) in turns.items():
                rate = _rate(llm, prompts, lora, options.new)
                print(f"round {i}{' (warm-up)' * (i == 0)}: {' '.join(turn)} {rate:.1f} tokens/s", flush=True)
                if i:
                    rates[turn].append(rate)
        base = rates["none", ""]
        for (what, kind), found in rates.items():
            against = spread(ratios(found, base), 3)
            bytes_ = f"{share[kind]:.1%}" if what.endswith("different") else ""
            report.rows.append([what, kind, spread(found), against, bytes_])
            report.raw[f"{what} {kind}".strip()] = found
        report.facts["versions"] = {name: {name: metadata.version(name)} for name in ("bestiary", "torch")}
        report.notes += [
            "Rate = batch x (new - 1) / (time for all new tokens - time for one); a round is one turn of each.",
            f"Least share of none by bytes alone: 1 / (1 + the last column) = "
            f"{', '.join(f'{kind} {1 / (1 + s):.3f}' for kind, s in share.items())}.",
            f"Medians of none: {statistics.median(base):.1f} tokens/s.",
        ]


def _llm(model: Model, batch: int) -> LLM:
    return LLM(
        str(model.folder),
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=512,
        max_num_seqs=batch,
        max_loras=batch,
        enable_prefix_caching=False,
    )


def _adapter(model: Model, folder: Path, modules: tuple[str, ...], rank: int, seed: int) -> int:
    """Save a random one; its bytes."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    with safe_open(next(iter(sorted(model.folder.glob("*.safetensors")))), "pt") as file:
        for name in file.keys():  # noqa: SIM118 - no mapping
            if any(f".{module}" in name for module in modules) and name.endswith("_proj.weight"):
                rows, columns = file.get_slice(name).get_shape()
                stem = f"base_model.model.{name.removesuffix('.weight')}"
                tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, columns, generator=draw).bfloat16()
                tensors[f"{stem}.lora_B.weight"] = (torch.randn(rows, rank, generator=draw) * 1e-3).bfloat16()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return sum(tensor.nbytes for tensor in tensors.values())


def _params(new: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)


def _rate(llm: LLM, prompts: list[list[int]], lora: list[str] | None, new: int) -> float:
    seconds = []
    for count in (1, new):
        start = time.perf_counter()
        llm.generate(prompts, _params(count), use_tqdm=False, lora=lora)
        seconds.append(time.perf_counter() - start)
    return len(prompts) * (new - 1) / (seconds[1] - seconds[0])


if __name__ == "__main__":
    main()
