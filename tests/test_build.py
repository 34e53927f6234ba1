"""What is shipped, that it builds without torch and without a compiler, and that it imports with parts missing."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest

import walt_kernels

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str | Path, env: dict[str, str] | None = None, cwd: Path = ROOT) -> str:
    result = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, cwd=cwd, env={**os.environ, **(env or {})}
    )
    assert result.returncode == 0, f"{command} failed:\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout + result.stderr


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The tree as git would check it out, in a folder of its own, so that builds leave nothing behind here."""
    folder = tmp_path / "source"
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard").splitlines()
    for name in listed:
        if (ROOT / name).is_file():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    return folder


@pytest.fixture
def without_torch(tmp_path: Path) -> dict[str, str]:
    """An environment in which importing torch is an error, for every Python process started in it."""
    folder = tmp_path / "blocked"
    folder.mkdir()
    (folder / "torch.py").write_text("raise ImportError('the build must not import torch')\n")
    return {"PYTHONPATH": str(folder)}


def build_wheel(source: Path, out: Path, env: dict[str, str]) -> tuple[set[str], str]:
    options = ["--no-build-isolation", "--no-deps", "--no-cache-dir", "-v", "-w", out]
    log = run(sys.executable, "-m", "pip", "wheel", *options, source, env=env, cwd=source)
    (wheel,) = out.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist()), log


def test_wheel_builds_without_torch_and_holds_the_packages(
    source: Path, tmp_path: Path, without_torch: dict[str, str], touching: Path
) -> None:
    # That the sources compile is seen by every installation; here it is what the wheel holds.
    environment = {**without_torch, "CXX": str(touching), "CUDACXX": "no-such-nvcc"}
    names, log = build_wheel(source, tmp_path / "out", environment)
    assert any(re.fullmatch(r"walt_kernels/_C\..*\.so", name) for name in names)
    assert "built native CPU kernels for baseline" in log
    assert "; CUDA: none (nvcc was not found (CUDACXX=no-such-nvcc))" in log
    modules = {
        str(path.relative_to(source)) for top in ("walt", "walt_kernels") for path in (source / top).rglob("*.py")
    }
    assert modules | weights(source) <= names
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"walt", "walt_kernels"}


def weights(source: Path) -> set[str]:
    """The files of the models in the package."""
    found = {str(path.relative_to(source)) for path in (source / "walt" / "weights").rglob("*") if path.is_file()}
    assert "walt/weights/tiny-doom/tokenizer/model.safetensors" in found
    return found


