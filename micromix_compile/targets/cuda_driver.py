"""Calls of the CUDA driver: kernels loaded and launched, and TMA's descriptors encoded, without a launcher of Triton's.

Its launcher encodes each descriptor anew at each launch, which took 41 to 78 us of the host's time with six of them on
an H200's host. Here they are bytes that a launch copies.
"""

from __future__ import annotations

import ctypes
import threading
from functools import cache
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

MAP_BYTES: Final = 128
"""Of a CUtensorMap, which lies at a multiple of 64."""

DATA_TYPES: Final = {"fp8e4nv": 0, "i32": 3, "bf16": 9}
"""CUtensorMapDataType: UINT8, INT32, BFLOAT16."""

SWIZZLES: Final = {0: 0, 32: 1, 128: 3}
"""CUtensorMapSwizzle, by bytes."""

_L2_PROMOTION_128: Final = 2
_MAX_DYNAMIC_SHARED: Final = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_STREAM_SERIALIZATION: Final = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute, whose value takes 64 bytes."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_int * 15))


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    )


@cache
def driver() -> Any:
    """The driver's library, with the types of what is called here."""
    library = ctypes.CDLL("libcuda.so.1")
    pointer = ctypes.c_void_p
    library.cuLaunchKernelEx.argtypes = (ctypes.POINTER(LaunchConfig), pointer, pointer, pointer)
    library.cuModuleLoadData.argtypes = (pointer, ctypes.c_char_p)
    library.cuModuleGetFunction.argtypes = (pointer, pointer, ctypes.c_char_p)
    library.cuFuncSetAttribute.argtypes = (pointer, ctypes.c_int, ctypes.c_int)
    library.cuTensorMapEncodeTiled.argtypes = (
        pointer, ctypes.c_int, ctypes.c_uint, *[pointer] * 5, *[ctypes.c_int] * 4,
    )  # fmt: skip
    return library


_thread: Final = threading.local()


def ensure_context(device: int) -> None:
    """Make a device's primary context current in a thread that has none: torch may not have needed one there yet.

    A thread that had one once has one: torch's, of the device that it calls current.
    """
    if getattr(_thread, "has_context", False):
        return
    context, handle = ctypes.c_void_p(), ctypes.c_int()
    check(driver().cuCtxGetCurrent(ctypes.byref(context)), "asking for the context")
    if context.value is None:
        check(driver().cuDeviceGet(ctypes.byref(handle), device), f"finding device {device}")
        check(driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), f"the context of device {device}")
        check(driver().cuCtxSetCurrent(context), f"entering the context of device {device}")
    _thread.has_context = True


def check(code: int, what: str) -> None:
    """Raise RuntimeError with the driver's words unless a call succeeded."""
    if code:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"{what}: the CUDA driver says {(text.value or b'nothing').decode()} ({code})")


def load_function(binary: bytes, name: str, shared_bytes: int) -> int:
    """A kernel of a module, in the current context, where the module stays loaded."""
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    check(driver().cuModuleLoadData(ctypes.byref(module), binary), f"loading {name}")
    check(driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()), f"finding {name}")
    code = driver().cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, shared_bytes)
    check(code, f"{shared_bytes} bytes of shared memory for {name}")
    assert function.value is not None, "the driver found it"
    return function.value


def launch_config(threads: int, shared_bytes: int) -> LaunchConfig:
    """For kernels that may start while the one before them ends; grid[0] and stream are the caller's to set."""
    attribute = _Attribute(_STREAM_SERIALIZATION, 0, 1)
    return LaunchConfig((1, 1, 1), (threads, 1, 1), shared_bytes, None, ctypes.pointer(attribute), 1)


def aligned_memory(size: int) -> ctypes.Array[ctypes.c_char]:
    """Memory of the host that begins at a multiple of 64."""
    room = ctypes.create_string_buffer(size + 64)
    return (ctypes.c_char * size).from_buffer(room, -ctypes.addressof(room) % 64)


def encode_map(
    address: int, data_type: int, shape: tuple[int, int], row_bytes: int, box: tuple[int, int], swizzle: int
) -> bytes:
    """A descriptor of a matrix: rows and columns of the whole and of what is copied at a time.

    What lies outside of the matrix reads as zeros and is not written.
    """
    memory = aligned_memory(MAP_BYTES)
    code = driver().cuTensorMapEncodeTiled(
        memory, data_type, 2, address, _longs(shape[::-1]), _longs([row_bytes]), _ints(box[::-1]), _ints((1, 1)), 0,
        swizzle, _L2_PROMOTION_128, 0,
    )  # fmt: skip
    check(code, f"a TMA descriptor of {shape} in rows of {row_bytes} bytes at {address:#x}")
    return bytes(memory)


def _longs(values: Sequence[int]) -> Any:
    return (ctypes.c_uint64 * len(values))(*values)


def _ints(values: Sequence[int]) -> Any:
    return (ctypes.c_uint32 * len(values))(*values)
