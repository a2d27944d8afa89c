"""Builds the C++ library beside the Python package: plain C symbols, one copy of each kernel per instruction set.

Knows nothing of torch or of Python's C interface, so the wheel fits every Python and every torch. A compiler that is
missing or fails is no error: the package then computes with its references, and one line says so.
"""

import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

LIBRARY = "libbestiary_kernels.so"
PACKAGE = Path("src", "bestiary_kernels")
# -fno-math-errno and -fno-trapping-math change no value; -ffast-math would lose NaN. OpenMP's symbols stay open: the
# runtime that torch has loaded answers them (see library.py), so the link line has no -fopenmp.
COMPILE = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fopenmp",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wno-psabi",
]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
AVX512_BF16 = [*AVX512, "-mavx512bf16", "-mavx512vbmi"]
VARIANTS: dict[str, list[str]] = {"portable": []}
if platform.machine() in ("x86_64", "AMD64"):
    VARIANTS |= {
        "avx2": ["-mavx2", "-mfma"],
        "avx512": AVX512,
        "avx512_bf16": AVX512_BF16,
        "amx_bf16": [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"],
    }


def _run(command: list[str]) -> None:
    """Run a compiler; raises OSError, with the compiler's words, when it is missing or fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{command[0]} failed:\n{done.stderr.strip()}")


def _compile(source: str, target: Path, flags: list[str]) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    more = os.environ.get("CXXFLAGS", "").split()
    _run([os.environ.get("CXX", "g++"), *COMPILE, *flags, *more, "-c", str(PACKAGE / source), "-o", str(target)])
    return target


def build_library(target: Path, scratch: Path) -> None:
    """Compile every variant that the compiler knows and link them to `target`; OSError when none can be built."""
    if not sys.platform.startswith("linux"):
        raise OSError(f"only Linux is supported, not {sys.platform}")
    with ThreadPoolExecutor() as pool:
        jobs = {
            name: pool.submit(_compile, "kernels.cpp", scratch / f"{name}.o", [f"-DVARIANT={name}", *flags])
            for name, flags in VARIANTS.items()
        }
    objects = [_compile("dispatch.cpp", scratch / "dispatch.o", [])]
    for name, job in jobs.items():
        try:
            objects.append(job.result())
        except OSError as error:
            if name == "portable":
                raise
            print(f"bestiary-kernels: built without the {name} kernels: {error}", file=sys.stderr)
    target.parent.mkdir(parents=True, exist_ok=True)
    more = os.environ.get("LDFLAGS", "").split()
    link = [os.environ.get("CXX", "g++"), "-shared", "-Wl,--as-needed", *map(str, objects), *more, "-o", str(target)]
    _run(link)


class BuildLibrary(build_ext):
    """The extension's slot in the build, filled with a library that Python loads through ctypes."""

    def get_ext_filename(self, fullname: str) -> str:
        """Where the file lies under the package folder: no Python version in its name."""
        return str(Path(*fullname.split(".")[:-1], LIBRARY))

    def build_extension(self, ext: Extension) -> None:
        """Build the library, or say in one line why not."""
        try:
            build_library(Path(self.get_ext_fullpath(ext.name)), Path(self.build_temp))
        except OSError as error:
            ext.optional = True  # an editable install then does not look for the file
            print(f"bestiary-kernels: built without the C++ library, the references remain: {error}", file=sys.stderr)

    def get_outputs(self) -> list[str]:
        """List what was built; the library may be absent."""
        return [path for path in super().get_outputs() if Path(path).exists()]


class PlatformWheel(bdist_wheel):
    """The library depends on the platform, not on Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Any Python 3, no Python binary interface, this platform."""
        return ("py3", "none", super().get_tag()[2])


sources, headers = (sorted(str(path) for path in PACKAGE.rglob(f"*.{ending}")) for ending in ("cpp", "hpp"))
setup(
    ext_modules=[Extension("bestiary_kernels.library_file", sources, depends=headers)],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