def set_up(source: Path, tmp_path: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path / "build")]
    return subprocess.run(command, cwd=source, env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.fixture
def touching(tmp_path: Path) -> Path:
    """A compiler that only makes the files it is asked for, so that a build takes no time. It knows no OpenMP."""
    text = """#!/bin/sh
for word; do
    case $last in -o | -MF) : > "$word" ;; esac
    if [ "$word" = -fopenmp ]; then exit 1; fi
    last=$word
done
"""
    return script(tmp_path / "touching-c++", text)


def script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_without_the_headers_of_python_it_installs_and_names_the_package(source: Path, tmp_path: Path) -> None:
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "sitecustomize.py").write_text(
        "import sysconfig\n"
        "get = sysconfig.get_path\n"
        "sysconfig.get_path = lambda name, *more, **options: (\n"
        "    '/no/such/include' if name == 'include' else get(name, *more, **options)\n"
        ")\n"
    )
    result = set_up(source, tmp_path, {"PYTHONPATH": str(tmp_path / "blocked"), "CXX": "c++"})
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("walt_kernels:")]
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert line == (
        "walt_kernels: c++ finds no Python.h in /no/such/include "
        f"(package python3-dev, or python{version}-dev; on Fedora python3-devel); "
        "installing without native CPU kernels (PyTorch reference only)"
    )
    assert "error" not in result.stdout + result.stderr
    assert not list(tmp_path.rglob("*.o"))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "without OpenMP; CUDA: none (nvcc was not found (CUDACXX=no-such-nvcc))"),
        ({"MAX_JOBS": "2"}, "built native CPU kernels for baseline"),
        ({"MAX_JOBS": ""}, "built native CPU kernels for baseline"),
        ({"MAX_JOBS": " ", "WALT_KERNELS_CUDA": " "}, "built native CPU kernels for baseline"),
        ({"TORCH_CUDA_ARCH_LIST": " ", "CUDA_HOME": " "}, "nvcc was not found (CUDACXX=no-such-nvcc)"),
        ({"WALT_KERNELS_CUDA": "0"}, "CUDA: none (WALT_KERNELS_CUDA=0)"),
        ({"CUDACXX": "true"}, "true knows none of the architectures 80, 90a, 100)"),
    ],
    ids=["defaults", "two jobs", "no jobs", "blank", "blank of cuda", "no cuda", "foreign nvcc"],
)
def test_what_was_built_is_one_line(
    source: Path, tmp_path: Path, touching: Path, environment: dict[str, str], message: str
) -> None:
    result = set_up(source, tmp_path, {"CXX": str(touching), "CUDACXX": "no-such-nvcc", **environment})
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("walt_kernels:")]
    assert message in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("#!/no/such/shell\n", "does not work: No such file or directory"),
        ("", "does not work: Exec format error"),
        ("#!/bin/sh\necho compute_80\n", "does not say what it would link"),
    ],
    ids=["no interpreter", "empty", "another program"],
)
def test_a_broken_nvcc_is_told(source: Path, tmp_path: Path, touching: Path, text: str, message: str) -> None:
    nvcc = script(tmp_path / "nvcc", text)
    environment = {"CXX": str(touching), "CUDACXX": str(nvcc)}
    result = set_up(source, tmp_path, environment)
    assert result.returncode == 0, result.stderr
    assert f"CUDA: none ({nvcc} {message})" in result.stdout
    result = set_up(source, tmp_path, {**environment, "WALT_KERNELS_CUDA": "1"})
    assert result.returncode != 0
    assert result.stderr.splitlines()[-1] == f"walt_kernels: WALT_KERNELS_CUDA=1, but {nvcc} {message}"


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the levels of another processor")
@pytest.mark.parametrize(
    ("named", "built"),
    [
        (None, "baseline, avx2, avx512, amx"),
        ("", "baseline, avx2, avx512, amx"),
        ("baseline", "baseline"),
        ("avx512, avx2", "baseline, avx2, avx512"),
        ("avx512,amx", "baseline, avx512, amx"),
    ],
)
def test_only_the_levels_that_are_asked_for(
    source: Path, tmp_path: Path, touching: Path, named: str | None, built: str
) -> None:
    environment = {"CXX": str(touching), "CUDACXX": "no-such-nvcc"}
    result = set_up(source, tmp_path, environment | ({} if named is None else {"WALT_KERNELS_LEVELS": named}))
    assert result.returncode == 0, result.stderr
    assert f"walt_kernels: built native CPU kernels for {built} without OpenMP" in result.stdout
    objects = {path.name.split(".")[-2] for path in tmp_path.rglob("*forward*.o")}
    assert objects == set(built.split(", ")) - {"amx"}


