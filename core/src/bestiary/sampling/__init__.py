"""From logits to tokens: what a request asks for (params) and the vectorised sampler (sampler)."""
