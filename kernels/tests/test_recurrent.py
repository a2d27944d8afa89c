"""causal_conv and selective_scan: against torch's convolution, a loop in float64 and transformers' Mamba."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bestiary_kernels import causal_conv, selective_scan
from bestiary_kernels.activation.reference import ACTIVATIONS
from bestiary_kernels.convolution import _operator as convolution
from bestiary_kernels.scan import _operator as scan

from .cases import assert_rounds_to

DTYPES = [torch.float32, torch.bfloat16]
#: Each step's tokens of three sequences: together and alone, fewer than a convolution reaches back, and none.
STEPS = [(9, 1, 4), (1, 1, 0), (0, 2, 12), (1, 1, 1)]
CHANNELS, STATE = 12, 5


class Slots:
    """Two slots for each of three sequences, which take turns, among others that nobody may touch."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
        self.kept = torch.full((9, *shape), float("nan"), dtype=dtype)
        self.slots = torch.tensor([[4, 1], [0, 7], [3, 8]])

    def arguments(self, step: int, lengths: tuple[int, ...]) -> tuple[Tensor, ...]:
        starts = torch.tensor([0, *lengths]).cumsum(0).int()
        read, write = (step + 1) % 2, step % 2
        slots = self.slots.T.contiguous()
        return self.kept, slots[read], slots[write], starts, torch.full((3,), step == 0)


def in_steps(slots: Slots, run: Callable[[list[slice], tuple[Tensor, ...]], Tensor]) -> list[Tensor]:
    """Run all steps; `run` gets each sequence's tokens of a step. Returns what came out by sequence."""
    done, results = [0, 0, 0], [[], [], []]  # type: ignore[var-annotated]
    for step, lengths in enumerate(STEPS):
        spans = [slice(begin, begin + length) for begin, length in zip(done, lengths, strict=True)]
        y = run(spans, slots.arguments(step, lengths))
        for s, part in enumerate(y.split(lengths)):
            results[s].append(part)
        done = [span.stop for span in spans]
    return [torch.cat(parts) for parts in results]


def totals() -> list[int]:
    return [sum(lengths) for lengths in zip(*STEPS, strict=True)]


def gathered(parts: list[Tensor], spans: list[slice]) -> Tensor:
    return torch.cat([part[span] for part, span in zip(parts, spans, strict=True)])


# ---- convolution -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["silu", None])
@pytest.mark.parametrize(("taps", "with_bias"), [(4, True), (2, False), (1, True)])
def test_a_convolution_in_steps_is_torchs_of_the_whole(
    taps: int, with_bias: bool, act: str | None, dtype: torch.dtype
) -> None:
    weight = torch.randn(CHANNELS, taps).to(dtype)
    bias = torch.randn(CHANNELS).to(dtype) if with_bias else None
    inputs = [torch.randn(total, CHANNELS).to(dtype) for total in totals()]
    slots = Slots((CHANNELS, taps - 1), dtype)
    results = in_steps(slots, lambda spans, kept: causal_conv(gathered(inputs, spans), weight, bias, *kept, act=act))
    for x, y in zip(inputs, results, strict=True):
        padded = functional.pad(x.double().T, (taps - 1, 0))
        wide_bias = None if bias is None else bias.double()
        expected = functional.conv1d(padded, weight.double()[:, None], wide_bias, groups=CHANNELS).T
        assert_rounds_to(y, (expected if act is None else ACTIVATIONS[act](expected)).to(dtype), floor=2e-5)


def test_the_last_inputs_are_kept_and_nothing_else_is_written() -> None:
    slots = Slots((CHANNELS, 3))
    x = torch.randn(6, CHANNELS)
    causal_conv(x, torch.randn(CHANNELS, 4), None, *slots.arguments(0, (5, 1, 0)))
    assert torch.equal(slots.kept[4], x[2:5].T)
    assert torch.equal(slots.kept[0], torch.stack([torch.zeros(CHANNELS), torch.zeros(CHANNELS), x[5]], 1))
    assert torch.equal(slots.kept[3], torch.zeros(CHANNELS, 3))
    assert slots.kept[[1, 2, 5, 6, 7, 8]].isnan().all()


# ---- scan ------------------------------------------------------------------------------------------------------------


