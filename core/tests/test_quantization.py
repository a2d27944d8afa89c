"""quantization=int8 or int4: which matrices it touches, what they compute then, and that nothing else changes."""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import bestiary_kernels as kernels
from bestiary import LLM, SamplingParams, model, registry
from bestiary.blocks import Decoder, Head, Lanes, Linear, MoE, Update
from bestiary.blocks.linear import Format
from bestiary.checkpoint import Checkpoint, ConfigFile
from bestiary.config import EngineConfig
from bestiary.parallel import Mesh
from bestiary.planner import Shapes
from bestiary.testing.fixture import Fixture
from bestiary.testing.tiny import tiny_checkpoint

CPU = torch.device("cpu")
FORMATS: tuple[Format, ...] = ("int8", "int4")
#: Where the numbers of a format lie, as a share of the logits' spread, at most.
NEAR = {"int8": 0.05, "int4": 0.7}
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
PROMPTS = ["The griffin " * n for n in (1, 2, 5, 9, 14, 30)]


@pytest.fixture(scope="module", params=[False, True], ids=["own head", "tied head"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("m")
    return tiny_checkpoint(folder, "LlamaForCausalLM", dtype=torch.bfloat16, tied=request.param)


def described(folder: Path) -> Any:
    file = ConfigFile.load(folder)
    return model.describe(registry.resolve(file.architectures), file)


def built(folder: Path, quantization: str | None, dtype: torch.dtype = torch.bfloat16) -> Decoder:
    tree, names, _ = described(folder)
    with Checkpoint.open(folder) as checkpoint:
        return model.build(
            tree, names, checkpoint, dtype=dtype, device=CPU, length=64, mesh=Mesh(), quantization=quantization
        )


def linears(tree: Decoder) -> Iterator[tuple[str, Linear]]:
    return ((path, leaf) for path, leaf in model.leaves(tree) if isinstance(leaf, Linear))


# --- which matrices -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", FORMATS)
def test_the_matrices_of_the_layers_take_the_format_and_the_others_stay(folder: Path, quantization: Format) -> None:
    for path, leaf in linears(built(folder, quantization)):
        assert isinstance(leaf.packed, kernels.QuantisedLinear) == path.startswith("layers.")
        assert isinstance(leaf.packed, kernels.PackedLinear) == isinstance(leaf, Head)
        assert not hasattr(leaf, "weight")


def test_what_decides_where_a_token_goes_stays_exact() -> None:
    architecture = registry.find("MixtralForCausalLM").load()
    case = import_module(str(architecture.proof)).CASES[0]
    file = ConfigFile({**case.config, "architectures": ["MixtralForCausalLM"]}, Path("config.json"))
    tree = model.describe(architecture, file).tree
    model.quantise(tree, "int8")
    routers = [block.router for block in tree.modules() if isinstance(block, MoE)]
    assert routers and all(router.format is None for router in routers)
    assert {leaf.format for path, leaf in linears(tree) if "mixer" in path} == {"int8"}


def test_only_few_matrices_are_large_at_any_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fused matrix waits for its parts, in whatever order the file has them; all others are made small at once."""
    tree, names, _ = described(folder)
    most, fill = 0, Linear.fill

    def counting(self: Linear, part: str | None, suffix: str, tensor: Tensor, index: int | None) -> None:
        nonlocal most
        fill(self, part, suffix, tensor, index)
        most = max(most, sum("weight" in leaf._parameters for path, leaf in linears(tree) if "layers" in path))

    monkeypatch.setattr(Linear, "fill", counting)
    with Checkpoint.open(folder) as checkpoint:
        model.build(tree, names, checkpoint, dtype=torch.bfloat16, device=CPU, length=64, quantization="int8")
    assert most <= 2


@pytest.mark.parametrize("quantization", FORMATS)
def test_the_planner_counts_what_is_stored(folder: Path, quantization: Format) -> None:
    planned = Shapes(ConfigFile.load(folder), EngineConfig(model="m", quantization=quantization))
    large = Shapes(ConfigFile.load(folder), EngineConfig(model="m"))
    small = dict(linears(built(folder, quantization)))
    tree = described(folder).tree
    for path, leaf in linears(tree):
        leaf.format = quantization if path.startswith("layers.") else None
        if leaf.format:
            packed = small[path].packed
            assert packed is not None
            whole = -(-packed.outputs // 64) * 64
            assert packed.nbytes == leaf.nbytes(torch.bfloat16) * whole // packed.outputs
    assert planned.weight_bytes < large.weight_bytes
    rank, before = planned.rank(Mesh()), large.rank(Mesh())
    assert rank.weight_bytes == planned.weight_bytes
    assert rank.flops(3) == before.flops(3) and rank.weights_read(3) < before.weights_read(3)


# --- what they compute --------------------------------------------------------------------------------------------


def linear(weight: Tensor, quantization: Format | None, *, bias: Tensor | None = None, cut: Any = None) -> Linear:
    """A matrix of two parts, filled one after the other."""
    rows, columns = weight.shape
    leaf = Linear(columns, {"a": rows // 2, "b": rows - rows // 2}, "column", bias=bias is not None)
    leaf.format = quantization
    if cut is not None:
        cut(leaf)
    leaf.allocate(weight.dtype, CPU)
    for suffix, tensor in {"weight": weight, **({} if bias is None else {"bias": bias})}.items():
        leaf.fill("b", suffix, tensor[rows // 2 :], None)
        leaf.fill("a", suffix, tensor[: rows // 2], None)
    leaf.pack()
    leaf.settle()
    return leaf


def meant(weight: Tensor, quantization: Format) -> Tensor:
    return kernels.dequantise(*kernels.quantise(weight, 8 if quantization == "int8" else 4))


@settings(max_examples=25, deadline=None)
@given(
    quantization=st.sampled_from(FORMATS),
    rows=st.integers(2, 140),
    columns=st.integers(1, 140),
    tokens=st.integers(0, 9),
    has_bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_matrix_of_parts_computes_with_the_weights_that_its_codes_mean(
    quantization: Format, rows: int, columns: int, tokens: int, has_bias: bool, dtype: torch.dtype
) -> None:
    weight, x = torch.randn(rows, columns).to(dtype), torch.randn(tokens, columns).to(dtype)
    bias = torch.randn(rows).to(dtype) if has_bias else None
    wanted = x.float() @ meant(weight, quantization).T + (0 if bias is None else bias.float())
    tolerance = 1e-4 if dtype is torch.float32 else 1e-2
    found = linear(weight, quantization, bias=bias)(x)
    torch.testing.assert_close(found.float(), wanted, atol=tolerance * columns**0.5, rtol=tolerance)


@pytest.mark.parametrize("quantization", FORMATS)
def test_shards_quantise_what_they_have(quantization: Format) -> None:
    weight, x = torch.randn(96, 128), torch.randn(5, 128)
    upper = linear(weight, quantization, cut=lambda leaf: leaf.keep_rows(a=range(24), b=range(24, 48)))
    own = torch.cat((weight[:24], weight[72:]))
    torch.testing.assert_close(upper(x), x @ meant(own, quantization).T, atol=1e-4, rtol=1e-4)
    shares = (range(64), range(64, 128))
    halves = [linear(weight, quantization, cut=lambda leaf, share=share: leaf.keep_columns(share)) for share in shares]
    found = sum((half(x[:, s.start : s.stop]) for half, s in zip(halves, shares, strict=True)), torch.zeros(5, 96))
    wanted = sum(
        (x[:, s.start : s.stop] @ meant(weight[:, s.start : s.stop], quantization).T for s in shares), 0 * found
    )
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("quantization", FORMATS)
def test_adapters_are_added_to_the_product(quantization: Format) -> None:
    weight, x = torch.randn(60, 48), torch.randn(3, 48)
    leaf, lanes = linear(weight, quantization), Lanes()
    plain = leaf(x)
    leaf.adapt(lanes, 2, 4, torch.float32, CPU)
    down, up = torch.randn(4, 48), torch.randn(30, 4)
    assert leaf.low is not None
    leaf.low.write(1, [Update("b", down, up)])
    lanes.set({"tokens": torch.tensor([1, -1, 1], dtype=torch.int32)})
    added = torch.zeros(3, 60)
    added[[0, 2], 30:] = (x @ down.T @ up.T)[[0, 2]]
    torch.testing.assert_close(leaf(x), plain + added, atol=1e-4, rtol=1e-4)


# --- a model ------------------------------------------------------------------------------------------------------


def logprobs(folder: Path, dtype: str, quantization: str | None) -> Tensor:
    """[steps, 20] of the prompt's own tokens, so that the texts cannot part ways."""
    llm = LLM(str(folder), dtype=dtype, quantization=quantization, max_model_len=256)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    found = []
    for output in llm.generate(PROMPTS, params, use_tqdm=False):
        assert output.prompt_logprobs is not None
        for step, token in zip(output.prompt_logprobs, output.prompt_token_ids, strict=True):
            if step is not None:
                found.append(step[token].logprob)
    return torch.tensor(found)


@pytest.mark.parametrize("quantization", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_model_thinks_stays_near(folder: Path, dtype: str, quantization: Format) -> None:
    exact, found = logprobs(folder, "float32", None), logprobs(folder, dtype, quantization)
    assert 0 < float((found - exact).square().mean().sqrt() / exact.std()) < NEAR[quantization]


@pytest.mark.parametrize("name", ["JambaForCausalLM", "MllamaForConditionalGeneration"])
def test_layers_of_every_kind_are_served_split_too(name: str, tmp_path: Path) -> None:
    """Experts, states, and vectors that are looked at; two ranks round what each has of a row."""
    case = import_module(str(registry.find(name).load().proof)).CASES[0]
    fixture = Fixture(name, case, tmp_path)
    samples = fixture.samples[:2]
    exact = fixture.answers(fixture.engine(), samples, logprobs=True)
    split = fixture.engine(quantization="int8", tensor_parallel_size=2)
    try:
        found = {"alone": fixture.engine(quantization="int8"), "split": split}
        for engine in found.values():
            for wanted, answer in zip(exact, fixture.answers(engine, samples, logprobs=True), strict=True):
                off = (answer.prompt_logprobs - wanted.prompt_logprobs).square().mean().sqrt()
                assert 0 < float(off / wanted.prompt_logprobs.std()) < 0.15
    finally:
        split.close()


@pytest.mark.parametrize("quantization", FORMATS)
def test_the_text_is_the_same_alone_together_and_in_chunks(folder: Path, quantization: Format) -> None:
    def texts(prompts: list[str], **more: Any) -> list[list[int]]:
        llm = LLM(str(folder), quantization=quantization, max_model_len=256, enable_prefix_caching=False, **more)
        return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, GREEDY, use_tqdm=False)]

    together = texts(PROMPTS)
    assert [texts([prompt])[0] for prompt in PROMPTS[::2]] == together[::2]
    assert texts(PROMPTS, max_num_batched_tokens=7, max_num_seqs=3) == together


@pytest.mark.skipif(
    kernels.status().backend not in ("avx512_bf16", "amx_bf16"), reason="this machine's matrices are oneDNN's"
)
@pytest.mark.parametrize("quantization", FORMATS)
def test_recorded_steps_contain_the_product(folder: Path, quantization: Format) -> None:
    llm = LLM(str(folder), quantization=quantization, max_model_len=256)
    llm.generate(PROMPTS[:2], GREEDY, use_tqdm=False)
    runner = llm.engine.executor.runner  # type: ignore[attr-defined]
    (step,) = (found for key, found in runner._replays._steps.items() if key.size == 2)
    products = sum(path.startswith("layers.") for path, _ in linears(runner._model))
    assert step.recording._names.count("quantised_linear") == products > 0
