"""The blocks of encoders beside torch's own modules."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bestiary.blocks import (
    MLP,
    Convolution1d,
    EncoderAttention,
    EncoderLayer,
    Items,
    LayerNorm,
    Leaf,
    PatchEmbedding,
    patches,
)
from bestiary.blocks.leaf import Block
from bestiary.errors import TensorMismatch

WIDTH, HEADS, HEAD = 32, 4, 8
CPU = torch.device("cpu")
LENGTHS = (5, 1, 8, 5)


def ready(block: Block, fills: dict[str, Tensor], *, packed: bool = True) -> Block:
    """The block with tensors by place ("mixer.qkv[q]:weight"), as a checkpoint would fill it."""
    leaves = {path: module for path, module in block.named_modules() if isinstance(module, Leaf)}
    wanted = {(path, *place) for path, leaf in leaves.items() for place in leaf.expected()}
    for leaf in leaves.values():
        leaf.allocate(torch.float32, CPU)
    for place, tensor in fills.items():
        path, _, rest = place.partition("[")
        part, _, suffix = rest.partition("]:")
        leaves[path].fill(part, suffix, tensor.detach(), None)
        wanted.remove((path, part, suffix))
    assert not wanted
    for leaf in leaves.values():
        if packed:
            leaf.pack()
    for module in block.modules():
        if isinstance(module, Block):
            module.settle()
    return block


def reference() -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 48, 0.0, "gelu", 1e-5, batch_first=True, norm_first=True)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    # Left in training mode, in which torch does not fuse and so rounds as we do; nothing is dropped.
    return layer.requires_grad_(False)


def mixer_fills(layer: nn.TransformerEncoderLayer, at: str = "") -> dict[str, Tensor]:
    attention = layer.self_attn
    fills = {f"{at}out[out]:weight": attention.out_proj.weight, f"{at}out[out]:bias": attention.out_proj.bias}
    for i, part in enumerate("qkv"):
        fills[f"{at}qkv[{part}]:weight"] = attention.in_proj_weight.chunk(3)[i]
        fills[f"{at}qkv[{part}]:bias"] = attention.in_proj_bias.chunk(3)[i]
    return fills


@pytest.fixture(params=[True, False], ids=["packed", "plain"])
def layer(request: pytest.FixtureRequest) -> EncoderLayer:
    theirs = reference()
    ours = EncoderLayer(
        mix_norm=LayerNorm(WIDTH, 1e-5),
        mixer=EncoderAttention(WIDTH, heads=HEADS),
        ffn_norm=LayerNorm(WIDTH, 1e-5),
        ffn=MLP(WIDTH, 48, act="gelu"),
    )
    fills = mixer_fills(theirs, "mixer.")
    for path, module in {
        "mix_norm": theirs.norm1,
        "ffn_norm": theirs.norm2,
        "ffn.up": theirs.linear1,
        "ffn.down": theirs.linear2,
    }.items():
        fills |= {f"{path}[out]:{suffix}": tensor for suffix, tensor in module.named_parameters()}
    ready(ours, fills, packed=request.param)
    return ours


def test_a_layer_is_torchs_for_items_of_several_lengths(layer: EncoderLayer) -> None:
    x = torch.randn(sum(LENGTHS), WIDTH)
    expected = torch.cat([reference()(item[None])[0] for item in x.split(LENGTHS)])
    torch.testing.assert_close(layer(x, Items(LENGTHS)), expected, atol=1e-5, rtol=1e-4)


def test_a_layer_leaves_the_stream_that_it_reads_as_it_was(layer: EncoderLayer) -> None:
    x = torch.randn(sum(LENGTHS), WIDTH)
    before = x.clone()
    layer(x, Items(LENGTHS))
    assert torch.equal(x, before)


def test_an_item_never_sees_another(layer: EncoderLayer) -> None:
    x = torch.randn(sum(LENGTHS), WIDTH)
    spoilt = x.clone()
    spoilt[6:14] = torch.nan
    found = layer(spoilt, Items(LENGTHS))
    assert found[6:14].isnan().all()
    assert torch.equal(found[:6], layer(x, Items(LENGTHS))[:6])


def test_masks_say_what_is_seen_or_what_is_added_to_scores() -> None:
    theirs = reference().self_attn
    ours = ready(EncoderAttention(WIDTH, heads=HEADS), mixer_fills(reference()))
    x = torch.randn(10, WIDTH)
    seen = torch.ones(5, 5, dtype=torch.bool).tril()
    added = torch.randn(HEADS, 5, 5)
    first = theirs(x[None, :5], x[None, :5], x[None, :5], attn_mask=~seen)[0][0]
    second = theirs(x[None, 5:], x[None, 5:], x[None, 5:], attn_mask=added)[0][0]
    torch.testing.assert_close(ours(x[:5], Items((5,), masks=(seen[None],))), first)
    torch.testing.assert_close(ours(x[5:], Items((5,), masks=(added,))), second)
    both = Items((5, 5), masks=(torch.zeros(1, 5, 5).masked_fill(~seen, -torch.inf), added))
    torch.testing.assert_close(ours(x, both), torch.cat((first, second)))


@pytest.mark.parametrize("interleaved", [False, True])
def test_queries_and_keys_turn_by_the_angles_as_complex_numbers_do(interleaved: bool) -> None:
    ours = ready(EncoderAttention(WIDTH, heads=HEADS, interleaved=interleaved), mixer_fills(reference()))
    x, angles = torch.randn(7, WIDTH), torch.randn(7, HEAD // 2)

    def turned(projected: Tensor) -> Tensor:
        heads = projected.view(7, HEADS, HEAD)
        pairs = heads.unflatten(-1, (-1, 2)) if interleaved else heads.unflatten(-1, (2, -1)).mT
        spun = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.view_as_real(spun).flatten(-2).transpose(0, 1)

    attention = reference().self_attn
    q, k, v = F.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
    weights = (turned(q) @ turned(k).mT / HEAD**0.5).softmax(-1)
    mixed = (weights @ v.view(7, HEADS, HEAD).transpose(0, 1)).transpose(0, 1).flatten(1)
    found = ours(x, Items((7,), angles=torch.stack((angles.cos(), angles.sin()), 1)))
    torch.testing.assert_close(found, attention.out_proj(mixed), atol=1e-5, rtol=1e-4)


def test_a_part_without_a_bias_is_not_asked_for_one_and_has_zeros() -> None:
    theirs, x = reference(), torch.randn(6, WIDTH)
    theirs.self_attn.in_proj_bias[WIDTH : 2 * WIDTH] = 0
    fills = mixer_fills(theirs)
    whole = ready(EncoderAttention(WIDTH, heads=HEADS), dict(fills))
    del fills["qkv[k]:bias"]
    ours = ready(EncoderAttention(WIDTH, heads=HEADS, biases=("q", "v")), fills)
    torch.testing.assert_close(ours(x, Items((6,))), theirs.self_attn(x[None], x[None], x[None])[0][0])
    # Where nothing turns, a bias of keys moves all scores of a query alike, and would not show.
    turning = Items((6,), angles=torch.rand(6, 2, HEAD // 2))
    torch.testing.assert_close(ours(x, turning), whole(x, turning))


def test_heads_may_be_wider_or_narrower_than_their_share() -> None:
    attention = EncoderAttention(WIDTH, heads=2, head_dim=6, biases=(), out_bias=False)
    shapes = {path: module.shapes() for path, module in attention.named_modules() if isinstance(module, Leaf)}
    assert shapes == {"qkv": {"weight": (36, WIDTH)}, "out": {"weight": (WIDTH, 12)}}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("height", "width"), [(12, 8), (4, 4), (15, 9)])
def test_a_patch_embedding_is_a_convolution_whose_stride_is_its_kernel(height: int, width: int, packed: bool) -> None:
    kernel, bias, pixels = torch.randn(WIDTH, 3, 4, 4), torch.randn(WIDTH), torch.randn(2, 3, height, width)
    embed = ready(PatchEmbedding(3, 4, WIDTH, bias=True), {"[out]:weight": kernel, "[out]:bias": bias}, packed=packed)
    expected = F.conv2d(pixels, kernel, bias, stride=4).flatten(2).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(embed(patches(pixels, 4)), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(embed(patches(pixels, 4).double()), expected, atol=1e-5, rtol=1e-4)


def test_a_patch_embedding_takes_its_weight_flat_or_whole_and_of_pictures_in_a_row() -> None:
    kernel, video = torch.randn(WIDTH, 3, 2, 4, 4), torch.randn(1, 3, 2, 4, 4)
    for stored in (kernel, kernel.flatten(1)):
        embed = ready(PatchEmbedding(3, 4, WIDTH, frames=2), {"[out]:weight": stored})
        torch.testing.assert_close(embed(video.flatten(1)), F.conv3d(video, kernel).flatten(1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", [(WIDTH, 4, 4, 3), (WIDTH, 3, 1, 4, 4), (WIDTH, 47), (WIDTH + 1, 3, 4, 4)])
def test_a_kernel_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(TensorMismatch, match="shape"):
        ready(PatchEmbedding(3, 4, WIDTH), {"[out]:weight": torch.zeros(shape)})


@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 1), (3, 0)])
@pytest.mark.parametrize("frames", [3, 4, 9])
def test_a_convolution_over_time_is_torchs(frames: int, stride: int, padding: int) -> None:
    kernel, bias, x = torch.randn(WIDTH, 5, 3), torch.randn(WIDTH), torch.randn(5, frames)
    convolution = Convolution1d(5, WIDTH, taps=3, stride=stride, padding=padding)
    ready(convolution, {"[out]:weight": kernel, "[out]:bias": bias})
    expected = F.conv1d(x, kernel, bias, stride=stride, padding=padding)
    torch.testing.assert_close(convolution(x), expected, atol=1e-5, rtol=1e-4)
