"""PEFT's own adapters, in the names of transformers' own classes, against its own merging: each architecture.

Left out: architectures whose reference is another one's class (DeepSeek MoE, Qwen2's reward model, Ultravox), and
Mamba, whose projections PEFT refuses.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from bestiary import registry
from bestiary.errors import AdapterError
from bestiary.testing.fixture import Fixture

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
TARGETS: dict[str, Any] = {
    "BartForConditionalGeneration": "all-linear",
    "BloomForCausalLM": "all-linear",
    "DeepseekV2ForCausalLM": ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
    "FalconForCausalLM": "all-linear",
    "GPT2LMHeadModel": "all-linear",
    "Gemma2ForCausalLM": "all-linear",
    "Gemma2Model": "all-linear",
    "GemmaForCausalLM": "all-linear",
    "JambaForCausalLM": "all-linear",
    "LlamaForCausalLM": "all-linear",
    "LlavaForConditionalGeneration": "all-linear",
    "MistralModel": "all-linear",
    "MixtralForCausalLM": ATTENTION,
    "MllamaForConditionalGeneration": "all-linear",
    "PaliGemmaForConditionalGeneration": [*ATTENTION, "gate_proj", "up_proj", "down_proj", "linear"],
    "Qwen2ForCausalLM": "all-linear",
    "Qwen2MoeForCausalLM": "all-linear",
    "Qwen2VLForConditionalGeneration": "all-linear",
}


def adapted(fixture: Fixture, folder: Path, targets: Any) -> Any:
    """The reference with a random adapter, which is saved as PEFT saves it."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=2, init_lora_weights=False, target_modules=targets)
    found = peft.get_peft_model(fixture.oracle.model, config)  # type: ignore[attr-defined]
    found.save_pretrained(folder, save_embedding_layers=False)
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TARGETS)
def test_an_adapter_does_what_peft_merges(name: str, tmp_path: Path) -> None:
    case = import_module(str(registry.find(name).load().proof)).CASES[0]
    fixture = Fixture(name, case, tmp_path / "case")
    engine, sample = fixture.engine(fixture.folder), fixture.samples[0]
    trained = adapted(fixture, tmp_path / "adapter", TARGETS[name])
    engine.adapters.load("one", tmp_path / "adapter")
    (answer,) = fixture.answers(engine, [sample], logprobs=True, lora=["one"])
    fixture.oracle.model = trained.merge_and_unload()  # type: ignore[attr-defined]
    if fixture.pools:
        assert float((answer.vectors - fixture.oracle.vectors(sample)).abs().max()) < 1e-4
        return
    judged = fixture.oracle.judge(sample, answer.tokens)
    assert judged[-len(answer.tokens) :].argmax(-1).tolist() == answer.tokens
    assert float((torch.cat((answer.prompt_logprobs, answer.logprobs)) - judged).abs().max()) < 1e-4


@pytest.mark.filterwarnings("ignore")
def test_stacked_experts_are_refused_by_name(tmp_path: Path) -> None:
    """PEFT adapts them as bare parameters, which are no module's weight."""
    case = import_module(str(registry.find("MixtralForCausalLM").load().proof)).CASES[0]
    fixture = Fixture("MixtralForCausalLM", case, tmp_path / "case")
    engine = fixture.engine(fixture.folder)
    adapted(fixture, tmp_path / "adapter", "all-linear")
    with pytest.raises(AdapterError, match=r"target_parameters=.* is not served"):
        engine.adapters.load("one", tmp_path / "adapter")
