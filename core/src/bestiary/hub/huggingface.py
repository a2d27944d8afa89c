"""The model source `hf`: the Hugging Face Hub, through its own client, which keeps its own cache and settings.

The client reads HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE and the proxy settings by itself.
"""

import errno
from pathlib import Path

from bestiary.errors import CheckpointNotFound
from bestiary.hooks import hookimpl
from bestiary.hub import DATA_FILES, DUPLICATES

__all__ = ["bestiary_fetch"]


@hookimpl
def bestiary_fetch(reference: str, revision: str | None, cache: Path) -> Path:
    """Return the folder of a repository's snapshot, downloaded where it is not in the client's cache.

    Raises CheckpointNotFound, with what to do, where that fails.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            reference, revision=revision, allow_patterns=list(DATA_FILES), ignore_patterns=list(DUPLICATES)
        )
    except Exception as error:  # the HTTP library below the client, and so the errors, differ between its versions
        raise CheckpointNotFound(f"{reference}: {_explain(error, reference, revision)}") from error
    return Path(folder)


def _explain(error: Exception, reference: str, revision: str | None) -> str:
    """What went wrong, and what to do."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{reference}"
    match error:
        case errors.GatedRepoError():
            return f"its owner asks for consent: accept the terms at {page}, then `hf auth login` or set HF_TOKEN"
        case errors.RevisionNotFoundError():
            return f"it has no revision {revision!r}: see the branches and tags at {page}"
        case errors.RepositoryNotFoundError():
            return f"there is no {page}, or it is private: check the name, or `hf auth login` or set HF_TOKEN"
        case errors.LocalEntryNotFoundError() if constants.HF_HUB_OFFLINE:
            return (
                f"it is not, or not wholly, in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids to "
                "fetch it: unset HF_HUB_OFFLINE once"
            )
        case errors.LocalEntryNotFoundError():
            return (
                f"{constants.ENDPOINT} cannot be reached, and it is not, or not wholly, in the cache "
                f"{constants.HF_HUB_CACHE}: check the network, the proxy settings and HF_ENDPOINT"
            )
        case OSError(errno=errno.ENOSPC):
            return f"no space left in {constants.HF_HUB_CACHE}: make room, or set HF_HOME to a folder on another disk"
        case _:
            kept = "try again; files that arrived whole are kept"
            return f"the download failed ({type(error).__name__}: {error}): {kept}"