WRONG = [
    ({"MAX_JOBS": "auto"}, "MAX_JOBS is 'auto', expected a whole number of at least 1, or nothing"),
    ({"MAX_JOBS": "0"}, "MAX_JOBS is '0', expected a whole number of at least 1, or nothing"),
    ({"MAX_JOBS": "-3"}, "MAX_JOBS is '-3', expected a whole number of at least 1, or nothing"),
    ({"MAX_JOBS": "\u0664"}, "MAX_JOBS is '\u0664', expected a whole number of at least 1, or nothing"),
    ({"MAX_JOBS": "\u00b2"}, "MAX_JOBS is '\u00b2', expected a whole number of at least 1, or nothing"),
    ({"MAX_JOBS": "1_0"}, "MAX_JOBS is '1_0', expected a whole number of at least 1, or nothing"),
    ({"MAX_JOBS": "1.5"}, "MAX_JOBS is '1.5', expected a whole number of at least 1, or nothing"),
    (
        {"WALT_KERNELS_LEVELS": "baseline,sse4"},
        "WALT_KERNELS_LEVELS has 'sse4', expected names out of baseline, avx2, avx512, amx, with commas",
    ),
    (
        {"WALT_KERNELS_LEVELS": "baseline amx"},
        "WALT_KERNELS_LEVELS has 'baseline amx', expected names out of baseline, avx2, avx512, amx, with commas",
    ),
    (
        {"WALT_KERNELS_LEVELS": "avx2,amx"},
        "WALT_KERNELS_LEVELS has 'amx' without 'avx512', whose kernels it extends",
    ),
    ({"CXX": "no-such-compiler", "WALT_KERNELS_CUDA": "yes"}, "WALT_KERNELS_CUDA is 'yes', expected auto, 1 or 0"),
]


@pytest.mark.parametrize(("environment", "message"), WRONG, ids=lambda value: str(value)[:30])
def test_a_wrong_setting_is_one_line(source: Path, tmp_path: Path, environment: dict[str, str], message: str) -> None:
    result = set_up(source, tmp_path, environment)
    assert result.returncode != 0
    assert result.stderr.splitlines()[-1] == f"walt_kernels: {message}"
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.rglob("*.o"))  # told before anything is compiled


def test_a_blank_compiler_is_none_asked_for(source: Path, tmp_path: Path, touching: Path) -> None:
    (tmp_path / "bin").mkdir()
    touching.rename(tmp_path / "bin" / "c++")
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    result = set_up(source, tmp_path, {"CXX": " ", "CUDACXX": "no-such-nvcc", "PATH": path})
    assert result.returncode == 0, result.stderr
    assert "built native CPU kernels for baseline" in result.stdout


def test_a_compiler_that_fails_on_the_way_is_no_traceback(source: Path, tmp_path: Path, touching: Path) -> None:
    compiler = script(
        tmp_path / "failing-c++",
        f'#!/bin/sh\ncase "$*" in *forward.cpp*) echo internal error; exit 1 ;; esac\nexec {touching} "$@"\n',
    )
    result = set_up(source, tmp_path, {"CXX": str(compiler), "CUDACXX": "no-such-nvcc"})
    assert result.returncode != 0
    assert "internal error" in result.stdout
    assert (
        result.stderr.splitlines()[-1] == "walt_kernels: the native kernels do not compile here, see the errors above"
    )
    assert "Traceback" not in result.stderr


def test_wheel_without_a_compiler_installs_and_says_so(
    source: Path, tmp_path: Path, without_torch: dict[str, str]
) -> None:
    names, log = build_wheel(source, tmp_path / "out", {**without_torch, "CXX": "no-such-compiler"})
    assert "no-such-compiler does not compile C++17; installing without native CPU kernels" in log
    assert not any(name.endswith(".so") for name in names)
    assert "walt_kernels/__init__.py" in names


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WALT_KERNELS_CUDA": "yes"}, "WALT_KERNELS_CUDA is 'yes', expected auto, 1 or 0"),
        (
            {"WALT_KERNELS_CUDA": "1", "CUDACXX": "no-such-nvcc"},
            "WALT_KERNELS_CUDA=1, but nvcc was not found (CUDACXX=no-such-nvcc)",
        ),
        ({"WALT_KERNELS_CUDA": "1", "CUDACXX": "false"}, "false does not work"),
        (
            {"WALT_KERNELS_CUDA": "1", "CXX": "no-such-compiler"},
            "WALT_KERNELS_CUDA=1, but no-such-compiler does not compile C++17",
        ),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else "",
)
def test_cuda_that_cannot_be_built_is_an_error(
    source: Path, tmp_path: Path, environment: dict[str, str], message: str
) -> None:
    result = set_up(source, tmp_path, environment)
    assert result.returncode != 0
    assert message in result.stderr
    assert not list(tmp_path.rglob("*.o"))  # told before anything is compiled


