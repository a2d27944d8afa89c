"""A model over several hosts: nodes that come to a driver, what becomes of it when one goes, and who is not let in."""

import contextlib
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

import pytest
from msgspec.structs import replace

from bestiary import LLM
from bestiary.errors import EngineError, SettingError
from bestiary.executor import frames, node, nodes, parallel
from bestiary.executor.interfaces import interface_of
from bestiary.output import RequestOutput
from bestiary.testing.tiny import tiny_checkpoint

from .ranks import (
    SOON,
    ask,
    fill,
    kill_and_drain,
    open_llm,
    ranks_of,
    reasons,
    tokens,
    wait_until_gone,
)

pytestmark = pytest.mark.xdist_group("hosts")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"), "LlamaForCausalLM")


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[RequestOutput]:
    llm = open_llm(folder)
    found = ask(llm)
    llm.close()
    return found


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def join(folder: Path, port: int, number: int = 1, **environment: str) -> "subprocess.Popen[bytes]":
    """Another host, as a user would make it one: the driver's command with another --node-rank."""
    command = ["run", str(folder), "x", "--nnodes", "2", "--node-rank", str(number), "--master-port", str(port)]
    return subprocess.Popen(
        [sys.executable, "-m", "bestiary", *command],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env={**ENVIRONMENT, **environment},
    )


class Two:
    """A driver in this process, and a node; an engine over both."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.node = join(folder, self.port)
        self._engines: dict[tuple[int, int], LLM] = {}

    def serve(self, tensor: int, pipeline: int) -> LLM:
        """With the ranks shared by the two; loaded anew where a test has killed some."""
        self.bring()
        key = tensor, pipeline
        if key not in self._engines:
            self._engines[key] = open_llm(self.folder, tensor, pipeline, nnodes=2, master_port=self.port)
        elif self._engines[key].engine.failure is not None:
            self._engines[key].restart()
        return self._engines[key]

    def bring(self) -> None:
        """The node, again if it is gone."""
        if self.node.poll() is not None:
            self.node.communicate()
            self.node = join(self.folder, self.port)

    def far(self) -> list[int]:
        """The processes of the node's ranks."""
        return sorted(ranks_of(self.node.pid))

    def close(self) -> None:
        for llm in self._engines.values():
            llm.close()
        self.node.kill()
        self.node.communicate()


@pytest.fixture(scope="module")
def two(folder: Path) -> Iterator[Two]:
    pair = Two(folder)
    yield pair
    pair.close()


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2), (2, 2)])
def test_two_hosts_answer_as_one_process(two: Two, expected: list[RequestOutput], tensor: int, pipeline: int) -> None:
    llm = two.serve(tensor, pipeline)
    assert len(two.far()) == tensor * pipeline // 2
    for _ in range(2):
        assert tokens(ask(llm)) == tokens(expected)
    llm.engine.check_integrity()
    llm.close()
    two._engines.clear()
    wait_until_gone(two.far(), 2)
    assert two.node.poll() is None  # it waits for the next engine


# --- what fails -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP])
def test_requests_end_within_a_second_when_a_rank_of_another_host_dies_or_hangs(
    two: Two, expected: list[RequestOutput], sign: signal.Signals
) -> None:
    llm = two.serve(2, 1)
    fill(llm)
    (rank,) = two.far()
    took, done = kill_and_drain(llm, rank, sign)
    assert took < SOON
    why = "rank 1 .*SIGKILL" if sign == signal.SIGKILL else "rank 1 .*stopped"
    assert all(re.search(why, reason) for reason in reasons(done))
    with pytest.raises(EngineError, match="Restart"):
        ask(llm)
    wait_until_gone([rank], 2)
    llm.restart()
    assert tokens(ask(llm)) == tokens(expected)
    print(f"{sign.name}: errors after {took:.2f} s")


def test_requests_end_within_a_second_when_another_host_goes(two: Two, expected: list[RequestOutput]) -> None:
    llm = two.serve(2, 1)
    fill(llm)
    ranks = two.far()
    took, done = kill_and_drain(llm, two.node.pid, signal.SIGKILL)
    assert took < SOON
    assert all(re.search(r"rank 1 .*node 1 .* is not connected any more", reason) for reason in reasons(done))
    wait_until_gone(ranks, 2)
    two.bring()
    llm.restart()
    assert tokens(ask(llm)) == tokens(expected)
    print(f"errors after {took:.2f} s")


