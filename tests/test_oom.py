import errno

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autobatch.devices.oom import Failure, classify, requested_bytes
from autobatch.errors import add_note

CUDA_OOM = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.69 GiB"
CPU_OOM = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 4000000000 bytes. Error code 12 (Cannot allocate memory)"
)
NCCL = (
    "NCCL error in: NCCLUtils.cpp:77, unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL 2.27\n"
    "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
)
ASSERT = "CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously reported"


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (torch.OutOfMemoryError(CUDA_OOM), Failure.ALLOCATOR),
        (torch.OutOfMemoryError("Allocation on device"), Failure.ALLOCATOR),
        (RuntimeError(CUDA_OOM), Failure.ALLOCATOR),
        (RuntimeError("HIP out of memory. Tried to allocate 512.00 MiB. GPU 0 has"), Failure.ALLOCATOR),
        (RuntimeError("XPU out of memory. Tried to allocate 4.66 GiB. GPU 0 has"), Failure.ALLOCATOR),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB, other allocations"), Failure.ALLOCATOR),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), Failure.ALLOCATOR),
        (RuntimeError("CUDA driver error: out of memory"), Failure.ALLOCATOR),
        (RuntimeError("HIP error: out of memory"), Failure.ALLOCATOR),
        (RuntimeError("Triton Error [CUDA]: out of memory"), Failure.ALLOCATOR),
        (RuntimeError("Triton Error [HIP]:  Code: 2, Messsage: out of memory"), Failure.ALLOCATOR),
        (RuntimeError("Triton Error [HIP]: Code: 2, Message: out of memory"), Failure.ALLOCATOR),
        (
            RuntimeError("level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
            Failure.ALLOCATOR,
        ),
        (
            RuntimeError("UR backend failed. UR backend returns:40 (UR_RESULT_ERROR_OUT_OF_RESOURCES)"),
            Failure.ALLOCATOR,
        ),
        (
            RuntimeError("The following operation failed in the TorchScript interpreter.\nRuntimeError: " + CUDA_OOM),
            Failure.ALLOCATOR,
        ),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            Failure.LIBRARY,
        ),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
            Failure.LIBRARY,
        ),
        (
            RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
            Failure.LIBRARY,
        ),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasLtCreate(handle)`"),
            Failure.LIBRARY,
        ),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), Failure.LIBRARY),
        (RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"), Failure.LIBRARY),
        (RuntimeError("cuFFT error: CUFFT_INTERNAL_ERROR"), Failure.LIBRARY),
        (RuntimeError(NCCL + "Failed to CUDA malloc 4194304 bytes"), Failure.LIBRARY),
        (RuntimeError(NCCL + "Failed to CUDA calloc async 608 bytes"), Failure.LIBRARY),
        (RuntimeError(NCCL + "Cuda failure 2 'out of memory'"), Failure.LIBRARY),
        (RuntimeError(NCCL + "Cuda failure 'out of memory'"), Failure.LIBRARY),
        (RuntimeError(CPU_OOM), Failure.HOST),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:81] data. DefaultCPUAllocator: not enough memory: you tried"),
            Failure.HOST,
        ),
        (RuntimeError("std::bad_alloc"), Failure.HOST),
        (MemoryError(), Failure.HOST),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), Failure.HOST),
        (RuntimeError(ASSERT), Failure.POISONED),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), Failure.POISONED),
        (RuntimeError("CUDA error: misaligned address"), Failure.POISONED),
        (RuntimeError("Triton Error [CUDA]: device-side assert triggered"), Failure.POISONED),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), Failure.POISONED),
        (RuntimeError("CUDA error: unspecified launch failure"), Failure.POISONED),
        (RuntimeError("CUDA error: an illegal instruction was encountered"), Failure.POISONED),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), Failure.POISONED),
        (RuntimeError("Native API failed. Native API returns: 20 (UR_RESULT_ERROR_DEVICE_LOST)"), Failure.POISONED),
    ],
)
def test_failures_are_told_apart(error, failure):
    assert classify(error).failure is failure


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("my replay memory is out of memory slots"),
        RuntimeError("this layer needs cuda"),
        RuntimeError("refusing to go on: CUDA out of memory. Tried to allocate too often"),
        ValueError(CUDA_OOM),
        KeyError("memory"),
        OSError(errno.ENOENT, "no such file: memory.bin"),
        RuntimeError(
            "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous"
        ),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasSgemm(handle, opa, opb)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasLtMatmul(handle, desc)`"),
        RuntimeError("CUDA error: invalid device ordinal"),
        RuntimeError("NCCL Error 1: unhandled cuda error"),
        RuntimeError(NCCL + "Cuda failure 101 'invalid device ordinal'"),
        RuntimeError("Triton Error [CUDA]: invalid argument"),
        RuntimeError("out of resource: shared memory, Required: 147456, Hardware limit: 101376."),
        RuntimeError("FIND was unable to find an engine to execute this computation"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        RuntimeError("could not create a primitive"),
        RuntimeError("can't start new thread"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x3 and 5x2)"),
        RuntimeError("expected scalar type Half but found Float"),
    ],
)
def test_a_bug_of_the_model_is_never_called_memory(error):
    assert classify(error) is None