def test_sdist_holds_what_the_build_needs(source: Path, tmp_path: Path, without_torch: dict[str, str]) -> None:
    run(sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path / "out", env=without_torch, cwd=source)
    (archive,) = (tmp_path / "out").glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.split("/", 1)[1] for name in opened.getnames() if "/" in name}
    needed = {str(path.relative_to(source)) for path in (source / "csrc").rglob("*.*")}
    assert needed | weights(source) | {"setup.py", "pyproject.toml", "LICENSE", "README.md"} <= names


@pytest.mark.parametrize("missing", ["walt_kernels._C", "triton", "flash_attn"])
def test_imports_and_runs_without(missing: str) -> None:
    code = f"""
    import sys
    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name == {missing!r} or name.startswith({missing!r} + "."):
                raise ImportError("blocked for the test")
    sys.meta_path.insert(0, Blocker())
    import torch, walt_kernels
    from walt_kernels import testing, _dispatch
    for op in _dispatch.ops():
        inputs = testing.sample_call(op)
        assert walt_kernels.explain(op, **inputs)["reference"] is None
        result = getattr(walt_kernels, op)(**inputs)
        assert all(torch.isfinite(t).all() for t in (result if isinstance(result, tuple) else (result,)))
        print(op, walt_kernels.explain(op, **inputs))
    """
    output = run(sys.executable, "-c", textwrap.dedent(code))
    for op in walt_kernels._dispatch.ops():
        assert op in output
    if missing == "walt_kernels._C":
        assert len(re.findall(r"'cpu': [^,]*blocked for the test", output)) == len(walt_kernels._dispatch.ops())


def test_importing_does_not_start_cuda_or_read_the_compiler() -> None:
    code = "import walt_kernels, torch, sys; assert not torch.cuda.is_initialized(); assert 'triton' not in sys.modules"
    run(sys.executable, "-c", code)


def test_report_names_every_op_and_says_why_not() -> None:
    output = run(sys.executable, "-m", "walt_kernels")
    for op in walt_kernels._dispatch.ops():
        assert output.count(op) >= 2  # once for CPU tensors, once for CUDA tensors
    assert "ISA levels     baseline" in output
    assert "not cpu: runs on CPU tensors" in output


def test_public_names_exist() -> None:
    assert sorted(walt_kernels.__all__) == sorted(set(walt_kernels.__all__))
    for name in walt_kernels.__all__:
        assert hasattr(walt_kernels, name)


def test_no_headers_of_two_folders_of_csrc_define_one_name() -> None:
    """Two types or inline functions of one name in one namespace are two definitions of which the linker keeps one."""
    name = re.compile(r"(?:(?:struct|class|enum class) (\w+)|\w[\w:<>*&, ]* [*&]?(?!__)(\w+)\()")
    folders: dict[tuple[str, str], set[Path]] = {}
    for path in sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh")):
        inside: list[str] = []
        for line in path.read_text().splitlines():
            if match := re.match(r"namespace (\S*) ?{", line):
                inside.append(match[1])
            elif line.startswith("}  // namespace"):
                inside.pop()
            elif inside and inside[-1] != "" and (match := name.match(line)):
                folders.setdefault((inside[-1], match[1] or match[2]), set()).add(path.parent)
    assert {"Scratch", "parallel_for", "Run", "check", "pack_winograd"} <= {name for _, name in folders}
    assert [name for name, where in folders.items() if len(where) > 1] == []


def test_csrc_knows_nothing_of_torch_and_kernels_nothing_of_the_model() -> None:
    for path in (ROOT / "csrc").rglob("*.*"):
        assert not re.search(r'#\s*include\s*[<"](torch|ATen|c10)/', path.read_text()), path
    for path in (ROOT / "walt_kernels").rglob("*.py"):
        assert not re.search(r"^\s*(from|import)\s+walt(\.|\s|$)", path.read_text(), re.M), path
