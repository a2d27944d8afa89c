"""A model over real processes: the answers of one process, and what happens when a process, or its driver, dies.

Cases with less to lose run over threads: test_wire.py of the core, and the kit's level L3.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from bestiary import LLM, SamplingParams, limits
from bestiary.config import EngineConfig
from bestiary.engine import Engine
from bestiary.errors import EngineError, PluginIncompatible, SettingError, TensorMismatch
from bestiary.executor import parallel, worker
from bestiary.output import RequestOutput
from bestiary.testing import threads
from bestiary.testing.fixture import Fixture
from bestiary.testing.tiny import tiny_checkpoint

from .ranks import (
    PROMPTS,
    SOON,
    ask,
    children,
    drain,
    fill,
    greedy,
    is_there,
    kill_and_drain,
    open_llm,
    reasons,
    tokens,
    wait_until_gone,
)

Serve = Callable[[int, int], LLM]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"), "LlamaForCausalLM")


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[RequestOutput]:
    """What one process answers."""
    llm = open_llm(folder)
    found = ask(llm)
    llm.close()
    return found


@pytest.fixture(scope="module")
def serve(folder: Path) -> Iterator[Serve]:
    """An engine over so many processes: started once, and again only where a test has killed it."""
    engines: dict[tuple[int, int], LLM] = {}

    def serve(tensor: int, pipeline: int) -> LLM:
        key = tensor, pipeline
        if key not in engines:
            engines[key] = open_llm(folder, tensor, pipeline)
        elif engines[key].engine.failure is not None:
            engines[key].restart()
        return engines[key]

    yield serve
    for llm in engines.values():
        llm.close()


def pids(llm: LLM) -> list[int]:
    """Of the processes, by rank."""
    workers = llm.engine.executor._team._workers  # type: ignore[attr-defined]
    return [workers[rank]._process.pid for rank in sorted(workers)]


# --- answers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2), (2, 2)])
def test_several_processes_answer_as_one(
    serve: Serve, expected: list[RequestOutput], tensor: int, pipeline: int
) -> None:
    llm = serve(tensor, pipeline)
    for _ in range(2):  # the second time with prefixes found
        found = ask(llm)
        assert tokens(found) == tokens(expected)
        for output, wanted in zip(found, expected, strict=True):
            for step, other in zip(output.outputs[0].logprobs or [], wanted.outputs[0].logprobs or [], strict=True):
                assert {t: e.logprob for t, e in step.items()} == pytest.approx(
                    {t: e.logprob for t, e in other.items()}, abs=1e-4
                )
    llm.engine.check_integrity()
    assert llm.engine.scheduler.cache.is_empty


@pytest.mark.parametrize(
    ("architecture", "cases", "tensor", "pipeline"),
    [
        ("MllamaForConditionalGeneration", "bestiary_mllama.proof", 2, 2),  # pictures, that layers look at
        ("JambaForCausalLM", "bestiary_jamba.proof", 1, 2),  # states beside keys and values
    ],
)
def test_what_models_keep_and_look_at_reaches_every_process(
    tmp_path: Path, architecture: str, cases: str, tensor: int, pipeline: int
) -> None:
    fixture = Fixture(architecture, import_module(cases).CASES[0], tmp_path)
    alone = fixture.answers(fixture.engine(), fixture.samples)
    config = replace(fixture.engine().config, tensor_parallel_size=tensor, pipeline_parallel_size=pipeline)
    engine = Engine.load(config, fixture.folder)
    try:
        found = fixture.answers(engine, fixture.samples)
    finally:
        engine.close()
    assert [answer.tokens for answer in found] == [answer.tokens for answer in alone]


# --- what fails ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP])
def test_requests_end_within_a_second_when_a_process_dies_or_hangs(
    serve: Serve, expected: list[RequestOutput], sign: signal.Signals
) -> None:
    llm = serve(2, 1)
    fill(llm)
    old = pids(llm)
    took, done = kill_and_drain(llm, old[1], sign)
    assert took < SOON
    why = "rank 1 .*SIGKILL" if sign == signal.SIGKILL else "rank 1 .*stopped"
    assert all(re.search(why, reason) for reason in reasons(done))
    with pytest.raises(EngineError, match="Restart"):
        ask(llm)
    wait_until_gone(old, 2)
    begin = time.monotonic()
    llm.restart()
    print(f"{sign.name}: errors after {took:.2f} s, restarted in {time.monotonic() - begin:.2f} s")
    assert tokens(ask(llm)) == tokens(expected)


def test_the_next_request_notices_a_process_that_died_while_nothing_ran(serve: Serve) -> None:
    llm = serve(2, 1)
    os.kill(pids(llm)[0], signal.SIGKILL)
    time.sleep(0.1)
    begin = time.monotonic()
    with pytest.warns(RuntimeWarning, match="rank 0 .*SIGKILL"):
        outputs = ask(llm)
    assert time.monotonic() - begin < SOON
    assert {output.outputs[0].finish_reason for output in outputs} == {"error"}


@pytest.mark.filterwarnings("ignore:a step of .* failed:RuntimeWarning")
@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2), (2, 2)])
def test_a_request_that_fails_on_every_process_alike_ends_alone(
    serve: Serve, expected: list[RequestOutput], monkeypatch: pytest.MonkeyPatch, tensor: int, pipeline: int
) -> None:
    """A token that no tensor of integers takes: nothing but the engine's check would keep it away."""
    llm = serve(tensor, pipeline)
    monkeypatch.setattr(limits, "_check_prompt", lambda *_: None)
    done = beside(llm, [5, 2**63], greedy(detokenize=False))
    (answer,) = done.pop("culprit").outputs
    assert answer.finish_reason == "error"
    assert "OverflowError" in str(answer.stop_reason)
    assert tokens([done[str(n)] for n in range(len(PROMPTS))]) == tokens(expected)
    assert tokens(ask(llm)) == tokens(expected)


