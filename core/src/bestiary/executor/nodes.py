"""Ranks on several hosts, as the driver sees them: nodes come to its address, and each takes a share of the ranks.

Who reaches that address can listen and speak: it belongs into a network of its own, like the ranks' own exchange.
"""

import itertools
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from functools import cache
from importlib import metadata

import msgspec

from bestiary.config import EngineConfig
from bestiary.errors import EngineError
from bestiary.executor import frames, link, node
from bestiary.executor.interfaces import interface_of
from bestiary.executor.parallel import Inbox
from bestiary.executor.process import Processes, Silence

__all__ = ["NodeTeam", "Nodes", "introduction", "start"]

#: How long the driver waits for nodes, and how often it looks after what brings them, in seconds.
_PATIENCE, _LOOK = 600.0, 0.2
#: A node that has not been heard of for so long is lost, in seconds: it beats every fifth of one.
_SILENCE = 15.0
#: What comes to the address has so many seconds, and bytes, to say that it is a node.
_GREETING, _SHORT = 10.0, 4096

_READ = msgspec.msgpack.Decoder(node.FromNode).decode


def introduction(number: int, nodes: int, key: str | None = None) -> node.Hello:
    """What node `number` of so many says. `key` must be the driver's: $BESTIARY_NODE_KEY, if nothing else is said."""
    own = os.environ.get("BESTIARY_NODE_KEY", "") if key is None else key
    return node.Hello(number, nodes, metadata.version("bestiary"), own)


def start(config: EngineConfig, ranks: int, inbox: Inbox) -> "NodeTeam":
    """As many ranks, an equal share of them on each of `nnodes` hosts, of which this is the first."""
    nodes = _at(config.master_addr, config.master_port, config.nnodes)
    share = ranks // config.nnodes
    others = {number: range(number * share, (number + 1) * share) for number in range(1, config.nnodes)}
    return NodeTeam(nodes, range(share), others, inbox)


@cache
def _at(address: str, port: int, count: int) -> "Nodes":
    """Nodes belong to this process: an engine that starts again finds those of the one before."""
    return Nodes(address, port, introduction(0, count))


