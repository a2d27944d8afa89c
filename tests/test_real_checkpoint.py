"""Level L4 of the conformance kit on the real model: it reads a text as transformers does, and no other way."""

import dataclasses
import json
from pathlib import Path

import pytest

from bestiary.checkpoint import ConfigFile
from bestiary.testing.real import prove

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("real checkpoint")]


def test_the_real_model_reads_a_text_as_the_reference(demo: Path) -> None:
    (result,) = prove(str(demo))
    assert (result.status, result.level, result.architecture) == ("passed", "L4", "LlamaForCausalLM"), result.reason
    assert "perplexity" in result.reason


def test_a_model_that_reads_otherwise_is_found(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a plugin took another base for its angles than config.json says."""
    from bestiary_llama import llama

    read = llama.Config.read.__func__  # type: ignore[attr-defined]

    def otherwise(cls: type, file: ConfigFile) -> llama.Config:
        config: llama.Config = read(cls, file)
        return dataclasses.replace(config, rope=dataclasses.replace(config.rope, base=config.rope.base * 1.01))

    monkeypatch.setattr(llama.Config, "read", classmethod(otherwise))
    (result,) = prove(str(demo))
    assert result.status == "failed", result.reason


def test_a_model_that_writes_no_text_has_nothing_to_compare(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["MistralModel"]}))
    (result,) = prove(str(tmp_path))
    assert (result.status, result.reason) == ("not applicable", "it writes no text")