def test_a_host_that_falls_silent_is_named(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its processes run on, and nobody hears of them: as when the network between is cut."""
    llm = two.serve(2, 1)
    fill(llm)
    monkeypatch.setattr(nodes, "_SILENCE", 0.5)
    try:
        _, done = kill_and_drain(llm, two.node.pid, signal.SIGSTOP)
    finally:
        os.kill(two.node.pid, signal.SIGCONT)
    assert all(re.search(r"rank 1 .*node 1 .*not been heard of", reason) for reason in reasons(done))
    two.node.wait(5)  # it has lost the driver


def test_an_engine_that_is_closed_leaves_no_rank_on_another_host(two: Two) -> None:
    llm = two.serve(1, 2)
    fill(llm)
    ranks = two.far()
    assert ranks
    llm.close()
    two._engines.clear()
    wait_until_gone(ranks, 2)


DRIVER = """
import sys
from bestiary import LLM, SamplingParams
llm = LLM(
    sys.argv[1], dtype="float32", max_model_len=2048, kv_cache_memory_bytes=2**24,
    tensor_parallel_size=2, nnodes=2, master_port=int(sys.argv[2]), master_addr=sys.argv[3],
)
output, = llm.generate("The griffin", SamplingParams(temperature=0, max_tokens=12, ignore_eos=True), use_tqdm=False)
print(*output.outputs[0].token_ids, flush=True)
while len(sys.argv) > 4:
    llm.generate("The griffin", SamplingParams(max_tokens=1000, ignore_eos=True), use_tqdm=False)
"""


def test_hosts_let_go_when_their_driver_is_killed_and_its_port_is_free(folder: Path) -> None:
    port = free_port()
    other = join(folder, port)
    command = [sys.executable, "-c", DRIVER, str(folder), str(port), "127.0.0.1", "go on"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=ENVIRONMENT) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline()
        ranks = ranks_of(driver.pid) | ranks_of(other.pid)
        assert len(ranks) == 2
        driver.kill()
    took = wait_until_gone({*ranks, other.pid}, 2)
    assert b"the driver has ended, and so does this node" in other.communicate()[1]
    with socket.create_server(("127.0.0.1", port)):
        print(f"gone {took:.2f} s after their driver")


# --- two hosts, each with a network of its own ------------------------------------------------------------------------


@contextmanager
def hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a wire between them; skips where this user may make none."""
    names = f"bestiary-{os.getpid()}-a", f"bestiary-{os.getpid()}-b"

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    if shutil.which("ip") is None:
        pytest.skip("there is no `ip` (iproute2) here")
    try:
        ip("netns", "add", names[0])
    except subprocess.CalledProcessError:
        pytest.skip("this user may not make a network namespace")
    try:
        ip("netns", "add", names[1])
        ip("link", "add", "wire0", "netns", names[0], "type", "veth", "peer", "name", "wire0", "netns", names[1])
        for number, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "wire0")
            for device in ("lo", "wire0"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def test_hosts_that_share_nothing_but_a_wire_answer_as_one(folder: Path, expected: list[RequestOutput]) -> None:
    with hosts() as (first, second):
        within = ["ip", "netns", "exec"]
        flags = ["--nnodes", "2", "--node-rank", "1", "--master-addr", "10.77.0.1", "--master-port", "29501"]
        there = [*within, second, sys.executable, "-m", "bestiary", "run", str(folder), "x", *flags]
        here = [*within, first, sys.executable, "-c", DRIVER, str(folder), "29501", "10.77.0.1"]
        with subprocess.Popen(there, env=ENVIRONMENT, stderr=subprocess.PIPE) as other:
            driver = subprocess.run(here, env=ENVIRONMENT, capture_output=True, timeout=120, check=False)
            assert driver.returncode == 0, driver.stderr.decode()
            assert [int(token) for token in driver.stdout.split()] == tokens(expected)[0]
            assert other.wait(5) == 0


# --- who is let in ----------------------------------------------------------------------------------------------------


@pytest.fixture
def place() -> Iterator[nodes.Nodes]:
    """Where two nodes beside the driver are waited for."""
    found = nodes.Nodes("127.0.0.1", 0, nodes.introduction(0, 3, "secret"))
    yield found
    found.close()


def knock(place: nodes.Nodes, hello: node.Hello) -> socket.socket:
    connection = socket.create_connection((place.address, place.port))
    frames.send(connection, node.pack(hello))
    return connection


HELLO = nodes.introduction(1, 3, "secret")


@pytest.mark.parametrize(
    ("hello", "says"),
    [
        (replace(HELLO, key="guessed"), "its BESTIARY_NODE_KEY is not the driver's"),
        (replace(HELLO, key=""), "its BESTIARY_NODE_KEY is not the driver's"),
        (replace(HELLO, version="0.0.1"), r"it runs bestiary 0\.0\.1, the driver "),
        (replace(HELLO, nodes=2), "it calls itself node 1 of 2, the driver has 3"),
        (replace(HELLO, number=0), "it calls itself node 0 of 3"),
        (replace(HELLO, number=3), "it calls itself node 3 of 3"),
    ],
)
def test_a_node_that_does_not_belong_here_is_told_why(place: nodes.Nodes, hello: node.Hello, says: str) -> None:
    with pytest.raises(EngineError, match=f"does not take this node: {says}"):
        node.serve(place.address, place.port, hello)


def test_nobody_takes_the_number_of_a_node_that_is_there(place: nodes.Nodes) -> None:
    with knock(place, HELLO):
        place.wait({1})
        with pytest.raises(EngineError, match="there is a node 1 already"):
            node.serve(place.address, place.port, HELLO)


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack("<Q", 2**63),
        struct.pack("<Q", 3) + b"\xc1\xc1\xc1",
        struct.pack("<Q", 2**20) + bytes(2**20),
        struct.pack("<Q", len(node.pack(node.Gone(0, 0, "x")))) + node.pack(node.Gone(0, 0, "x")),
        b"",
    ],
    ids=["HTTP", "endless", "no message", "long", "a message that is none of a stranger's", "nothing"],
)
def test_what_is_no_node_is_passed_over(place: nodes.Nodes, monkeypatch: pytest.MonkeyPatch, said: bytes) -> None:
    monkeypatch.setattr(nodes, "_GREETING", 0.3)
    stranger = socket.create_connection((place.address, place.port), timeout=5)
    with stranger, contextlib.suppress(OSError):  # it may have hung up in the middle of it
        stranger.sendall(said)
        assert stranger.recv(1) == b""
    with knock(place, HELLO), knock(place, replace(HELLO, number=2)):
        assert sorted(place.wait({1, 2})) == [1, 2]


