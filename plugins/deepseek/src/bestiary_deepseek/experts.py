"""What both generations of DeepSeek share: fine-grained experts beside shared ones, behind a few dense layers."""

from dataclasses import dataclass
from typing import Self

from bestiary.blocks import GatedMLP, MoE, Routing
from bestiary.checkpoint import ConfigFile, Names, Split, Stacked

__all__ = ["NAMES", "FeedForward"]


@dataclass(frozen=True)
class FeedForward:
    """The feed-forward blocks of all layers (Dai et al. 2024, arXiv 2401.06066)."""

    hidden_size: int
    dense_size: int
    expert_size: int
    experts: int
    shared: int
    first_sparse: int
    every: int
    routing: Routing

    @classmethod
    def read(cls, file: ConfigFile, routing: Routing) -> Self:
        """From config.json; how experts are chosen differs between the generations."""
        experts = file.size("n_routed_experts")
        file.must(routing.top_k <= experts, "num_experts_per_tok", f"is {routing.top_k}, of {experts} experts")
        return cls(
            hidden_size=file.size("hidden_size"),
            dense_size=file.size("intermediate_size"),
            expert_size=file.size("moe_intermediate_size"),
            experts=experts,
            shared=file.get("n_shared_experts", int, 0),
            first_sparse=file.get("first_k_dense_replace", int, 0),
            every=file.size("moe_layer_freq", 1),
            routing=routing,
        )

    def layer(self, i: int) -> GatedMLP | MoE:
        """The feed-forward block of layer i."""
        if i < self.first_sparse or i % self.every:
            return GatedMLP(self.hidden_size, self.dense_size)
        shared = self.expert_size * self.shared
        return MoE(self.hidden_size, self.expert_size, self.experts, self.routing, shared=shared)


NAMES = Names(
    ("model.layers.*.mlp.gate_proj", "layers.*.ffn.gate_up[gate]"),
    ("model.layers.*.mlp.up_proj", "layers.*.ffn.gate_up[up]"),
    ("model.layers.*.mlp.down_proj", "layers.*.ffn.down"),
    ("model.layers.*.mlp.gate", "layers.*.ffn.router"),
    ("model.layers.*.mlp.experts.*.gate_proj", "layers.*.ffn.gate_up[gate]"),
    ("model.layers.*.mlp.experts.*.up_proj", "layers.*.ffn.gate_up[up]"),
    ("model.layers.*.mlp.experts.*.down_proj", "layers.*.ffn.down"),
    ("model.layers.*.mlp.experts.gate_up_proj", "layers.*.ffn.gate_up:weight", Stacked(), Split("gate", "up")),
    ("model.layers.*.mlp.experts.down_proj", "layers.*.ffn.down:weight", Stacked()),
    ("model.layers.*.mlp.shared_experts.gate_proj", "layers.*.ffn.shared.gate_up[gate]"),
    ("model.layers.*.mlp.shared_experts.up_proj", "layers.*.ffn.shared.gate_up[up]"),
    ("model.layers.*.mlp.shared_experts.down_proj", "layers.*.ffn.shared.down"),
)
