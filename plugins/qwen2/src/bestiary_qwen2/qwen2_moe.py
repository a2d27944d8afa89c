"""Qwen2-MoE: many small experts, and one that every token goes through, as much as a gate lets it count."""

from dataclasses import dataclass
from typing import Self

from bestiary.blocks import Decoder, GatedMLP, Head, MoE, Routing
from bestiary.checkpoint import ConfigFile, Names, Split, Stacked
from bestiary_qwen2 import qwen2

__all__ = ["NAMES", "Config", "describe"]


@dataclass(frozen=True)
class Config:
    """What config.json says of a Qwen2-MoE."""

    base: qwen2.Config
    expert_size: int
    shared_size: int
    experts: int
    routing: Routing
    every: int
    dense: tuple[int, ...]

    @classmethod
    def read(cls, file: ConfigFile) -> Self:
        """Raises ConfigUnsupported for what no published Qwen2-MoE has."""
        experts, top_k = file.size("num_experts", 60), file.size("num_experts_per_tok", 4)
        file.must(top_k <= experts, "num_experts_per_tok", f"is {top_k}, of {experts} experts")
        # Where windows are used: in every other of the first layers, not, as in Qwen2, in all of the last.
        layers, windowed = file.size("num_hidden_layers"), file.get("max_window_layers", int, 28)
        types = ["full_attention" if i % 2 or i >= windowed else "sliding_attention" for i in range(layers)]
        return cls(
            base=qwen2.Config.read(file.filled({"layer_types": types})),
            expert_size=file.size("moe_intermediate_size"),
            shared_size=file.size("shared_expert_intermediate_size"),
            experts=experts,
            routing=Routing(top_k, renormalise=file.get("norm_topk_prob", bool, False)),
            every=file.size("decoder_sparse_step", 1),
            dense=file.get("mlp_only_layers", tuple[int, ...], ()),
        )


def describe(c: Config) -> Decoder:
    """The tree of a Qwen2-MoE."""
    b = c.base

    def ffn(i: int) -> GatedMLP | MoE:
        if i in c.dense or (i + 1) % c.every:
            return GatedMLP(b.hidden_size, b.intermediate_size)
        return MoE(b.hidden_size, c.expert_size, c.experts, c.routing, shared=c.shared_size, shared_gate=True)

    return qwen2.trunk(b, Head(b.vocab_size, b.hidden_size, tied=b.tied), ffn)


NAMES = qwen2.NAMES + Names(
    ("model.layers.*.mlp.gate", "layers.*.ffn.router"),
    ("model.layers.*.mlp.experts.*.gate_proj", "layers.*.ffn.gate_up[gate]"),
    ("model.layers.*.mlp.experts.*.up_proj", "layers.*.ffn.gate_up[up]"),
    ("model.layers.*.mlp.experts.*.down_proj", "layers.*.ffn.down"),
    ("model.layers.*.mlp.experts.gate_up_proj", "layers.*.ffn.gate_up:weight", Stacked(), Split("gate", "up")),
    ("model.layers.*.mlp.experts.down_proj", "layers.*.ffn.down:weight", Stacked()),
    ("model.layers.*.mlp.shared_expert.gate_proj", "layers.*.ffn.shared.gate_up[gate]"),
    ("model.layers.*.mlp.shared_expert.up_proj", "layers.*.ffn.shared.gate_up[up]"),
    ("model.layers.*.mlp.shared_expert.down_proj", "layers.*.ffn.shared.down"),
    ("model.layers.*.mlp.shared_expert_gate", "layers.*.ffn.shared_gate"),
)
