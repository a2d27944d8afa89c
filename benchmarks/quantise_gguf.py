"""Write a GGUF of few bits from one of bf16: quantise_gguf.py BF16 OUT TYPE. Runs in the llamacpp environment."""

import argparse
import ctypes

import llama_cpp

TYPES = {"q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}


def main() -> None:
    """Read the file, write the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source")
    parser.add_argument("out")
    parser.add_argument("type", choices=TYPES)
    args = parser.parse_args()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = TYPES[args.type]
    if status := llama_cpp.llama_model_quantize(args.source.encode(), args.out.encode(), ctypes.byref(params)):
        raise SystemExit(f"{args.source}: llama.cpp could not write {args.type}: {status}")


if __name__ == "__main__":
    main()
