"""How do models that are no Llama decode, beside transformers: a state space, experts, latent rows with experts?"""

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from rig.report import measured_alone, parser_alone, ratios, spread

from bestiary import LLM, SamplingParams

COLUMNS = ["model", "numbers", "ours, tokens/s", "transformers, tokens/s", "ratio", "goal", "met"]
GOAL = 2.0
SMALL = {"vocab_size": 32000, "max_position_embeddings": 1024, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHAPES: dict[str, dict[str, Any]] = {
    "mamba": {"hidden_size": 1024, "num_hidden_layers": 36, "state_size": 16, "tie_word_embeddings": True},
    "mixtral": {
        "hidden_size": 768,
        "intermediate_size": 1152,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "deepseek_v2": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "moe_intermediate_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "n_routed_experts": 24,
        "num_experts_per_tok": 4,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 256,
        "q_lora_rank": None,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
    },
}


def main() -> None:
    """Random weights of about 0.3 billion numbers, the same for both; in turns, in this process."""
    options = parser_alone(__doc__, rounds=5)
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--new", type=int, default=48)
    options.add_argument("--models", default=",".join(SHAPES))
    given = options.parse_args()
    with measured_alone(given, f"Kinds of models, decode, batch {given.batch}, bf16", COLUMNS) as report:
        for kind in given.models.split(","):
            report.rows.append(_measure(kind, given))
            print(report.rows[-1], flush=True)
            gc.collect()
        report.notes = [
            "Random weights, greedy; rate = batch x (new - 1) / (time for all new tokens - time for one), in turns."
        ]


def _measure(kind: str, given: argparse.Namespace) -> list[str]:
    import transformers

    config = transformers.AutoConfig.for_model(kind, **{**SMALL, **SHAPES[kind]})
    torch.manual_seed(0)
    theirs: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    prompts = torch.randint(3, 32000, (given.batch, 64)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = LLM(
            folder,
            dtype="bfloat16",
            skip_tokenizer_init=True,
            max_model_len=64 + given.new + 8,
            max_num_seqs=given.batch,
            enable_prefix_caching=False,
        )
    found: dict[str, list[float]] = {"ours": [], "theirs": []}
    for turn in range(given.rounds + 1):
        rates = {
            "ours": _rate(lambda new: _answer(ours, prompts, new), given),
            "theirs": _rate(lambda new: _generate(theirs, prompts, new), given),
        }
        print(f"{kind}, round {turn}: " + ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items()), flush=True)
        for name, rate in rates.items() if turn else ():
            found[name].append(rate)
    ours.close()
    ratio = ratios(found["ours"], found["theirs"])
    numbers = f"{sum(p.numel() for p in theirs.parameters()) / 1e6:.0f} M"
    met = "yes" if statistics.median(ratio) >= GOAL else "NO"
    return [kind, numbers, spread(found["ours"]), spread(found["theirs"]), spread(ratio, 2), f">= {GOAL:g}", met]


def _rate(answer: Callable[[int], object], given: argparse.Namespace) -> float:
    seconds = []
    for new in (1, given.new):
        begin = time.perf_counter()
        answer(new)
        seconds.append(time.perf_counter() - begin)
    return float(given.batch * (given.new - 1) / (seconds[1] - seconds[0]))


def _answer(llm: LLM, prompts: list[list[int]], new: int) -> object:
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    return llm.generate(prompts, params, use_tqdm=False)


def _generate(model: Any, prompts: list[list[int]], new: int) -> object:
    ids = torch.tensor(prompts)
    with torch.inference_mode():
        counts = {"max_new_tokens": new, "min_new_tokens": new}
        return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **counts)


if __name__ == "__main__":
    main()
