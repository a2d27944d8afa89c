"""Tiny random Llamas against transformers, in float32: every number of the vocabulary at every position."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bestiary.config import EngineConfig
from bestiary.errors import ConfigUnsupported, TensorMismatch
from bestiary.runner import Runner, StepRow
from bestiary.sampling.params import SamplingParams
from bestiary.sampling.sampler import Row
from bestiary_llama import LLAMA

VOCABULARY = 96
PROMPT = torch.tensor([5, 9, 77, 31, 2, 64, 18, 90, 11, 7, 3, 3, 54, 21, 8, 40, 41, 42, 77, 1, 0, 95, 33])

#: What each published generation brings, on top of a plain Llama.
VARIANTS: dict[str, dict[str, Any]] = {
    "llama 2": {"num_key_value_heads": 4},
    "grouped queries": {"num_key_value_heads": 2},
    "one head of keys": {"num_key_value_heads": 1},
    "own head size": {"head_dim": 48},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied head": {"tie_word_embeddings": True},
    "other base": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "llama 3.1": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
}


def reference(**changes: Any) -> LlamaForCausalLM:
    """A random model whose norms and biases matter, as those of a fresh one do not."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.12)
        else:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def logprobs(folder: Path, tokens: list[int], chunk: int, **settings: Any) -> torch.Tensor:
    """[len(tokens) - 1, vocabulary] as the engine's runner finds them, `chunk` tokens a step."""
    config = EngineConfig.resolve(model=str(folder), max_num_seqs=4, dtype="float32", **settings)
    runner = Runner(config, LLAMA, folder)
    blocks = [7, 3, 9, 1, 4, 2, 8][: -(-len(tokens) // runner.block_size)]
    found = torch.empty(len(tokens) - 1, VOCABULARY)
    at = 0
    for start in range(0, len(tokens), chunk):
        piece = tokens[start : start + chunk]
        successors = tokens[start + 1 : start + chunk + 1]
        row = StepRow(piece, start, [blocks], None, prompt_logprobs=VOCABULARY, successors=successors)
        for top in runner.execute([row])[0].prompt:
            found[at, top.token_ids] = torch.tensor(top.logprobs)
            at += 1
    assert at == len(tokens) - 1
    return found


@pytest.mark.parametrize("name", VARIANTS)
def test_every_logprob_equals_the_references(name: str, tmp_path: Path) -> None:
    model = reference(**VARIANTS[name])
    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        expected = model(PROMPT[None]).logits[0, :-1].log_softmax(-1)
    for chunk in (1, 7, len(PROMPT)):
        torch.testing.assert_close(logprobs(tmp_path, PROMPT.tolist(), chunk), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")  # the new name is not everywhere
def test_dynamic_rope_beyond_the_trained_context_equals_token_by_token_decoding(tmp_path: Path) -> None:
    """The reference recomputes its base as the sequence grows; only decoding step by step is defined for every cut."""
    model = reference(max_position_embeddings=12, **VARIANTS["dynamic"])
    model.save_pretrained(tmp_path)
    expected, past = [], None
    with torch.inference_mode():
        for token in PROMPT:
            answer = model(token[None, None], past_key_values=past, use_cache=True)
            past = answer.past_key_values
            expected.append(answer.logits[0, -1].log_softmax(-1))
    for chunk in (1, 7, len(PROMPT)):
        found = logprobs(tmp_path, PROMPT.tolist(), chunk)
        torch.testing.assert_close(found, torch.stack(expected)[:-1], atol=1e-4, rtol=1e-4)


def test_both_dialects_of_config_json_mean_the_same(tmp_path: Path) -> None:
    """As published (rope_theta, rope_scaling, torch_dtype) and as transformers 5 saves it."""
    import json

    model = reference(**VARIANTS["llama 3.1"])
    model.save_pretrained(tmp_path)
    now = logprobs(tmp_path, PROMPT.tolist(), 64)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    rope = values.pop("rope_parameters")
    values["rope_theta"] = rope.pop("rope_theta")
    values["rope_scaling"] = rope
    values["torch_dtype"] = values.pop("dtype")
    file.write_text(json.dumps(values))
    torch.testing.assert_close(logprobs(tmp_path, PROMPT.tolist(), 64), now, atol=0, rtol=0)


@pytest.mark.parametrize("block_size", [1, 5, 16])
def test_block_size_changes_nothing(block_size: int, tmp_path: Path) -> None:
    model = reference()
    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        expected = model(PROMPT[None]).logits[0, :-1].log_softmax(-1)
    tokens = PROMPT.tolist()[: 7 * block_size]
    found = logprobs(tmp_path, tokens, 3, block_size=block_size)
    torch.testing.assert_close(found, expected[: len(tokens) - 1], atol=1e-4, rtol=1e-4)


def test_sixteen_bit_weights_are_served_in_their_own_dtype(tmp_path: Path) -> None:
    model = reference().bfloat16()
    model.save_pretrained(tmp_path)
    runner = Runner(EngineConfig.resolve(model=str(tmp_path)), LLAMA, tmp_path)
    row = Row(SamplingParams(temperature=0), PROMPT.tolist(), len(PROMPT), 0)
    choice = runner.execute([StepRow(PROMPT.tolist(), 0, [[1, 2]], row)])[0].choice
    with torch.inference_mode():
        logits = model(PROMPT[None]).logits[0, -1].float()
    assert choice is not None
    assert logits[choice.token] >= logits.max() - 0.05


def test_an_activation_that_no_llama_has_is_refused(tmp_path: Path) -> None:
    reference(hidden_act="gelu").save_pretrained(tmp_path)
    with pytest.raises(ConfigUnsupported, match="hidden_act"):
        Runner(EngineConfig.resolve(model=str(tmp_path)), LLAMA, tmp_path)


def test_an_unknown_kind_of_rope_is_refused(tmp_path: Path) -> None:
    import json

    reference().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    values["rope_parameters"] = {"rope_type": "spiral", "rope_theta": 10000.0}
    file.write_text(json.dumps(values))
    with pytest.raises(ConfigUnsupported, match="spiral"):
        Runner(EngineConfig.resolve(model=str(tmp_path)), LLAMA, tmp_path)


def test_a_checkpoint_of_another_size_is_refused(tmp_path: Path) -> None:
    import json

    reference().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "intermediate_size": 128}))
    with pytest.raises(TensorMismatch, match=r"mlp\.(gate|up|down)_proj"):
        Runner(EngineConfig.resolve(model=str(tmp_path)), LLAMA, tmp_path)
