"""Builds walt_kernels._C, the native kernels, with ninja and without torch.

Every .cpp in csrc/<op> and its folders is compiled once per instruction-set level, of which the module picks one at
load; the op's names in Python, bind.cpp, once. Without a C++ compiler or Python's headers the package still installs,
with the PyTorch reference kernels only. With nvcc, the .cu files and cuda_bind.cpp join the same module, which imports
without a GPU and without a driver all the same.

Environment: CXX (compiler), MAX_JOBS (parallel compile jobs), WALT_KERNELS_LEVELS=baseline,avx2 (only these of the
levels baseline, avx2, avx512 and amx, and baseline in any case; by default all that the compiler knows),
WALT_KERNELS_SANITIZE=1 (AddressSanitizer and
UndefinedBehaviorSanitizer), WALT_KERNELS_EMULATE_AVX512=1 and WALT_KERNELS_EMULATE_AMX=1 (these levels as plain code,
for tests where the processor lacks them). WALT_KERNELS_CUDA=auto (CUDA kernels where nvcc is found; the default), 1 (an
error where they cannot be built) or 0; nvcc is looked for in CUDACXX, CUDA_HOME, PATH and /usr/local/cuda;
TORCH_CUDA_ARCH_LIST (as PyTorch reads it) says for which architectures.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

# Objects are linked in this order. The linker keeps the first copy of an inline function that several objects share, so
# the baseline comes first and no AVX-512 copy of one can end up on an older processor's path.
ISA_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16"],
}
if os.environ.get("WALT_KERNELS_EMULATE_AVX512") == "1":
    ISA_FLAGS["avx512"] = [*ISA_FLAGS["avx2"], "-DWALT_EMULATE_AVX512", "-Wno-psabi"]
if os.environ.get("WALT_KERNELS_EMULATE_AMX") == "1":
    ISA_FLAGS["avx512"].append("-DWALT_EMULATE_AMX")
OPTIMIZE = ["-O3", "-fno-math-errno", "-mprefer-vector-width=512"]
SANITIZE = ["-Og", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# GCC 12 takes the deliberately undefined vectors of its own AVX-512 headers for mistakes.
WARN = ["-Wall", "-Wextra", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]

CUDA_ARCHITECTURES = ["80", "90a", "100"]
CUDA_FIRST = 80  # what the kernels need
CUDA_NAMES = {"Ampere": "8.0;8.6+PTX", "Ada": "8.9+PTX", "Hopper": "9.0+PTX", "Blackwell": "10.0;10.3;12.0;12.1+PTX"}


def setting(name: str, default: str = "") -> str:
    """An environment variable; blank is unset."""
    return os.environ.get(name, "").strip() or default


def find_compiler() -> list[str] | None:
    """The C++ compiler as a command line, or None."""
    if wanted := setting("CXX"):
        return shlex.split(wanted)
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    return None


def compiles(compiler: list[str], flags: list[str], include: str = "cstdint", statement: str = "") -> bool:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(f"#include <{include}>\nint main() {{ {statement} return 0; }}\n")
        command = [*compiler, "-std=c++17", *flags, str(source), "-o", str(Path(folder, "probe"))]
        try:
            return subprocess.run(command, capture_output=True).returncode == 0
        except OSError:
            return False


def native_problem(compiler: list[str] | None) -> str | None:
    """Why nothing can be compiled here, or None."""
    if compiler is None:
        return "no C++ compiler found"
    if not compiles(compiler, []):
        return f"{shlex.join(compiler)} does not compile C++17"
    headers = sysconfig.get_path("include")
    if not compiles(compiler, [f"-I{headers}"], "Python.h"):
        packages = f"python3-dev, or python{sysconfig.get_python_version()}-dev; on Fedora python3-devel"
        return f"{shlex.join(compiler)} finds no Python.h in {headers} (package {packages})"
    return None


def max_jobs() -> list[str]:
    """What MAX_JOBS asks ninja for."""
    wanted = setting("MAX_JOBS")
    if wanted and not (wanted.isascii() and wanted.isdigit() and int(wanted) >= 1):
        raise SystemExit(f"walt_kernels: MAX_JOBS is {wanted!r}, expected a whole number of at least 1, or nothing")
    return ["-j", wanted] if wanted else []


def wanted_levels() -> list[str]:
    """What WALT_KERNELS_LEVELS asks for, baseline first; all where it is unset."""
    known = [*ISA_FLAGS, "amx"]
    named = [name.strip() for name in setting("WALT_KERNELS_LEVELS", ",".join(known)).split(",")]
    for name in named:
        if name not in known:
            raise SystemExit(
                f"walt_kernels: WALT_KERNELS_LEVELS has {name!r}, expected names out of {', '.join(known)}, with commas"
            )
    if "amx" in named and "avx512" not in named:
        raise SystemExit("walt_kernels: WALT_KERNELS_LEVELS has 'amx' without 'avx512', whose kernels it extends")
    return [name for name in known if name in (*named, "baseline")]


@dataclass
class Cuda:
    nvcc: list[str]  # with the host compiler to use
    architectures: list[str]  # "80", "90a", "100+PTX"
    libraries: list[str]  # for the link line


def find_nvcc() -> str | None:
    if wanted := setting("CUDACXX"):
        return shutil.which(wanted)
    home = [os.path.join(setting("CUDA_HOME"), "bin")] if setting("CUDA_HOME") else []
    places = [*home, os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(places))


def cuda_architectures(known: set[int]) -> list[str]:
    """What to compile for, by TORCH_CUDA_ARCH_LIST or by default, given the architectures that nvcc knows."""
    listed = setting("TORCH_CUDA_ARCH_LIST")
    if not listed:
        chosen = [name for name in CUDA_ARCHITECTURES if int(name.rstrip("a")) in known]
        newest = next((i for i in reversed(range(len(chosen))) if chosen[i].isdigit()), None)
        if newest is not None:  # PTX of an "a" architecture would run nowhere else
            chosen[newest] += "+PTX"
        return chosen
    for name, numbers in CUDA_NAMES.items():
        listed = re.sub(rf"\b{name}\b(\+PTX)?", numbers, listed)
    chosen = []
    for word in re.split(r"[;,\s]+", listed.strip(" ;,")):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", word)
        if match is None:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST has {word!r}, expected numbers like 8.0;9.0a+PTX")
        number, suffix, ptx = int(match[1] + match[2]), match[3], match[4] or ""
        if number >= CUDA_FIRST and number not in known:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST has {word!r}, which this nvcc does not know")
        if number >= CUDA_FIRST and f"{number}{suffix}{ptx}" not in chosen:
            chosen.append(f"{number}{suffix}{ptx}")
    if not chosen:
        raise ValueError(f"TORCH_CUDA_ARCH_LIST is {listed!r}, expected at least one architecture from 8.0 on")
    return chosen


def find_cuda(compiler: list[str]) -> Cuda:
    """nvcc, tried out. Raises ValueError that says why there are no CUDA kernels."""
    nvcc = find_nvcc()
    if nvcc is None:
        where = f"CUDACXX={setting('CUDACXX')}" if setting("CUDACXX") else "CUDA_HOME, PATH, /usr/local/cuda"
        raise ValueError(f"nvcc was not found ({where})")
    command = [nvcc, *(["-ccbin", compiler[0]] if len(compiler) == 1 else [])]

    def ask(*words: str) -> str:
        try:
            done = subprocess.run([*command, *words], capture_output=True, text=True)
        except OSError as error:
            raise ValueError(f"{nvcc} does not work: {error.strerror or error}") from error
        if done.returncode != 0:
            raise ValueError(f"{nvcc} does not work:\n{done.stdout}{done.stderr}".rstrip())
        return done.stdout + done.stderr

    architectures = cuda_architectures({int(name) for name in re.findall(r"compute_(\d+)", ask("--list-gpu-arch"))})
    if not architectures:
        raise ValueError(f"{nvcc} knows none of the architectures {', '.join(CUDA_ARCHITECTURES)}")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cu")
        source.write_text("#include <cuda_runtime.h>\n__global__ void probe() {}\n")
        ask("-std=c++17", "-c", str(source), "-o", str(Path(folder, "probe.o")))
        plan = ask("-dryrun", str(Path(folder, "probe.o")), "-o", str(Path(folder, "probe")))
    libraries = re.search(r"LIBRARIES=(.*)", plan)
    if libraries is None:
        raise ValueError(f"{nvcc} does not say what it would link")
    folders = [word for word in shlex.split(libraries[1]) if word.startswith("-L")]
    # Our own copy of the runtime, and hidden: it must not stand in for the one that torch loads, nor that one for it.
    return Cuda(
        command, architectures, [*folders, "-lcudart_static", "-lrt", "-lpthread", "-ldl", "-Wl,--exclude-libs,ALL"]
    )


def wanted_cuda() -> str:
    wanted = setting("WALT_KERNELS_CUDA", "auto")
    if wanted not in ("auto", "1", "0"):
        raise SystemExit(f"walt_kernels: WALT_KERNELS_CUDA is {wanted!r}, expected auto, 1 or 0")
    return wanted


def choose_cuda(compiler: list[str]) -> Cuda | str:
    """What WALT_KERNELS_CUDA asks for, or why there are no CUDA kernels; an error where it asks for what cannot be."""
    wanted = wanted_cuda()
    if wanted == "0":
        return "WALT_KERNELS_CUDA=0"
    try:
        return find_cuda(compiler)
    except ValueError as error:
        if wanted == "1":
            raise SystemExit(f"walt_kernels: WALT_KERNELS_CUDA=1, but {error}") from error
        return str(error)


class BuildNative(build_ext):
    """Writes a ninja file and runs it: parallel, incremental, and with flags per object, which distutils cannot do."""

    def build_extension(self, ext: Extension) -> None:
        wanted, jobs, named, compiler = wanted_cuda(), max_jobs(), wanted_levels(), find_compiler()
        problem = native_problem(compiler)
        if problem is not None:
            if wanted == "1":
                raise SystemExit(f"walt_kernels: WALT_KERNELS_CUDA=1, but {problem}")
            print(f"walt_kernels: {problem}; installing without native CPU kernels (PyTorch reference only)")
            return
        cuda = choose_cuda(compiler)
        import ninja

        x86 = platform.machine() in ("x86_64", "AMD64")
        flags = {level: ISA_FLAGS[level] for level in named if level in ISA_FLAGS}
        levels = [level for level, words in flags.items() if not words or (x86 and compiles(compiler, words))]
        if "amx" in named and "avx512" in levels and compiles(compiler, [], statement='asm volatile("tilerelease");'):
            levels.append("amx")  # avx512's kernels, which then have tiles
        openmp = ["-fopenmp"] if compiles(compiler, ["-fopenmp"]) else []
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve()
        for path in (output.parent, folder):
            path.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(
            ninja_file(compiler, levels, openmp, cuda if isinstance(cuda, Cuda) else None, output)
        )
        if subprocess.run([str(Path(ninja.BIN_DIR, "ninja")), "-C", str(folder), *jobs]).returncode != 0:
            raise SystemExit("walt_kernels: the native kernels do not compile here, see the errors above")
        summary = ", ".join(levels) + (" with OpenMP" if openmp else " without OpenMP")
        gpu = ", ".join(cuda.architectures) if isinstance(cuda, Cuda) else f"none ({cuda})"
        print(f"walt_kernels: built native CPU kernels for {summary}; CUDA: {gpu}")


def sources(pattern: str) -> dict[str, Path]:
    """The files of csrc's folders, by names for their objects: causal_conv3d/direct/a.cpp is causal_conv3d.direct.a."""
    found = sorted(path.relative_to(CSRC) for path in CSRC.glob(f"*/**/{pattern}"))
    return {".".join(path.with_suffix("").parts): CSRC / path for path in found}


