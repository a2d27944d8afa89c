"""latent_attention and its cache: against torch's attention and against transformers' DeepSeek-V2."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bestiary_kernels import add_rms_norm, cache_write, latent_attention, library, rotary
from bestiary_kernels.latent import _operator, _write_operator

from .cases import Batch, assert_weighs, paged_batch

DTYPES = [torch.float32, torch.bfloat16]
MIX = [(1, 33), (20, 20), (0, 12), (7, 41), (1, 1)]
WIDTH, VALUES = 40, 28


@pytest.fixture(params=library.status().available)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with library.using(request.param):
        yield request.param


def latent_batch(lengths: list[tuple[int, int]], dtype: torch.dtype = torch.float32) -> Batch:
    return paged_batch(lengths, kv_heads=1, group=6, width=WIDTH, block_size=5, dtype=dtype)


def run(batch: Batch, out: Tensor | None = None) -> Tensor:
    tables = (batch.block_tables, batch.query_starts, batch.context_lens)
    return latent_attention(batch.q, batch.k_cache[:, 0], VALUES, *tables, batch.scale, out=out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_row_is_key_and_value_of_all_heads(backend: str, dtype: torch.dtype) -> None:
    batch = latent_batch(MIX, dtype)
    y = run(batch)
    assert y.shape == (29, 6, VALUES) and y.is_contiguous()
    for s, (queries, context) in enumerate(MIX):
        start = int(batch.query_starts[s])
        token = torch.arange(context)
        rows = batch.k_cache[batch.block_tables[s, token // 5].long(), 0, token % 5].double()
        q = batch.q[start : start + queries].double().transpose(0, 1)
        mask = token <= token[context - queries :, None]
        keys, values = rows.expand(6, -1, -1), rows[:, :VALUES].expand(6, -1, -1)
        expected = functional.scaled_dot_product_attention(q, keys, values, mask, scale=batch.scale)
        sizes = functional.scaled_dot_product_attention(q, keys, values.abs(), mask, scale=batch.scale)
        both = (attended.transpose(0, 1).to(dtype) for attended in (expected, sizes))
        assert_weighs(y[start : start + queries], *both)


def test_out_receives_the_result(backend: str) -> None:
    batch = latent_batch(MIX)
    out = torch.empty(29, 6, VALUES)
    assert run(batch, out) is out
    assert torch.equal(out, run(batch))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_go_where_the_slots_say(backend: str, dtype: torch.dtype) -> None:
    rows, cache = torch.randn(4, 6).to(dtype), torch.zeros(3, 5, 6, dtype=dtype)
    cache_write(rows, torch.tensor([14, -1, 0, 7]), cache)
    expected = torch.zeros(15, 6, dtype=dtype)
    expected[14], expected[0], expected[7] = rows[0], rows[2], rows[3]
    assert torch.equal(cache.view(15, 6), expected)


def test_many_rows_of_a_wider_buffer_go_to_a_layer_of_a_shared_cache(backend: str) -> None:
    """So many are written in parallel."""
    rows, slots = torch.randn(950, 300)[:, 4:], torch.randperm(1000)[:950]
    slots[::7] = -1
    cache = torch.zeros(200, 3, 5, 296)
    cache_write(rows, slots, cache[:, 1])
    expected = torch.zeros(1000, 296)
    expected[slots[slots >= 0]] = rows[slots >= 0]
    assert torch.equal(cache[:, 1].reshape(1000, 296), expected)
    assert not cache[:, 0].any() and not cache[:, 2].any()


def test_a_slot_outside_the_cache_is_refused_before_anything_is_written(backend: str) -> None:
    cache = torch.zeros(3, 5, 6)
    with pytest.raises(IndexError, match="cache_write: a slot"):
        cache_write(torch.ones(2, 6), torch.tensor([0, 15]), cache)
    assert not cache.any()


def test_the_absorbed_form_in_chunks_is_deepseeks_attention(backend: str) -> None:
    module = pytest.importorskip("transformers.models.deepseek_v2.modeling_deepseek_v2")
    heads, nope, rope, latent, values = 4, 12, 8, 20, 10
    config = module.DeepseekV2Config(
        hidden_size=32,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        q_lora_rank=None,
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope,
        kv_lora_rank=latent,
        v_head_dim=values,
        attn_implementation="sdpa",
    )
    theirs = module.DeepseekV2Attention(config, 0).requires_grad_(False).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(23, 32)
    turn = torch.arange(23)[:, None] * 10000.0 ** -torch.linspace(0, 1, rope // 2)
    expected, _ = theirs(x[None], None, position_embeddings=torch.polar(torch.ones_like(turn), turn)[None])

    table = torch.stack([turn.cos(), turn.sin()], 1)
    to_key, to_value = theirs.kv_b_proj.weight.view(heads, nope + values, latent).split((nope, values), 1)
    cache, blocks = torch.full((6, 5, latent + rope), float("nan")), torch.tensor([[3, 0, 5, 1, 4, -1]])
    for begin, end in ((0, 9), (9, 10), (10, 23)):
        places = torch.arange(begin, end)
        q_nope, q_rope = theirs.q_proj(x[begin:end]).view(-1, heads, nope + rope).split((nope, rope), -1)
        down, k_rope = theirs.kv_a_proj_with_mqa(x[begin:end]).split((latent, rope), -1)
        normed, _ = add_rms_norm(down, None, theirs.kv_a_layernorm.weight.data, theirs.kv_a_layernorm.variance_epsilon)
        k_rope = rotary(k_rope[:, None], table, places, interleaved=True)[:, 0]
        cache_write(torch.cat([normed, k_rope], -1), blocks[0, places // 5] * 5 + places % 5, cache)
        absorbed = torch.einsum("thn,hnl->thl", q_nope, to_key)
        q = torch.cat([absorbed, rotary(q_rope, table, places, interleaved=True)], -1)
        starts, lens = (torch.tensor(value, dtype=torch.int32) for value in ([0, end - begin], [end]))
        mixed = latent_attention(q, cache, latent, blocks.int(), starts, lens, theirs.scaling)
        y = theirs.o_proj(torch.einsum("thl,hvl->thv", mixed, to_value).flatten(1))
        torch.testing.assert_close(y, expected[0, begin:end], rtol=1e-4, atol=1e-5)


def test_shapes_and_dtypes_that_do_not_fit_are_refused() -> None:
    batch = latent_batch([(1, 5), (3, 3)])
    tables = (batch.block_tables, batch.query_starts, batch.context_lens, 1.0)
    cache = batch.k_cache[:, 0]
    for wrong in ((batch.q, cache, 41), (batch.q, cache, 0), (batch.q[..., :20], cache, 4), (batch.q, cache[0], 4)):
        with pytest.raises(ValueError, match="latent_attention"):
            latent_attention(*wrong, *tables)
    with pytest.raises(ValueError, match="latent_attention: out"):
        latent_attention(batch.q, cache, 4, *tables, out=torch.empty(4, 6, 5))
    with pytest.raises(ValueError, match="latent_attention: the shapes of tables"):
        latent_attention(batch.q, cache, 4, *tables[:2], batch.context_lens[:1], 1.0)
    for rows, slots in ((torch.ones(2, 7), [0, 1]), (torch.ones(2, 6), [0]), (torch.ones(2, 6).bfloat16(), [0, 1])):
        with pytest.raises(ValueError, match="cache_write"):
            cache_write(rows, torch.tensor(slots), torch.zeros(3, 5, 6))


@pytest.mark.parametrize("block", [-1, 10**6])
def test_a_block_id_outside_the_cache_is_refused(backend: str, block: int) -> None:
    batch = latent_batch([(1, 40), (2, 20)])
    batch.block_tables[1, 1] = block
    with pytest.raises(IndexError, match="a block id"):
        run(batch)


def test_the_operators_pass_torchs_checks() -> None:
    batch = latent_batch([(1, 5), (3, 3)])
    tables = (batch.block_tables, batch.query_starts, batch.context_lens)
    torch.library.opcheck(_operator, (batch.q, batch.k_cache[:, 0], VALUES, *tables, 1.0))
    torch.library.opcheck(_write_operator, (torch.randn(2, 6), torch.tensor([3, -1]), torch.zeros(3, 5, 6)))
    meta = latent_attention(batch.q.to("meta"), batch.k_cache[:, 0].to("meta"), VALUES, *tables, 1.0)
    assert meta.shape == (4, 6, VALUES) and meta.is_meta
