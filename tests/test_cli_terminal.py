"""The command line with a model: what is printed, and how it behaves at a real terminal."""

import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fcntl import ioctl
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

from bestiary import LLM, SamplingParams
from bestiary.checkpoint import Checkpoint
from bestiary.cli import main
from bestiary.cli.chat import Conversation
from bestiary.errors import RequestError
from bestiary.output import CompletionOutput, RequestOutput
from bestiary.testing.tiny import tiny_checkpoint

ROOT = Path(__file__).resolve().parents[1]
CONTEXT = 256
SIZED = ("--kv-cache-memory-bytes", "10000000")
ENDLESS = ("--kv-cache-memory-bytes", "400000000", "--max-model-len", "60000")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"), "LlamaForCausalLM", context=CONTEXT)


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose answers last until somebody stops them."""
    return tiny_checkpoint(tmp_path_factory.mktemp("endless"), "LlamaForCausalLM", ends=False, context=60_000)


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(str(folder), kv_cache_memory_bytes=10_000_000)


Printed = pytest.CaptureFixture[str]


# --- info ---------------------------------------------------------------------------------------------------------


def test_info_counts_what_the_checkpoint_holds(folder: Path, capsys: Printed) -> None:
    with Checkpoint.open(folder) as checkpoint:
        numbers = sum(checkpoint.tensor(name).numel() for name in checkpoint)
        size = checkpoint.nbytes
    assert main(["info", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["parameters"], facts["weight_bytes"], facts["dtype"]) == (numbers, size, "float32")
    assert facts["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, their size, bytes
    assert (facts["layers"], facts["vocabulary_size"], facts["context_length"]) == (2, 384, CONTEXT)
    assert (facts["architecture"], facts["distribution"]) == ("LlamaForCausalLM", "bestiary-llama")
    assert facts["chat_template"] is True
    memory = facts["memory"]
    assert memory["free_after_weights_bytes"] == memory["free_bytes"] - size
    assert memory["cache_tokens"] == memory["free_after_weights_bytes"] // facts["kv_bytes_per_token"]
    assert memory["longest_context"] == CONTEXT
    assert memory["full_length_sequences"] == memory["cache_tokens"] // CONTEXT


def test_info_reads_no_weights_and_says_where_they_do_not_fit(tmp_path: Path, capsys: Printed) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": 2**16, "intermediate_size": 2**18}
    more = {"num_hidden_layers": 500, "num_attention_heads": 512, "vocab_size": 1000, "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps({**config, **more}))
    assert main(["info", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"does not fit +the weights alone take [\d,]+ GiB", printed)
    assert re.search(r"chat template +no", printed)


def test_info_follows_the_dtype_that_is_asked_for(folder: Path, capsys: Printed) -> None:
    sizes = []
    for dtype in ("float32", "bfloat16"):
        assert main(["info", str(folder), "--json", "--dtype", dtype]) == 0
        facts = json.loads(capsys.readouterr().out)
        sizes.append((facts["weight_bytes"], facts["kv_bytes_per_token"]))
    assert sizes[0] == (2 * sizes[1][0], 2 * sizes[1][1])


# --- run ----------------------------------------------------------------------------------------------------------

GREEDY = SamplingParams(temperature=0, max_tokens=12)
FLAGS = ("--temperature", "0", "--max-tokens", "12", *SIZED)


def answer(output: RequestOutput) -> str:
    text = output.outputs[0].text
    return text if text.endswith("\n") else text + "\n"


def test_run_asks_a_model_that_can_chat(folder: Path, llm: LLM, capsys: Printed) -> None:
    assert main(["run", str(folder), "Who wakes it?", *FLAGS]) == 0
    expected = llm.chat([{"role": "user", "content": "Who wakes it?"}], GREEDY, use_tqdm=False)[0]
    assert capsys.readouterr() == (answer(expected), "")


def test_run_puts_the_systems_word_before_the_question(folder: Path, llm: LLM, capsys: Printed) -> None:
    assert main(["run", str(folder), "Who?", "--system", "Be brief.", *FLAGS]) == 0
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    assert capsys.readouterr().out == answer(llm.chat(talk, GREEDY, use_tqdm=False)[0])


def test_run_completes_a_prompt_where_that_is_wanted(folder: Path, llm: LLM, capsys: Printed) -> None:
    assert main(["run", str(folder), "-The griffin", "--no-chat", *FLAGS]) == 0
    assert capsys.readouterr().out == answer(llm.generate("-The griffin", GREEDY, use_tqdm=False)[0])


def test_run_completes_where_the_model_cannot_chat(tmp_path: Path, llm: LLM, capsys: Printed) -> None:
    base = str(tiny_checkpoint(tmp_path, "LlamaForCausalLM", context=CONTEXT, chat=False))
    assert main(["run", base, "The griffin", *FLAGS]) == 0
    assert capsys.readouterr().out == answer(llm.generate("The griffin", GREEDY, use_tqdm=False)[0])
    assert main(["run", base, "The griffin", "--chat", *FLAGS]) == 1
    assert "no chat template" in capsys.readouterr().err


def test_run_reads_the_prompt_from_the_standard_input(
    folder: Path, llm: LLM, capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", StringIO("The griffin\nhas"))
    assert main(["run", str(folder), "-", "--no-chat", *FLAGS]) == 0
    assert capsys.readouterr().out == answer(llm.generate("The griffin\nhas", GREEDY, use_tqdm=False)[0])


def test_run_stops_at_any_of_the_strings_that_are_given(folder: Path, llm: LLM, capsys: Printed) -> None:
    full = llm.generate("The griffin", GREEDY, use_tqdm=False)[0].outputs[0].text
    stop = full[3:5]
    assert main(["run", str(folder), "--stop", "never", "--stop", stop, "The griffin", "--no-chat", *FLAGS]) == 0
    assert capsys.readouterr().out == full[: full.index(stop)] + "\n"


def test_run_repeats_itself_with_a_seed(folder: Path, capsys: Printed) -> None:
    texts = []
    for seed in ("5", "5", "6"):
        assert main(["run", str(folder), "Who?", "--seed", seed, "--max-tokens", "12", *SIZED]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_run_tells_tokens_and_speed_apart_from_the_answer(folder: Path, llm: LLM, capsys: Printed) -> None:
    assert main(["run", str(folder), "The griffin", "--no-chat", "--stats", "--ignore-eos", *FLAGS]) == 0
    written = capsys.readouterr()
    prompt = len(llm.get_tokenizer().encode("The griffin"))
    assert "first token" not in written.out
    assert re.fullmatch(
        rf"prompt {prompt} tokens \(0 of them cached\), answer 12 tokens \(length\); "
        r"first token after \d+\.\d{3} s, then \d+\.\d tokens/s\n",
        written.err,
    )


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["word " * 500], "max_model_len=256"),
        (["hi", "--temperature", "-1"], "temperature=-1.0: it must be from 0 to 100"),
        (["hi", "--max-model-len", "9999"], "the model was made for 256 tokens"),
        (["hi", "--max-num-seqs", "0"], "max_num_seqs=0: it must be at least 1"),
        (["hi", "--plugin", "LlamaForCausalLM=other"], "other was chosen for LlamaForCausalLM"),
        (["hi", "--revision", "main"], "a folder, which has no revisions"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_what_cannot_be_served_is_one_message(folder: Path, flags: list[str], says: str, capsys: Printed) -> None:
    assert main(["run", str(folder), *flags]) == 1
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.startswith("bestiary: ")
    assert says in written.err


@pytest.mark.parametrize(
    "variable",
    [
        "BESTIARY_KERNELS",
        pytest.param(
            "BESTIARY_SQUEEZE",
            marks=pytest.mark.skipif(
                not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="nothing is packed in bfloat16 here"
            ),
        ),
    ],
)
def test_a_variable_of_the_kernels_that_says_nonsense_is_one_message(folder: Path, variable: str) -> None:
    command = [sys.executable, "-m", "bestiary", "plan", str(folder), "--dtype", "bfloat16"]
    done = subprocess.run(command, env={**os.environ, variable: "so"}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"bestiary: {variable}='so' is unknown; choose (one of )?\w.*\n", done.stderr)


# --- bench --------------------------------------------------------------------------------------------------------


def test_bench_latency_counts_every_token_once(folder: Path, tmp_path: Path, capsys: Printed) -> None:
    sizes = ["--batch-size", "3", "--input-len", "40", "--output-len", "5", "--num-iters", "2", "--warmup", "0"]
    file = tmp_path / "latency.json"
    assert main(["bench", "latency", str(folder), *sizes, "--max-num-batched-tokens", "64", "--json", str(file)]) == 0
    report, printed = json.loads(file.read_text()), capsys.readouterr().out
    phases = report["phases"]
    assert set(phases) == {"prefill", "mixed", "decode"}
    assert sum(phase["num_tokens"] for phase in phases.values()) == 2 * 3 * (40 + 5 - 1)
    assert sum(phase["seconds"] for phase in phases.values()) == pytest.approx(2 * report["seconds"]["mean"], rel=0.1)
    assert report["output_tokens_per_s"] == pytest.approx(3 * 5 / report["seconds"]["mean"])
    assert 0 < report["time_to_first_token"]["mean"] < report["seconds"]["mean"]
    assert 0 < phases["decode"]["bandwidth_share"] < 1
    assert 0 < phases["prefill"]["flops_share"] < 1
    for word in ("prefill", "decode", "time to first token", "time per output token", "GB/s read", "GFLOP/s"):
        assert word in printed


def test_bench_throughput_serves_all_prompts(folder: Path, tmp_path: Path, capsys: Printed) -> None:
    sizes = ["--num-prompts", "5", "--input-len", "8", "--output-len", "1", "--warmup", "1"]
    file = tmp_path / "throughput.json"
    assert main(["bench", "throughput", str(folder), *sizes, "--output-json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert report["time_per_output_token"] is None
    assert report["total_tokens_per_s"] == pytest.approx(9 * report["output_tokens_per_s"])
    assert report["requests_per_s"] == pytest.approx(5 / report["seconds"]["mean"])
    assert report["phases"]["prefill"]["num_tokens"] == 40


# --- chat ---------------------------------------------------------------------------------------------------------


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_a_conversation_goes_on_from_what_was_said(llm: LLM, capsys: Printed) -> None:
    talk = Conversation(llm, GREEDY, "Be kind.")
    assert talk.take("Who wakes it?")
    assert talk.take("And then?")
    system: dict[str, Any] = {"role": "system", "content": "Be kind."}
    first = llm.chat([system, user("Who wakes it?")], GREEDY, use_tqdm=False)[0]
    turns = [user("Who wakes it?"), assistant(first.outputs[0].text), user("And then?")]
    second = llm.chat([system, *turns], GREEDY, use_tqdm=False)[0]
    assert talk.turns == [*turns, assistant(second.outputs[0].text)]
    assert capsys.readouterr().out == answer(first) + answer(second)
    assert second.num_cached_tokens > 0


def test_commands_change_the_conversation(llm: LLM, capsys: Printed) -> None:
    talk = Conversation(llm, GREEDY)
    talk.take("/system Be kind.")
    talk.take("Who?")
    assert (talk.system, len(talk.turns)) == ("Be kind.", 2)
    talk.take("/clear")
    talk.take("/system")
    assert (talk.system, talk.turns) == (None, [])
    capsys.readouterr()
    talk.take("/help")
    assert "/system TEXT" in capsys.readouterr().out
    talk.take("/sytsem Be kind.")
    assert "no command /sytsem" in capsys.readouterr().err
    assert talk.turns == []
    assert not talk.take("/exit")


def test_a_path_is_no_command(llm: LLM) -> None:
    talk = Conversation(llm, GREEDY)
    talk.take("/etc/hosts holds what?")
    assert talk.turns[0] == user("/etc/hosts holds what?")


def test_a_question_that_is_too_long_is_told_of_and_forgotten(llm: LLM, capsys: Printed) -> None:
    talk = Conversation(llm, GREEDY)
    talk.take("Who?")
    before = list(talk.turns)
    talk.take("word " * CONTEXT)
    assert talk.turns == before
    assert "max_model_len=256" in capsys.readouterr().err
    talk.take("And now?")
    assert len(talk.turns) == 4


def test_an_answer_that_was_cut_off_is_told_of(llm: LLM, capsys: Printed) -> None:
    Conversation(llm, SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)).take("Who?")
    assert "cut off" in capsys.readouterr().err


class Scripted:
    """Stands for an LLM whose answers are given, and may be interrupted in their course."""

    def __init__(self, *steps: "str | int") -> None:
        self.steps, self.closed = steps, False

    def stream(self, messages: Any, params: Any, **_: Any) -> Iterator[RequestOutput]:
        text = ""
        try:
            for step in self.steps:
                if isinstance(step, int):
                    os.kill(os.getpid(), step)
                    continue
                text += step
                yield RequestOutput("0", "", [], None, [CompletionOutput(0, text, [])], False)
        finally:
            self.closed = True


def test_an_interrupt_stops_the_answer_at_the_next_token_and_what_was_said_stays(capsys: Printed) -> None:
    llm: Any = Scripted("The ", signal.SIGINT, "griffin", " sleeps")
    handler = signal.getsignal(signal.SIGINT)
    talk = Conversation(llm, GREEDY)
    talk.take("Who?")
    assert talk.turns == [user("Who?"), assistant("The griffin")]
    assert capsys.readouterr().out == "The griffin\n"
    assert llm.closed
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_second_interrupt_does_not_wait_for_the_token(capsys: Printed) -> None:
    llm: Any = Scripted("The ", signal.SIGINT, signal.SIGINT, "griffin")
    talk = Conversation(llm, GREEDY)
    talk.take("Who?")
    assert talk.turns == [user("Who?"), assistant("The ")]
    assert llm.closed


def test_a_question_without_an_answer_is_forgotten() -> None:
    llm: Any = Scripted(signal.SIGINT, signal.SIGINT, "never")
    talk = Conversation(llm, GREEDY)
    talk.take("Who?")
    assert talk.turns == []


def test_chat_answers_lines_from_a_pipe(
    folder: Path, llm: LLM, capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same answer twice, because the first was forgotten; and nothing on standard output but answers."""
    monkeypatch.setattr(sys, "stdin", StringIO("Who?\n\n/clear\nWho?\n"))
    assert main(["chat", str(folder), *FLAGS]) == 0
    expected = answer(llm.chat([user("Who?")], GREEDY, use_tqdm=False)[0])
    assert capsys.readouterr().out == expected * 2


