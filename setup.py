"""Builds walt_kernels._C, the native kernels, with ninja and without torch.

Every csrc/<op>/cpu.cpp is compiled once per instruction-set level; the module picks one at load. Without a C++ compiler
the package still installs, with the PyTorch reference kernels only.

Environment: CXX (compiler), MAX_JOBS (parallel compile jobs), WALT_KERNELS_SANITIZE=1 (AddressSanitizer and
UndefinedBehaviorSanitizer).
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OPS = ["causal_conv3d", "window_attention", "adaln_lora"]

# Objects are linked in this order. The linker keeps the first copy of an inline function that several objects share, so the
# baseline comes first and no AVX-512 copy of one can end up on an older processor's path.
ISA_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": (
        [
            "-mavx2",
            "-mfma",
            "-mf16c",
            "-mavx512f",
            "-mavx512bw",
            "-mavx512vl",
            "-mavx512dq",
            "-mavx512bf16",
            "-mprefer-vector-width=512",
        ]
    ),
}


def find_compiler() -> list[str] | None:
    """The C++ compiler as a command line, or None."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    return None


def compiles(compiler: list[str], flags: list[str]) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <cstdint>\nint main() { return 0; }\n")
        command = [*compiler, "-std=c++17", *flags, str(source), "-o", str(Path(folder, "probe"))]
        try:
            return subprocess.run(command, capture_output=True).returncode == 0
        except OSError:
            return False


class BuildNative(build_ext):
    """Writes a ninja file and runs it: parallel, incremental, and with flags per object, which distutils cannot do."""

    def build_extension(self, ext: Extension) -> None:
        compiler = find_compiler()
        if compiler is None or not compiles(compiler, []):
            name = "no C++ compiler found" if compiler is None else f"{compiler[0]} does not compile C++17"
            print(f"walt_kernels: {name}; installing without native CPU kernels (PyTorch reference only)")
            return
        levels = [
            level
            for level, flags in ISA_FLAGS.items()
            if level == "baseline" or (platform.machine() in ("x86_64", "AMD64") and compiles(compiler, flags))
        ]
        openmp = ["-fopenmp"] if compiles(compiler, ["-fopenmp"]) else []
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(self.ninja_file(compiler, levels, openmp, output))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        import ninja

        subprocess.run([str(Path(ninja.BIN_DIR, "ninja")), "-C", str(folder), *jobs], check=True)
        print(
            f"walt_kernels: built native CPU kernels for {', '.join(levels)}{' with OpenMP' if openmp else ''}; CUDA: none"
        )

    def ninja_file(self, compiler: list[str], levels: list[str], openmp: list[str], output: Path) -> str:
        import pybind11

        includes = [str(ROOT / "csrc"), pybind11.get_include(), sysconfig.get_path("include")]
        optimize = ["-O3"]
        link = []
        if os.environ.get("WALT_KERNELS_SANITIZE") == "1":
            optimize = [
                "-O1",
                "-g",
                "-fno-omit-frame-pointer",
                "-fsanitize=address,undefined",
                "-fno-sanitize-recover=all",
            ]
            link = ["-fsanitize=address,undefined"]
        common = [
            "-std=c++17",
            *optimize,
            "-fPIC",
            "-fvisibility=hidden",
            "-fno-math-errno",
            "-Wall",
            "-Wextra",
            "-Wno-maybe-uninitialized",
            *openmp,
        ]
        has = [f"-DWALT_HAS_{level.upper()}" for level in levels if level != "baseline"]
        version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout.splitlines()[0]
        defines = [*has, f'-DWALT_COMPILER="{version}"', f"-DWALT_OPENMP={int(bool(openmp))}"]

        def escape(text: str) -> str:  # ninja's own escapes
            return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

        lines = [
            "ninja_required_version = 1.5",
            "rule compile",
            "  command = " + shlex.join(compiler).replace("$", "$$") + " $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = $out",
            "rule link",
            "  command = " + shlex.join(compiler).replace("$", "$$") + " -shared $in -o $out $flags",
            "  description = $out",
        ]
        objects = []

        def compile_one(source: Path, name: str, flags: list[str]) -> None:
            objects.append(name)
            lines.append(f"build {name}: compile {escape(str(source))}")
            lines.append("  flags = " + shlex.join(flags).replace("$", "$$"))

        include_flags = [f"-I{path}" for path in includes]
        compile_one(ROOT / "csrc" / "module.cpp", "module.o", [*common, *include_flags, *defines])
        for level in levels:
            for op in OPS:
                for source in sorted((ROOT / "csrc" / op).glob("*.cpp")):
                    flags = [*common, *ISA_FLAGS[level], f"-DWALT_ISA=isa_{level}", f"-I{ROOT / 'csrc'}"]
                    compile_one(source, f"{op}.{source.stem}.{level}.o", flags)
        lines.append(f"build {escape(str(output))}: link {' '.join(objects)}")
        lines.append("  flags = " + shlex.join([*openmp, *link]))
        return "\n".join(lines) + "\n"


if sys.version_info < (3, 10):
    raise SystemExit("walt-kernels needs Python 3.10 or newer")

# `optional` lets an installation without a compiler go on; a compiler that fails is still an error.
setup(
    ext_modules=[Extension("walt_kernels._C", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative},
)
