"""transformers' `generate` in bfloat16; the variant `static` takes its static cache."""

import time
from typing import Any

from contenders.protocol import Generate, Generated, Options, Prompts, serve


def load(options: Options) -> Generate:
    """The model, loaded."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.generation.streamers import BaseStreamer

    options.imported()
    torch.set_num_threads(options.threads)
    model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = None

    class FirstToken(BaseStreamer):
        """Notes when the first new token came; the first thing it is given is the prompt."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: torch.Tensor) -> None:
            if len(self.times) < 2:
                self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    def generate(prompts: Prompts, max_tokens: int) -> Generated:
        ids = torch.tensor(prompts)
        watch = FirstToken() if len(prompts) == 1 else None  # a streamer is allowed for one sequence only
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=watch,
            cache_implementation="static" if options.variant == "static" else None,
        )
        return Generated(out[:, ids.shape[1] :].tolist(), watch.times[1] if watch else None)

    return generate


if __name__ == "__main__":
    serve(load, "transformers", "torch")
