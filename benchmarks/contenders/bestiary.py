"""Bestiary, through its offline interface."""

from contenders.protocol import Generate, Generated, Options, Prompts, serve


def load(options: Options) -> Generate:
    """The engine, loaded."""
    import torch

    from bestiary import LLM, SamplingParams

    options.imported()
    torch.set_num_threads(options.threads)
    sized = {"kv_cache_memory_bytes": options.cache_bytes} if options.cache_bytes else {}
    llm = LLM(
        model=options.model,
        dtype="bfloat16",
        max_model_len=options.max_len,
        max_num_seqs=options.max_seqs,
        max_num_batched_tokens=options.max_batched_tokens,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        seed=0,
        **sized,
    )

    def generate(prompts: Prompts, max_tokens: int) -> Generated:
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        outs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return Generated([list(out.outputs[0].token_ids) for out in outs])

    return generate


if __name__ == "__main__":
    serve(load, "bestiary", "torch")
