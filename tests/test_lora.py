"""LoRA adapters as users meet them: names, folders that are wrong, slots that are few, and PEFT's own word for it."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bestiary import LLM, SamplingParams
from bestiary.adapters import peft as reading
from bestiary.errors import AdapterError, CapabilityMissing, RequestError
from bestiary.testing import adapters
from bestiary.testing.tiny import tiny_checkpoint

WIDTH, RANK = 64, 4
PROMPTS = ["The griffin", "Who wakes the basilisk must not look at it", "1"]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
Module = dict[str, tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("base"), "LlamaForCausalLM")


@pytest.fixture(scope="module")
def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def pairs(weights: dict[str, torch.Tensor], names: list[str], seed: int, rank: int = RANK) -> Module:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, weight in weights.items():
        if name.removesuffix(".weight").rpartition(".")[2] in names:
            rows, columns = weight.shape
            down = torch.randn(rank, columns, generator=generator) * columns**-0.5
            found[name.removesuffix(".weight")] = (down, torch.randn(rows, rank, generator=generator))
    return found


Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path, weights: dict[str, torch.Tensor]) -> Make:
    def adapter(seed: int = 1, names: tuple[str, ...] = ("q_proj", "v_proj"), name: str = "", **config: Any) -> Path:
        rank = config.get("r", RANK)
        at = tmp_path / (name or f"adapter-{seed}")
        return adapters.save(at, pairs(weights, list(names), seed, rank), (), rank, 8.0, **config)

    return adapter


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with_two = LLM(str(folder), dtype="float32", max_model_len=256, max_num_seqs=4, max_loras=2, block_size=4)
    yield with_two
    with_two.close()


@pytest.fixture(autouse=True)
def unloaded(llm: LLM) -> Iterator[None]:
    yield
    for name in llm.list_loras():
        llm.unload_lora(name)
    llm.engine.check_integrity()


def ask(llm: LLM, lora: Any = None, prompts: list[str] = PROMPTS) -> list[list[int]]:
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False, lora=lora)
    assert {output.outputs[0].finish_reason for output in outputs} == {"length"}
    return [list(output.outputs[0].token_ids) for output in outputs]


def merged(folder: Path, to: Path, module: Module, scale: float) -> LLM:
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    for name, (down, up) in module.items():
        tensors[f"{name}.weight"] += up @ down * scale
    (to / "model.safetensors").unlink()
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return LLM(str(to), dtype="float32", max_model_len=256)


# ---- what PEFT itself makes of an adapter ----------------------------------------------------------------------------


def peft_config(**more: Any) -> Any:
    return pytest.importorskip("peft").LoraConfig(r=RANK, lora_alpha=10, init_lora_weights=False, **more)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
        {
            "target_modules": ["k_proj", "o_proj", "gate_proj"],
            "rank_pattern": {"k_proj": 2},
            "alpha_pattern": {"o_proj": 3},
        },
        {"target_modules": ["lm_head", "embed_tokens", "up_proj"]},
    ],
    ids=["q and v", "all", "rank-stabilised", "patterns", "head and embedding"],
)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_peft_saved_does_what_merging_it_with_peft_does(
    folder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    import transformers

    config = peft_config(**settings)
    torch.manual_seed(5)
    base = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trained = pytest.importorskip("peft").get_peft_model(base, config)
    trained.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with_adapter = LLM(str(folder), dtype="float32", max_model_len=256)
    with_adapter.load_lora("one", tmp_path / "adapter")
    prompt = with_adapter.get_tokenizer().encode(PROMPTS[1])
    (output,) = with_adapter.generate(
        [prompt], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=1), use_tqdm=False, lora="one"
    )
    answer = list(output.outputs[0].token_ids)
    with torch.inference_mode():
        logits = trained.merge_and_unload()(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    judged = logits.float().log_softmax(-1)
    assert judged.argmax(-1).tolist() == answer
    logprobs = output.outputs[0].logprobs
    assert logprobs is not None
    for row, entry, token in zip(judged, logprobs, answer, strict=True):
        assert abs(entry[token].logprob - float(row[token])) < 1e-4
    with_adapter.close()


# ---- names, slots, replacing -----------------------------------------------------------------------------------------


def test_requests_with_different_adapters_and_none_run_together(
    llm: LLM, make: Make, folder: Path, tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    plain = ask(llm)
    llm.load_lora("one", make(1))
    llm.load_lora("two", make(2, ("down_proj", "o_proj")))
    found = ask(llm, ["one", None, "two"], [PROMPTS[0]] * 3)
    assert found[1] == plain[0] and len({tuple(answer) for answer in found}) == 3
    for place, (name, seed, names) in {0: ("a", 1, ["q_proj", "v_proj"]), 2: ("b", 2, ["down_proj", "o_proj"])}.items():
        other = merged(folder, tmp_path / name, pairs(weights, names, seed), 8.0 / RANK)
        assert ask(other, None, [PROMPTS[0]])[0] == found[place]
        other.close()


def test_more_adapters_than_slots_take_turns(llm: LLM, make: Make) -> None:
    alone = {}
    for seed in range(1, 6):
        llm.load_lora(f"a{seed}", make(seed))
        alone[f"a{seed}"] = ask(llm, f"a{seed}")
    names = [name for _ in range(3) for name in alone]
    found = ask(llm, names, [PROMPTS[0]] * len(names))
    assert found == [alone[name][0] for name in names]


def test_a_name_with_new_content_never_meets_what_the_old_one_left(llm: LLM, make: Make) -> None:
    """S29."""
    answers = []
    for seed in (1, 2, 1):
        llm.load_lora("one", make(seed))
        answers.append(ask(llm, "one"))
        assert ask(llm, "one") == answers[-1]  # from the cache now
    assert answers[0] == answers[2] != answers[1]


def test_requests_under_way_keep_the_content_that_they_began_with(llm: LLM, make: Make) -> None:
    llm.load_lora("one", make(1))
    whole = ask(llm, "one", [PROMPTS[0]])
    stream = llm.stream(PROMPTS[0], GREEDY, lora="one")
    next(stream)
    llm.load_lora("one", make(2))
    llm.unload_lora("one")
    *_, last = stream
    assert [list(last.outputs[0].token_ids)] == whole
    assert llm.list_loras() == []


def test_a_slot_whose_filling_was_interrupted_is_filled_before_anybody_uses_it(
    llm: LLM, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while an adapter is put into its slot."""
    llm.load_lora("one", make(1))
    whole = ask(llm, "one")
    llm.load_lora("one", make(2))
    other = ask(llm, "one")
    llm.load_lora("one", make(1))
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.executor, "place_adapter", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ask(llm, "one")
    llm.engine.check_integrity()
    assert ask(llm, "one") == whole != other


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def test_an_adapter_that_left_memory_is_read_again_and_must_be_what_it_was(llm: LLM, make: Make) -> None:
    """F16. Two are held at most: the first one leaves when the third is loaded."""
    alone = {}
    for seed in (1, 2, 3):
        llm.load_lora(f"a{seed}", make(seed))
        alone[seed] = ask(llm, f"a{seed}")
    assert ask(llm, "a1") == alone[1]
    shutil.copy(make(4) / reading.TENSORS, make(2) / reading.TENSORS)
    with pytest.warns(RuntimeWarning, match="has changed since adapter 'a2' was loaded"):
        (output,) = llm.generate(PROMPTS[:1], GREEDY, use_tqdm=False, lora="a2")
    assert output.outputs[0].finish_reason == "error"
    assert ask(llm, "a3") == alone[3]