def test_chat_refuses_a_model_that_cannot(tmp_path: Path, capsys: Printed) -> None:
    base = str(tiny_checkpoint(tmp_path, "LlamaForCausalLM", context=CONTEXT, chat=False))
    assert main(["chat", base, *SIZED]) == 1
    assert "use `bestiary run`" in capsys.readouterr().err


def test_one_stream_at_a_time(llm: LLM) -> None:
    with pytest.raises(RequestError, match="one prompt, not 2"):
        llm.stream(["a", "b"], GREEDY)
    stream = llm.stream("The griffin", GREEDY)
    next(stream)
    with pytest.raises(RequestError, match="close it"):
        llm.generate("Who?", GREEDY, use_tqdm=False)
    with pytest.raises(RequestError, match="close it"):
        next(llm.stream("Who?", GREEDY))
    stream.close()
    assert llm.generate("Who?", GREEDY, use_tqdm=False)[0].finished


# --- a real terminal ----------------------------------------------------------------------------------------------

#: Makes the pseudo-terminal the one that ctrl-C comes from, and ctrl-C what ends things, as a login does: a shell
#: starts what goes on behind it with ctrl-C ignored, and so would be whatever is started from there.
CHILD = (
    "import fcntl, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
    "signal.signal(signal.SIGINT, signal.default_int_handler); from bestiary.cli import main; sys.exit(main())"
)
PATIENCE_S = 60.0