def beside(llm: LLM, culprit: list[int], params: SamplingParams) -> dict[str, RequestOutput]:
    """What becomes of the prompts when there is a culprit in the midst of them."""
    for number, prompt in enumerate(PROMPTS):
        if number == 1:
            llm.engine.add_request("culprit", culprit, params, final_only=True, cache_salt="culprit")
        llm.engine.add_request(str(number), llm.get_tokenizer().encode(prompt), greedy(), final_only=True)
    done = drain(llm)
    llm.engine.check_integrity()
    return done


@pytest.mark.filterwarnings("ignore:a step of .* failed:RuntimeWarning")
@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2)])
def test_a_request_that_fails_where_its_token_is_chosen_ends_alone(
    serve: Serve, expected: list[RequestOutput], monkeypatch: pytest.MonkeyPatch, tensor: int, pipeline: int
) -> None:
    """A bias for a token that is not there: only the rank that answers finds out, when all have done theirs."""
    llm = serve(tensor, pipeline)
    monkeypatch.setattr(limits, "_check_params", lambda *_: None)
    done = beside(llm, [5], greedy(logit_bias={10**6: 1.0}))
    (answer,) = done.pop("culprit").outputs
    assert answer.finish_reason == "error", answer
    assert tokens([done[str(n)] for n in range(len(PROMPTS))]) == tokens(expected)
    assert tokens(ask(llm)) == tokens(expected)


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2)])
def test_after_an_interruption_the_next_request_is_answered(
    serve: Serve, expected: list[RequestOutput], tensor: int, pipeline: int
) -> None:
    """Ctrl-C while the driver waits for a step: a process that stands still for a moment makes it wait."""
    llm = serve(tensor, pipeline)
    last = pids(llm)[-1]

    def interrupt(*_: object) -> None:
        os.kill(last, signal.SIGCONT)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        os.kill(last, signal.SIGSTOP)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            ask(llm)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        os.kill(last, signal.SIGCONT)
    for _ in range(2):
        assert tokens(ask(llm)) == tokens(expected)
    llm.engine.check_integrity()
    assert llm.engine.scheduler.cache.is_empty


# --- what is left behind ------------------------------------------------------------------------------------------


def test_a_model_that_cannot_be_loaded_says_why_and_leaves_no_process(folder: Path, tmp_path: Path) -> None:
    """Only the second stage misses a tensor; the first is waiting when it says so."""
    broken = shutil.copytree(folder, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    (broken / "model.safetensors").unlink()
    save_file(tensors, broken / "model.safetensors")
    before = children(os.getpid())
    with pytest.raises(TensorMismatch, match="up_proj"):
        open_llm(broken, pipeline=2)
    wait_until_gone(children(os.getpid()) - before, 2)


def test_a_closed_engine_leaves_neither_process_nor_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    llm = open_llm(folder, tensor=2)
    found = pids(llm)
    assert all(is_there(pid) for pid in found)
    assert list(tmp_path.iterdir())
    fill(llm)
    llm.close()
    wait_until_gone(found, 2)
    assert not list(tmp_path.iterdir())
    llm.close()  # a second time does nothing


DRIVER = """
import sys
from bestiary import LLM, SamplingParams, limits
llm = LLM(sys.argv[1], dtype="float32", max_model_len=2048, tensor_parallel_size=2, kv_cache_memory_bytes=2**24)
print("ready", flush=True)
while True:
    llm.generate("The griffin", SamplingParams(max_tokens=1000, ignore_eos=True), use_tqdm=False)
"""


def test_processes_go_when_their_driver_is_killed(folder: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", DRIVER, str(folder)], stdout=subprocess.PIPE) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == b"ready\n"
        found = children(driver.pid)
        assert len(found) == 2
        driver.kill()
    print(f"gone {wait_until_gone(found, 2):.2f} s after their driver")


# --- what cannot begin --------------------------------------------------------------------------------------------


def load_threads(folder: Path, **settings: Any) -> Engine:
    config = EngineConfig.resolve(model=str(folder), dtype="float32", max_model_len=64, **settings)
    return Engine.load(config, folder, threads.executor)


@pytest.mark.parametrize(
    ("what", "other"),
    [("version", "0.0.1"), ("distribution", "llama-fork"), ("bestiary", "9.9"), ("entry point", "x:y")],
)
def test_a_process_with_another_plugin_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, what: str, other: str
) -> None:
    own = parallel.identity
    monkeypatch.setattr(parallel, "identity", lambda *arguments: {**own(*arguments), what: other})
    with pytest.raises(PluginIncompatible, match=f"{what} '.*where the driver has '{other}'"):
        load_threads(folder, tensor_parallel_size=2)


def test_plugins_that_are_alike_are_accepted() -> None:
    same = {"architecture": "A", "distribution": "a", "version": "1"}
    worker._check(same, dict(same))
    with pytest.raises(PluginIncompatible, match=r"distribution 'a' where the driver has 'b'.*install the same"):
        worker._check(same, {**same, "distribution": "b"})
    with pytest.raises(PluginIncompatible, match="version None"):
        worker._check({"architecture": "A", "distribution": "a"}, same)


def test_heads_that_cannot_be_shared_name_the_choices(folder: Path) -> None:
    with pytest.raises(SettingError, match=r"tensor_parallel_size=3.*4 heads.*choose one of 1, 2, 4"):
        load_threads(folder, tensor_parallel_size=3)