def ninja_file(compiler: list[str], levels: list[str], openmp: list[str], cuda: Cuda | None, output: Path) -> str:
    """One compile line per source and level, one link line."""
    import pybind11

    sanitize = os.environ.get("WALT_KERNELS_SANITIZE") == "1"
    optimize = SANITIZE if sanitize else [flag for flag in OPTIMIZE if compiles(compiler, [flag])]
    link = ["-shared", *openmp, *(["-fsanitize=address,undefined"] if sanitize else [])]
    link += cuda.libraries if cuda else []
    common = ["-std=c++17", "-fPIC", "-fvisibility=hidden", *WARN, *openmp, f"-I{CSRC}"]
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout.partition("\n")[0]
    python = [
        "-O1",  # nothing in it is hot, and pybind11 is slow to optimise
        f"-I{pybind11.get_include()}",
        f"-I{sysconfig.get_path('include')}",
    ]
    listed = ", ".join(f'"{name}"' for name in cuda.architectures) if cuda else ""
    module = [
        *python,
        f"-DWALT_CUDA_ARCHITECTURES={listed}",
        f"-DWALT_OPENMP={int(bool(openmp))}",
        f'-DWALT_COMPILER="{version}"',
        *[flag for flag in ISA_FLAGS["avx512"] if flag.startswith("-D")],
        *[f"-DWALT_HAS_{level.upper()}" for level in levels if level != "baseline"],
    ]
    objects = {"module.o": (CSRC / "module.cpp", module)}
    objects |= {f"{name}.o": (source, module) for name, source in sources("bind.cpp").items()}
    kernels = {name: source for name, source in sources("*.cpp").items() if "bind" not in source.stem}
    tiles = ["-DWALT_HAS_AMX"] if "amx" in levels else []
    for level in [level for level in levels if level != "amx"]:
        flags = [*optimize, *ISA_FLAGS[level], *tiles, f"-DWALT_ISA=isa_{level}"]
        objects |= {f"{name}.{level}.o": (source, flags) for name, source in kernels.items()}
    cuda_objects = {}
    if cuda:
        words = [
            "-std=c++17",
            "-O3",
            "-Xfatbin=-compress-all",
            "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall",
            f"-I{CSRC}",
        ]
        for name, _, ptx in (architecture.partition("+") for architecture in cuda.architectures):
            words += [
                f"-gencode=arch=compute_{name},code={code}_{name}" for code in (["sm", "compute"] if ptx else ["sm"])
            ]
        cuda_objects = {f"{name}.o": (source, words) for name, source in sources("*.cu").items()}
        objects["cuda_module.o"] = (CSRC / "cuda_module.cpp", python)
        objects |= {f"{name}.o": (source, python) for name, source in sources("cuda_bind.cpp").items()}

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
        "  description = link $out",
        f"build {path(output)}: link {' '.join([*objects, *cuda_objects])}",
    ]
    for name, (source, flags) in objects.items():
        lines += [f"build {name}: compile {path(source)}", f"  flags = {command([*common, *flags])}"]
    if cuda:
        lines += [
            "rule cuda",
            f"  command = {command(cuda.nvcc)} $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $out",
        ]
    for name, (source, flags) in cuda_objects.items():
        lines += [f"build {name}: cuda {path(source)}", f"  flags = {command(flags)}"]
    return "\n".join(lines) + "\n"


# `optional` lets an installation without a compiler go on; a compiler that fails is still an error.
setup(
    ext_modules=[Extension("walt_kernels._C", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative},
)
