"""The passes from a description to a model that runs."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bestiary import model
from bestiary.architecture import Architecture, Task
from bestiary.batch import Batch, Pages
from bestiary.blocks import Attention, Decoder, Embedding, GatedMLP, Head, Kind, Layer, Layers, Linear, RMSNorm, Rope
from bestiary.cache import CacheGroup, store
from bestiary.checkpoint import Checkpoint, ConfigFile, Names
from bestiary.config import EngineConfig
from bestiary.errors import ConfigUnsupported, PluginBroken, SettingError, TensorMismatch, UnknownArchitecture
from bestiary.parallel import Mesh
from bestiary.runner import Runner
from bestiary.testing.tiny import tiny_checkpoint

WIDTH, INNER, LAYERS, HEADS, KV_HEADS = 64, 128, 5, 4, 2
CPU = torch.device("cpu")


def describe(vocabulary: int, *, tied: bool) -> Decoder:
    rope = Rope(WIDTH // HEADS, base=10000.0)

    def layer(i: int) -> Layer:
        return Layer(
            mix_norm=RMSNorm(WIDTH, 1e-5),
            mixer=Attention(WIDTH, heads=HEADS, kv_heads=KV_HEADS, head_dim=WIDTH // HEADS, rope=rope),
            ffn_norm=RMSNorm(WIDTH, 1e-5),
            ffn=GatedMLP(WIDTH, INNER),
        )

    return Decoder(
        embed=Embedding(vocabulary, WIDTH),
        layers=Layers(LAYERS, layer),
        norm=RMSNorm(WIDTH, 1e-5),
        head=Head(vocabulary, WIDTH, tied=tied),
        context=64,
    )


NAMES = Names(
    ("model.embed_tokens", "embed"),
    ("model.layers.*.input_layernorm", "layers.*.mix_norm"),
    ("model.layers.*.self_attn.q_proj", "layers.*.mixer.qkv[q]"),
    ("model.layers.*.self_attn.k_proj", "layers.*.mixer.qkv[k]"),
    ("model.layers.*.self_attn.v_proj", "layers.*.mixer.qkv[v]"),
    ("model.layers.*.self_attn.o_proj", "layers.*.mixer.out"),
    ("model.layers.*.post_attention_layernorm", "layers.*.ffn_norm"),
    ("model.layers.*.mlp.gate_proj", "layers.*.ffn.gate_up[gate]"),
    ("model.layers.*.mlp.up_proj", "layers.*.ffn.gate_up[up]"),
    ("model.layers.*.mlp.down_proj", "layers.*.ffn.down"),
    ("model.norm", "norm"),
    ("lm_head", "head"),
)


@pytest.fixture(scope="module", params=[False, True], ids=["own head", "tied head"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("m"), "X", layers=LAYERS, tied=request.param)


def build(folder: Path, mesh: Mesh | None = None, dtype: torch.dtype = torch.float32) -> Decoder:
    file = ConfigFile.load(folder)
    tree = describe(file.need("vocab_size", int), tied=file.get("tie_word_embeddings", bool, False))
    with Checkpoint.open(folder) as checkpoint:
        return model.build(tree, NAMES, checkpoint, dtype=dtype, device=CPU, length=64, mesh=mesh)


def batch(tree: Decoder, tokens: list[int], rows: list[int] | None = None, dtype: torch.dtype = torch.float32) -> Batch:
    n = len(tokens)
    return Batch(
        token_ids=torch.tensor(tokens),
        positions=torch.arange(n),
        query_starts=torch.tensor([0, n], dtype=torch.int32),
        context_lens=torch.tensor([n], dtype=torch.int32),
        pages={0: Pages(torch.arange(4, dtype=torch.int32)[None], torch.arange(n))},
        states={},
        output_rows=None if rows is None else torch.tensor(rows),
        caches=store.allocate(model.keeps(tree), [Kind()], [CacheGroup(4)], 16, dtype, CPU),
    )


TOKENS = [5, 99, 40, 7, 200, 31, 8]


@pytest.mark.parametrize("stages", [1, 2, 3, 5])
@torch.inference_mode()
def test_a_chain_of_stages_computes_what_the_whole_does(folder: Path, stages: int) -> None:
    whole = build(folder)
    expected = whole.logits(whole(batch(whole, TOKENS)))
    stream: torch.Tensor | None = None
    for stage in range(stages):
        part = build(folder, Mesh(stage, stages))
        stream = part(batch(part, TOKENS), stream)
    assert stream is not None
    torch.testing.assert_close(part.logits(stream), expected, atol=1e-5, rtol=1e-5)


def test_every_layer_has_one_stage_and_the_spread_is_even() -> None:
    for count in range(1, 20):
        for stages in range(1, count + 1):
            kept = [Mesh(stage, stages).layers_of(count) for stage in range(stages)]
            assert [i for layers in kept for i in layers] == list(range(count))
            assert max(map(len, kept)) - min(map(len, kept)) <= 1


@torch.inference_mode()
def test_only_the_wanted_rows_leave_the_model(folder: Path) -> None:
    tree = build(folder)
    every = tree(batch(tree, TOKENS))
    torch.testing.assert_close(tree(batch(tree, TOKENS, [6, 2])), every[[6, 2]], atol=1e-6, rtol=1e-6)


def test_a_tied_table_is_counted_and_stored_once(folder: Path) -> None:
    file = ConfigFile.load(folder)
    vocabulary, tied = file.need("vocab_size", int), file.get("tie_word_embeddings", bool, False)
    layer = WIDTH * (WIDTH + 2 * 32) + WIDTH * WIDTH + 3 * WIDTH * INNER + 2 * WIDTH
    tables = 1 if tied else 2
    assert model.num_parameters(describe(vocabulary, tied=tied)) == tables * vocabulary * WIDTH + LAYERS * layer + WIDTH


@pytest.mark.parametrize("shard", [None, 0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_second_copy_of_a_tied_table_must_say_the_same(
    tmp_path: Path, shard: int | None, dtype: torch.dtype, recwarn: pytest.WarningsRecorder
) -> None:
    folder = tiny_checkpoint(tmp_path, "X", layers=LAYERS, tied=True)
    mesh = Mesh() if shard is None else Mesh(shard=shard, shards=2)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    build(folder, mesh, dtype)
    assert not recwarn.list
    tensors["lm_head.weight"][[0, -1]] += 1  # a row of each shard
    save_file(tensors, folder / "model.safetensors")
    with pytest.warns(RuntimeWarning, match="differs from the table it is tied to, and is not used"):
        build(folder, mesh, dtype)


def test_describing_makes_no_tensor() -> None:
    assert list(describe(100, tied=False).parameters()) == []


def test_packing_lets_the_original_go(folder: Path) -> None:
    tree = build(folder, dtype=torch.bfloat16)
    linears = [leaf for leaf in tree.modules() if isinstance(leaf, Linear)]
    assert linears
    assert all(leaf.packed is not None and not hasattr(leaf, "weight") for leaf in linears)


def test_layers_that_turn_alike_share_one_table_of_angles(folder: Path) -> None:
    tables = {id(m.angles) for m in build(folder).modules() if isinstance(m, Attention)}
    assert len(tables) == 1


@torch.inference_mode()
def test_layers_that_turn_alike_by_several_axes_gather_a_steps_angles_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, gathered = build(folder), []
    turned = Rope.turned

    def counted(rope: Rope, table: torch.Tensor, axes: torch.Tensor) -> torch.Tensor:
        gathered.append(axes)
        return turned(rope, table, axes)

    monkeypatch.setattr(Rope, "turned", counted)
    expected = tree(batch(tree, TOKENS))
    for mixer in (m for m in tree.modules() if isinstance(m, Attention)):
        assert mixer.rope is not None
        mixer.rope = replace(mixer.rope, sections=(3, 3, 2))
    places = torch.arange(len(TOKENS)).expand(3, -1)
    for axes, same in ((places, True), (places * torch.tensor([[1], [2], [3]]), False), (places, True)):
        step = replace(batch(tree, TOKENS), axes=axes)
        assert torch.allclose(tree(step), expected, atol=1e-5) == same
    assert len(gathered) == 3


def test_a_tensor_of_another_shape_names_itself(folder: Path) -> None:
    wrong = describe(ConfigFile.load(folder).need("vocab_size", int) + 1, tied=False)
    with Checkpoint.open(folder) as checkpoint, pytest.raises(TensorMismatch, match="lm_head"):
        model.build(wrong, NAMES, checkpoint, dtype=torch.float32, device=CPU, length=64)


@pytest.mark.parametrize(
    ("setting", "stated", "expected"),
    [
        ("auto", "bfloat16", torch.bfloat16),
        ("auto", None, torch.float32),
        ("half", "bfloat16", torch.float16),
        ("float", "bfloat16", torch.float32),
        ("float32", "bfloat16", torch.float32),
    ],
)
def test_the_dtype_is_the_settings_else_the_checkpoints(
    setting: str, stated: str | None, expected: torch.dtype
) -> None:
    values: dict[str, Any] = {} if stated is None else {"torch_dtype": stated}
    assert model.choose_dtype(setting, ConfigFile(values, Path("config.json"))) is expected


def test_a_dtype_that_is_not_served_says_what_is() -> None:
    with pytest.raises(ConfigUnsupported, match=r"float8.*dtype=bfloat16"):
        model.choose_dtype("auto", ConfigFile({"torch_dtype": "float8_e4m3fn"}, Path("config.json")))


def declared(module: str) -> Architecture:
    return Architecture(name="X", model=module, tasks={Task.GENERATE})


def test_a_model_module_that_fails_to_import_is_broken() -> None:
    with pytest.raises(PluginBroken, match=r"X: its model module 'no_such_module_at_all'"):
        model.model_module(declared("no_such_module_at_all"), ConfigFile({}, Path("config.json")))


def test_a_model_module_without_its_parts_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "half_a_model", ModuleType("half_a_model"))
    with pytest.raises(PluginBroken, match="lacks Config, NAMES, describe"):
        model.model_module(declared("half_a_model"), ConfigFile({}, Path("config.json")))


# A model around another one, whose tensors may be in a checkpoint of its own.


class Inner:
    """A model module; its configuration is the section that it was read from."""

    def __init__(self) -> None:
        self.Config, self.NAMES = type("Config", (), {"read": staticmethod(lambda file: file)}), NAMES

    @staticmethod
    def describe(file: ConfigFile) -> Decoder:
        return describe(file.need("vocab_size", int), tied=file.get("tie_word_embeddings", bool, False))


class Outer(Inner):
    """As a plugin would write it: names that depend on the configuration, and tensors that are elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.NAMES = lambda file: self._text(file).names.under("text.", "")

    @staticmethod
    def _text(file: ConfigFile) -> model.Described:
        return model.language_model(file.section("text_config"), {"inner": "InnerForCausalLM"})

    def describe(self, file: ConfigFile) -> Decoder:  # type: ignore[override]
        return self._text(file).tree

    def others(self, file: ConfigFile) -> list[model.Other]:
        return [model.Other(file.need("text_model", str), "text.")]


