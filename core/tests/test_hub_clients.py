"""Both hubs through their real clients: a reference becomes a folder with the model's data, or an error that helps."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from bestiary import hub
from bestiary.errors import CapabilityMissing, CheckpointNotFound
from bestiary.hub import huggingface, modelscope

from .hub_server import Hub, Repository, serving

# The client's process: it reads one question a line and answers each with the folder, or the error's kind and text.
# A client reads its settings when it is imported, so that each kind of settings needs a process of its own.
CLIENT = """
import json, os, socket, sys, time
attempts = 0
pause = time.sleep
time.sleep = lambda seconds: pause(seconds / 100)  # before a client tries again
if "blocked" in sys.argv:
    def refuse(*_):
        global attempts
        attempts += 1
        raise OSError("this test allows no network")
    socket.socket.connect = refuse
    socket.getaddrinfo = refuse
from bestiary.hub import locate
for line in sys.stdin:
    question = json.loads(line)
    os.environ.update(question["environment"])
    try:
        answer = {"folder": str(locate(question["reference"], question["revision"]))}
    except Exception as error:
        answer = {"error": type(error).__name__, "text": str(error)}
    for name in question["environment"]:
        del os.environ[name]
    print(json.dumps({**answer, "attempts": attempts}), flush=True)
"""
# What `pip install` would write for core, so that its sources are found where it runs from the working tree.
METADATA = {
    "METADATA": "Metadata-Version: 2.1\nName: bestiary\nVersion: 0.1.0\n",
    "entry_points.txt": "[bestiary]\nhf = bestiary.hub.huggingface\nmodelscope = bestiary.hub.modelscope\n",
}
FILES = {
    "config.json": b'{"architectures": []}',
    "model-00001-of-00002.safetensors": bytes(range(256)) * 400,
    "model-00002-of-00002.safetensors": bytes(reversed(range(256))) * 400,
    "model.safetensors.index.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "merges.txt": b"a b",
}
LEFT_OUT = {
    "modeling_own.py": b"raise SystemExit",
    "pytorch_model.bin": b"\x80\x02.",
    "consolidated.safetensors": b"again",
    "original/params.json": b"{}",
    "README.md": b"#",
    "notes.txt": b"notes",
}
WEIGHTS = "model-00001-of-00002.safetensors"


class Client:
    """One process with one hub's client in it."""

    def __init__(self, folder: Path, *arguments: str, **settings: str) -> None:
        path = os.pathsep.join([str(folder / "installed"), str(Path(hub.__file__).parents[2])])
        own = {"HOME": str(folder), "PYTHONPATH": path, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "MODELSCOPE_", "BESTIARY_"))}
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLIENT, *arguments],
            env={**inherited, **own, **settings},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, reference: str, revision: str | None = None, **environment: str) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        question = {"reference": reference, "revision": revision, "environment": environment}
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    metadata = folder / "installed" / "bestiary-0.1.0.dist-info"
    metadata.mkdir(parents=True)
    for name, text in METADATA.items():
        (metadata / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with serving(Hub()) as hub:
        yield hub


@pytest.fixture(scope="module", params=["hf", "modelscope"])
def source(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name == "modelscope" and find_spec("modelscope") is None:
        pytest.skip("the modelscope client is not installed: pip install 'bestiary[modelscope]'")
    return name


@pytest.fixture(scope="module")
def client(folder: Path, server: Hub, source: str) -> Iterator[Client]:
    client = Client(
        folder,
        HF_ENDPOINT=server.url,
        HF_HOME=str(folder / "hf"),
        MODELSCOPE_ENDPOINT=server.url,
        MODELSCOPE_CACHE=str(folder / "modelscope"),
        MODELSCOPE_DOWNLOAD_MAX_RETRIES="1",
    )
    yield client
    client.close()


def publish(server: Hub, source: str, name: str, **kind: Any) -> str:
    """Put a model on the hub and return its reference; `name` keeps the tests apart in the one cache."""
    default = "main" if source == "hf" else "master"
    older = {**FILES, "config.json": b'{"architectures": ["Older"]}'}
    server.repositories[f"owner/{name}"] = Repository({default: {**FILES, **LEFT_OUT}, "v1.0": older}, **kind)
    server.file_requests.clear()
    return f"{source}:owner/{name}"


def contents(folder: str) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_a_repository_becomes_a_folder_with_its_data_files(client: Client, server: Hub, source: str) -> None:
    answer = client.ask(publish(server, source, "plain"))
    assert contents(answer["folder"]) == FILES


def test_code_pickles_and_second_copies_of_the_weights_are_never_asked_for(
    client: Client, server: Hub, source: str
) -> None:
    client.ask(publish(server, source, "mixed"))
    assert {path for _, path in server.file_requests} == set(FILES)


def test_a_second_look_up_fetches_no_file(client: Client, server: Hub, source: str) -> None:
    reference = publish(server, source, "twice")
    first = client.ask(reference)
    server.file_requests.clear()
    assert (client.ask(reference), server.file_requests) == (first, [])


def test_a_revision_gives_the_files_of_that_revision(client: Client, server: Hub, source: str) -> None:
    reference = publish(server, source, "revised")
    older, newest = client.ask(reference, "v1.0"), client.ask(reference)
    assert contents(older["folder"])["config.json"] == b'{"architectures": ["Older"]}'
    assert contents(newest["folder"])["config.json"] == FILES["config.json"]


def test_a_missing_revision_is_named(client: Client, server: Hub, source: str) -> None:
    answer = client.ask(publish(server, source, "unrevised"), "v9")
    assert (answer["error"], "revision 'v9'" in answer["text"]) == ("CheckpointNotFound", True)


def test_a_missing_model_is_named_with_what_to_check(client: Client, server: Hub, source: str) -> None:
    answer = client.ask(f"{source}:owner/missing")
    assert answer["error"] == "CheckpointNotFound"
    assert "owner/missing" in answer["text"] and "check the name" in answer["text"]


def test_a_gated_model_says_how_to_get_in_and_a_token_gets_in(client: Client, server: Hub, source: str) -> None:
    reference = publish(server, source, "gated", gated=True)
    refused = client.ask(reference)
    assert refused["error"] == "CheckpointNotFound" and "consent" in refused["text"]
    token = {"hf": "HF_TOKEN", "modelscope": "MODELSCOPE_API_TOKEN"}[source]
    assert token in refused["text"]
    assert contents(client.ask(reference, **{token: "good"})["folder"]) == FILES


def test_a_transfer_that_breaks_off_is_taken_up_again(client: Client, server: Hub, source: str) -> None:
    reference = publish(server, source, "interrupted")
    server.breaks[WEIGHTS] = 1
    assert contents(client.ask(reference)["folder"]) == FILES
    assert server.breaks[WEIGHTS] == 0


def test_a_transfer_that_never_ends_well_is_an_error_and_leaves_no_file_taken_for_whole(
    client: Client, server: Hub, source: str
) -> None:
    reference = publish(server, source, "broken")
    server.breaks[WEIGHTS] = 1000
    answer = client.ask(reference)
    server.breaks[WEIGHTS] = 0
    assert answer["error"] == "CheckpointNotFound" and "try again" in answer["text"]
    assert contents(client.ask(reference)["folder"]) == FILES


def test_a_repository_without_config_json_is_refused(client: Client, server: Hub, source: str) -> None:
    reference = publish(server, source, "bare")
    server.repositories["owner/bare"] = Repository({"main": {"a.json": b"{}"}, "master": {"a.json": b"{}"}})
    answer = client.ask(reference)
    assert answer["error"] == "CheckpointNotFound" and "no config.json" in answer["text"]


def test_offline_a_cached_model_is_found_and_another_is_not_without_touching_the_network(
    folder: Path, server: Hub, tmp_path: Path
) -> None:
    settings = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path)}
    online = Client(folder, **settings)
    found = online.ask(publish(server, "hf", "kept"))
    online.close()
    offline = Client(folder, "blocked", **settings, HF_HUB_OFFLINE="1")
    again, missing = offline.ask("owner/kept"), offline.ask("owner/elsewhere")
    offline.close()
    assert again == {"folder": found["folder"], "attempts": 0}
    assert missing["error"] == "CheckpointNotFound" and missing["attempts"] == 0
    assert "HF_HUB_OFFLINE" in missing["text"] and str(tmp_path) in missing["text"]