class Screen:
    """A terminal with a command in it."""

    def __init__(self, process: "subprocess.Popen[bytes]", master: int) -> None:
        self.process, self._master = process, master
        #: What was written since the last `wait_for`, and how many pieces it came in.
        self.text, self.num_pieces = "", 0

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def read(self) -> bool:
        """Take what comes next. False when the command has let go of the terminal."""
        assert select.select([self._master], [], [], PATIENCE_S)[0], f"nothing comes after {self.text!r}"
        try:
            piece = os.read(self._master, 4096)
        except OSError:
            return False
        self.text += piece.decode(errors="replace")
        self.num_pieces += 1
        return bool(piece)

    def wait_for(self, expected: str) -> str:
        """Read until a text has come; returns what came before it."""
        while expected not in self.text:
            assert self.read(), f"{expected!r} is not in {self.text!r}"
        before, _, self.text = self.text.partition(expected)
        self.num_pieces = 0
        return before

    def interrupt_until(self, expected: str) -> None:
        """Press ctrl-C until a text has come. Python's readline misses one that comes while it handles a key."""
        end = time.monotonic() + PATIENCE_S
        while expected not in self.text:
            assert time.monotonic() < end, f"ctrl-C does nothing after {self.text!r}"
            self.type("\x03")
            while expected not in self.text and select.select([self._master], [], [], 2.0)[0]:
                assert self.read(), f"{expected!r} is not in {self.text!r}"
        self.wait_for(expected)

    def end(self) -> int:
        """Read the rest and return the status."""
        while self.read():
            pass
        return self.process.wait(PATIENCE_S)


