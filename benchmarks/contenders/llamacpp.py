"""llama.cpp on a GGUF: its bare eval loop and numpy's argmax; the variant `python` is the package's own call."""

import time

from contenders.protocol import Generate, Generated, Options, Prompts, serve


def load(options: Options) -> Generate:
    """The model, loaded."""
    return _python_call(options) if options.variant == "python" else _bare_loop(options)


def _python_call(options: Options) -> Generate:
    from llama_cpp import Llama

    options.imported()
    llm = Llama(
        options.model,
        n_ctx=options.max_len,
        n_batch=options.max_batched_tokens,
        n_threads=options.threads,
        n_threads_batch=options.threads,
        verbose=False,
    )

    def generate(prompts: Prompts, max_tokens: int) -> Generated:
        (prompt,) = prompts
        tokens: list[int] = []
        first_at = 0.0
        for token in llm.generate(prompt, temp=0.0, repeat_penalty=1.0, reset=True):
            if not tokens:
                first_at = time.perf_counter()
            tokens.append(token)
            if len(tokens) == max_tokens:
                break
        llm.reset()
        llm._ctx.kv_cache_clear()  # or the next call would find this prompt in the cache
        return Generated([tokens], first_at)

    return generate


def _bare_loop(options: Options) -> Generate:
    import llama_cpp as lc
    import numpy as np

    options.imported()
    lc.llama_backend_init()
    params = lc.llama_model_default_params()
    # Its products of few bits on AMX end with a segmentation fault (version 0.3.36).
    params.use_extra_bufts = not (options.variant.startswith("q") and b"AMX_INT8 = 1" in lc.llama_print_system_info())
    model = lc.llama_model_load_from_file(options.model.encode(), params)
    if not model:
        raise SystemExit(f"llama.cpp cannot load {options.model}")
    vocab_size = lc.llama_vocab_n_tokens(lc.llama_model_get_vocab(model))
    contexts: dict[int, lc.llama_context_p] = {}
    batch = lc.llama_batch_init(options.max_batched_tokens, 0, 1)

    def context(num_seqs: int) -> lc.llama_context_p:
        # One context for each batch size, as a wide one makes a single sequence slower.
        if num_seqs not in contexts:
            params = lc.llama_context_default_params()
            params.n_ctx = options.max_len * num_seqs
            params.n_seq_max = num_seqs
            params.n_batch = options.max_batched_tokens
            params.n_threads = params.n_threads_batch = options.threads
            params.no_perf = True
            contexts[num_seqs] = lc.llama_init_from_model(model, params)
        lc.llama_memory_clear(lc.llama_get_memory(contexts[num_seqs]), False)
        return contexts[num_seqs]

    def add(token: int, position: int, seq: int, wanted: bool) -> None:
        i = batch.n_tokens
        batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, seq
        batch.n_tokens = i + 1

    def evaluate(ctx: lc.llama_context_p) -> dict[int, int]:
        """Run the batch and empty it: the likeliest next token of each sequence whose logits it asked for."""
        if status := lc.llama_decode(ctx, batch):
            raise RuntimeError(f"llama_decode: {status}")
        rows = [i for i in range(batch.n_tokens) if batch.logits[i]]
        batch.n_tokens = 0
        return {
            batch.seq_id[i][0]: int(np.ctypeslib.as_array(lc.llama_get_logits_ith(ctx, i), (vocab_size,)).argmax())
            for i in rows
        }

    def generate(prompts: Prompts, max_tokens: int) -> Generated:
        ctx = context(len(prompts))
        tokens: list[list[int]] = [[] for _ in prompts]
        latest: dict[int, int] = {}
        for seq, prompt in enumerate(prompts):
            for position, token in enumerate(prompt):
                if batch.n_tokens == options.max_batched_tokens:
                    latest |= evaluate(ctx)
                add(token, position, seq, position == len(prompt) - 1)
        latest |= evaluate(ctx)
        first_at = time.perf_counter()
        while True:
            for seq, token in latest.items():
                tokens[seq].append(token)
            if len(tokens[0]) == max_tokens:
                return Generated(tokens, first_at)
            for seq, token in latest.items():
                add(token, len(prompts[seq]) + len(tokens[seq]) - 1, seq, True)
            latest = evaluate(ctx)

    return generate


if __name__ == "__main__":
    serve(load, "llama-cpp-python", "numpy")