@pytest.fixture
def nested(monkeypatch: pytest.MonkeyPatch, folder: Path) -> dict[str, Any]:
    """The config.json of an outer model; plugins for both are installed."""
    monkeypatch.setitem(sys.modules, "an_inner_model", Inner())  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "an_outer_model", Outer())  # type: ignore[arg-type]
    known = {"InnerForCausalLM": Architecture(name="InnerForCausalLM", model="an_inner_model", tasks={Task.GENERATE})}
    monkeypatch.setattr(model.registry, "find", lambda name: SimpleNamespace(load=lambda: known[name]))
    text = {**ConfigFile.load(folder).values, "model_type": "inner"}
    return {"architectures": ["Outer"], "text_config": text, "text_model": str(folder), "dtype": "float32"}


def test_a_part_of_a_configuration_is_described_by_the_plugin_for_it(nested: dict[str, Any], folder: Path) -> None:
    file = ConfigFile(nested, Path("config.json"))
    tree, names, others = model.describe(declared("an_outer_model"), file)
    assert model.num_parameters(tree) == model.num_parameters(Inner.describe(ConfigFile.load(folder)))
    target = names.find("text.model.norm.weight")
    assert target is not None and target.path == "norm" and names.find("model.norm.weight") is None
    assert others == (model.Other(str(folder), "text."),)