def test_onednn_and_threads_count_as_memory_only_under_a_cpu_limit():
    for message in ("could not create a primitive", "could not create a memory object", "can't start new thread"):
        assert classify(RuntimeError(message), cpu_limited=True).failure is Failure.HOST


def test_a_real_failed_allocation_is_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55, dtype=torch.uint8)
    diagnosis = classify(caught.value)
    assert diagnosis.failure is Failure.HOST
    assert diagnosis.requested_bytes == 2**55


def test_an_oom_wrapped_by_another_error_is_still_memory():
    error = KeyError("training failed")
    error.__cause__ = torch.OutOfMemoryError(CUDA_OOM)
    assert classify(error).requested_bytes == 2 * 1024**3


def test_an_error_met_while_handling_an_oom_is_memory_unless_the_context_is_hidden():
    def fail(hide):
        try:
            raise torch.OutOfMemoryError(CUDA_OOM)
        except torch.OutOfMemoryError:
            if hide:
                raise ValueError("bad shape") from None
            raise ValueError("bad shape")  # noqa: B904

    with pytest.raises(ValueError, match="bad shape") as shown:
        fail(hide=False)
    with pytest.raises(ValueError, match="bad shape") as hidden:
        fail(hide=True)
    assert classify(shown.value).is_memory
    assert classify(hidden.value) is None


def test_an_error_that_was_being_handled_before_the_step_says_nothing_about_it():
    before, bug = torch.OutOfMemoryError(CUDA_OOM), ValueError("bad shape")
    bug.__context__ = before
    assert classify(bug).is_memory
    assert classify(bug, outside=before) is None


def test_a_poisoned_device_beneath_an_oom_decides():
    error = torch.OutOfMemoryError(CUDA_OOM)
    error.__cause__ = RuntimeError(ASSERT)
    diagnosis = classify(error)
    assert diagnosis.failure is Failure.POISONED
    assert not diagnosis.is_memory
    assert diagnosis.message == "CUDA error: device-side assert triggered"


def test_a_chain_that_bites_its_tail_ends():
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert classify(first) is None


@given(number=st.integers(0, 10**6), unit=st.sampled_from(["KiB", "MiB", "GiB"]))
def test_the_requested_size_is_read_in_its_unit(number, unit):
    scale = {"KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}[unit]
    message = f"CUDA out of memory. Tried to allocate {number}.50 {unit}. GPU 0 has"
    assert requested_bytes(message) == (2 * number + 1) * scale // 2


def test_a_size_that_is_not_named_is_none():
    assert requested_bytes("CUDA error: out of memory") is None


def test_notes_are_kept_in_order():
    error = ValueError("x")
    add_note(error, "one")
    add_note(error, "two")
    assert error.__notes__ == ["one", "two"]
