"""Media of messages: taken in order, fetched only from where the operator allows, from a server on loopback here."""

import base64
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from PIL import Image

from bestiary.errors import RequestError, SettingError
from bestiary.media import MediaLimits, Sources, collect, fetch_all, load_image
from bestiary.media.web import is_public

LIMITS = MediaLimits(max_image_bytes=5_000)
HERE = Sources(allowed_media_domains=["localhost"], allow_private_media_addresses=True, media_fetch_timeout=5)


def picture() -> bytes:
    out = BytesIO()
    Image.new("RGB", (6, 4), (1, 2, 3)).save(out, "PNG")
    return out.getvalue()


PNG = picture()
INSIDE_4 = "127.0.0.1", "10.0.0.1", "172.16.9.9", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1"
INSIDE_6 = "::1", "::", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:7f00:1::"
DATA_URL = "data:image/png;base64," + base64.b64encode(PNG).decode()


@dataclass
class Site:
    """What each path answers, and which paths were asked for."""

    pages: dict[str, Callable[[BaseHTTPRequestHandler], None]]
    asked: list[str] = field(default_factory=list)
    port: int = 0

    def url(self, path: str = "/a.png", host: str = "localhost") -> str:
        return f"http://{host}:{self.port}{path}"


def body(content: bytes, declared: int | None = None) -> Callable[[BaseHTTPRequestHandler], None]:
    def page(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content) if declared is None else declared))
        handler.end_headers()
        handler.wfile.write(content)

    return page


