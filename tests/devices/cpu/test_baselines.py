"""devices/cpu/baselines.py and how build.py chooses: faked processors for the choice, this one for what is built."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from tidewright.devices.cpu import build
from tidewright.devices.cpu.__main__ import main
from tidewright.devices.cpu.baselines import AMD, BASELINES, Processor, fitting, for_machine

INTEL = "GenuineIntel"
# Of /proc/cpuinfo, what matters here.
HASWELL = {"sse4_2", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"}
SKYLAKE_X = HASWELL | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
COOPER_LAKE = SKYLAKE_X | {"avx512_vnni", "avx512_bf16"}
SAPPHIRE_RAPIDS = COOPER_LAKE | {"amx_tile", "amx_bf16", "amx_int8"}
TESTS = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(900)  # compilers, on a busy machine
# The first is much as what is compiled for this very processor, on which all other tests run. Each kernel of v4-vnni is
# that of another.
OTHERS = [baseline.name for baseline in fitting(build.processor()) if baseline.name != "x86-64-v4-vnni"][1:]


@pytest.mark.parametrize(
    ("machine", "vendor", "features", "first", "count"),
    [
        ("x86_64", INTEL, SAPPHIRE_RAPIDS, "x86-64-v4-amx", 4),
        ("x86_64", INTEL, COOPER_LAKE, "x86-64-v4-vnni", 3),  # its dot product of bfloat16 is the slower way
        ("x86_64", AMD, COOPER_LAKE, "x86-64-v4-bf16", 4),  # as Zen 4 has them
        ("x86_64", INTEL, SKYLAKE_X, "x86-64-v4", 2),
        ("x86_64", INTEL, SKYLAKE_X - {"avx512vl"}, "x86-64-v3", 1),  # Knights Landing
        ("x86_64", INTEL, HASWELL | {"avx_vnni"}, "x86-64-v3-vnni", 2),  # Alder Lake
        ("x86_64", AMD, HASWELL, "x86-64-v3", 1),
        ("x86_64", INTEL, HASWELL - {"avx2"}, None, 0),
        ("aarch64", "", {"asimd"}, "armv8-a", 1),
        ("riscv64", "", set(), None, 0),
    ],
)
def test_the_fastest_that_a_processor_can_run(
    machine: str, vendor: str, features: set[str], first: str | None, count: int
) -> None:
    found = [baseline.name for baseline in fitting(Processor(machine, vendor, frozenset(features)))]
    assert len(found) == count
    assert (found[0] if found else None) == first


def test_a_missing_feature_rules_a_baseline_out() -> None:
    """Each feature counts: an instruction that the processor lacks ends the engine."""
    for baseline in BASELINES:
        assert baseline.runs_on(Processor(baseline.machine, "", baseline.features))
        for feature in baseline.features:
            assert not baseline.runs_on(Processor(baseline.machine, "", baseline.features - {feature}))


def test_each_baseline_lets_the_compiler_use_no_more_than_it_asks_of_the_processor() -> None:
    """By the compiler's own predefined macros."""
    names = {
        "__AVX512BF16__": "avx512_bf16",
        "__AVX512VNNI__": "avx512_vnni",
        "__AVXVNNI__": "avx_vnni",
        "__AMX_TILE__": "amx_tile",
        "__AMX_BF16__": "amx_bf16",
        "__LZCNT__": "abm",
        "__BMI__": "bmi1",
    }
    # Older than AVX, so every processor with AVX has them; or, the last two, no instructions that compilers use.
    older = {"mmx", "sse", "sse2", "sse3", "ssse3", "sse4_1", "sse4_2", "popcnt", "fxsr", "sse_math", "sse2_math"}
    for baseline in for_machine("x86_64"):
        command = [os.environ.get("CXX") or "g++", *baseline.flags, "-dM", "-E", "-x", "c++", "/dev/null"]
        defined = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        used = {
            names.get(m, m.strip("_").lower()) for m in defined if m.startswith(("__AVX", "__AMX", "__BMI", "__F16C"))
        }
        used |= {
            names.get(m, m.strip("_").lower())
            for m in defined
            if m in ("__FMA__", "__LZCNT__", "__MOVBE__", "__XSAVE__")
        }
        assert used - older <= baseline.features, baseline.name
        assert used >= baseline.features - {"movbe", "xsave"}, baseline.name


