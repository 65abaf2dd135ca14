"""Compiles kernels for GPUs without a GPU and reads what they take: registers, spills and shared memory.

To register a kernel: a module beside this one, named in `REGISTRY`, defines `variants()`, which yields one `Variant`
for each way in which the engine launches its kernels. Build them from the same functions that make the `Launch` at run
time (see attention_variants.py), so that the compiled variant is the one that runs. The module must not import torch.
`python -m benchmarks.gpu_kernels` prints the table of all variants; the tests compile those marked `tested`.
Nothing can be compiled under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tidewright.devices.cuda.launch import Launch

REGISTRY = tuple(f"tidewright.devices.cuda.{name}_variants" for name in ("attention", "fused", "lora", "quantized"))

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Most bytes of one program, by architecture: A100; H100 and H200; B200."""

Argument = str
"""A Triton type such as "*bf16", "fp32" or "i32"; "i32:16" is divisible by 16. All pointers are aligned to 16 bytes."""


@dataclass(frozen=True)
class Variant:
    """One kernel as it is launched. `arguments`: the type of each parameter that is not a constant."""

    name: str  # the kernel's, in the table
    shape: str  # tells this variant from the kernel's others, in the table
    kernel: Any  # a @triton.jit function
    arguments: Mapping[str, Argument]
    launch: Launch
    tested: bool = False  # also compiled in the test suite: a few representatives
    least_arch: int = 80  # the engine uses it from this one on


@dataclass(frozen=True)
class Resources:
    """Registers and stack bytes of one thread, shared bytes of one program. These kernels use a stack only to spill.

    `fused`: multiply-adds, if the launch asked for none.
    """

    registers: int
    stack: int
    shared: int
    fused: int = 0

    def complaints(self, arch: int) -> list[str]:
        """Empty if the kernel fits and does not spill."""
        found = []
        if self.stack:
            found.append(f"spills {self.stack} bytes a thread")
        if self.shared > SHARED_MEMORY[arch]:
            found.append(f"takes {self.shared} bytes of shared memory, and sm_{arch} has {SHARED_MEMORY[arch]}")
        if self.fused:
            found.append(f"rounds {self.fused} products and sums together")
        return found


def all_variants() -> Iterator[Variant]:
    for module in REGISTRY:
        yield from importlib.import_module(module).variants()


def compile_for(variant: Variant, arch: int) -> Resources:
    """Raises the compiler's error if the kernel does not compile."""
    kernel, launch = variant.kernel, variant.launch
    named = set(variant.arguments) | set(launch.constants)
    if named != set(kernel.arg_names):
        wrong = sorted(named ^ set(kernel.arg_names))
        raise ValueError(f"{variant.name} {variant.shape}: {wrong} do not match the kernel's parameters")
    types = {name: kind.partition(":")[0] for name, kind in variant.arguments.items()}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = [name for name, kind in variant.arguments.items() if kind.startswith("*") or kind.endswith(":16")]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, dict(launch.constants), attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    fused = 0 if launch.fuses else compiled.asm["ptx"].count("fma.rn")
    return _resources(compiled.asm["cubin"], compiled.metadata.shared, fused)


def _resources(cubin: bytes, shared: int, fused: int) -> Resources:
    """Shared memory is requested at launch, so the machine code does not state it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_cuobjdump(), "--dump-resource-usage", file.name]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    numbers = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    return Resources(numbers["REG"], numbers["STACK"] + numbers["LOCAL"], shared, fused)


def _cuobjdump() -> str:
    """Shipped with Triton, as the assembler is."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