def test_a_name_that_nothing_has_is_an_error(llm: LLM, make: Make) -> None:
    llm.load_lora("one", make(1))
    with pytest.raises(RequestError, match="no adapter 'two'; loaded are: one"):
        ask(llm, "two")
    with pytest.raises(RequestError, match="no adapter 'two'"):
        llm.unload_lora("two")
    with pytest.raises(RequestError, match="2 names of adapters for 3 prompts"):
        ask(llm, ["one", None])
    assert len(ask(llm, "one")) == 3


@pytest.mark.parametrize("name", ["", "a b", "a/b", "..", "x" * 65, "é", "a\0", 5])
def test_a_name_that_cannot_be_one_is_refused(llm: LLM, make: Make, name: Any) -> None:
    """S27."""
    with pytest.raises(RequestError, match="1 to 64 letters"):
        llm.load_lora(name, make(1))


def test_adapters_can_be_switched_off(folder: Path, make: Make) -> None:
    without = LLM(str(folder), dtype="float32", max_model_len=64, enable_lora=False)
    with pytest.raises(CapabilityMissing, match="enable_lora=False"):
        without.load_lora("one", make(1))
    without.close()


def test_adapters_may_be_given_with_the_model(folder: Path, make: Make, llm: LLM) -> None:
    llm.load_lora("one", make(1))
    given = LLM(str(folder), dtype="float32", max_model_len=256, lora_modules={"first": str(make(1))})
    assert ask(given, "first") == ask(llm, "one") != ask(given)
    given.close()


