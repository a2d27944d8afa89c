"""Fetch one web address for a stranger, without becoming his way into our network. Knows no media.

Against forged requests (CWE-918): only hosts that the operator named; the name is resolved once, every address that
it has must be public, and the connection goes to that very address, so that a second answer of the name's server
changes nothing; each redirect is checked as the first address was. Proxies of the environment are not used.
"""

import socket
import ssl
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from threading import Timer
from time import monotonic
from urllib.parse import SplitResult, urljoin, urlsplit

from bestiary.errors import RequestError

__all__ = ["fetch", "is_public"]

_MAX_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)
_PORTS = {"http": 80, "https": 443}
#: IPv4 addresses as IPv6 hosts see them (RFC 6052).
_NAT64 = IPv6Network("64:ff9b::/96")


def fetch(url: str, allowed: Collection[str], *, private: bool, timeout: float, max_bytes: int) -> bytes:
    """The body behind an http(s) address, of which at most one byte more than `max_bytes` is read.

    `allowed` are names of hosts; `private` lets them be in a private network; `timeout` seconds are for everything.
    Raises RequestError.
    """
    deadline = monotonic() + timeout
    for _ in range(_MAX_REDIRECTS + 1):
        parts = _checked(url, allowed)
        with _answer(parts, private, deadline) as answer:
            if answer.status in _REDIRECTS and (location := answer.headers.get("Location")):
                url = urljoin(url, location)
                continue
            if answer.status != 200:
                raise RequestError(f"{parts.hostname} answers {answer.status} to the media's address: check it")
            return _body(answer, parts.hostname, max_bytes, deadline)
    raise RequestError(f"the media's address redirects more than {_MAX_REDIRECTS} times: send the last one")


def is_public(address: str) -> bool:
    """An address that anybody on the Internet could reach, also where IPv6 wraps an IPv4 address."""
    ip: IPv4Address | IPv6Address = ip_address(address.partition("%")[0])
    if isinstance(ip, IPv6Address):
        wrapped = ip.ipv4_mapped or ip.sixtofour or (IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else None)
        ip = wrapped or ip
    return ip.is_global and not ip.is_multicast


def _checked(url: str, allowed: Collection[str]) -> SplitResult:
    """The parts of an address that may be asked; what readers of addresses understand differently is refused."""
    if not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        raise RequestError("the media's address has characters that must be written as %XX")
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError as error:
        raise RequestError(f"the media's address cannot be read ({error})") from error
    if parts.scheme not in _PORTS or "@" in parts.netloc:
        raise RequestError("the media's address must be http(s)://host/path, without a user's name")
    if host.rstrip(".") not in {name.lower().rstrip(".") for name in allowed}:
        raise RequestError(
            f"media may not be fetched from {host[:80]!r}: send a data: address, or set allowed_media_domains"
        )
    return parts


def _addresses(host: str, port: int, private: bool) -> list[str]:
    """All addresses of a host. Which of them is private is not told: the asker may be feeling for it."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    if not private and not all(map(is_public, addresses)):
        raise RequestError(
            f"{host} is in a private network: send the media another way, or set allow_private_media_addresses"
        )
    return addresses


class _Connection(HTTPConnection):
    """To one of the addresses that were checked, whatever the host's name means by now."""

    def __init__(self, host: str, port: int, addresses: Sequence[str], timeout: float, tls: bool) -> None:
        super().__init__(host, port, timeout=timeout)
        self.default_port = _PORTS["https" if tls else "http"]
        self._addresses, self._tls = addresses, tls
        #: Kept here too: http.client lets go of it once the header is read.
        self.line: socket.socket | None = None

    def connect(self) -> None:
        for place, address in enumerate(self._addresses):
            try:
                self.line = self.sock = socket.create_connection((address, self.port), self.timeout)
                break
            except OSError:
                if place == len(self._addresses) - 1:
                    raise
        if self._tls:
            context = ssl.create_default_context()
            wrapped = context.wrap_socket(self.sock, server_hostname=self.host, do_handshake_on_connect=False)
            self.line = self.sock = wrapped
            wrapped.do_handshake()

    def cut(self) -> None:
        """Ends whatever waits for the other side, from another thread."""
        if self.line is not None:
            with suppress(OSError):
                # The plain socket's method: that of TLS would take away what the waiting thread works with.
                socket.socket.shutdown(self.line, socket.SHUT_RDWR)


@contextmanager
def _answer(parts: SplitResult, private: bool, deadline: float) -> Iterator[HTTPResponse]:
    """The answer to one GET, and every failure of the network inside as RequestError.

    A server that sends a byte a second never runs into a socket's time limit, so a timer cuts the line.
    """
    host, port = parts.hostname or "", parts.port or _PORTS[parts.scheme]
    try:
        addresses = _addresses(host, port, private)
        left = max(deadline - monotonic(), 0.001)
        connection = _Connection(host, port, addresses, left, parts.scheme == "https")
        timer = Timer(left, connection.cut)
        timer.daemon = True
        timer.start()
        try:
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", target, headers={"Accept-Encoding": "identity", "Connection": "close"})
            with connection.getresponse() as answer:
                yield answer
        finally:
            timer.cancel()
            connection.close()
    except (OSError, HTTPException) as error:
        if monotonic() >= deadline:
            raise _too_slow(host) from error
        raise RequestError(f"the media cannot be fetched from {host} ({type(error).__name__})") from error


def _body(answer: HTTPResponse, host: str | None, max_bytes: int, deadline: float) -> bytes:
    declared = answer.length
    if declared is not None and declared > max_bytes:
        raise RequestError(
            f"the media at {host} has {declared:,} bytes, more than the {max_bytes:,} allowed: "
            f"send less, or raise the limit of MediaLimits"
        )
    body = answer.read(max_bytes + 1)
    if monotonic() >= deadline:
        raise _too_slow(host)
    if declared is not None and len(body) < declared:
        raise RequestError(f"{host} broke off after {len(body):,} of {declared:,} bytes: try again")
    return body


def _too_slow(host: str | None) -> RequestError:
    return RequestError(f"{host} took too long to send the media: try again, or raise media_fetch_timeout")
