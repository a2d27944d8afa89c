"""How an answer begins where the configuration forces its first token."""

import json
from pathlib import Path
from typing import Any

import pytest

from bestiary.checkpoint import ConfigFile
from bestiary.prompts import Prompt
from bestiary_bart.processor import Processor

BART = {"vocab_size": 96, "decoder_start_token_id": 2, "bos_token_id": 0, "forced_bos_token_id": 0}
READ = Prompt(token_ids=[5, 6, 7])


def begun(folder: Path, prompt: Prompt = READ, **changes: Any) -> list[int]:
    file = ConfigFile({**BART, **changes}, folder / "config.json")
    return Processor(file, folder, None)(prompt)[0]


def test_the_forced_token_follows_the_first(tmp_path: Path) -> None:
    assert begun(tmp_path) == [2, 0]
    assert begun(tmp_path, Prompt(encoder=READ)) == begun(tmp_path, Prompt(token_ids=[2], encoder=READ)) == [2, 0]


def test_nothing_is_forced_where_nothing_says_so(tmp_path: Path) -> None:
    assert begun(tmp_path, forced_bos_token_id=None) == [2]


def test_whoever_begins_the_answer_says_what_follows(tmp_path: Path) -> None:
    assert begun(tmp_path, Prompt(token_ids=[9, 8], encoder=READ)) == [2, 9, 8]


@pytest.mark.parametrize(("said", "ids"), [({}, [2]), ({"forced_bos_token_id": 4}, [2, 4])])
def test_generation_config_knows_better(tmp_path: Path, said: dict[str, Any], ids: list[int]) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    assert begun(tmp_path) == ids


def test_the_settings_first_name(tmp_path: Path) -> None:
    assert begun(tmp_path, forced_bos_token_id=None, force_bos_token_to_be_generated=True) == [2, 0]
