"""What `bestiary doctor` looks at: each check is a function that returns findings. Knows no printing."""

import importlib
import os
import platform
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import importlib_metadata

from bestiary import hooks, installed, registry
from bestiary.cli.terminal import size
from bestiary.config import EngineConfig, cache_home
from bestiary.errors import BestiaryError, PluginBroken

__all__ = ["CHECKS", "Finding"]

_OWN = ("bestiary", "bestiary-kernels")
_LIBRARIES = ("torch", "tokenizers", "safetensors", "huggingface-hub", "modelscope")
#: The features of a processor that decide which kernels can run.
_CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
#: What is set from outside and matters here; of these the plain ones may be shown, since they hold no secret.
_SETTINGS = re.compile(
    r"(BESTIARY|HF|HUGGING_FACE|MODELSCOPE|TRANSFORMERS)_\w+|(OMP|MKL)_NUM_THREADS|(HTTPS?|ALL|NO)_PROXY", re.IGNORECASE
)
_PLAIN = re.compile(
    r"BESTIARY_\w+|HF_(HOME|HUB_CACHE|ENDPOINT|HUB_OFFLINE|HUB_(DISABLE|ENABLE)_\w+|HUB_\w+_TIMEOUT)"
    r"|MODELSCOPE_(CACHE|ENDPOINT|DOMAIN|OFFLINE)|TRANSFORMERS_OFFLINE|(OMP|MKL)_NUM_THREADS"
)
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSWORD|CREDENTIAL")
_CREDENTIALS = re.compile(r"(?<=//)\S*@")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. A `note` may surprise; what is `broken` must be mended, and `value` says how."""

    name: str
    value: str
    status: Literal["ok", "note", "broken"] = "ok"


def _environment() -> Iterator[Finding]:
    yield Finding("python", f"{platform.python_version()} ({sys.executable})")
    yield Finding("system", f"{platform.system()} {platform.release()}, {platform.machine()}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("processor", f"{cores} cores for this process; {' '.join(_cpu_flags()) or 'features unknown'}")
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        kib = {key: int(rest.split()[0]) for key, rest in (line.split(":", 1) for line in lines)}
        yield Finding("memory", f"{size(kib['MemTotal'] * 1024)}, {size(kib['MemAvailable'] * 1024)} of it available")
    except (OSError, KeyError):
        yield Finding("memory", "unknown: this system has no /proc/meminfo", "note")
    yield from _attempted("torch", "torch", _torch)


def _cpu_flags() -> list[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    words = found[1].split() if found else []
    return [flag for flag in _CPU_FLAGS if flag in words]


def _torch() -> Iterator[Finding]:
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    yield Finding("torch", f"{torch.__version__} ({build}), {torch.get_num_threads()} threads")
    if not torch.cuda.is_available():
        yield Finding("GPU", "none that this build of torch can use")
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        yield Finding(f"cuda:{number}", f"{gpu.name}, {size(gpu.total_memory)}")


def _kernels() -> Iterator[Finding]:
    return _attempted("kernels", "bestiary-kernels", _native_kernels)


def _native_kernels() -> Iterator[Finding]:
    import bestiary_kernels

    status = bestiary_kernels.status()
    is_slow = status.backend == "reference"
    reason = f": {status.reason}" if status.reason else ""
    yield Finding("in use", f"{status.backend}{reason}", "note" if is_slow else "ok")
    yield Finding("possible here", " ".join(status.available))
    yield Finding("threads", f"{status.threads}, with OpenMP from {status.openmp or 'nowhere'}")


def _attempted(name: str, distribution: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Whatever a check of foreign code raises is a finding too."""
    try:
        yield from check()
    except Exception as error:
        mend = (
            f". Run: pip install --upgrade --force-reinstall {distribution}" if isinstance(error, ImportError) else ""
        )
        yield Finding(name, f"{type(error).__name__}: {error}{mend}", "broken")


