"""The kit itself: whatever it is there to find, it finds, and says by name. The checks of real plugins are theirs."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bestiary import registry
from bestiary.architecture import Architecture, Task
from bestiary.cli import main
from bestiary.errors import BestiaryError
from bestiary.testing import Case, Naming, Transformers, Waiver
from bestiary.testing import conformance as kit
from bestiary.testing.checklist import NotApplicable
from bestiary.testing.fixture import Fixture, Unfit
from bestiary.testing.report import Result, table

NAME = "GPT2LMHeadModel"
CONFIG = {
    "model_type": "gpt2",
    "vocab_size": 96,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
}
RIGHT = Case("right", CONFIG, Transformers(NAME))


def check(name: str, subject: Any) -> None:
    next(one.run for one in kit._checks() if one.name == name)(subject)


@pytest.mark.parametrize("name", ["logits", "reference_dialect", "missing_tensor", "company", "preemption"])
def test_a_plugin_that_is_right_passes(name: str, tmp_path: Path) -> None:
    check(name, Fixture(NAME, RIGHT, tmp_path))


@pytest.mark.parametrize(
    ("name", "case", "says"),
    [
        ("logits", replace(RIGHT, reference=Transformers(NAME, changes={"scale_attn_weights": False})), "off the"),
        ("logits", replace(RIGHT, reference=Transformers(NAME, changes={"layer_norm_epsilon": 0.1})), "off the"),
        ("mutations", replace(RIGHT, mutations={"the colour": {"colour": "red"}}), "the colour changes nothing"),
        ("mutations", replace(RIGHT, mutations={"the context": {"n_ctx": 5}}), "the context changes nothing"),
    ],
    ids=["a wrong scale", "a wrong epsilon", "an unknown feature", "a feature without effect"],
)
def test_what_is_wrong_is_found(name: str, case: Case, says: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=says):
        check(name, Fixture(NAME, case, tmp_path))


def test_names_that_the_plugin_does_not_know_are_found(tmp_path: Path) -> None:
    case = replace(RIGHT, namings=(Naming("of another world", ((r"ln_1", "griffin"),)),))
    with pytest.raises(BestiaryError, match="griffin"):
        check("namings", Fixture(NAME, case, tmp_path))


def test_an_engine_that_forgets_a_preempted_sequence_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence that keeps its count of computed tokens, and not their keys."""
    from bestiary.scheduler import Scheduler, Sequence

    whole = Scheduler.preempt

    def forgetful(self: Scheduler, sequence: Sequence) -> None:
        whole(self, sequence)
        sequence.tokens[0] ^= 1

    monkeypatch.setattr(Scheduler, "preempt", forgetful)
    with pytest.raises(AssertionError, match="answered differently"):
        check("preemption", Fixture(NAME, RIGHT, tmp_path))


def test_an_answer_of_few_different_tokens_proves_nothing(tmp_path: Path) -> None:
    def dull(tensors: dict[str, Any]) -> dict[str, Any]:
        return {name: tensor * ("wte" in name or "ln" in name) for name, tensor in tensors.items()}

    fixture = Fixture(NAME, replace(RIGHT, reference=Transformers(NAME, weights=dull)), tmp_path)
    with pytest.raises(Unfit, match="different tokens"):
        _ = fixture.expected


def test_a_waiver_stands_in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(RIGHT, without={"logits": Waiver("the reference is wrong", "https://example.org/1")})
    monkeypatch.setattr(kit, "_cases", lambda architecture: {"right": case})
    kit._fixture.cache_clear()
    result = kit.Planned(NAME, "L2", "logits", "right").run()
    kit._fixture.cache_clear()
    assert (result.status, result.reason) == ("waived", "the reference is wrong (https://example.org/1)")


@pytest.mark.parametrize("name", ["logits", "reference_dialect", "namings", "mutations", "bfloat16"])
def test_a_reference_of_a_version_that_lacks_something_proves_nothing_and_says_so(name: str, tmp_path: Path) -> None:
    """Where it is whole, the numbers of a wrong one count."""
    wrong = Transformers(NAME, changes={"layer_norm_epsilon": 9.0}, since=("99.1", "the epsilon"))
    case = replace(RIGHT, reference=wrong, namings=(Naming("as it is"),), mutations={"the epsilon": {"n_ctx": 5}})
    with pytest.raises(NotApplicable, match=r"leaves out the epsilon; 99\.1 is the first that does not"):
        check(name, Fixture(NAME, case, tmp_path))
    with pytest.raises(AssertionError, match="off the reference"):
        check("logits", Fixture(NAME, replace(case, reference=replace(wrong, since=("5.0", ""))), tmp_path / "whole"))