# ---- folders that are wrong ------------------------------------------------------------------------------------------


def changed(at: Path, **config: Any) -> None:
    file = at / reading.CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))


def rewritten(at: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    tensors = change(load_file(at / reading.TENSORS))
    (at / reading.TENSORS).unlink()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, at / reading.TENSORS, {"format": "pt"})


FIRST = "base_model.model.model.layers.0.self_attn.q_proj"
CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA"),
    ({"use_dora": True}, "use_dora=True is not served: DoRA"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save=.*replaces whole modules"),
    ({"bias": "all"}, "bias='all' is not served"),
    ({"target_parameters": ["experts.down_proj"]}, "target_parameters"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ({"init_lora_weights": "pissa_niter_4"}, "changed the base model"),
    ({"r": 0}, "r=0: it must be"),
    ({"r": 10**6}, "r=1000000: it must be"),
    ({"r": "4"}, "r='4': it must be"),
    ({"r": 3}, r"the rank is to be 3"),
    ({"lora_alpha": float("nan")}, "lora_alpha=nan"),
    ({"lora_alpha": "8"}, "lora_alpha='8'"),
    ({"alpha_pattern": {"(a+)+$": 1}}, "must be names of modules"),
    ({"rank_pattern": {"q_proj": 2}}, "q_proj has A .* the rank is to be 2"),
]
TENSORS: list[tuple[str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], str]] = [
    ("nan", lambda t: {**t, f"{FIRST}.lora_A.weight": t[f"{FIRST}.lora_A.weight"] * float("nan")}, "finite numbers"),
    ("whole", lambda t: {**t, f"{FIRST}.lora_B.weight": t[f"{FIRST}.lora_B.weight"].long()}, "finite numbers"),
    ("half", lambda t: {k: v for k, v in t.items() if k != f"{FIRST}.lora_B.weight"}, "q_proj has no lora_B"),
    ("nothing", lambda t: {"lonely": torch.zeros(2, 2)}, "only lora_A and lora_B are served"),
    ("magnitude", lambda t: {**t, f"{FIRST}.lora_magnitude_vector": torch.ones(2)}, "DoRA"),
    ("saved module", lambda t: {**t, "base_model.model.lm_head.weight": torch.ones(2, 2)}, "lm_head"),
    ("narrow", lambda t: {**t, f"{FIRST}.lora_A.weight": torch.ones(RANK, 7)}, r"q_proj has A \[4, 7\].*needs A"),
    ("short", lambda t: {**t, f"{FIRST}.lora_B.weight": torch.ones(7, RANK)}, r"q_proj has A .*B \[7, 4\]"),
    (
        "of another model",
        lambda t: {name.replace("self_attn", "griffin"): tensor for name, tensor in t.items()},
        "knows none of its modules: model.layers.0.griffin.q_proj",
    ),
    (
        "in part",
        lambda t: {name.replace("0.self_attn.q", "0.self_attn.w"): tensor for name, tensor in t.items()},
        "1 of its modules not: model.layers.0.self_attn.w_proj",
    ),
    (
        "a norm",
        lambda t: {name.replace("self_attn.q_proj", "input_layernorm"): tensor for name, tensor in t.items()},
        "layers.0.input_layernorm",
    ),
]


