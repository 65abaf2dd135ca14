"""devices/memory.py: which errors say that memory did not suffice."""

from __future__ import annotations

import mmap
import os

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from tidewright.devices.cpu.huge_pages import huge_empty
from tidewright.devices.memory import out_of_memory
from tidewright.engine.step_budget import StepMemoryError

TOO_MUCH = 1 << 60  # bytes


def test_what_runs_out_of_memory_is_known_by_its_error() -> None:
    with pytest.raises(RuntimeError) as of_torch:
        torch.empty(TOO_MUCH, dtype=torch.uint8)
    assert "allocate memory" in out_of_memory(of_torch.value)
    with pytest.raises(MemoryError) as of_numpy:
        np.empty(TOO_MUCH, np.uint8)
    assert "Unable to allocate" in out_of_memory(of_numpy.value)
    assert out_of_memory(MemoryError()) == "MemoryError"
    assert out_of_memory(RuntimeError("CUDA error: out of memory\nCUDA kernel")).startswith("CUDA error")
    long = out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried\n to allocate 20.00 MiB. " + "a" * 1000))
    assert long.startswith("CUDA out of memory. Tried to allocate 20.00 MiB.")
    assert len(long) == 300


def test_what_the_kernel_will_not_map_is_that() -> None:
    with pytest.raises(OSError, match="Errno 12") as of_mmap:
        huge_empty(TOO_MUCH, reserves=True)
    assert out_of_memory(of_mmap.value) == "[Errno 12] Cannot allocate memory"
    # A file that is shared, as the memory of another process's tensors.
    file = os.memfd_create("test")
    try:
        os.ftruncate(file, TOO_MUCH)
        with pytest.raises(OSError, match="Errno 12") as of_file:
            mmap.mmap(file, TOO_MUCH)
        with pytest.raises(RuntimeError, match="unable to mmap") as of_torch:
            torch.from_file(f"/proc/self/fd/{file}", shared=True, size=TOO_MUCH, dtype=torch.uint8)
    finally:
        os.close(file)
    assert out_of_memory(of_file.value)
    assert "Cannot allocate memory" in out_of_memory(of_torch.value)


@pytest.mark.parametrize("arena", [True, False])
def test_what_onnxruntime_has_no_memory_for_is_that(arena: bool) -> None:
    helper, number = onnx.helper, onnx.TensorProto
    node = helper.make_node("ConstantOfShape", ["shape"], ["filled"])
    given = helper.make_tensor_value_info("shape", number.INT64, [1])
    made = helper.make_tensor_value_info("filled", number.FLOAT, None)
    graph = helper.make_graph([node], "graph", [given], [made])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.enable_cpu_mem_arena = arena
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    with pytest.raises(Exception, match="ConstantOfShape") as raised:  # its types have no common base of their own
        session.run(None, {"shape": np.array([TOO_MUCH // 4])})
    assert "ONNXRuntimeError" in out_of_memory(raised.value)


def test_what_libraries_say_of_a_gpu_is_that() -> None:
    for said in (
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "Triton Error [CUDA]: out of memory",
        "NCCL error: unhandled cuda error. Last error: Cuda failure 2 'out of memory'",
    ):
        assert out_of_memory(RuntimeError(said)) == said


def test_other_errors_are_not_that() -> None:
    assert out_of_memory(FileNotFoundError(2, "No such file or directory")) == ""
    assert out_of_memory(OSError(28, "No space left on device")) == ""
    assert out_of_memory(StepMemoryError("a step of 4 tokens ran out of memory", 2)) == ""
    assert out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered")) == ""
    assert out_of_memory(ValueError("DefaultCPUAllocator: can't allocate memory")) == ""
    assert out_of_memory(RuntimeError("out of resource: shared memory")) == ""
