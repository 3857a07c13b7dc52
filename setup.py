"""Builds the native modules with CMake; everything else is in pyproject.toml.

A machine without a C++ compiler still gets a working package: the ops then run on
`memos_engine/ops/reference.py`, and `memos-engine doctor` says so.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """One CMake project gives both `memos_engine._cpu` and, where nvcc is found, `memos_engine._cuda`."""

    def run(self) -> None:
        first = self.extensions[0]
        target = Path(self.get_ext_fullpath(first.name)).resolve().parent
        build = HERE / "build" / f"cmake-{sys.implementation.cache_tag}"
        try:
            import pybind11

            build.mkdir(parents=True, exist_ok=True)
            target.mkdir(parents=True, exist_ok=True)
            configure = [
                "cmake", "-S", str(HERE), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release",
                f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DMEMOS_ENGINE_OUTPUT={target}",
            ]  # fmt: skip
            if shutil.which("ninja"):
                configure += ["-G", "Ninja"]
            subprocess.run(configure, check=True)
            jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
            subprocess.run(["cmake", "--build", str(build), "-j", jobs], check=True)
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            if os.environ.get("MEMOS_ENGINE_REQUIRE_NATIVE"):
                raise
            print(
                f"memos_engine: native code was not built ({error}); the pure torch reference is used. "
                "Install a C++17 compiler and reinstall for speed.",
                file=sys.stderr,
            )


setup(
    ext_modules=[Extension("memos_engine._cpu", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