def test_a_model_without_others_names_none(nested: dict[str, Any], folder: Path) -> None:
    assert model.describe(declared("an_inner_model"), ConfigFile.load(folder)).others == ()


def test_a_part_of_a_kind_that_the_outer_model_does_not_take_is_refused_with_those_it_does() -> None:
    for values, complaint in (({"model_type": "other"}, r"'other'.*'inner'"), ({}, "is missing.*'inner'")):
        section = ConfigFile({"text_config": values}, Path("config.json")).section("text_config")
        with pytest.raises(ConfigUnsupported, match=rf"text_config\.model_type.*{complaint}"):
            model.language_model(section, {"inner": "InnerForCausalLM"})


def test_a_part_that_no_plugin_serves_is_told_by_its_architecture() -> None:
    section = ConfigFile({"model_type": "inner"}, Path("config.json"))
    with pytest.raises(UnknownArchitecture, match="SuchAnArchitectureIsNot"):
        model.language_model(section, {"inner": "SuchAnArchitectureIsNot"})


@torch.inference_mode()
def test_a_model_is_run_out_of_two_checkpoints(nested: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    """The outer one holds a norm of its own, and nothing else."""
    outer = tmp_path / "outer"
    outer.mkdir()
    (outer / "config.json").write_text(json.dumps(nested))
    save_file({"text.model.norm.weight": torch.full((WIDTH,), 0.5)}, outer / "model.safetensors")
    config = EngineConfig(model=str(outer), device="cpu", max_model_len=64, num_gpu_blocks_override=8)
    built = Runner(config, declared("an_outer_model"), outer)._model
    tensors = load_file(folder / "model.safetensors")
    torch.testing.assert_close(built.norm.weight, torch.full((WIDTH,), 0.5))  # type: ignore[union-attr]
    torch.testing.assert_close(built.embed(torch.arange(9)), tensors["model.embed_tokens.weight"][:9])


def test_weights_that_the_device_has_no_room_for_are_refused_before_any_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "free_memory", lambda device: 1000)
    with pytest.raises(SettingError, match=r"weights take 0.0 GiB, and 0.0 GiB are free on device cpu: .*quantiz"):
        build(folder)
