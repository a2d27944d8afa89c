"""Random weights with which every part of a model matters: a fresh model's norms and biases would show no mistake."""

import torch
from torch import Generator, Tensor, nn

__all__ = ["randomise"]


def randomise(model: nn.Module, generator: Generator) -> None:
    """Draw every parameter anew: matrices, tables, gains and biases, each in the size in which it shows.

    Gains change signs, or a tied head would find the token that it was just given and repeat it for ever.
    """
    config = getattr(model, "config", None)
    is_tied = bool(getattr(config, "tie_word_embeddings", False))
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "A_log" in name:
                continue  # decays that a state survives are found by its own initialisation
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                scale = (1.2 if is_tied else 2.4) if id(parameter) in tables else 1.2
                parameter.copy_(drawn * scale * parameter.shape[-1] ** -0.5)
                continue
            is_offset = _is_all(parameter, 0.0) and name.endswith("weight")  # gains stored as their distance from 1
            if _is_all(parameter, 1.0) or is_offset:
                signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
                parameter.copy_((1 + 0.3 * drawn) * signs - float(is_offset))
            else:
                parameter.copy_(0.1 * drawn)
        for name, buffer in model.named_buffers():
            if name.endswith("logits_bias"):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))


def _is_all(parameter: Tensor, value: float) -> bool:
    return bool((parameter == value).all())
