"""Builds one extension module per folder of csrc/ with host C++: csrc/runtime -> dsv3_kernels._runtime.

Needs a C++17 compiler, pybind11 and ninja: no CUDA toolkit, no torch. The device sources in csrc/kernels are
not compiled here (NVRTC does that at run time); a wheel carries them as package data in dsv3_kernels/kernels.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
MODULES = ("runtime", "emulator")
FLAGS = ["-std=c++17", "-O2", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]


def ninja_command():
    """The ninja of the PyPI wheel if it is importable, else the one on the PATH."""
    try:
        import ninja

        return os.path.join(ninja.BIN_DIR, "ninja")
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise SystemExit("setup.py: found no ninja. Mend: pip install ninja") from None
        return found


def quoted(path):
    """A path as build.ninja spells it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaBuild(build_ext):
    """Compiles every translation unit of every extension in one ninja run, in parallel and incrementally."""

    def run(self):
        cxx = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "c++")
        if shutil.which(shlex.split(cxx)[0]) is None:
            raise SystemExit(
                f"setup.py: found no C++ compiler named {cxx!r}. Mend: install g++ or clang++, or set CXX"
            )
        includes = [sysconfig.get_path("include"), pybind11.get_include()]
        build_dir = Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        link = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
        flags = [*FLAGS, *(f"-I{shlex.quote(path)}" for path in includes), os.environ.get("CXXFLAGS", "")]
        cflags = " ".join(flags).replace("$", "$$")
        lines = [
            "rule compile",
            f"  command = {cxx} -MMD -MF $out.d {cflags} -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {cxx} {link} $in -o $out {os.environ.get('LDFLAGS', '')} -ldl -lpthread",
        ]
        targets = []
        for extension in self.extensions:
            objects = []
            for source in extension.sources:
                # ABI and module in the object's path: several Pythons may share one build folder.
                obj = build_dir / sysconfig.get_config_var("SOABI") / (source + ".o")
                objects.append(quoted(obj))
                lines.append(f"build {quoted(obj)}: compile {quoted(ROOT / source)}")
            target = Path(self.get_ext_fullpath(extension.name)).resolve()
            target.parent.mkdir(parents=True, exist_ok=True)
            targets.append(target)
            lines.append(f"build {quoted(target)}: link {' '.join(objects)}")
        (build_dir / "build.ninja").write_text("\n".join(lines) + "\n")
        subprocess.run([ninja_command(), "-C", str(build_dir), *map(str, targets)], check=True)


class BuildWithKernels(build_py):
    """Adds csrc/kernels to a wheel; an editable install reads the checkout."""

    def run(self):
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "dsv3_kernels" / "kernels"
            target.mkdir(parents=True, exist_ok=True)
            for header in sorted((ROOT / "csrc" / "kernels").glob("*.cuh")):
                shutil.copy2(header, target / header.name)


def extension(name):
    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / name).glob("*.cpp"))
    return Extension(f"dsv3_kernels._{name}", sources)


setup(
    ext_modules=[extension(name) for name in MODULES],
    cmdclass={"build_ext": NinjaBuild, "build_py": BuildWithKernels},
)
