"""What a configuration says by leaving the window out."""

from pathlib import Path
from typing import Any

import pytest
from transformers import MistralConfig

from bestiary.checkpoint import ConfigFile
from bestiary_mistral.mistral import Config


@pytest.mark.parametrize("said", [{}, {"sliding_window": None}, {"sliding_window": 9}])
def test_a_window_that_is_left_out_is_the_class_s_and_a_null_is_none(said: dict[str, Any]) -> None:
    whole = MistralConfig(**said)
    file = ConfigFile(
        {**{k: v for k, v in whole.to_dict().items() if k != "sliding_window"}, **said}, Path("config.json")
    )
    assert Config.read(file).window == whole.sliding_window
