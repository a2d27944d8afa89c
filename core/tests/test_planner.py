"""What the planner says against what is really allocated, on small models, and its arithmetic on devices."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from bestiary import model, registry
from bestiary.blocks import Experts, Leaf, Linear
from bestiary.cache import CacheGroup, store
from bestiary.checkpoint import ConfigFile, Names
from bestiary.cli import main
from bestiary.config import EngineConfig
from bestiary.errors import SettingError
from bestiary.parallel import Mesh
from bestiary.planner import Device, Shapes, device, devices
from bestiary_kernels import PackedLinear, QuantisedLinear
from bestiary_kernels.linear import squeezed

CPU = torch.device("cpu")
NAMES = (
    "LlamaForCausalLM",
    "MixtralForCausalLM",
    "DeepseekV2ForCausalLM",
    "JambaForCausalLM",
    "Gemma2ForCausalLM",
    "BartForConditionalGeneration",
    "MllamaForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
)


def shapes(name: str, config: dict[str, Any], **settings: Any) -> Shapes:
    values = {**json.loads(json.dumps(config)), "architectures": [name]}
    return Shapes(ConfigFile(values, Path("config.json")), EngineConfig(model="m", **settings))


def small(name: str, **settings: Any) -> Shapes:
    case = import_module(str(registry.find(name).load().proof)).CASES[0]
    return shapes(name, case.config, **settings)


@pytest.mark.parametrize(("shards", "stages"), [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("name", NAMES)
def test_weights_and_cache_are_those_that_are_allocated(name: str, shards: int, stages: int) -> None:
    planned = small(name)
    for rank in range(shards * stages):
        mesh = Mesh.at(rank, stages, shards, Mesh().link)
        found = planned.rank(mesh)
        tree = planned._described()
        kinds = model.kinds(model.keeps(tree))
        model.part(tree, mesh)
        for _, leaf in model.leaves(tree):
            leaf.allocate(planned.dtype, CPU)
        leaves = [leaf for leaf in tree.modules() if isinstance(leaf, Leaf)]
        assert found.weight_bytes == sum(p.nbytes for leaf in leaves for p in leaf.parameters(recurse=False))
        groups = [CacheGroup(8, *kind) for kind in kinds]
        kept = model.keeps(tree)
        tensors = store.allocate(kept, kinds, groups, 16, planned.dtype, CPU)
        blocks = {group: group.most_held(128, 64, 16) for group in groups}
        wanted = sum(
            tensor.nbytes // 8 * blocks[groups[kinds.index(layer.kind)]]
            for layer, some in zip(kept, tensors, strict=True)
            for tensor in some
        )
        assert found.cache_held(128, 64, 16) == wanted


def read_of(weight: PackedLinear | QuantisedLinear) -> int:
    """Small ones of which oneDNN has a layout of its own stand in memory twice."""
    is_squeezed = isinstance(weight, PackedLinear) and weight.form == "squeezed"
    return weight.nbytes if is_squeezed else 2 * weight.outputs * weight.inputs


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MixtralForCausalLM", "DeepseekV2ForCausalLM"])
def test_what_a_step_reads_on_this_machine_is_what_is_packed_here(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(squeezed, "_LEAST", 0)
    planned = small(name, dtype="bfloat16")
    found, elsewhere = planned.rank(Mesh(), here=True), planned.rank(Mesh())
    tree = model.build(planned._described(), Names(), None, dtype=torch.bfloat16, device=CPU, length=64)
    dense, experts = 0, 0
    for path, leaf in model.leaves(tree):
        if isinstance(leaf, Experts):
            experts += leaf.matrices.nbytes
        elif isinstance(leaf, Linear) and leaf.packed is not None:
            dense += read_of(leaf.packed) + (leaf.bias.nbytes if leaf.has_bias else 0)
        elif path != "embed":
            dense += sum(tensor.nbytes for tensor in leaf.parameters(recurse=False))
    assert found.dense_bytes <= dense <= found.dense_bytes * 1.01
    assert sum(found.expert_bytes.values()) <= experts <= sum(found.expert_bytes.values()) * 1.01
    assert found.weight_bytes == elsewhere.weight_bytes and found.flops(3) == elsewhere.flops(3)
    if squeezed.Squeezed.size((1, 32)) is not None:
        assert found.dense_bytes < elsewhere.dense_bytes


def test_devices_have_figures_and_sources() -> None:
    assert {"h200", "h100", "a100-80g", "l4", "rtx4090", "mi300x", "b200"} <= devices().keys()
    for one in devices().values():
        assert one.memory_bytes > 2**33 and one.bandwidth and one.bandwidth > 10**11 and one.source
    with pytest.raises(SettingError, match=r"device='abacus'.*h200.*--memory"):
        device("abacus")


def test_a_ceiling_is_bytes_over_bandwidth() -> None:
    planned = small("LlamaForCausalLM")
    on = Device("slow", 2**30, 1e6, None, "a test")
    plan = planned.plan(on, 1, 1, 64)
    (rank,) = plan.ranks
    ceiling = plan.ceiling(1)
    assert ceiling is not None
    read = rank.dense_bytes + rank.row_bytes + rank.token_bytes * 64
    assert ceiling.tokens_per_second == pytest.approx(1e6 / read)
    assert plan.fits(plan.largest_batch) and not plan.fits(plan.largest_batch + 1)


def test_experts_are_read_as_often_as_they_are_chosen() -> None:
    rank = small("MixtralForCausalLM").rank(Mesh())
    ((experts, chosen), size), *others = rank.expert_bytes.items()
    assert not others and chosen < experts
    assert rank.weights_read(1) == pytest.approx(rank.dense_bytes + rank.row_bytes + size * chosen / experts)
    assert rank.weights_read(10**6) == pytest.approx(rank.dense_bytes + rank.row_bytes * 10**6 + size)


def test_what_does_not_fit_is_said_with_the_smallest_split_that_does() -> None:
    planned = small("LlamaForCausalLM")
    whole = planned.weight_bytes
    on = Device("tiny", int(whole * 0.7), None, None, "a test")
    assert planned.smallest_split(Device("large", whole * 4, None, None, "a test"), 16) == (1, 1)
    assert planned.smallest_split(on, 16) == (2, 1)
    assert planned.smallest_split(Device("nothing", 1000, None, None, "a test"), 16) is None


def test_the_verb_prints_what_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = import_module(str(registry.find("LlamaForCausalLM").load().proof)).CASES[0]
    config = {**case.config, "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["plan", str(tmp_path), "--device", "h200", "--tp", "2", "--context", "32"]) == 0
    said = capsys.readouterr().out
    assert "largest batch" in said and "tp 2 x pp 1: 2 x h200" in said
    command = [
        "plan",
        str(tmp_path / "config.json"),
        "--memory",
        "1MB",
        "--bandwidth",
        "1GB/s",
        "--context",
        "32",
        "--json",
    ]
    assert main(command) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["device"]["bandwidth"] == 10**9 and facts["usable_bytes"] == 900_000
    assert main(["plan", str(tmp_path), "--device", "h200", "--tp", "3"]) != 0
    assert "cannot share evenly" in capsys.readouterr().err