def test_where_the_hub_cannot_be_reached_a_cached_model_is_found_and_another_is_not(
    folder: Path, client: Client, server: Hub, source: str
) -> None:
    found = client.ask(publish(server, source, "unreachable"))
    nowhere = "http://127.0.0.1:9"  # the discard port: nothing listens
    cut_off = Client(
        folder,
        HF_ENDPOINT=nowhere,
        HF_HOME=str(folder / "hf"),
        MODELSCOPE_ENDPOINT=nowhere,
        MODELSCOPE_CACHE=str(folder / "modelscope"),
        MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS="1",
    )
    again, missing = cut_off.ask(f"{source}:owner/unreachable"), cut_off.ask(f"{source}:owner/elsewhere")
    cut_off.close()
    assert again == found
    assert missing["error"] == "CheckpointNotFound" and "cannot be reached" in missing["text"]


@pytest.mark.parametrize(("source_module", "variable"), [(huggingface, "HF_HOME"), (modelscope, "MODELSCOPE_CACHE")])
def test_a_full_disk_says_which_variable_moves_the_cache(
    source_module: ModuleType, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_the_disk(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    fake = SimpleNamespace(snapshot_download=fill_the_disk)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fill_the_disk)
    monkeypatch.setitem(sys.modules, "modelscope.hub.snapshot_download", fake)
    with pytest.raises(CheckpointNotFound, match=f"no space left.*{variable}"):
        source_module.bestiary_fetch("owner/name", None, Path())


def test_without_its_client_modelscope_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope.hub.snapshot_download", None)
    with pytest.raises(CapabilityMissing, match=r"pip install 'bestiary\[modelscope\]'"):
        modelscope.bestiary_fetch("owner/name", None, Path())