@contextmanager
def terminal(*arguments: str, columns: int = 100) -> Iterator[Screen]:
    """A command at a terminal of its own."""
    master, slave = pty.openpty()
    ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    sources = [str(path) for path in (ROOT / "core/src", ROOT / "kernels/src", *ROOT.glob("plugins/*/src"))]
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments],
        env={**environment, "PYTHONPATH": os.pathsep.join(sources), "TERM": "xterm", "OMP_NUM_THREADS": "1"},
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
    )
    os.close(slave)
    try:
        yield Screen(process, master)
    finally:
        process.kill()
        process.wait()
        os.close(master)


def test_a_chat_at_a_terminal_streams_stops_at_ctrl_c_and_ends_at_ctrl_d(endless: Path) -> None:
    with terminal("chat", str(endless), "--temperature", "0", *ENDLESS) as screen:
        screen.wait_for("> ")
        screen.type("Who wakes it?\n")
        screen.wait_for("Who wakes it?\r\n")  # the terminal's own echo
        while len(screen.text) < 100 or screen.num_pieces <= 5:  # it comes piece by piece, however fast
            assert screen.read()
        screen.type("\x03")
        screen.wait_for("\r\n> ")
        assert screen.process.poll() is None
        screen.type("/help\n")
        screen.wait_for("ctrl-C ")
        screen.wait_for("> ")
        screen.type("half a line")
        screen.wait_for("half a line")
        screen.interrupt_until("\r\n> ")
        screen.type("\x04")
        assert screen.end() == 0
        assert "Traceback" not in screen.text


def test_ctrl_c_ends_a_run(endless: Path) -> None:
    with terminal("run", str(endless), "Who?", "--temperature", "0", *ENDLESS) as screen:
        while len(screen.text) < 100:
            assert screen.read()
        started = time.monotonic()
        screen.type("\x03")
        assert screen.end() == 130
        assert time.monotonic() - started < 20
        assert "Traceback" not in screen.text


def test_a_table_fits_its_terminal() -> None:
    with terminal("list", columns=60) as screen:
        assert screen.end() == 0
        narrow = re.sub(r"\x1b\[\d*m", "", screen.text).partition("\r\n\r\n")[0].split("\r\n")
    assert max(map(len, narrow)) <= 60
    assert re.search(r"^Ll\w* +be\S* +\d\S* +text +generate", "\n".join(narrow), re.MULTILINE)
    with terminal("list", columns=120) as screen:
        assert screen.end() == 0
        assert re.search(r"\nLlamaForCausalLM +bestiary-llama +\d\S* +text +generate +yes", screen.text)
