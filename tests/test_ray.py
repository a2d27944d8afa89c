"""A model over actors of a real Ray cluster on this host, which the tests start."""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from bestiary import LLM
from bestiary.errors import EngineError, SettingError, TensorMismatch
from bestiary.executor import ray as own
from bestiary.output import RequestOutput
from bestiary.testing.tiny import tiny_checkpoint

from .ranks import PROMPTS, SOON, ask, fill, greedy, kill_and_drain, open_llm, reasons, tokens, wait_until_gone

#: One cluster at a time; and Ray warns of things of its own.
pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.filterwarnings("ignore")]
ray: Any = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"), "LlamaForCausalLM")


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[RequestOutput]:
    llm = open_llm(folder)
    found = ask(llm)
    llm.close()
    return found


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """Four cores, whatever this host has: ranks ask for one each."""
    ray.init(num_cpus=4, log_to_driver=False, configure_logging=False, include_dashboard=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def llm(folder: Path, cluster: None) -> Iterator[LLM]:
    spread = open_llm(folder, 2, 1, executor="ray")
    yield spread
    spread.close()


def workers() -> list[int]:
    """The processes of ranks, wherever Ray put them: its processes are nobody's children here."""
    found = []
    for at in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"bestiary.executor.rank" in at.read_bytes() and b"RAY_JOB_ID" in at.with_name("environ").read_bytes():
                found.append(int(at.parent.name))
        except OSError:
            continue
    return sorted(found)


def wait_for_cores(count: float) -> None:
    """Ray counts what it gets back a moment later."""
    end = time.monotonic() + 10
    while ray.available_resources().get("CPU", 0) != count:
        assert time.monotonic() < end, ray.available_resources()
        time.sleep(0.1)


def test_actors_answer_as_one_process(llm: LLM, expected: list[RequestOutput]) -> None:
    for _ in range(2):
        assert tokens(ask(llm)) == tokens(expected)
    llm.engine.check_integrity()
    (group,) = (g for g in ray.util.placement_group_table().values() if g["state"] == "CREATED")
    assert list(group["bundles"].values()) == [{"CPU": 1.0}] * 2
    assert len(workers()) == 2


def test_requests_end_within_a_second_when_a_rank_dies(llm: LLM, expected: list[RequestOutput]) -> None:
    fill(llm)
    old = workers()
    took, done = kill_and_drain(llm, old[0], signal.SIGKILL)
    assert took < SOON
    assert all("SIGKILL" in reason for reason in reasons(done))
    with pytest.raises(EngineError, match="Restart"):
        ask(llm)
    wait_until_gone(old, 3)
    begin = time.monotonic()
    llm.restart()
    print(f"errors after {took:.2f} s, restarted in {time.monotonic() - begin:.2f} s")
    assert tokens(ask(llm)) == tokens(expected)


def test_requests_end_within_a_second_when_an_actor_dies(llm: LLM, expected: list[RequestOutput]) -> None:
    fill(llm)
    old = workers()
    actor = int(Path(f"/proc/{old[1]}/stat").read_text().rpartition(")")[2].split()[1])
    took, done = kill_and_drain(llm, actor, signal.SIGKILL)
    assert took < SOON
    assert all("is not connected any more" in reason for reason in reasons(done))
    wait_until_gone(old, 3)
    llm.restart()
    assert tokens(ask(llm)) == tokens(expected)
    print(f"errors after {took:.2f} s")


def test_stages_of_shards_over_actors_and_all_is_given_back(
    llm: LLM, folder: Path, expected: list[RequestOutput]
) -> None:
    llm.close()
    wait_for_cores(4)
    four = open_llm(folder, 2, 2, executor="ray")
    try:
        assert tokens(ask(four)) == tokens(expected)
        found = workers()
        assert len(found) == 4
    finally:
        four.close()
    wait_until_gone(found, 3)
    wait_for_cores(4)


def test_one_rank_may_run_elsewhere_too(folder: Path, expected: list[RequestOutput]) -> None:
    one = open_llm(folder, executor="ray")
    try:
        assert len(workers()) == 1
        assert tokens(ask(one)) == tokens(expected)
        (output,) = one.generate(PROMPTS[0], greedy(seed=3, temperature=1.0), use_tqdm=False)
        assert output.outputs[0].finish_reason == "length"
    finally:
        one.close()
    wait_for_cores(4)


def test_a_model_that_cannot_be_loaded_says_why_and_gives_all_back(folder: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(folder, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    (broken / "model.safetensors").unlink()
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(TensorMismatch, match="up_proj"):
        open_llm(broken, pipeline=2, executor="ray")
    wait_until_gone(workers(), 3)
    wait_for_cores(4)


def test_a_cluster_without_room_is_an_error_that_says_what_is_free(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own, "_PATIENCE", 0.5)
    with pytest.raises(EngineError, match=r"no room for 8 ranks of \{'CPU': 1\.0\} each: free is .*'CPU': 4\.0"):
        open_llm(folder, 2, 4, executor="ray")
    wait_for_cores(4)


def test_actors_that_cannot_start_say_why(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own, "_Rank", type("_Rank", (), {"serve": lambda self, *_: 1 // 0}))
    with pytest.raises(EngineError, match="Ray could not start a rank of the model: ZeroDivisionError: integer"):
        open_llm(folder, 2, executor="ray")
    wait_for_cores(4)


def test_without_ray_the_error_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SettingError, match=r"executor='ray' needs Ray: pip install 'bestiary\[ray\]'"):
        open_llm(folder, executor="ray")


DRIVER = """
import sys
import ray
ray.init(sys.argv[2], log_to_driver=False, configure_logging=False)
from bestiary import LLM, SamplingParams
llm = LLM(sys.argv[1], dtype="float32", max_model_len=2048, kv_cache_memory_bytes=2**24, executor="ray",
          tensor_parallel_size=2)
print("ready", flush=True)
while True:
    llm.generate("The griffin", SamplingParams(max_tokens=1000, ignore_eos=True), use_tqdm=False)
"""


def test_ranks_go_when_their_driver_is_killed_and_the_cluster_has_all_back(folder: Path) -> None:
    command = [sys.executable, "-c", DRIVER, str(folder), ray.get_runtime_context().gcs_address]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == b"ready\n"
        found = workers()
        assert len(found) == 2
        driver.kill()
    print(f"gone {wait_until_gone(found, 3):.2f} s after their driver")
    wait_for_cores(4)
