"""Finds, loads and describes the C++ library; every operation asks `native` which kernels to call.

Knows nothing of what an operation computes: it hands out C functions and turns their status numbers into exceptions.
The environment variable BESTIARY_KERNELS forces a backend; it is read once, when the package is imported.
"""

import ctypes
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

__all__ = [
    "CHOICES",
    "IS_BF16",
    "SIGNATURES",
    "VARIABLE",
    "VARIANTS",
    "Kernels",
    "Status",
    "active",
    "fail",
    "is_traced",
    "native",
    "openmp_runtimes",
    "redirected",
    "status",
    "using",
]

VARIABLE = "BESTIARY_KERNELS"
# Ordered by what they ask of the machine: the index is the level that `bestiary_cpu_level` must reach.
VARIANTS = ("portable", "avx2", "avx512", "avx512_bf16", "amx_bf16")
CHOICES = ("auto", "reference", *VARIANTS)
IS_BF16 = {torch.bfloat16: 1, torch.float32: 0}

_FILE = Path(__file__).with_name("libbestiary_kernels.so")
_POINTER, _SIZE, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
#: The arguments of each C function.
SIGNATURES: dict[str, list[Any]] = {
    "activation": [_INT, _INT, _POINTER, _POINTER, *[_SIZE] * 3],
    "add": [_INT, *[_POINTER] * 4, *[_SIZE] * 2],
    "add_layer_norm": [_INT, *[_POINTER] * 5, *[_SIZE] * 7, _FLOAT],
    "add_rms_norm": [_INT, *[_POINTER] * 4, *[_SIZE] * 5, _FLOAT, _FLOAT],
    "cache_write": [*[_POINTER] * 3, *[_SIZE] * 7],
    "gated_activation": [_INT, _INT, _POINTER, _POINTER, *[_SIZE] * 3],
    "greedy": [_INT, *[_POINTER] * 2, *[_SIZE] * 3],
    "heads_linear": [_INT, *[_POINTER] * 4],
    "rotary": [_INT, *[_POINTER] * 4, *[_SIZE] * 9, _INT],
    "rotary_cache_write": [_INT, *[_POINTER] * 9],
    "paged_attention": [_INT, *[_POINTER] * 7, _FLOAT, _POINTER],
    "embedding": [*[_POINTER] * 3, *[_SIZE] * 3],
    "linear_packed": [_POINTER, _POINTER, _POINTER, _SIZE, _SIZE],
    "linear_squeezed": [_POINTER, _POINTER, _POINTER, _SIZE, _SIZE],
    "linear_packed_many": [*[_POINTER] * 3, *[_SIZE] * 2, _INT, _INT],
    "linear_squeezed_many": [*[_POINTER] * 3, *[_SIZE] * 2, _INT, _INT],
    "linear_rows": [_POINTER, _POINTER, _POINTER, _SIZE, _SIZE],
    "embedding_packed": [_POINTER, _POINTER, _POINTER, _SIZE],
    "embedding_squeezed": [_POINTER, _POINTER, _POINTER, _SIZE],
    "squeeze": [_POINTER, _POINTER, _POINTER],
    "unsqueeze": [_POINTER, _POINTER],
    "lora": [_INT, *[_POINTER] * 8],
    "draw": [*[_POINTER] * 7, *[_SIZE] * 3],
    "route": [_INT, *[_POINTER] * 5],
    "moe": [_INT, _INT, *[_POINTER] * 7],
    "experts_linear": [_INT, *[_POINTER] * 5],
    "moe_squeezed": [_INT, *[_POINTER] * 7],
    "experts_squeezed": [*[_POINTER] * 5],
    "causal_conv": [_INT, _INT, *[_POINTER] * 10],
    "scaled": [_INT, _POINTER, _POINTER, _SIZE, _FLOAT, _FLOAT],
    "selective_scan": [_INT, *[_POINTER] * 14],
    "quantise": [_INT, _INT, *[_POINTER] * 3, *[_SIZE] * 3],
    "quantised_linear": [_POINTER, _POINTER, _POINTER, _SIZE],
    "read_memory": [_POINTER, _SIZE, _INT],
    "replay": [_POINTER, _SIZE, _POINTER],
    "replay_on": [_POINTER, _SIZE, *[_POINTER] * 3],
}
# The numbers of `Status` in simd.hpp.
_ERRORS: dict[int, tuple[type[Exception], str]] = {
    1: (IndexError, "a block id in block_tables is not a block of the cache"),
    2: (IndexError, "a slot lies outside the cache"),
    3: (IndexError, "a position lies outside cos_sin"),
    4: (ValueError, "query_starts and context_lens do not fit q and block_tables"),
    5: (MemoryError, "no memory for the kernel's scratch space"),
    6: (IndexError, "a row number lies outside the weight"),
    7: (IndexError, "a slot lies outside the adapters"),
    8: (IndexError, "a rank is outside what the adapters have room for"),
    9: (ValueError, "starts do not cut the columns into parts"),
    20: (IndexError, "an expert's number lies outside the weights"),
}
BAD_BLOCK, BAD_SLOT, BAD_POSITION, BAD_RAGGED, BAD_ROW, BAD_ADAPTER, BAD_RANK, BAD_PARTS = 1, 2, 3, 4, 6, 7, 8, 9
BAD_EXPERT = 20


