"""Builds walt_kernels._C, the native kernels, with ninja and without torch.

Every csrc/<op>/cpu.cpp is compiled once per instruction-set level; the module picks one at load. Without a C++ compiler
the package still installs, with the PyTorch reference kernels only.

Environment: CXX (compiler), MAX_JOBS (parallel compile jobs), WALT_KERNELS_SANITIZE=1 (AddressSanitizer and
UndefinedBehaviorSanitizer), WALT_KERNELS_EMULATE_AVX512=1 (the AVX-512 level as plain code that AVX2 can run, for
tests).
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OPS = ["causal_conv3d", "window_attention", "adaln_lora"]

# Objects are linked in this order. The linker keeps the first copy of an inline function that several objects share, so
# the baseline comes first and no AVX-512 copy of one can end up on an older processor's path.
ISA_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16"],
}
if os.environ.get("WALT_KERNELS_EMULATE_AVX512") == "1":
    ISA_FLAGS["avx512"] = [*ISA_FLAGS["avx2"], "-DWALT_EMULATE_AVX512", "-Wno-psabi"]
OPTIMIZE = ["-O3", "-fno-math-errno", "-mprefer-vector-width=512"]
SANITIZE = ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# GCC 12 takes the deliberately undefined vectors of its own AVX-512 headers for mistakes.
WARN = ["-Wall", "-Wextra", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]


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
            problem = "no C++ compiler found" if compiler is None else f"{shlex.join(compiler)} does not compile C++17"
            print(f"walt_kernels: {problem}; installing without native CPU kernels (PyTorch reference only)")
            return
        import ninja

        x86 = platform.machine() in ("x86_64", "AMD64")
        levels = [level for level, flags in ISA_FLAGS.items() if not flags or (x86 and compiles(compiler, flags))]
        openmp = ["-fopenmp"] if compiles(compiler, ["-fopenmp"]) else []
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve()
        for path in (output.parent, folder):
            path.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(compiler, levels, openmp, output))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        subprocess.run([str(Path(ninja.BIN_DIR, "ninja")), "-C", str(folder), *jobs], check=True)
        summary = ", ".join(levels) + (" with OpenMP" if openmp else " without OpenMP")
        print(f"walt_kernels: built native CPU kernels for {summary}; CUDA: none")


def ninja_file(compiler: list[str], levels: list[str], openmp: list[str], output: Path) -> str:
    """One compile line per source and level, one link line."""
    import pybind11

    sanitize = os.environ.get("WALT_KERNELS_SANITIZE") == "1"
    optimize = SANITIZE if sanitize else [flag for flag in OPTIMIZE if compiles(compiler, [flag])]
    link = ["-shared", *openmp, *(["-fsanitize=address,undefined"] if sanitize else [])]
    common = ["-std=c++17", "-fPIC", "-fvisibility=hidden", *WARN, *openmp, f"-I{ROOT / 'csrc'}"]
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout.splitlines()[0]
    module = [
        "-O1",  # nothing in it is hot, and pybind11 is slow to optimise
        f"-I{pybind11.get_include()}",
        f"-I{sysconfig.get_path('include')}",
        f"-DWALT_OPENMP={int(bool(openmp))}",
        f'-DWALT_COMPILER="{version}"',
        *[flag for flag in ISA_FLAGS["avx512"] if flag.startswith("-D")],
        *[f"-DWALT_HAS_{level.upper()}" for level in levels if level != "baseline"],
    ]
    objects = {"module.o": (ROOT / "csrc" / "module.cpp", module)}
    for level in levels:
        for source in sorted(source for op in OPS for source in (ROOT / "csrc" / op).glob("*.cpp")):
            flags = [*optimize, *ISA_FLAGS[level], f"-DWALT_ISA=isa_{level}"]
            objects[f"{source.parent.name}.{source.stem}.{level}.o"] = (source, flags)

    def command(words: list[str]) -> str:
        return shlex.join(words).replace("$", "$$")

    def path(value: object) -> str:
        return str(value).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = [
        "rule compile",
        f"  command = {command(compiler)} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        f"  command = {command(compiler)} $in -o $out {command(link)}",
        f"build {path(output)}: link {' '.join(objects)}",
    ]
    for name, (source, flags) in objects.items():
        lines += [f"build {name}: compile {path(source)}", f"  flags = {command([*common, *flags])}"]
    return "\n".join(lines) + "\n"


# `optional` lets an installation without a compiler go on; a compiler that fails is still an error.
setup(
    ext_modules=[Extension("walt_kernels._C", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative},
)
