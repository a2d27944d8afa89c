"""What configurations leave out, since it is as the class in transformers has it."""

from pathlib import Path
from typing import Any

import pytest
from transformers import MllamaConfig

from bestiary.blocks import Decoder
from bestiary.checkpoint import ConfigFile
from bestiary_mllama.mllama import Config, describe


def tree(text: dict[str, Any], vision: dict[str, Any]) -> Decoder:
    file = ConfigFile({"text_config": text, "vision_config": vision}, Path("config.json"))
    return describe(Config.read(file))


def seen(decoder: Decoder) -> object:
    """Sizes, angles and epsilons of all of it."""
    leaves = [(path, vars(block).get("parts"), vars(block).get("eps")) for path, block in decoder.named_modules()]
    ropes = {vars(block).get("rope") for block in decoder.modules()}
    return leaves, ropes, decoder.context


@pytest.mark.parametrize("own", [{}, {"hidden_size": 8192, "num_hidden_layers": 100, "num_attention_heads": 64}])
def test_what_a_fine_tuned_model_leaves_out_is_as_the_class_has_it(own: dict[str, Any]) -> None:
    whole = MllamaConfig(text_config=dict(own)).to_dict()
    saved = {"model_type": "mllama_text_model", "torch_dtype": "bfloat16", **own}
    assert seen(tree(saved, {})) == seen(tree(whole["text_config"], whole["vision_config"]))