def loaded(tmp_path: Path, *choices: str, code: str = "") -> list[tuple[str, str]]:
    """What load_library says and logs in a process of its own, without a compiler: for each TIDEWRIGHT_KERNELS."""
    script = f"""
import io, json, logging, os
from tidewright.devices.cpu.build import load_library, KernelChoiceError
{code}
said = []
for choice in {list(choices)}:
    os.environ["TIDEWRIGHT_KERNELS"], log = choice, io.StringIO()
    logging.basicConfig(stream=log, level="INFO", force=True)
    load_library.cache_clear()
    try: library = str(load_library() and load_library()._name)
    except KernelChoiceError as error: library = str(error)
    said.append((library, log.getvalue()))
print(json.dumps(said))
"""
    variables = {**os.environ, "TIDEWRIGHT_CACHE": str(tmp_path), "CXX": "/nonexistent"}
    done = subprocess.run([sys.executable, "-c", script], env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [(library, log) for library, log in json.loads(done.stdout)]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with the kernels for each baseline. Not optimized, which takes long, but for those of OTHERS."""
    folder = tmp_path_factory.mktemp("built")
    compiler = folder / "quick"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *-mamx*|*-mavx512bf16*|*vnni*) last=-O0;; *) last=-O3;; esac\nexec g++ "$@" $last\n'
    )
    compiler.chmod(0o755)
    environment = {**os.environ, "CXX": str(compiler)}
    command = [sys.executable, "-m", "tidewright.devices.cpu", "--into", str(folder / "kernels")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(for_machine(os.uname().machine))
    return folder


@pytest.mark.heavy
def test_the_best_that_was_built_is_loaded_without_a_compiler(built: Path) -> None:
    ((library, log),) = loaded(built, "")
    assert Path(library).parent == built / "kernels"
    assert Path(library).name.startswith(f"{fitting(build.processor())[0].name}-")
    assert f"CPU kernels: {library}" in log


@pytest.mark.heavy
def test_if_the_best_is_missing_the_next_is_loaded(built: Path, tmp_path: Path) -> None:
    names = [baseline.name for baseline in fitting(build.processor())]
    (tmp_path / "kernels").mkdir()
    for file in (built / "kernels").iterdir():
        if file.name.rpartition("-")[0] == names[-1]:
            (tmp_path / "kernels" / file.name).symlink_to(file)
    ((library, _),) = loaded(tmp_path, "")
    assert names[-1] in library


@pytest.mark.heavy
def test_what_was_built_from_other_sources_is_not_loaded(built: Path, tmp_path: Path) -> None:
    """Nor, by the same digest, for another OpenMP library."""
    (tmp_path / "kernels").mkdir()
    for file in (built / "kernels").glob("*.so"):
        (tmp_path / "kernels" / file.name).symlink_to(file)
    sources = tmp_path / "cpu"
    sources.mkdir()
    for source in build._SOURCES.iterdir():
        (sources / source.name).write_text(source.read_text() + "\n")
    code = (
        f"from pathlib import Path; from tidewright.devices.cpu import build; build._SOURCES = Path({str(sources)!r})"
    )
    ((library, log),) = loaded(tmp_path, "", code=code)
    assert library == "None"
    assert "CPU kernels are off, torch's slower operations stand in: no C++ compiler '/nonexistent'" in log


@pytest.mark.heavy
def test_the_choice_by_name(built: Path, tmp_path: Path) -> None:
    oldest = fitting(build.processor())[-1].name
    other = next(baseline.name for baseline in BASELINES if not baseline.runs_on(build.processor()))
    named, none, native, unknown, foreign = loaded(built, oldest, "none", "native", "avx9", other)
    assert oldest in named[0]
    assert none == ("None", "")
    assert "no C++ compiler" in native[1]
    assert unknown[0].startswith("TIDEWRIGHT_KERNELS='avx9' is none of auto, native, ")
    assert "this processor lacks instructions that it uses" in foreign[0]
    ((library, log),) = loaded(tmp_path, oldest)
    assert library == "None"
    assert f"{oldest} is not built; run: python -m tidewright.devices.cpu {oldest}" in log


def test_the_name_of_openmp_is_that_which_the_loader_looks_for() -> None:
    """torch's own file and a system's are the same library to what is linked to it."""
    assert build._name_to_link(Path("/usr/lib/libgomp.so.1.0.0")) == build._name_to_link(Path("/torch/libgomp.so.1"))
    assert build._name_to_link(Path("libgomp-24e2ab19.so.1")) == "libgomp-24e2ab19.so.1"
    assert build._name_to_link(Path("libiomp5.so")) == "libiomp5.so"


@pytest.mark.heavy
@pytest.mark.parametrize("name", OTHERS)
def test_the_numbers_are_right_for_each_baseline(built: Path, name: str) -> None:
    """The tests of the kernels, on that build, without a compiler. With AVX2 alone, vectors are half as wide.

    But for the one of them that takes longest: it is about how work is shared out, which is the same for each.
    """
    chosen = [str(TESTS / "devices/cpu" / f"test_{kernels}.py") for kernels in ("kernels", "quantized", "attention")]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not begin_alike", *chosen],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "TIDEWRIGHT_CACHE": str(built), "TIDEWRIGHT_KERNELS": name, "CXX": "/nonexistent"},
    )
    assert run.returncode == 0, run.stdout


def test_the_command_refuses_what_it_can_not_build(tmp_path: Path) -> None:
    other = next(baseline.name for baseline in BASELINES if baseline.machine != os.uname().machine)
    for name, why in (("avx9", "is none"), (other, "is of another architecture")):
        result = CliRunner().invoke(main, [name, "--into", str(tmp_path)])
        assert (result.exit_code, f"'{name}' {why}; choose from " in result.output) == (2, True)
    result = CliRunner().invoke(main, ["--into", str(tmp_path)], env={"CXX": "/nonexistent"})
    assert result.exit_code == 1
    assert "no C++ compiler '/nonexistent'" in result.output
    assert not list(tmp_path.iterdir())