def test_a_plugin_that_brings_no_proof_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = Architecture(name="Griffin", model="griffin", tasks={Task.GENERATE})
    monkeypatch.setattr(registry, "find", lambda name: SimpleNamespace(load=lambda: bare))
    with pytest.raises(AssertionError, match="declares no `proof`"):
        check("declaration", bare)


def test_what_is_not_declared_must_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = Architecture(name="Griffin", model="griffin", tasks={Task.GENERATE})
    check("undeclared_is_refused", bare)
    monkeypatch.setattr(registry, "require", lambda architecture, **wish: None)
    with pytest.raises(AssertionError, match="is not declared, and it is not refused"):
        check("undeclared_is_refused", bare)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("import torch", "imports torch"),
        ("import socket; socket.socket()", "a socket was opened"),
        ("import json; json.dumps2 = json.dumps; json.load = None", "changes json.load"),
        ("import time; t = time.process_time()\nwhile time.process_time() - t < 0.1: pass", "ms of processor time"),
    ],
    ids=["heavy", "network", "patches", "slow"],
)
def test_a_declaration_that_does_more_than_declare_is_found(
    source: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "griffin.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(registry, "find", lambda name: SimpleNamespace(value="griffin:X"))
    with pytest.raises(AssertionError, match=says):
        check("light_declaration", Architecture(name="Griffin", model="griffin", tasks={Task.GENERATE}))


def test_verify_writes_its_report_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--json", str(tmp_path / "c.json"), "--table", str(tmp_path / "t.md")]
    assert main(["verify", NAME, "--level", "L0", *files]) == 0
    assert "2 passed, 0 failed" in capsys.readouterr().out
    results = json.loads((tmp_path / "c.json").read_text())
    assert {result["check"] for result in results} == {"declaration", "undeclared_is_refused"}
    assert f"| {NAME} | bestiary-gpt2 0.1.0 | 2 of 2 |" in (tmp_path / "t.md").read_text()


def test_the_table_counts_what_applies() -> None:
    def result(level: str, status: str, check: str = "c") -> Result:
        return Result("0.1", "p 1", "A", level, check, None, status, "", None, 0.0)

    rows = table([result("L0", "passed"), result("L0", "failed"), result("L2", "waived", "w"), result("L3", "passed")])
    assert "| A | p 1 | 1 of 2 | - | - | 1 of 1 | w |" in rows


def test_without_a_line_of_code_pytest_runs_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--bestiary-plugin", NAME, "-k", "L0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout


def test_a_split_that_does_not_add_up_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bestiary.blocks import Linear

    monkeypatch.setattr(Linear, "keep_addends", lambda self, columns, mesh: self.keep_columns(columns))
    with pytest.raises(AssertionError, match="answered differently"):
        check("tensor", Fixture(NAME, RIGHT, tmp_path))


def test_a_stage_that_passes_on_something_else_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bestiary.parallel import Mesh

    whole = Mesh.send
    monkeypatch.setattr(Mesh, "send", lambda self, *tensors: whole(self, *(tensor * 1.5 for tensor in tensors)))
    with pytest.raises(AssertionError, match="answered differently"):
        check("pipeline", Fixture(NAME, RIGHT, tmp_path))


@pytest.mark.parametrize("fault", ["no scale", "first slot for all", "stale"])
def test_adapters_that_are_mixed_up_are_found(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bestiary.adapters import peft
    from bestiary.blocks import Lanes
    from bestiary.cache import tables

    name = {"no scale": "lora", "first slot for all": "lora_company", "stale": "lora_replaced"}[fault]
    if fault == "no scale":
        whole = peft._pair
        monkeypatch.setattr(peft, "_pair", lambda *given: (lambda p: peft.Pair(p.down, p.up / 2))(whole(*given)))
    elif fault == "first slot for all":
        steer = Lanes.set
        monkeypatch.setattr(
            Lanes, "set", lambda self, slots: steer(self, {k: v.clamp(max=0) for k, v in slots.items()})
        )
    else:
        digest = tables._digest
        without = {b"root": lambda parts: (parts[0], *parts[2:])}  # the adapter's content stands second
        monkeypatch.setattr(tables, "_digest", lambda tag, *p: digest(tag, *without.get(tag, tuple)(p)))
    with pytest.raises(AssertionError):
        check(name, Fixture(NAME, RIGHT, tmp_path))
