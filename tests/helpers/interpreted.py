"""Runs kernels of the Triton language on the CPU, by its interpreter; where there is a GPU, there, compiled."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from helpers.on_card import launch_on_card

_NAME = "TRITON_INTERPRET"
_mended: list[bool] = []
COMPILED = torch.cuda.is_available() and os.environ.get(_NAME) != "1"
"""Kernels are those of the real compiler, on the GPU; TRITON_INTERPRET=1 has them interpreted there, too."""


@contextmanager
def interpreted() -> Iterator[None]:
    """Modules imported inside have interpreted kernels: the decorator reads the variable once, when it runs.

    The variable is not left set, because processes that other tests start must compile. Does nothing if COMPILED.
    """
    if COMPILED:
        yield
        return
    before = os.environ.get(_NAME)
    os.environ[_NAME] = "1"
    try:
        import triton.experimental.gluon  # noqa: F401 - the interpreter imports it later, and it reads the variable
        import triton.language as tl
        from triton.runtime.interpreter import InterpretedFunction

        if not isinstance(tl.cdiv, InterpretedFunction):
            raise RuntimeError("something imported triton as a compiler before; import it under interpreted() first")
        if not _mended:
            _mended.append(True)
            _mend_rounding()
            _patch_once()
        yield
    finally:
        if before is None:
            del os.environ[_NAME]
        else:
            os.environ[_NAME] = before


def _mend_rounding() -> None:
    """Makes bfloat16 and float8 what they are on a GPU.

    The interpreter's `tl.dot` multiplies the bits of bfloat16, and casts to it truncate; those to float8 round to half
    of the next power of two.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def widened(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return plain_dot(self, widened(a), widened(b), *others)

    def cast(self: Any, source: Any, kind: Any) -> Any:
        if source.dtype.scalar.is_int() and kind.scalar == tl.bfloat16:
            source = plain_cast(self, source, tl.float32)
        if source.dtype.scalar != tl.float32 or kind.scalar != tl.bfloat16:
            return plain_cast(self, source, kind)
        bits = source.data.astype(np.float32).view(np.uint32)
        to_even = bits + 0x7FFF + ((bits >> 16) & 1)
        rounded = np.where(np.isnan(source.data), bits | 0x400000, to_even) >> 16
        return TensorHandle(rounded.astype(np.uint16), tl.bfloat16)

    def to_float8(self: Any, source: Any, kind: Any, rounding: Any) -> Any:
        if source.dtype.scalar != tl.float32 or kind.scalar != tl.float8e4nv:
            return plain_fp_to_fp(self, source, kind, rounding)
        codes = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.float8_e4m3fn)
        return TensorHandle(codes.view(torch.uint8).numpy(), tl.float8e4nv)

    plain_dot, plain_cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl
    plain_fp_to_fp = InterpreterBuilder.create_fp_to_fp
    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = dot, cast
    InterpreterBuilder.create_fp_to_fp = to_float8


def _patch_once() -> None:
    """The interpreter patches the language at every call of a device function, as `tl.sum`: most of its time."""
    from triton.runtime import interpreter

    patched: set[int] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self.fn.__globals__) not in patched:
            patched.add(id(self.fn.__globals__))
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def rounding_of(dtype: torch.dtype) -> float:
    """The largest relative change of one rounding to nearest."""
    return torch.finfo(dtype).eps / 2


# At once, by conftest.py: triton's own functions are made for the interpreter or for the compiler when it is imported,
# and libraries that other tests use import it, too.
if find_spec("triton"):
    if COMPILED:
        launch_on_card()
    with interpreted():
        pass