def refused(llm: LLM, at: Path, says: str) -> None:
    """An error that says what is wrong, and the slots as before."""
    before, books = ask(llm, "one"), llm.list_loras()
    with pytest.raises(AdapterError, match=says):
        llm.load_lora("one", at)
    assert llm.list_loras() == books and ask(llm, "one") == before


@pytest.mark.parametrize(("config", "says"), CONFIGS, ids=[next(iter(config)) for config, _ in CONFIGS])
def test_a_configuration_that_is_not_served_is_refused_by_name(
    llm: LLM, make: Make, config: dict[str, Any], says: str
) -> None:
    """S28."""
    llm.load_lora("one", make(1))
    at = make(2)
    changed(at, **config)
    refused(llm, at, says)


@pytest.mark.parametrize(("change", "says"), [row[1:] for row in TENSORS], ids=[row[0] for row in TENSORS])
def test_tensors_that_are_wrong_are_named(llm: LLM, make: Make, change: Any, says: str) -> None:
    llm.load_lora("one", make(1))
    at = make(2)
    rewritten(at, change)
    refused(llm, at, says)


def test_a_rank_above_the_limit_names_the_setting(llm: LLM, make: Make) -> None:
    llm.load_lora("one", make(1))
    refused(llm, make(2, r=17), "has rank 17: load the model with max_lora_rank=17")


@pytest.mark.parametrize(
    "broken", ["no config", "no tensors", "not JSON", "cut short", "a pickle", "nowhere", "a FIFO"]
)
def test_a_folder_that_cannot_be_read_is_refused(llm: LLM, make: Make, broken: str) -> None:
    """S27."""
    llm.load_lora("one", make(1))
    at = make(2)
    config, tensors = at / reading.CONFIG, at / reading.TENSORS
    match broken:
        case "no config":
            config.unlink()
        case "no tensors":
            tensors.unlink()
        case "not JSON":
            config.write_text("{")
        case "cut short":
            tensors.write_bytes(tensors.read_bytes()[:-9])
        case "a pickle":
            tensors.rename(at / "adapter_model.bin")
        case "nowhere":
            at = at / "nowhere"
        case "a FIFO":
            import os

            tensors.unlink()
            os.mkfifo(tensors)
    refused(llm, at, "adapter")


def test_adapters_lie_below_the_allowed_folder(folder: Path, make: Make, tmp_path: Path) -> None:
    """S27: no path, and no link, leads out of it."""
    outside, root = make(1, name="outside"), tmp_path / "root"
    inside = shutil.copytree(outside, root / "inside")
    (root / "link").symlink_to(outside)
    linked = shutil.copytree(outside, root / "linked")
    (linked / reading.TENSORS).unlink()
    (linked / reading.TENSORS).symlink_to(outside / reading.TENSORS)
    guarded = LLM(str(folder), dtype="float32", max_model_len=64, allowed_lora_path=str(root))
    for path in (outside, root / "link", linked, root / ".." / "outside", Path("/")):
        with pytest.raises(AdapterError, match="is not below allowed_lora_path"):
            guarded.load_lora("one", path)
    guarded.load_lora("one", inside)
    guarded.close()
