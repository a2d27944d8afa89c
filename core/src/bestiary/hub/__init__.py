"""What the user calls a model -> a folder on this disk. Knows no hub: each is a source of its own, found by name.

./folder  ~/folder  /folder      that folder
owner/name                       the source `hf`, or `modelscope` where BESTIARY_USE_MODELSCOPE=1
scheme:name                      the source called `scheme`, such as modelscope:owner/name
demo                             the source `demo`
"""

import os
import re
from pathlib import Path

from bestiary import hooks
from bestiary.config import cache_home
from bestiary.errors import CheckpointNotFound, SettingError

__all__ = ["DATA_FILES", "DUPLICATES", "locate"]

#: What a source fetches of a repository: data, never code and never a pickle.
DATA_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt")
#: The same weights once more, in the layout of the model's makers.
DUPLICATES = ("consolidated*", "original/*")

FORMS = (
    "a folder (./model, ~/model, /model), owner/name on Hugging Face, scheme:name for another source "
    "(modelscope:owner/name), or the word demo"
)
SCHEME = re.compile(r"([a-z][a-z0-9_-]*):(.*)")
SEGMENT = re.compile(r"[A-Za-z0-9._-]{1,96}")


def locate(reference: str, revision: str | None = None, cache: Path | None = None) -> Path:
    """Return the folder of a model, fetched where it is not here yet.

    `revision` is a branch, tag or commit of a hub's repository, `cache` the folder for what Bestiary itself makes
    (None: `cache_home()`); hubs keep their own caches. Raises CheckpointNotFound, with what to do, where there is no
    such model, and SettingError for a revision of something that has none.
    """
    try:
        if folder := _local(reference):
            return _checked(folder, reference, revision)
    except (OSError, RuntimeError) as error:  # no right to look there, a name too long, a ~user that is none
        raise CheckpointNotFound(f"{reference[:200]}: {error}; give {FORMS}") from error
    scheme, name = _split(reference)
    if revision is not None and not _is_name(revision):
        raise CheckpointNotFound(f"{revision!r} cannot be a revision: give a branch, a tag or a commit")
    return _with_config(hooks.source(scheme).fetch(name, revision, cache or cache_home()), reference)


def _local(reference: str) -> Path | None:
    """The path that a reference means, or None where it names something at a source."""
    path = Path(reference).expanduser()
    if reference.startswith(("/", "./", "../", "~")) or reference in (".", ".."):
        return path
    if (path / "config.json").is_file() or path.suffix == ".gguf" or ("/" in reference and path.is_dir()):
        return path
    return None


def _split(reference: str) -> tuple[str, str]:
    if reference == "demo":
        return "demo", ""
    if match := SCHEME.fullmatch(reference):
        scheme, name = match.groups()
    else:
        scheme, name = _default_source(), reference
        if name.count("/") != 1:
            raise CheckpointNotFound(f"{reference!r} names no model: give {FORMS}")
    if name and not _is_name(name):
        raise CheckpointNotFound(
            f"{reference!r} cannot be a model's name: between slashes stand 1 to 96 of A-Z a-z 0-9 . _ -, and no two "
            f"dots in a row; give {FORMS}"
        )
    return scheme, name


def _default_source() -> str:
    choice = os.environ.get("BESTIARY_USE_MODELSCOPE", "0")
    if choice not in ("", "0", "1"):
        raise SettingError(f"BESTIARY_USE_MODELSCOPE={choice!r}: set it to 1, or to 0")
    return "modelscope" if choice == "1" else "hf"


def _is_name(text: str) -> bool:
    return ".." not in text and all(part != "." and SEGMENT.fullmatch(part) for part in text.split("/"))


def _checked(path: Path, reference: str, revision: str | None) -> Path:
    """The path, if a model's folder can be there."""
    if path.suffix == ".gguf" and not path.is_dir():
        raise CheckpointNotFound(
            f"{reference}: a single GGUF file is not served; give the folder or repository that it was made from, "
            "with config.json and safetensors"
        )
    if path.is_file():
        raise CheckpointNotFound(f"{reference} is a file; give the folder that it lies in: {path.parent}")
    if not path.is_dir():
        raise CheckpointNotFound(f"{reference}: there is no such folder; give {FORMS}")
    if revision is not None:
        raise SettingError(f"revision={revision!r}: {reference} is a folder, which has no revisions; leave it out")
    return _with_config(path, reference)


def _with_config(folder: Path, reference: str) -> Path:
    if not (folder / "config.json").is_file():
        raise CheckpointNotFound(
            f"{reference}: there is no config.json in {folder}, so it is not a model in Hugging Face's layout; "
            "give the folder or repository that holds config.json beside the weights"
        )
    return folder