def scan_inputs(total: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, dt, b and c of one sequence."""
    x, dt = torch.randn(total, CHANNELS), torch.rand(total, CHANNELS)
    return x.to(dtype), dt.to(dtype), torch.randn(total, STATE).to(dtype), torch.randn(total, STATE).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_scan_in_steps_is_the_recurrence_of_the_whole(dtype: torch.dtype) -> None:
    a, d = -torch.rand(CHANNELS, STATE) * 4, torch.randn(CHANNELS)
    inputs = [scan_inputs(total, dtype) for total in totals()]

    def run(spans: list[slice], kept: tuple[Tensor, ...]) -> Tensor:
        x, dt, b, c = (gathered(list(parts), spans) for parts in zip(*inputs, strict=True))
        return selective_scan(x, dt, a, b, c, d, *kept)

    slots = Slots((CHANNELS, STATE))
    results = in_steps(slots, run)
    for s, (given, y) in enumerate(zip(inputs, results, strict=True)):
        h = torch.zeros(CHANNELS, STATE, dtype=torch.float64)
        for x, dt, b, c, out in zip(*(tensor.double() for tensor in given), y, strict=True):
            h = (dt[:, None] * a.double()).exp() * h + torch.outer(dt * x, b)
            assert_rounds_to(out, (h @ c + d.double() * x).to(dtype), floor=2e-5)
        torch.testing.assert_close(slots.kept[slots.slots[s, 1]], h.float(), rtol=1e-5, atol=1e-5)


def test_a_step_done_again_gives_the_same_again() -> None:
    given = [torch.cat(parts) for parts in zip(*(scan_inputs(n, torch.float32) for n in (3, 1, 2)), strict=True)]
    a, d, slots = -torch.rand(CHANNELS, STATE), torch.randn(CHANNELS), Slots((CHANNELS, STATE))
    x, dt, b, c = given
    selective_scan(x, dt, a, b, c, d, *slots.arguments(0, (3, 1, 2)))
    first = selective_scan(x, dt, a, b, c, d, *slots.arguments(1, (1, 2, 3)))
    kept = slots.kept.clone()
    again = selective_scan(x, dt, a, b, c, d, *slots.arguments(1, (1, 2, 3)))
    assert torch.equal(first, again) and torch.equal(kept.nan_to_num(), slots.kept.nan_to_num())
    assert first.isfinite().all()


# ---- both ------------------------------------------------------------------------------------------------------------


def test_both_in_steps_are_transformers_mamba_mixer() -> None:
    module = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    config = module.MambaConfig(
        hidden_size=CHANNELS // 2, state_size=STATE, expand=2, conv_kernel=4, time_step_rank=3, num_hidden_layers=1
    )
    theirs: Any = module.MambaMixer(config, 0).requires_grad_(False).eval()
    for name, parameter in theirs.named_parameters():
        if name not in ("A_log", "dt_proj.bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    hidden = [torch.randn(total, CHANNELS // 2) for total in totals()]
    convolved, scanned = Slots((CHANNELS, 3)), Slots((CHANNELS, STATE))
    step = iter(range(len(STEPS)))

    def run(spans: list[slice], kept: tuple[Tensor, ...]) -> Tensor:
        x, gate = theirs.in_proj(gathered(hidden, spans)).chunk(2, -1)
        number = next(step)
        x = causal_conv(x, theirs.conv1d.weight[:, 0], theirs.conv1d.bias, *convolved.arguments(number, STEPS[number]))
        dt, b, c = theirs.x_proj(x).split((3, STATE, STATE), -1)
        dt = functional.softplus(theirs.dt_proj(dt))
        return theirs.out_proj(
            selective_scan(x, dt, -theirs.A_log.exp(), b, c, theirs.D, *kept) * functional.silu(gate)
        )

    for x, y in zip(hidden, in_steps(scanned, run), strict=True):
        torch.testing.assert_close(y, theirs(x[None])[0], rtol=1e-4, atol=1e-5)


def refusals(run: Callable[..., Tensor], arguments: dict[str, Tensor], name: str) -> None:
    """What both refuse, and that nothing was written by then."""
    wrong: list[tuple[type[Exception], str, dict[str, Tensor]]] = [
        (IndexError, "a slot", {"read_slots": torch.tensor([0, 4])}),
        (IndexError, "a slot", {"write_slots": torch.tensor([2, -1])}),
        (ValueError, "query_starts must rise", {"query_starts": torch.tensor([0, 4, 3])}),
        (ValueError, "query_starts must rise", {"query_starts": torch.tensor([1, 2, 3])}),
        (ValueError, "do not fit 2 sequences", {"query_starts": torch.tensor([0, 3])}),
        (ValueError, "do not fit 2 sequences", {"fresh": torch.zeros(2)}),
        (ValueError, "do not fit", {"states": torch.ones(4, 2, 2)}),
    ]
    for kind, message, changed in wrong:
        with pytest.raises(kind, match=f"{name}: .*{message}"):
            run(**{**arguments, **changed})
    assert (arguments["states"] == 7).all()


def common(shape: tuple[int, ...]) -> dict[str, Tensor]:
    return {
        "states": torch.full((4, *shape), 7.0),
        "read_slots": torch.tensor([0, 3]),
        "write_slots": torch.tensor([2, 1]),
        "query_starts": torch.tensor([0, 1, 3], dtype=torch.int32),
        "fresh": torch.tensor([False, False]),
    }


def test_what_does_not_fit_is_refused_before_anything_is_written() -> None:
    x = torch.randn(3, CHANNELS)
    convolved: dict[str, Any] = {"x_TC": x, "weight_CK": torch.randn(CHANNELS, 4), "bias_C": None}
    refusals(causal_conv, {**convolved, **common((CHANNELS, 3))}, "causal_conv")
    for name, value in (("bias_C", torch.ones(3)), ("act", "swish"), ("x_TC", x[:, 1:])):
        with pytest.raises(ValueError, match="causal_conv"):
            causal_conv(**{**convolved, **common((CHANNELS, 3)), name: value})
    b = torch.randn(3, STATE)
    scanned = {"x_TC": x, "dt_TC": x, "a_CN": torch.randn(CHANNELS, STATE), "b_TN": b, "c_TN": b, "d_C": x[0]}
    refusals(selective_scan, {**scanned, **common((CHANNELS, STATE))}, "selective_scan")
    for name, value in (("dt_TC", x[1:]), ("b_TN", b[:, 1:]), ("d_C", x[0, 1:])):
        with pytest.raises(ValueError, match="selective_scan"):
            selective_scan(**{**scanned, **common((CHANNELS, STATE)), name: value})


def test_a_fresh_sequence_may_have_no_slot_to_read() -> None:
    given = common((CHANNELS, 3))
    given["read_slots"], given["fresh"] = torch.tensor([-1, 3]), torch.tensor([True, False])
    x, weight = torch.randn(3, CHANNELS), torch.randn(CHANNELS, 4)
    y = causal_conv(x, weight, None, **given, act=None)  # type: ignore[arg-type]
    torch.testing.assert_close(y[0], weight[:, 3] * x[0])
    torch.testing.assert_close(y[1], 7 * weight[:, :3].sum(1) + weight[:, 3] * x[1])


def test_no_sequences_are_no_work() -> None:
    given = {name: value[:0] for name, value in common((CHANNELS, 3)).items()}
    given["states"], given["query_starts"] = torch.zeros(4, CHANNELS, 3), torch.tensor([0])
    none = torch.randn(0, CHANNELS)
    assert causal_conv(none, torch.randn(CHANNELS, 4), None, **given).shape == (0, CHANNELS)  # type: ignore[arg-type]
    b = torch.randn(0, 3)
    y = selective_scan(none, none, torch.randn(CHANNELS, 3), b, b, torch.randn(CHANNELS), **given)
    assert y.shape == (0, CHANNELS)


def test_the_operators_pass_torchs_checks() -> None:
    x, b = torch.randn(3, CHANNELS), torch.randn(3, STATE)
    convolved = tuple(common((CHANNELS, 3)).values())
    torch.library.opcheck(convolution, (x, torch.randn(CHANNELS, 4), None, *convolved, "silu"))
    torch.library.opcheck(convolution, (x, torch.randn(CHANNELS, 4), x[0].clone(), *convolved, None))
    scanned = tuple(common((CHANNELS, STATE)).values())
    torch.library.opcheck(
        scan, (x, x.abs(), -torch.rand(CHANNELS, STATE), b, b.clone(), x[0].clone(), *scanned, None, True)
    )
    meta = x.to("meta")
    assert causal_conv(meta, torch.randn(CHANNELS, 4, device="meta"), None, *convolved).shape == (3, CHANNELS)
