"""The library: which backend is chosen, one OpenMP runtime, registered operators, public names."""

import os
import subprocess
import sys

import pytest
import torch

import bestiary_kernels
from bestiary_kernels import library
from bestiary_kernels.activation import _operator as activation
from bestiary_kernels.attention import _operator as attention
from bestiary_kernels.norm import _operator as norm
from bestiary_kernels.rotary import _operator as rotary

from .cases import paged_batch
from .conftest import NATIVE

needs_library = pytest.mark.skipif(not NATIVE, reason="no C++ library was built")


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_the_variable_forces_a_backend() -> None:
    done = run("import bestiary_kernels as b; print(b.status().backend)", BESTIARY_KERNELS="reference")
    assert done.stdout.strip() == "reference", done.stderr


def test_an_unknown_backend_names_the_choices() -> None:
    done = run("import bestiary_kernels", BESTIARY_KERNELS="sse9")
    assert "ValueError" in done.stderr
    assert all(choice in done.stderr for choice in library.CHOICES)


@pytest.mark.parametrize("backend", library.status().available)
def test_every_backend_can_be_asked_for(backend: str) -> None:
    with library.using(backend):
        assert library.status().backend == backend


def test_a_backend_that_cannot_run_here_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_available", ("portable",))
    with pytest.raises(RuntimeError, match="avx512 cannot be used"), library.using("avx512"):
        pass


def test_auto_takes_the_best_and_a_forced_backend_is_explained() -> None:
    with library.using("auto"):
        status = library.status()
        assert status.backend in status.available and not status.reason
        # Without tiles pairs of bfloat16 pay on AMD's processors alone.
        assert status.backend == status.available[-1] or status.available[-1] == "avx512_bf16"
    with library.using("reference"):
        assert library.status().backend == "reference"
        assert library.status().reason


@needs_library
@pytest.mark.parametrize(("level", "wanted"), [(0, "portable"), (4, library.status().available[-1])])
def test_auto_takes_the_fastest_level_or_where_it_was_not_built_the_next(
    level: int, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Machine:
        """A library whose machine is fastest with one level."""

        def bestiary_best_level(self) -> int:
            return level

        def __getattr__(self, name: str) -> object:
            return getattr(library_here, name)

    library_here = library._library
    monkeypatch.setattr(library, "_library", Machine())
    with library.using("auto"):
        assert library.status().backend == wanted and not library.status().reason


def test_a_missing_library_leaves_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_FILE", library._FILE.with_name("absent.so"))
    opened, reason = library._open()
    assert opened is None and "compiler" in reason


@needs_library
def test_one_openmp_runtime_is_mapped_and_follows_torchs_thread_count() -> None:
    code = """
import ctypes, torch, bestiary_kernels as b
from bestiary_kernels import library
b.read_bandwidth(size_bytes=2**22)
torch.randn(512, 512) @ torch.randn(512, 512)
assert len(library.openmp_runtimes()) == 1, library.openmp_runtimes()
runtime = ctypes.CDLL(library.openmp_runtimes()[0])
for threads in (1, 3):
    torch.set_num_threads(threads)
    assert runtime.omp_get_max_threads() == threads
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


@needs_library
def test_the_library_needs_no_openmp_of_its_own_and_shares_no_function_between_variants() -> None:
    """A weak symbol is one function kept for all variants: on an older machine it could be the wrong one."""
    assert b"libgomp" not in library._FILE.read_bytes()
    try:
        listing = subprocess.run(["nm", "-D", str(library._FILE)], capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        pytest.skip("nm is not installed")
    defined = [line.split()[-2:] for line in listing.splitlines() if line.split()[-2] not in ("U", "w")]
    assert all(kind == "T" and name.startswith("bestiary_") for kind, name in defined), defined


def test_operators_pass_torchs_checks() -> None:
    x, weight = torch.randn(3, 8), torch.randn(8)
    torch.library.opcheck(norm, (x, x.clone(), weight, 1e-5, 0.0))
    torch.library.opcheck(norm, (x, None, weight, 1e-5))
    torch.library.opcheck(activation, (x, "gelu"))
    batch = paged_batch([(1, 5), (3, 3)], width=8)
    torch.library.opcheck(attention, batch.arguments())
    q, k, v = torch.randn(2, 4, 8), torch.randn(2, 2, 8), torch.randn(2, 2, 8)
    caches = torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8)
    index = torch.arange(2)
    torch.library.opcheck(rotary, (q, k, v, torch.randn(4, 2, 4), index, index, *caches, True))


def test_compiled_code_goes_through_the_operators() -> None:
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda x: bestiary_kernels.gated_activation(x) + 1, backend=keep, fullgraph=True)
    x = torch.randn(3, 8)
    torch.testing.assert_close(compiled(x), bestiary_kernels.gated_activation(x) + 1)
    assert "bestiary.gated_activation" in str(graphs[0].code)


def test_public_names_are_what_all_lists() -> None:
    assert sorted(bestiary_kernels.__all__) == bestiary_kernels.__all__ or sorted(
        bestiary_kernels.__all__, key=str.lower
    )
    assert all(getattr(bestiary_kernels, name).__doc__ for name in bestiary_kernels.__all__)


def test_measures_are_positive(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bestiary_kernels.read_bandwidth(1, size_bytes=2**22, repeats=1) > 1e8
    with library.using("reference"):
        assert bestiary_kernels.read_bandwidth(size_bytes=2**22, repeats=1) > 1e7
    assert bestiary_kernels.matmul_flops(torch.float32, size=64, repeats=1) > 1e6
