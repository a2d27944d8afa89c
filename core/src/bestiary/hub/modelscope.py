"""The model source `modelscope`: the ModelScope hub, through its own client, which keeps its own cache and settings.

The client is an extra, and reads MODELSCOPE_CACHE, MODELSCOPE_ENDPOINT and MODELSCOPE_API_TOKEN by itself.
"""

import errno
from functools import partial
from pathlib import Path

from bestiary.errors import CapabilityMissing, CheckpointNotFound
from bestiary.hooks import hookimpl
from bestiary.hub import DATA_FILES, DUPLICATES

__all__ = ["bestiary_fetch"]


@hookimpl
def bestiary_fetch(reference: str, revision: str | None, cache: Path) -> Path:
    """Return the folder of a repository's snapshot, downloaded where it is not in the client's cache.

    Raises CapabilityMissing where the client is not installed, and CheckpointNotFound, with what to do, where the
    download fails.
    """
    try:
        from modelscope.hub.snapshot_download import snapshot_download
    except ImportError:
        raise CapabilityMissing(
            f"modelscope:{reference} needs ModelScope's client: pip install 'bestiary[modelscope]'"
        ) from None
    fetch = partial(
        snapshot_download,
        reference,
        revision=revision,
        allow_patterns=list(DATA_FILES),
        ignore_patterns=list(DUPLICATES),
    )
    try:
        return Path(fetch())
    except ConnectionError as error:
        try:
            return Path(fetch(local_files_only=True))  # what the client of the other hub does by itself
        except Exception:
            raise CheckpointNotFound(
                f"modelscope:{reference}: ModelScope cannot be reached, and it is not in the client's cache: check the "
                "network, the proxy settings and MODELSCOPE_ENDPOINT"
            ) from error
    except Exception as error:  # the client raises its own errors, requests' and Python's, by version
        raise CheckpointNotFound(f"modelscope:{reference}: {_explain(error, revision)}") from error


def _explain(error: Exception, revision: str | None) -> str:
    """What went wrong, and what to do."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    failures = [error, *getattr(error, "failed_files", {}).values()]
    if status == 404:
        which = "such model" if revision is None else f"such model, or no revision {revision!r} of it"
        return f"there is no {which}: check the name at ModelScope"
    if status in (401, 403):
        return "it is private, or its owner asks for consent: `modelscope login`, or set MODELSCOPE_API_TOKEN"
    if any(isinstance(failure, OSError) and failure.errno == errno.ENOSPC for failure in failures):
        return "no space left on the disk: make room, or set MODELSCOPE_CACHE to a folder on another disk"
    return f"the download failed ({type(error).__name__}: {error}): try again, it goes on where it stopped"
