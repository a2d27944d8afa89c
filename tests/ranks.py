"""What the tests of models over several processes share: a tiny model, questions, and a look at who is still there."""

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bestiary import LLM, SamplingParams
from bestiary.output import RequestOutput

PROMPTS = ["The griffin", "Who wakes the basilisk must not look at it: its glance kills", "1", "Ein Einhorn trinkt"]
#: Processes are noticed, and requests end, within a second.
SOON = 1.0


def greedy(**values: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 12, "ignore_eos": True, "logprobs": 5, **values})


def ask(llm: LLM, prompts: list[str] = PROMPTS) -> list[RequestOutput]:
    return llm.generate(prompts, greedy(), use_tqdm=False)


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def open_llm(folder: Path, tensor: int = 1, pipeline: int = 1, **settings: Any) -> LLM:
    return LLM(
        str(folder),
        dtype="float32",
        max_model_len=512,
        max_num_seqs=3,  # fewer than prompts: some wait
        block_size=8,
        max_num_batched_tokens=16,
        tensor_parallel_size=tensor,
        pipeline_parallel_size=pipeline,
        **settings,
    )


def fill(llm: LLM) -> None:
    """Requests that take long, some of which wait, and the first steps of those that run."""
    for number, prompt in enumerate(PROMPTS):
        ids = llm.get_tokenizer().encode(prompt)
        llm.engine.add_request(str(number), ids, greedy(max_tokens=400), final_only=True)
    for _ in range(8):
        assert llm.engine.step() == []


def drain(llm: LLM) -> dict[str, RequestOutput]:
    done = {}
    while llm.engine.has_unfinished_requests():
        done.update({output.request_id: output for output in llm.engine.step()})
    return done


def children(pid: int) -> set[int]:
    """Processes that it started and that are still there."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == pid and state != "Z":
            found.add(int(stat.parent.name))
    return found


def ranks_of(pid: int) -> set[int]:
    """The processes below it that run a rank of a model."""
    found = set()
    for child in children(pid):
        try:
            command = Path(f"/proc/{child}/cmdline").read_bytes()
        except OSError:
            continue
        found |= {child} if b"bestiary.executor.rank" in command else ranks_of(child)
    return found


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(found: Iterable[int], seconds: float) -> float:
    """How long it took."""
    begin = time.monotonic()
    while left := [pid for pid in found if is_there(pid)]:
        assert time.monotonic() - begin < seconds, f"{left} are still there"
        time.sleep(0.02)
    return time.monotonic() - begin


def kill_and_drain(llm: LLM, pid: int, sign: int) -> tuple[float, dict[str, RequestOutput]]:
    """What becomes of requests under way when a process gets a signal, and how long that takes."""
    begin = time.monotonic()
    os.kill(pid, sign)
    done = drain(llm)
    return time.monotonic() - begin, done


def reasons(done: dict[str, RequestOutput]) -> list[str]:
    """Why the requests of `fill` ended: with an error, each of them."""
    assert sorted(done) == [str(number) for number in range(len(PROMPTS))]
    answers = [output.outputs[0] for output in done.values()]
    assert {answer.finish_reason for answer in answers} == {"error"}
    return [str(answer.stop_reason) for answer in answers]