def redirect(location: str) -> Callable[[BaseHTTPRequestHandler], None]:
    def page(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(302)
        handler.send_header("Location", location)
        handler.end_headers()

    return page


def endless(handler: BaseHTTPRequestHandler) -> None:
    """Says no length, and never ends of itself."""
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(bytes(2**16))


def drip(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(200):
        handler.wfile.write(b".")
        handler.wfile.flush()
        time.sleep(0.05)


def drip_header(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for i in range(200):
        handler.wfile.write(b"X-%d: y\r\n" % i)
        handler.wfile.flush()
        time.sleep(0.05)


def nonsense(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"SSH-2.0-OpenSSH\r\n\r\n")


@contextmanager
def serving(**pages: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[Site]:
    site = Site({f"/{name}": page for name, page in pages.items()} | {"/a.png": body(PNG)})

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            """Quiet."""

        def do_GET(self) -> None:
            site.asked.append(self.path)
            try:
                site.pages.get(self.path, lambda handler: handler.send_error(404))(self)
            except OSError:
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site.port = server.server_port
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_what_the_operator_allows_is_fetched() -> None:
    with serving(there=redirect("/next"), next=redirect("/a.png")) as site:
        assert HERE.fetch(site.url(), "image", LIMITS) == PNG
        assert HERE.fetch(site.url("/there"), "image", LIMITS) == PNG
        assert load_image(site.url(), sources=HERE).size == (6, 4)
        assert site.asked == ["/a.png", "/there", "/next", "/a.png", "/a.png"]


@pytest.mark.parametrize(
    ("sources", "host"),
    [
        (Sources(), "localhost"),
        (Sources(allowed_media_domains=["example.com"]), "localhost"),
        # Allowed by name, but no address of the Internet.
        (Sources(allowed_media_domains=["localhost"]), "localhost"),
        (Sources(allowed_media_domains=["127.0.0.1"]), "127.0.0.1"),
        (Sources(allowed_media_domains=["2130706433"]), "2130706433"),
        (Sources(allowed_media_domains=["0177.0.0.1"]), "0177.0.0.1"),
        (Sources(allowed_media_domains=["[::ffff:127.0.0.1]", "::ffff:127.0.0.1"]), "[::ffff:127.0.0.1]"),
        (HERE, "localhost.example.com"),
        (HERE, "example.com@localhost"),
        (HERE, "localhost\\@example.com"),
        (HERE, "localhost%00.example.com"),
        (HERE, "loc\nalhost"),
        (HERE, "l\u00f3calhost"),
    ],
)
def test_what_he_does_not_allow_opens_no_connection(sources: Sources, host: str) -> None:
    with serving() as site:
        with pytest.raises(RequestError):
            sources.fetch(site.url(host=host), "image", LIMITS)
        assert site.asked == []


def test_a_redirect_is_checked_as_the_first_address_was(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    with (
        serving() as inner,
        serving(
            out=redirect(inner.url(host="127.0.0.1")), file=redirect(f"file://{tmp_path}/a.png"), loop=redirect("/loop")
        ) as site,
    ):
        with pytest.raises(RequestError, match=r"not be fetched from '127.0.0.1': .* set allowed_media_domains"):
            HERE.fetch(site.url("/out"), "image", LIMITS)
        with pytest.raises(RequestError, match=r"must be http\(s\)"):
            HERE.fetch(site.url("/file"), "image", LIMITS)
        with pytest.raises(RequestError, match="redirects more than 3 times"):
            HERE.fetch(site.url("/loop"), "image", LIMITS)
        assert inner.asked == []
        assert site.asked.count("/loop") == 4


def test_a_name_that_changes_its_meaning_leads_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name is asked for once, and the connection goes to the address that was checked."""
    real, asked = socket.getaddrinfo, []

    def answer(host: str, port: int, *args: Any, **more: Any) -> Any:
        if host != "picture.example":
            return real(host, port, *args, **more)
        asked.append(host)
        address = "127.0.0.1" if len(asked) == 1 else "127.0.0.2"
        return real(address, port, *args, **more)

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    sources = Sources(allowed_media_domains=["Picture.Example."], allow_private_media_addresses=True)
    with serving() as site:
        assert sources.fetch(site.url(host="picture.example"), "image", LIMITS) == PNG
    assert asked == ["picture.example"]


def test_one_private_address_among_public_ones_is_enough_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(host: str, port: int, **more: Any) -> Any:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in ("8.8.8.8", "10.0.0.7")]

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    with pytest.raises(RequestError, match="in a private network") as caught:
        Sources(allowed_media_domains=["x.example"]).fetch("http://x.example/", "image", LIMITS)
    assert "10.0.0.7" not in str(caught.value)


@pytest.mark.parametrize("address", [*INSIDE_4, *INSIDE_6])
def test_addresses_that_are_not_of_the_internet(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_addresses_of_the_internet(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        (body(PNG, declared=10**12), "1,000,000,000,000 bytes, more than the 5,000"),
        (body(bytes(5_001)), "5,001 bytes, more than the 5,000"),
        (endless, "bytes: 5,001, more than the 5,000 of max_image_bytes"),
        (body(PNG[:20], declared=40), "broke off after 20 of 40 bytes"),
        (redirect(""), "answers 302"),
        (nonsense, "cannot be fetched from localhost"),
    ],
)
def test_an_answer_that_is_too_large_or_broken_is_refused(
    page: Callable[[BaseHTTPRequestHandler], None], reason: str
) -> None:
    with serving(page=page) as site, pytest.raises(RequestError, match=reason):
        HERE.fetch(site.url("/page"), "image", LIMITS)


@pytest.mark.parametrize("page", [drip, drip_header])
def test_a_server_that_sends_a_byte_now_and_then_is_cut_off(page: Callable[[BaseHTTPRequestHandler], None]) -> None:
    sources = Sources(["localhost"], allow_private_media_addresses=True, media_fetch_timeout=0.4)
    with serving(page=page) as site:
        before = time.monotonic()
        with pytest.raises(RequestError, match=r"too long .* raise media_fetch_timeout"):
            sources.fetch(site.url("/page"), "image", LIMITS)
        assert time.monotonic() - before < 3


def test_a_page_that_is_not_there_nobody_listening_and_no_tls_are_told() -> None:
    with serving() as site:
        with pytest.raises(RequestError, match="localhost answers 404"):
            HERE.fetch(site.url("/no"), "image", LIMITS)
        with pytest.raises(RequestError, match="cannot be fetched from localhost"):
            HERE.fetch(site.url().replace("http:", "https:"), "image", LIMITS)
    with pytest.raises(RequestError, match="cannot be fetched from localhost"):
        HERE.fetch(site.url(), "image", LIMITS)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files as Linux lists them")
def test_no_connection_stays_open_after_a_failure() -> None:
    def count() -> int:
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    with serving(page=body(bytes(6_000))) as site:
        before = count()
        for _ in range(20):
            with pytest.raises(RequestError):
                HERE.fetch(site.url("/page"), "image", LIMITS)
        time.sleep(0.1)
        assert count() <= before + 3


def test_a_request_names_files_only_below_the_folder_that_is_allowed(tmp_path: Path) -> None:
    root = tmp_path / "media"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "a b.png").write_bytes(PNG)
    (tmp_path / "secret").write_bytes(PNG)
    (root / "out").symlink_to(tmp_path / "secret")
    (root / "loop").symlink_to(root / "loop")
    os.mkfifo(root / "pipe")
    sources = Sources(allowed_local_media_path=root)
    for name in ("sub/a b.png", f"{root}/sub/a b.png", f"file://{root}/sub/a%20b.png", "sub/../sub/a b.png"):
        assert sources.fetch(name, "image", LIMITS) == PNG
    refused = ["../secret", f"{tmp_path}/secret", f"file://{tmp_path}/secret", f"file://{root}/%2e%2e/secret", "out"]
    refused += ["loop", "pipe", "sub", "no", "a\0b", "", "/dev/zero", "x" * 5_000, f"{tmp_path}/not-there"]
    for name in refused:
        with pytest.raises(RequestError, match="is no file below allowed_local_media_path"):
            sources.fetch(name, "image", LIMITS)
    with pytest.raises(RequestError, match="names a host"):
        sources.fetch("file://server/a.png", "image", LIMITS)
    with pytest.raises(RequestError, match="max_image_bytes"):
        sources.fetch("sub/a b.png", "image", MediaLimits(max_image_bytes=3))
    with pytest.raises(RequestError, match="set allowed_local_media_path"):
        Sources().fetch(f"{root}/sub/a b.png", "image", LIMITS)


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(SettingError, match="give a list"):
        Sources(allowed_media_domains="example.com")
    with pytest.raises(SettingError, match="media_fetch_timeout"):
        Sources(media_fetch_timeout=0)


IMAGE = Image.new("RGB", (3, 3))


def test_a_conversation_gives_its_media_in_order_and_keeps_plain_parts() -> None:
    text, wav = {"type": "text", "text": "and"}, base64.b64encode(b"RIFF....").decode()
    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "name": "ann",
            "content": [
                {"type": "image_url", "image_url": {"url": DATA_URL, "detail": "auto"}},
                text,
                {"type": "input_audio", "input_audio": {"data": wav, "format": "wav"}},
                {"type": "image", "image": IMAGE},
                {"type": "video_url", "video_url": {"url": "data:video/mp4,abc"}},
            ],
        },
        {"role": "assistant", "content": None},
        {"role": "user", "content": [{"type": "image", "url": DATA_URL}, {"type": "image"}, {"type": "odd", "odd": 1}]},
    ]
    plain, media = collect(messages)
    kinds = [{"type": kind} for kind in ("image", "audio", "image", "video")]
    assert plain == [
        messages[0],
        {"role": "user", "name": "ann", "content": [kinds[0], text, *kinds[1:]]},
        messages[2],
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "odd", "odd": 1}]},
    ]
    assert [(m.kind, m.where) for m in media] == [
        ("image", "message 1, part 0"),
        ("audio", "message 1, part 2"),
        ("image", "message 1, part 3"),
        ("video", "message 1, part 4"),
        ("image", "message 3, part 0"),
    ]
    found = fetch_all(media, limits=LIMITS, sources=Sources())
    assert found == {"image": [PNG, IMAGE, PNG], "audio": [b"RIFF...."], "video": [b"abc"]}


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"type": "image_url"}, "must have one content"),
        ({"type": "image_url", "image_url": {}}, "must be {'url': address}"),
        ({"type": "image_url", "image_url": {"url": 3}}, "must be {'url': address}"),
        ({"type": "image_url", "image_url": {"url": "x", "detail": "high"}}, "detail is 'high'"),
        ({"type": "image_url", "image_url": {"url": "x"}, "min_pixels": 3}, "it has the key 'min_pixels'"),
        ({"type": "image", "image": "a", "url": "b"}, "must have one content"),
        ({"type": "input_audio", "input_audio": {"data": 3}}, "input_audio must be"),
        ({"type": "input_audio", "input_audio": {"data": "", "format": "wav;base64,x"}}, "input_audio must be"),
    ],
)
def test_a_part_that_cannot_be_read_is_refused_with_its_place(part: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=f"^message 0, part 1: .*{reason}"):
        collect([{"role": "user", "content": [{"type": "text", "text": "x"}, part]}])


def test_a_path_in_a_message_is_a_strangers_and_a_failure_names_its_place(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    for part in (
        {"type": "image", "image": str(tmp_path / "a.png")},
        {"type": "image_url", "image_url": {"url": f"file://{tmp_path}/a.png"}},
    ):
        _, media = collect([{"role": "user", "content": [part]}])
        assert media[0].where == "message 0, part 0"
        with pytest.raises(RequestError, match=r"^message 0, part 0: .* set allowed_local_media_path"):
            fetch_all(media, limits=LIMITS, sources=Sources())
        allowed = Sources(allowed_local_media_path=tmp_path)
        assert fetch_all(media, limits=LIMITS, sources=allowed) == {"image": [PNG]}