class Kernels:
    """The C functions of one variant, as attributes; a function that the variant does not have is None."""

    def __init__(self, library: ctypes.CDLL, variant: str) -> None:
        self.variant = variant
        #: Whether bfloat16 is multiplied in pairs: oneDNN too is fast there, and nowhere else.
        self.has_pairs = variant in ("avx512_bf16", "amx_bf16")
        for name, arguments in SIGNATURES.items():
            function = getattr(library, f"bestiary_{variant}_{name}", None)
            if function is not None:
                function.argtypes = arguments
                function.restype = ctypes.c_uint32 if name == "read_memory" else ctypes.c_int
            setattr(self, name, function)

    def __getattr__(self, name: str) -> Any:
        """Tell type checkers that the functions are attributes; only reached for a name that is none of them."""
        raise AttributeError(f"the {self.variant} kernels have no function {name!r}")


@dataclass(frozen=True)
class Status:
    """What `bestiary doctor` prints: the backend in use, what this machine could use, and why not more."""

    backend: str
    available: tuple[str, ...]
    openmp: str | None
    threads: int
    reason: str


def openmp_runtimes() -> list[str]:
    """Paths of the OpenMP runtimes mapped into this process, torch's own first."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    found = set(re.findall(r"(/\S*/lib(?:gomp|iomp5|omp)\b[^/\s]*\.so[^/\s]*)$", maps, re.MULTILINE))
    torch_folder = str(Path(torch.__file__).parent)
    return sorted(found, key=lambda path: (not path.startswith(torch_folder), path))


def _open() -> tuple[ctypes.CDLL | None, str]:
    """Load the library against the OpenMP runtime that torch has loaded; a second runtime would fight for the cores."""
    if not _FILE.exists():
        return None, f"{_FILE.name} is not installed: no C++ compiler was found when the package was built"
    runtimes = openmp_runtimes()
    if not runtimes:
        return None, "torch has loaded no OpenMP runtime that the library could share"
    try:
        ctypes.CDLL(runtimes[0], mode=ctypes.RTLD_GLOBAL | os.RTLD_NOLOAD)
        return ctypes.CDLL(str(_FILE), mode=ctypes.RTLD_LOCAL | os.RTLD_NOW), ""
    except OSError as error:
        return None, str(error)


def _variants() -> tuple[str, ...]:
    if _library is None:
        return ()
    level = int(_library.bestiary_cpu_level())
    return tuple(name for name in VARIANTS[: level + 1] if hasattr(_library, f"bestiary_{name}_add_rms_norm"))


def _best() -> str:
    """The variant that is fastest here, or the reference."""
    if _library is None or not _available:
        return "reference"
    best = VARIANTS[int(_library.bestiary_best_level())]
    return best if best in _available else _available[-1]


def _choose(wanted: str) -> Kernels | None:
    """The kernels that a value of BESTIARY_KERNELS asks for; None is the reference.

    Raises ValueError for an unknown value and RuntimeError for a variant that cannot run here.
    """
    if wanted not in CHOICES:
        raise ValueError(f"{VARIABLE}={wanted!r} is unknown; choose one of {', '.join(CHOICES)}")
    if wanted == "auto":
        wanted = _best()
    if wanted == "reference":
        return None
    if wanted not in _available or _library is None:
        why = _absence or f"this machine or build has {', '.join(_available)}"
        raise RuntimeError(f"{VARIABLE}={wanted} cannot be used: {why}")
    return Kernels(_library, wanted)


_library, _absence = _open()
_available = _variants()
_forced = os.environ.get(VARIABLE, "auto")
_active = _choose(_forced)


def native(tensor: Tensor) -> Kernels | None:
    """The kernels for a call on `tensor`: None off the CPU, for traced or subclassed tensors, and in reference mode."""
    if _active is None or type(tensor) is not Tensor or not tensor.is_cpu or torch.compiler.is_compiling():
        return None
    return _active


def is_traced(tensor: Tensor) -> bool:
    """Whether a call must go through torch's dispatcher: meta and fake tensors, and torch.compile."""
    return tensor.is_meta or type(tensor) is not Tensor or torch.compiler.is_compiling()


def active() -> Kernels | None:
    """The kernels in use on the CPU; None is the reference."""
    return _active


@contextmanager
def redirected(kernels: Any) -> Iterator[None]:
    """Give `kernels` (None: the reference) to every call of a block of code, in the whole process."""
    global _active
    before, _active = _active, kernels
    try:
        yield
    finally:
        _active = before


def using(backend: str) -> AbstractContextManager[None]:
    """Switch the backend for a block of code, in the whole process; `backend` is a value of BESTIARY_KERNELS."""
    return redirected(_choose(backend))


def fail(operation: str, status: int) -> NoReturn:
    """Raise what a kernel's nonzero status means."""
    kind, message = _ERRORS[status]
    raise kind(f"{operation}: {message}")


def status() -> Status:
    """Describe the backend in use."""
    runtimes = openmp_runtimes()
    backend = _active.variant if _active else "reference"
    reason = _absence
    if not reason and backend != _best():
        reason = f"{VARIABLE}={_forced}" if _forced != "auto" else "switched by the program"
    return Status(
        backend, ("reference", *_available), runtimes[0] if runtimes else None, torch.get_num_threads(), reason
    )
