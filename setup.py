# SPDX-License-Identifier: Apache-2.0
"""Drives CMake. All choices are environment variables:

TOKENPRUNE_CUDA       AUTO (default): CUDA when nvcc, its torch counterpart and libtorch_cuda are there; ON: or fail; OFF.
TORCH_CUDA_ARCH_LIST  e.g. "8.0;9.0a+PTX" (default: that)
MAX_JOBS              parallel compilations
CMAKE_BUILD_TYPE      Release (default), Debug, RelWithDebInfo
"""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
DEFAULT_ARCHS = "8.0;9.0a+PTX"


def torch_dir() -> Path:
    """Folder of torch, found without importing it (no CUDA initialisation)."""
    spec = importlib.util.find_spec("torch")
    if spec is None:
        raise SystemExit(
            "tokenprune_ext: building needs torch >= 2.11; install it first, then use --no-build-isolation"
        )
    return Path(spec.submodule_search_locations[0])


def torch_cuda_version(folder: Path) -> str | None:
    """torch.version.cuda, read from the file."""
    match = re.search(r"^cuda(?:: [^=]*)? = ['\"]([^'\"]+)", (folder / "version.py").read_text(), re.M)
    return match.group(1) if match else None


def nvcc_path() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and (Path(home) / "bin" / "nvcc").exists():
        return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def nvcc_version(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release ([\d.]+)", text).group(1)


def cuda_obstacle(folder: Path) -> str | None:
    """Why CUDA kernels cannot be built here, or None."""
    cuda = torch_cuda_version(folder)
    if cuda is None or not (folder / "lib" / "libtorch_cuda.so").exists():
        return "torch was built without CUDA"
    nvcc = nvcc_path()
    if nvcc is None:
        return "nvcc was not found"
    version = nvcc_version(nvcc)
    if version.split(".")[0] != cuda.split(".")[0]:
        return f"nvcc is {version} but torch uses CUDA {cuda}"
    return None


def gencode(archs: str) -> list[str]:
    """nvcc flags of an arch list such as "8.0;9.0a+PTX". PTX is of the plain architecture: 9.0a's is not portable."""
    flags = []
    for item in re.split(r"[;\s]+", archs.strip()):
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", item)
        if match is None:
            raise SystemExit(f"tokenprune_ext: TORCH_CUDA_ARCH_LIST must list e.g. 8.0;9.0a+PTX, got {item!r}")
        number, suffix = match.group(1) + match.group(2), match.group(3)
        flags.append(f"-gencode=arch=compute_{number}{suffix},code=sm_{number}{suffix}")
        if match.group(4):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class CMakeBuild(build_ext):
    """Configure and build once; copy the libraries beside the Python package."""

    def build_extension(self, ext):
        folder = torch_dir()
        wanted = os.environ.get("TOKENPRUNE_CUDA", "AUTO").upper()
        if wanted not in ("AUTO", "ON", "OFF"):
            raise SystemExit(f"tokenprune_ext: TOKENPRUNE_CUDA must be AUTO, ON or OFF, got {wanted!r}")
        obstacle = "TOKENPRUNE_CUDA=OFF" if wanted == "OFF" else cuda_obstacle(folder)
        if wanted == "ON" and obstacle:
            raise SystemExit(f"tokenprune_ext: TOKENPRUNE_CUDA=ON, but {obstacle}")
        with_cuda = obstacle is None
        archs = os.environ.get("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHS) if with_cuda else ""
        print(
            f"tokenprune_ext: CPU kernels, {'CUDA kernels for ' + archs if with_cuda else f'no CUDA ({obstacle})'}",
            flush=True,
        )

        build = Path(os.environ.get("TOKENPRUNE_BUILD_DIR", ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"))
        args = [
            f"-DTOKENPRUNE_TORCH_DIR={folder}",
            f"-DTOKENPRUNE_WITH_CUDA={'ON' if with_cuda else 'OFF'}",
            f"-DTOKENPRUNE_GENCODE={';'.join(gencode(archs)) if with_cuda else ''}",
            f"-DTOKENPRUNE_ARCHS={archs.replace(';', ',')}",
            f"-DCMAKE_BUILD_TYPE={os.environ.get('CMAKE_BUILD_TYPE', 'Release')}",
            f"-DPython_EXECUTABLE={sys.executable}",
        ]
        if with_cuda:
            args.append(f"-DCMAKE_CUDA_COMPILER={nvcc_path()}")
        pybind11 = importlib.util.find_spec("pybind11")
        if pybind11 is not None:
            args.append(f"-DTOKENPRUNE_PYBIND11_DIR={Path(pybind11.origin).parent / 'share' / 'cmake' / 'pybind11'}")
        beside = Path(sys.executable).parent / "cmake"  # the one of this environment, also when it is not activated
        cmake = str(beside) if beside.exists() else "cmake"
        configure = [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *args]
        ninja = Path(sys.executable).parent / "ninja"
        if ninja.exists():
            configure.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
        told = subprocess.run(configure, check=True, stdout=subprocess.PIPE, text=True).stdout
        units = re.findall(r"^-- tokenprune: (.*)", told, re.M)
        print("".join(f"tokenprune_ext: {line}\n" for line in units), end="", flush=True)
        jobs = os.environ.get("MAX_JOBS")
        subprocess.run([cmake, "--build", str(build), *(["-j", jobs] if jobs else [])], check=True)

        target = Path(self.build_lib) / "tokenprune_ext"
        target.mkdir(parents=True, exist_ok=True)
        for stale in target.glob("libtokenprune_*.so"):
            stale.unlink()
        for library in [*build.glob("libtokenprune_*.so"), *build.glob("_C.*.so")]:
            if with_cuda or "cuda" not in library.name:
                shutil.copy2(library, target)
        info = {
            "cuda": with_cuda,
            "cuda_reason": obstacle,
            "cuda_archs": archs,
            "cuda_units": units,
            "torch": importlib.metadata.version("torch"),
            "torch_target": "2.11",
            "nvcc": nvcc_version(nvcc_path()) if with_cuda else None,
            "compiler": subprocess.run(
                [os.environ.get("CXX", "c++"), "--version"], capture_output=True, text=True
            ).stdout.split("\n")[0],
        }
        (target / "_build_info.json").write_text(json.dumps(info, indent=1) + "\n")

    def built_files(self) -> list[Path]:
        folder = Path(self.build_lib) / "tokenprune_ext"
        return [*folder.glob("libtokenprune_*.so"), *folder.glob("_C.*.so"), *folder.glob("_build_info.json")]

    def get_outputs(self):
        return [str(path) for path in self.built_files()]

    def copy_extensions_to_source(self):  # editable installs
        source = ROOT / "python" / "tokenprune_ext"
        for stale in source.glob("libtokenprune_*.so"):
            stale.unlink()
        for path in self.built_files():
            shutil.copy2(path, source)


class PlatformWheel(bdist_wheel):
    """The kernels do not depend on Python: one wheel serves every interpreter; _C is optional at run time."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("tokenprune_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