def _distributions() -> Iterator[Finding]:
    found = _copies()
    for name in (*_OWN, *sorted(set(found) - set(_OWN))):
        if name not in found:
            yield Finding(name, "not installed: what is imported is a folder on sys.path", "note")
            continue
        (version, where), *others = found[name]
        yield Finding(name, f"{version} in {where}")
        for other_version, other in others:
            text = f"once more: {other_version} in {other}, hidden by the first"
            if other_version == version:
                yield Finding(name, text, "note")
            else:
                yield Finding(name, f"{text}. Run `pip uninstall {name}` until none is left, then install it", "broken")


def _copies() -> dict[str, list[tuple[str, str]]]:
    """(version, folder) of every copy of the distributions that matter here, in the order of sys.path."""
    matter = {*_OWN, *_LIBRARIES}
    found: dict[str, list[tuple[str, str]]] = {}
    for distribution in importlib_metadata.distributions():
        with suppress(Exception):  # what cannot be read is told of with the plugins
            name = _canonical(distribution.metadata["Name"])
            copy = (distribution.version, str(distribution.locate_file("")))
            if copy not in found.setdefault(name, []):
                found[name].append(copy)
            if f"[{hooks.GROUP}" in (distribution.read_text("entry_points.txt") or ""):
                matter.add(name)
    return {name: copies for name, copies in found.items() if name in matter}


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _plugins() -> Iterator[Finding]:
    for fault in installed.unreadable():
        text = f"its metadata could not be read ({fault.reason}): remove that folder, or install its distribution again"
        yield Finding(fault.where, text, "broken")
    for name, plugins in registry.scan().items():
        if len(plugins) > 1:
            owners = ", ".join(plugin.owner for plugin in plugins)
            yield _tried(name, f"claimed by {owners}; BESTIARY_PLUGIN chooses", partial(registry.find, name))
        for plugin in plugins:
            yield _tried(name, plugin.owner, partial(_import_models, plugin))
    for name, entries in installed.declared(hooks.GROUP).items():
        yield _tried(f"models from {name}", entries[0].owner, partial(hooks.source, name))


def _tried(name: str, value: str, attempt: Callable[[], object]) -> Finding:
    try:
        attempt()
    except BestiaryError as error:
        return Finding(name, str(error), "broken")
    return Finding(name, value)


def _import_models(plugin: registry.Installed) -> None:
    """Load a declaration, and the code behind it, which a checkpoint would need."""
    declared = plugin.load()
    for module in dict.fromkeys((declared.model, *(variant.model for variant in declared.variants))):
        try:
            importlib.import_module(module)
        except (Exception, SystemExit) as error:
            raise PluginBroken(
                f"{plugin.owner}: its model module {module} fails to import ({type(error).__name__}: {error}). "
                f"Run: pip install --upgrade --force-reinstall {plugin.distribution}; or tell its author"
            ) from error


def _settings() -> Iterator[Finding]:
    yield _tried("engine settings", "can be read", partial(EngineConfig.resolve, model="demo"))
    for name, value in sorted(os.environ.items()):
        if _SETTINGS.fullmatch(name):
            is_plain = _PLAIN.fullmatch(name) and not _SECRET.search(name)
            yield Finding(name, _CREDENTIALS.sub("***@", value) if is_plain else "set, and not shown here")


def _caches() -> Iterator[Finding]:
    yield _cache("Bestiary", cache_home())
    yield from _attempted("Hugging Face", "huggingface_hub", _hugging_face_cache)
    if "MODELSCOPE_CACHE" in os.environ:
        yield _cache("ModelScope", Path(os.environ["MODELSCOPE_CACHE"]))


def _hugging_face_cache() -> Iterator[Finding]:
    from huggingface_hub import constants

    yield _cache("Hugging Face", Path(constants.HF_HUB_CACHE))


def _cache(name: str, folder: Path) -> Finding:
    """What a folder holds, links not followed: hubs link each file to one copy of it."""
    total, is_there = 0, folder.is_dir()
    for parent, _, files in os.walk(folder):
        for file in files:
            with suppress(OSError):  # removed meanwhile
                total += Path(parent, file).lstat().st_size
    return Finding(name, f"{folder}: {size(total) if is_there else 'not there yet'}")


CHECKS: Mapping[str, Callable[[], Iterable[Finding]]] = {
    "environment": _environment,
    "kernels": _kernels,
    "distributions": _distributions,
    "plugins": _plugins,
    "settings": _settings,
    "caches": _caches,
}
