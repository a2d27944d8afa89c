"""The command line that all scripts share, and who takes part: the peers' interpreters, arguments and environments."""

import argparse
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rig import machine
from rig.contender import Entry
from rig.model import Model
from rig.shapes import ENVS, folder

NAMES = {
    "bestiary": ("bestiary", ""),
    "vllm": ("vllm", ""),
    "vllm-eager": ("vllm", "eager"),
    "llamacpp": ("llamacpp", ""),
    "llamacpp-python": ("llamacpp", "python"),
    "llamacpp-q8_0": ("llamacpp", "q8_0"),
    "llamacpp-q4_0": ("llamacpp", "q4_0"),
    "transformers": ("transformers", ""),
    "transformers-static": ("transformers", "static"),
}
"""A row's name, the program that runs it and its variant."""


def weight_bits(name: str) -> int:
    """Bits in which a contender holds a weight of bfloat16, all of them without loss."""
    return 12 if name == "bestiary" and machine.squeezes() else 16


@dataclass(frozen=True)
class Sizes:
    """What an engine is told to be ready for."""

    max_len: int
    max_seqs: int
    max_batched_tokens: int
    cache_bytes: int = 0
    """Zero: enough for that many sequences of that length."""


def parser(description: str | None, contenders: str) -> argparse.ArgumentParser:
    """The options of every script."""
    made = argparse.ArgumentParser(description=description)
    told = "demo, random-0.5b, or a Hugging Face folder of a Llama checkpoint in bf16"
    made.add_argument("--model", type=folder, default="demo", help=told)
    made.add_argument("--contenders", default=contenders, help=f"comma-separated, of {', '.join(NAMES)}")
    made.add_argument("--python", default=sys.executable, help="interpreter that has bestiary and torch")
    made.add_argument("--pairs", type=int, default=5, help="rounds, in each of which every contender has its turn")
    made.add_argument("--threads", type=int, default=machine.cores())
    made.add_argument("--noisy", action="store_true", help="measure even though the machine is busy")
    made.add_argument("--name", help="name of the result's files (default: the script's, and the model's)")
    return made


def entries(options: argparse.Namespace, model: Model, sizes: Sizes, names: list[str] | None = None) -> list[Entry]:
    """The contenders asked for, ready to start."""
    chosen = names if names is not None else options.contenders.split(",")
    if unknown := [name for name in chosen if name not in NAMES]:
        raise SystemExit(f"No contender named {', '.join(unknown)}; there are {', '.join(NAMES)}")
    return [_entry(name, options, model, sizes) for name in chosen]


def _entry(name: str, options: argparse.Namespace, model: Model, sizes: Sizes) -> Entry:
    program, variant = NAMES[name]
    arguments = {
        "model": gguf(model, variant) if program == "llamacpp" else model.folder,
        "max-len": sizes.max_len,
        "max-seqs": sizes.max_seqs,
        "max-batched-tokens": sizes.max_batched_tokens,
        "threads": options.threads,
        "variant": variant,
    }
    if program == "vllm":
        # Left alone it takes nearly all memory. Its blocks are 128 tokens, hence one more for each sequence, and one of
        # them is nobody's.
        needed = (sizes.max_seqs * (sizes.max_len + 128) + 128) * model.kv_bytes_per_token
        arguments["cache-bytes"] = sizes.cache_bytes or needed
    elif sizes.cache_bytes:
        arguments["cache-bytes"] = sizes.cache_bytes
    environment = {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if program == "vllm":
        environment = {"HF_HUB_OFFLINE": "1"} | _vllm_environment(options.threads)
    python = options.python if program == "bestiary" else _python(program)
    return Entry(name, program, python, arguments, environment)


def _vllm_environment(threads: int) -> dict[str, str]:
    """The fastest it was found to be on two cores, where its own choice keeps one of them back for a server.

    Everything in one process (it would start three), Intel's OpenMP loaded first and bound to the cores, as its worker
    does it; and no ahead-of-time compiled code, which 0.32 fails to read back and compiles again.
    """
    bound = ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))
    return {
        "LD_PRELOAD": str(ENVS / "vllm/lib/libiomp5.so"),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": str(threads),
        "KMP_AFFINITY": f"granularity=fine,explicit,proclist=[{bound}]",
        "KMP_BLOCKTIME": "5",
        "KMP_TPAUSE": "0",
        "VLLM_USE_AOT_COMPILE": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
    }


def _python(program: str) -> str:
    python = ENVS / program / "bin/python"
    if not python.exists():
        raise SystemExit(f"There is no environment for {program}: run benchmarks/peers.sh {program}")
    return str(python)


def gguf(model: Model, variant: str = "") -> Path:
    """The model as llama.cpp reads it, written once; of a variant's few bits, where it names some."""
    stem = ENVS / "models" / f"{model.folder.name}-{model.stored_bytes}"
    wide = Path(f"{stem}.bf16.gguf")
    _written(wide, "to_gguf.py", str(model.folder))
    if not variant.startswith("q"):
        return wide
    few = Path(f"{stem}.{variant}.gguf")
    _written(few, "quantise_gguf.py", str(wide), variant)
    return few


def _written(path: Path, script: str, source: str, *more: str) -> None:
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    program = Path(__file__).resolve().parent.parent / script
    unfinished = path.with_suffix(".part")
    subprocess.run([_python("llamacpp"), str(program), source, str(unfinished), *more], check=True)
    unfinished.rename(path)
