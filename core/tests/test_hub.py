"""The forms of a model reference: which source each goes to, and what a folder must be."""

from pathlib import Path

import pytest

from bestiary import hooks
from bestiary.errors import CheckpointNotFound, SettingError
from bestiary.hub import locate


class Recorder:
    """Stands for every source: notes what it was asked and gives one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[tuple[str, str, str | None, Path]] = []

    def source(self, scheme: str) -> "Recorder":
        self.scheme = scheme
        return self

    def fetch(self, reference: str, revision: str | None, cache: Path) -> Path:
        self.asked.append((self.scheme, reference, revision, cache))
        return self.folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "mine"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def recorder(model: Path, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder(model)
    monkeypatch.setattr(hooks, "source", recorder.source)
    monkeypatch.setenv("BESTIARY_CACHE", "/cache")
    monkeypatch.delenv("BESTIARY_USE_MODELSCOPE", raising=False)
    return recorder


@pytest.mark.parametrize(
    ("reference", "scheme", "name"),
    [
        ("Qwen/Qwen2-0.5B", "hf", "Qwen/Qwen2-0.5B"),
        ("hf:gpt2", "hf", "gpt2"),
        ("modelscope:Qwen/Qwen2-0.5B", "modelscope", "Qwen/Qwen2-0.5B"),
        ("demo", "demo", ""),
        ("shelf:a/b/c", "shelf", "a/b/c"),
    ],
)
def test_a_reference_goes_to_its_source(
    recorder: Recorder, model: Path, reference: str, scheme: str, name: str
) -> None:
    assert locate(reference) == model
    assert recorder.asked == [(scheme, name, None, Path("/cache"))]


def test_revision_and_cache_are_handed_on(recorder: Recorder, tmp_path: Path) -> None:
    locate("owner/name", "refs/pr/1", tmp_path)
    assert recorder.asked == [("hf", "owner/name", "refs/pr/1", tmp_path)]


@pytest.mark.parametrize(("value", "scheme"), [("1", "modelscope"), ("0", "hf"), ("", "hf")])
def test_the_environment_makes_modelscope_the_usual_source(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, value: str, scheme: str
) -> None:
    monkeypatch.setenv("BESTIARY_USE_MODELSCOPE", value)
    locate("owner/name")
    assert recorder.asked[0][0] == scheme


def test_an_unclear_choice_of_modelscope_is_refused(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BESTIARY_USE_MODELSCOPE", "maybe")
    with pytest.raises(SettingError, match="BESTIARY_USE_MODELSCOPE='maybe'"):
        locate("owner/name")


@pytest.mark.parametrize("form", ["{0}", "./models/mine", "models/mine", "../{1}/models/mine", "~/models/mine"])
def test_a_folder_is_itself(
    recorder: Recorder, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate(form.format(model, tmp_path.name)).resolve() == model
    assert recorder.asked == []


def test_a_folder_wins_over_a_source_only_if_it_holds_a_model(
    recorder: Recorder, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo").mkdir()
    assert locate("demo") == model
    Path("demo", "config.json").write_text("{}")
    assert locate("demo") == Path("demo")


def test_a_relative_folder_without_a_model_is_not_looked_up_on_a_hub(
    recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("owner/name").mkdir(parents=True)
    with pytest.raises(CheckpointNotFound, match=r"no config\.json in owner/name"):
        locate("owner/name")
    assert recorder.asked == []


def test_a_folder_has_no_revisions(model: Path) -> None:
    with pytest.raises(SettingError, match=r"revision='main'.*leave it out"):
        locate(str(model), "main")


@pytest.mark.parametrize(
    "reference",
    [
        "",
        "gpt2",
        "a/b/c",
        "hf:../../etc",
        "hf:a/..",
        "hf:a//b",
        "hf:a b/c",
        "hf:" + "x" * 97,
        "owner/na me",
        "owner/name\n",
        "https://example.org/owner/name",
        "C:model",
    ],
)
def test_anything_else_is_refused_with_the_forms(recorder: Recorder, reference: str) -> None:
    with pytest.raises(CheckpointNotFound, match="owner/name on Hugging Face"):
        locate(reference)
    assert recorder.asked == []


@pytest.mark.parametrize("revision", ["../main", "", "a b", "/main"])
def test_a_revision_that_could_leave_the_cache_is_refused(recorder: Recorder, revision: str) -> None:
    with pytest.raises(CheckpointNotFound, match="cannot be a revision"):
        locate("owner/name", revision)
    assert recorder.asked == []


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("absent", "no such folder"),
        ("x" * 5000, "name too long.*give a folder"),
        ("../" * 20 + "no/such", "no such folder"),
        ("empty", r"no config\.json"),
        ("model.gguf", "single GGUF file is not served; give the folder or repository"),
        ("absent.gguf", "single GGUF file is not served"),
        ("model.safetensors", "is a file; give the folder that it lies in"),
    ],
)
def test_a_path_that_is_no_models_folder_says_what_to_give(tmp_path: Path, name: str, complaint: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointNotFound, match=complaint):
        locate(str(tmp_path / name))


@pytest.mark.parametrize("reference", ["~nobody-of-this-name/model", "x" * 5000, "a\0b/c"])
def test_a_path_that_cannot_be_looked_at_is_no_model(recorder: Recorder, reference: str) -> None:
    with pytest.raises(CheckpointNotFound, match="give a folder"):
        locate(reference)