class Nodes:
    """The nodes that have come to an address of this host, by number; the driver itself is number 0."""

    def __init__(self, address: str, port: int, like: node.Hello) -> None:
        """Nodes introduce themselves as `like`, but for the number. Raises EngineError for no address of this host."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            self._listener = socket.create_server((address, port), family=family)
        except OSError as error:
            raise EngineError(
                f"nodes cannot come to {address}:{port} ({error}): --master-addr must be an address of the host of "
                "node 0, and --master-port free there"
            ) from None
        self.address, self.port = self._listener.getsockname()[:2]
        self._like = like
        self._nodes: dict[int, _Node] = {}
        self._came = threading.Condition()
        threading.Thread(target=self._accept, daemon=True).start()

    def wait(self, numbers: set[int], look: Callable[[], None] = lambda: None) -> dict[int, "_Node"]:
        """The nodes of these numbers, when all have come. `look` raises where one never will."""
        end = time.monotonic() + _PATIENCE
        with self._came:
            while missing := sorted(numbers - set(self._nodes)):
                if time.monotonic() > end:
                    raise EngineError(
                        f"node {missing[0]} of {self._like.nodes} did not come: run the same command there with "
                        f"--node-rank {missing[0]} --master-addr {self.address} --master-port {self.port}"
                    )
                look()
                self._came.wait(_LOOK)
            return {number: self._nodes[number] for number in numbers}

    def close(self) -> None:
        """Let all nodes go, and the address."""
        self._listener.close()
        with self._came:
            for one in self._nodes.values():
                one.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, peer = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._greet, args=(connection, str(peer[0])), daemon=True).start()

    def _greet(self, connection: socket.socket, host: str) -> None:
        """Find out who came, and listen to it as long as it is there."""
        with connection:
            hello = _hello(connection)
            if hello is None:
                return
            one = _Node(hello.number, host, connection)
            with self._came:
                objection = self._objection(hello)
                if not objection:
                    self._nodes[hello.number] = one
                    self._came.notify_all()
            if objection:
                one.tell(node.Refused(objection))
                return
            one.listen()
            with self._came:
                del self._nodes[hello.number]

    def _objection(self, hello: node.Hello) -> str:
        own = self._like
        if not secrets.compare_digest(hello.key.encode(), own.key.encode()):
            return "its BESTIARY_NODE_KEY is not the driver's"
        if hello.version != own.version:
            return f"it runs bestiary {hello.version}, the driver {own.version}"
        if hello.nodes != own.nodes or not 0 < hello.number < own.nodes:
            return f"it calls itself node {hello.number} of {hello.nodes}, the driver has {own.nodes}, counted from 0"
        if hello.number in self._nodes:
            return f"there is a node {hello.number} already"
        return ""


def _hello(connection: socket.socket) -> node.Hello | None:
    """What somebody who came says; None for what is no node."""
    connection.settimeout(_GREETING)
    try:
        hello = _READ(frames.receive(connection, _SHORT) or b"")
    except (msgspec.DecodeError, ValueError):
        return None
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return hello if isinstance(hello, node.Hello) else None


class _Node:
    """One that came: its connection, and what it has to do."""

    def __init__(self, number: int, host: str, connection: socket.socket) -> None:
        self._name, self._connection = f"node {number} ({host})", connection
        self._lock = threading.Lock()
        self._silence = Silence()
        self._gone = ""
        self._tasks: dict[int, tuple[range, Inbox]] = {}

    def start(self, team: int, ranks: range, inbox: Inbox) -> None:
        """Give it ranks."""
        with self._lock:
            self._tasks[team] = ranks, inbox
        self.tell(node.Start(team, ranks.start, ranks.stop))
        if self._gone:
            self._report()

    def stop(self, team: int) -> None:
        """Take them away. A second call does nothing."""
        with self._lock:
            self._tasks.pop(team, None)
        self.tell(node.Stop(team))

    def tell(self, message: node.ToNode) -> None:
        try:
            frames.send(self._connection, node.pack(message))
        except OSError:  # whoever listens says so
            return

    def look(self) -> None:
        """Let it go where it is silent: its host may be off, or the network between."""
        if (silence := self._silence.seconds()) > _SILENCE:
            self._gone = f"{self._name} has not been heard of for {silence:.0f} s"
            self.close()

    def listen(self) -> None:
        """Until it is gone."""
        try:
            while (data := frames.receive(self._connection)) is not None:
                self._silence.heard()
                if data:
                    self._take(_READ(data))
        except (msgspec.DecodeError, ValueError) as error:
            self._gone = f"{self._name} does not speak as nodes do ({error})"
        self._gone = self._gone or f"{self._name} is not connected any more"
        self._report()

    def _take(self, message: node.FromNode) -> None:
        if isinstance(message, node.Hello):
            return
        with self._lock:
            _, inbox = self._tasks.get(message.team, (None, None))
        if inbox is not None:
            inbox.put((message.rank, message.why if isinstance(message, node.Gone) else message.data))

    def _report(self) -> None:
        with self._lock:
            tasks = list(self._tasks.values())
        for ranks, inbox in tasks:
            for rank in ranks:
                inbox.put((rank, self._gone))

    def close(self) -> None:
        """End the connection; it notices."""
        try:
            self._connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return


class NodeTeam:
    """All ranks of one model: some on this host, the others with nodes."""

    _number = itertools.count()

    def __init__(
        self,
        nodes: Nodes,
        own: range,
        others: Mapping[int, range],
        inbox: Inbox,
        look: Callable[[], None] = lambda: None,
    ) -> None:
        """`own` ranks run here, `others` by the numbers of their nodes; `look` raises where a node will never come."""
        self._team = next(NodeTeam._number)
        self._far: dict[int, _Node] = {}
        self._meeting = link.Meeting(nodes.address)
        self.meeting = self._meeting.address
        try:
            self._nodes = nodes.wait(set(others), look)
        except BaseException:
            self._meeting.close()
            raise
        self._here = Processes(own, inbox, interface_of(nodes.address))
        for number, ranks in others.items():
            self._nodes[number].start(self._team, ranks, inbox)
            self._far.update(dict.fromkeys(ranks, self._nodes[number]))

    def send(self, rank: int, data: bytes) -> None:
        """To this host's, or over its node."""
        if rank in self._far:
            self._far[rank].tell(node.Send(self._team, rank, data))
        else:
            self._here.send(rank, data)

    def look(self) -> None:
        """After this host's ranks, and nodes; nodes look after theirs."""
        self._here.look()
        for one in self._nodes.values():
            one.look()

    def stop(self) -> None:
        """End all ranks; nodes stay."""
        for one in self._nodes.values():
            one.stop(self._team)
        self._here.stop()
        self._meeting.close()
