"""Multi-head latent attention (DeepSeek-AI 2024, arXiv 2405.04434): a small row a token stands for all heads' keys."""

import torch
from torch import Tensor, nn

import bestiary_kernels as kernels
from bestiary.batch import Batch
from bestiary.blocks.kept import Latent
from bestiary.blocks.linear import Linear
from bestiary.blocks.lowrank import Adaptable
from bestiary.blocks.mixer import Mixer
from bestiary.blocks.norm import RMSNorm
from bestiary.blocks.rotary import Rope
from bestiary.parallel import Mesh, scaled

__all__ = ["LatentAttention"]


class _Up(Adaptable):
    """What makes a head's keys and values out of a latent row. It is never multiplied with one: see `forward` below.

    A matrix of each head is multiplied from the left for keys and from the right for values, so that, once packed,
    values' matrices lie turned round in their place: both products then read whole rows.
    """

    weight: nn.Parameter

    def __init__(self, inputs: int, heads: int, k_dim: int, v_dim: int) -> None:
        super().__init__()
        self.inputs, self.heads, self.unit = inputs, heads, min(k_dim, v_dim)
        self.parts = {"k": heads * k_dim, "v": heads * v_dim}
        self.is_packed = False

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """A weight [heads x (k_dim + v_dim), latent width]."""
        return {"weight": (sum(self.parts.values()), self.inputs)}

    def keys(self) -> Tensor:
        """[heads, head size, latent width]."""
        return self.weight[self.rows_of("k")].view(self.heads, -1, self.inputs)

    def values(self) -> Tensor:
        """[heads, latent width, head size]."""
        own = self.weight[self.rows_of("v")]
        if self.is_packed:
            return own.view(self.heads, self.inputs, -1)
        return own.view(self.heads, -1, self.inputs).transpose(1, 2)

    def pack(self) -> None:
        """Turn the values' matrices."""
        if not self.is_packed:
            turned, self.is_packed = self.values().contiguous(), True
            self.values().copy_(turned)

    def add_to_keys(self, x_TD: Tensor, q_THK: Tensor, y_THC: Tensor) -> None:
        """y += what adapters make of queries; x says whose rows they are."""
        if (low := self._low_rank("k", x_TD)) is not None:
            own_TS, down_SRC, up_SRHK = low
            inner_THSR = torch.einsum("thk,srhk->thsr", q_THK, up_SRHK) * own_TS[:, None, :, None]
            y_THC += torch.einsum("thsr,src->thc", inner_THSR, down_SRC)

    def add_to_values(self, x_TD: Tensor, mixed_THC: Tensor, y_THV: Tensor) -> None:
        """y += what adapters make of gathered latent rows."""
        if (low := self._low_rank("v", x_TD)) is not None:
            own_TS, down_SRC, up_SRHV = low
            inner_THSR = torch.einsum("thc,src->thsr", mixed_THC, down_SRC) * own_TS[:, None, :, None]
            y_THV += torch.einsum("thsr,srhv->thv", inner_THSR, up_SRHV)

    def _low_rank(self, part: str, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Which slot is each row's, [rows, slots] of 0 and 1, and of all slots the matrices of a part.

        All slots go along: to ask which of them the step has would be to wait for the device.
        """
        slots_T = self.slots_of(x_TD)
        if slots_T is None or self.low is None:
            return None
        down_SRC, up_SRN = self.low.of(part)
        own_TS = slots_T[:, None] == torch.arange(len(down_SRC), device=x_TD.device)
        return own_TS.to(x_TD.dtype), down_SRC, up_SRN.view(*up_SRN.shape[:2], self.heads, -1)


class LatentAttention(Mixer):
    """Causal attention whose cache holds one row of `kv_rank` + `rope.dim` numbers a token for all heads.

    A key is W_k times the latent row c, so that q . W_k c = (W_kᵀ q) . c: queries go down to the latent's width instead
    of keys up, and what attention gathers comes up through W_v afterwards. Only the last `rope.dim` numbers of queries
    and keys turn with the position. `q_rank`: queries too come through a narrow matrix; None: they do not.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        q_rank: int | None,
        kv_rank: int,
        plain_dim: int,
        rope: Rope,
        v_dim: int,
        eps: float,
        scale: float,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.kv_rank, self.plain_dim, self.scale = heads, kv_rank, plain_dim, scale
        self.rope, self.rope_dim, self.v_dim = rope, rope.dim, v_dim
        self.keeps = Latent(kv_rank + rope.dim)
        head_dim = plain_dim + rope.dim
        self.q_down = None if q_rank is None else Linear(width, q_rank, "whole", bias=bias)
        self.q_norm = None if q_rank is None else RMSNorm(q_rank, eps)
        self.q = Linear(width if q_rank is None else q_rank, heads * head_dim, "column", unit=head_dim)
        self.kv_down = Linear(width, kv_rank + rope.dim, "whole", bias=bias)
        self.kv_norm = RMSNorm(kv_rank, eps)
        self.up = _Up(kv_rank, heads, plain_dim, v_dim)
        self.out = Linear(heads * v_dim, width, "row", bias=bias)

    def cut(self, mesh: Mesh) -> None:
        """Some of the heads; the latent rows, which all heads read, stay whole."""
        own, _ = mesh.heads(self.heads, self.heads)
        self.q.keep_rows(out=scaled(own, self.plain_dim + self.rope_dim))
        self.up.keep_rows(k=scaled(own, self.plain_dim), v=scaled(own, self.v_dim))
        self.out.keep_addends(scaled(own, self.v_dim), mesh)
        self.heads = self.up.heads = len(own)

    def forward(self, x_TD: Tensor, batch: Batch) -> Tensor:
        """[T, width] to [T, width]; this step's latent rows stay in the cache."""
        (cache,) = batch.caches[self.slot]
        pages = batch.pages[self.group]
        self._keep(x_TD, batch, pages.slots, cache)
        mixed_THC = kernels.latent_attention(
            self._queries(x_TD, batch),
            cache,
            self.kv_rank,
            pages.blocks,
            batch.query_starts,
            batch.context_lens,
            self.scale,
        )
        values_THV = kernels.heads_linear(mixed_THC, self.up.values())
        self.up.add_to_values(x_TD, mixed_THC, values_THV)
        return self.out(values_THV.view(x_TD.shape[0], -1))

    def _keep(self, x_TD: Tensor, batch: Batch, slots: Tensor, cache: Tensor) -> None:
        """Write [kv_rank + rope.dim] of each token to the cache."""
        row, turning = self.kv_down(x_TD).split_with_sizes((self.kv_rank, self.rope_dim), -1)
        kernels.cache_write(self.kv_norm(row)[0], slots, cache[..., : self.kv_rank])
        turned = self._turn(turning[:, None], batch)
        kernels.cache_write(turned[:, 0], slots, cache[..., self.kv_rank :])

    def _queries(self, x_TD: Tensor, batch: Batch) -> Tensor:
        """[T, heads, kv_rank + rope.dim] queries as the latent rows understand them."""
        if self.q_down is not None and self.q_norm is not None:
            x_TD = self.q_norm(self.q_down(x_TD))[0]
        q_THD: Tensor = self.q(x_TD).view(x_TD.shape[0], self.heads, -1)
        plain, turning = q_THD.split_with_sizes((self.plain_dim, self.rope_dim), -1)
        both = q_THD.new_empty(*q_THD.shape[:2], self.kv_rank + self.rope_dim)
        down, turned = both.split_with_sizes((self.kv_rank, self.rope_dim), -1)
        kernels.heads_linear(plain, self.up.keys(), out=down)
        self.up.add_to_keys(x_TD, plain, down)
        self._turn(turning, batch, turned)
        return both

    def _turn(self, x_THD: Tensor, batch: Batch, out: Tensor | None = None) -> Tensor:
        assert self.rope is not None and self.angles is not None
        return kernels.rotary(x_THD, self.angles, batch.positions, self.rope.interleaved, out)
