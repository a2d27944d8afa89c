"""A mixture of experts computes what its routing says, against plain formulas in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import bestiary_kernels as kernels
from bestiary.blocks import MoE, Routing
from bestiary.blocks.leaf import Leaf
from bestiary_kernels.linear import squeezed

WIDTH, INNER, EXPERTS, TOKENS, TOP = 32, 16, 8, 7, 3


def made(
    routing: Routing, dtype: torch.dtype = torch.float32, width: int = WIDTH, inner: int = INNER, **more: Any
) -> MoE:
    block = MoE(width, inner, EXPERTS, routing, **more)
    for module in block.modules():
        if isinstance(module, Leaf):
            module.allocate(dtype, torch.device("cpu"))
            for tensor in module.parameters(recurse=False):
                tensor.copy_(torch.randn(tensor.shape) * tensor.shape[-1] ** -0.5)
    return block


def mixed(block: MoE, x: Tensor, weights: Tensor) -> Tensor:
    """[T, width] for weights [T, E] that are 0 where an expert was not chosen."""
    gate, up = block.gate_up.weight.double().chunk(2, 1)
    hidden = torch.nn.functional.silu(torch.einsum("td,eid->tei", x, gate)) * torch.einsum("td,eid->tei", x, up)
    return torch.einsum("tei,edi,te->td", hidden, block.down.weight.double(), weights)


def deepseek_v3(block: MoE, logits: Tensor) -> Tensor:
    """DeepSeek-AI 2024, arXiv 2412.19437: sigmoids, of which a bias and the best two of each group say who counts."""
    scores, bias = logits.sigmoid(), block.router_bias.bias  # type: ignore[union-attr]
    keys = scores + bias.double()
    worth = keys.view(TOKENS, 4, 2).sum(-1)
    is_open = (worth >= worth.topk(2).values[:, -1:]).repeat_interleave(2, 1)
    chosen = keys.masked_fill(~is_open, -torch.inf).topk(TOP).indices
    weights = torch.zeros_like(scores).scatter(1, chosen, scores.gather(1, chosen))
    return 2.5 * weights / weights.sum(-1, keepdim=True)


def sparsemixer(block: MoE, logits: Tensor) -> Tensor:
    """Liu et al. 2024, arXiv 2409.12136, as Phi-3.5-MoE computes it once it no longer learns."""
    weights, left = torch.zeros_like(logits), logits
    for _ in range(2):
        best, expert = left.max(-1, keepdim=True)
        is_far = (best - logits) / torch.maximum(logits.abs(), best) > 2 * 0.1
        near = left.masked_fill(is_far, -torch.inf).softmax(-1)
        weights = weights.scatter(1, expert, near.gather(1, expert))
        left = left.scatter(1, expert, -torch.inf)
    return weights


def softmax_last(block: MoE, logits: Tensor) -> Tensor:
    chosen = logits.topk(TOP)
    return torch.zeros_like(logits).scatter(1, chosen.indices, chosen.values.softmax(-1))


WAYS: dict[str, tuple[Routing, Callable[[MoE, Tensor], Tensor]]] = {
    "DeepSeek-V3": (
        Routing(
            TOP,
            renormalise=True,
            scale=2.5,
            groups=4,
            top_groups=2,
            scoring="sigmoid",
            group_by="best_two",
            bias=True,
        ),
        deepseek_v3,
    ),
    "Phi-3.5-MoE": (Routing(2, renormalise=False, scoring="sparsemixer", jitter=0.1), sparsemixer),
    "softmax of the chosen": (Routing(TOP, renormalise=False, softmax_last=True), softmax_last),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("way", WAYS)
def test_experts_are_chosen_and_weighed_as_published(way: str, backend: str) -> None:
    torch.manual_seed(0)
    routing, weights_of = WAYS[way]
    with torch.inference_mode(), kernels.using(backend):
        block, x = made(routing), torch.randn(TOKENS, WIDTH)
        logits = x.double() @ block.router.weight.double().T
        wanted = mixed(block, x.double(), weights_of(block, logits))
        torch.testing.assert_close(block(x, None), wanted.float(), rtol=1e-4, atol=1e-5)


def test_the_routers_bias_is_of_float32_in_every_model() -> None:
    block = MoE(WIDTH, INNER, EXPERTS, Routing(TOP, renormalise=True, bias=True))
    assert block.router_bias is not None
    assert block.router_bias.nbytes(torch.bfloat16) == 4 * EXPERTS
    with torch.inference_mode():
        block = made(Routing(TOP, renormalise=True, bias=True), torch.bfloat16)
        assert block.router_bias is not None and block.router_bias.bias.dtype is torch.float32


def test_squeezed_experts_mix_what_they_mixed_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(squeezed, "_LEAST", 0)
    monkeypatch.delenv(squeezed.VARIABLE, raising=False)
    torch.manual_seed(0)
    with torch.inference_mode():
        block = made(Routing(TOP, renormalise=True), torch.bfloat16, 192, 128)
        x = torch.randn(TOKENS, 192).bfloat16()
        before = block(x, None)
        block.settle()
        if block.gate_up.squeezed is None:
            pytest.skip("no kernel of ours reads squeezed weights here")
        assert block.down.squeezed is not None and not [*block.gate_up.parameters(), *block.down.parameters()]
        torch.testing.assert_close(block(x, None), before, rtol=2e-2, atol=2e-2)


def test_a_gate_says_how_much_the_shared_expert_counts() -> None:
    torch.manual_seed(0)
    with torch.inference_mode():
        block = made(Routing(TOP, renormalise=True), shared=INNER, shared_gate=True)
        x = torch.randn(TOKENS, WIDTH)
        with_shared, shared, gate = block(x, None), block.shared, block.shared_gate
        assert shared is not None and gate is not None
        block.shared = None
        torch.testing.assert_close(with_shared, block(x, None) + gate(x).sigmoid() * shared(x, None))