def test_a_node_that_says_nonsense_later_is_let_go(place: nodes.Nodes) -> None:
    inbox: parallel.Inbox = SimpleQueue()
    with knock(place, HELLO) as connection:
        place.wait({1})[1].start(0, range(4, 6), inbox)
        assert node._read(frames.receive(connection) or b"") == node.Start(0, 4, 6)
        frames.send(connection, node.pack(node.Said(0, 4, b"hello")))
        frames.send(connection, node.pack(node.Said(7, 4, b"of a team that is gone")))
        frames.send(connection, b"\xc1")
        assert inbox.get(timeout=5) == (4, b"hello")
        gone = [inbox.get(timeout=5) for _ in range(2)]
    assert [rank for rank, _ in gone] == [4, 5]
    assert all("node 1 (127.0.0.1) does not speak as nodes do" in str(why) for _, why in gone)


def test_nodes_that_never_come_are_named(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(nodes, "_PATIENCE", 0.3)
    port = free_port()
    with pytest.raises(EngineError, match=rf"node 1 of 2 did not come: .*--node-rank 1 .*--master-port {port}"):
        open_llm(folder, 2, nnodes=2, master_port=port)


def test_a_driver_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "_PATIENCE", 0.3)
    monkeypatch.setattr(node, "_PAUSE", 0.1)
    with pytest.raises(EngineError, match=r"no driver answers at 127\.0\.0\.1:.*--node-rank 0"):
        node.serve("127.0.0.1", free_port(), HELLO)
    with pytest.raises(EngineError, match=r"no driver answers at nowhere\.invalid:1 "):
        node.serve("nowhere.invalid", 1, HELLO)


def test_an_address_that_cannot_be_had_is_named(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EngineError, match=f"nodes cannot come to 127.0.0.1:{port} .*Address already in use"):
            open_llm(folder, 2, nnodes=2, master_port=port)
    with pytest.raises(EngineError, match=r"nodes cannot come to 203\.0\.113\.1:.*must be an address of the host"):
        open_llm(folder, 2, nnodes=2, master_addr="203.0.113.1", master_port=port)


def test_a_driver_is_node_0(folder: Path) -> None:
    with pytest.raises(SettingError, match=r"node_rank=1: the driver is node 0\..*--node-rank 1"):
        open_llm(folder, 2, nnodes=2, node_rank=1)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems are not asked")
def test_the_interface_of_an_address_is_found() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.1") is None
