"""The GPU at hand, asked through the CUDA driver: no PyTorch, no CUDA package."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from ..errors import TargetError

__all__ = ["Gpu", "describe_gpu"]

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR


@dataclass(frozen=True)
class Gpu:
    """Name as the driver gives it, compute capability like ``9.0``, newest CUDA version of the driver like ``13.0``."""

    name: str
    compute_capability: str
    driver: str


def describe_gpu(index: int = 0) -> Gpu:
    """The GPU of this number.

    Raises:
        TargetError: no driver, or no such GPU.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise TargetError(
            "no CUDA driver (libcuda.so.1): TensorRT builds and runs engines on the GPU that they are for; install the "
            "NVIDIA driver, or in a container use --gpus all"
        ) from error

    def check(code: int, what: str) -> None:
        if code:
            text = ctypes.c_char_p()
            driver.cuGetErrorString(code, ctypes.byref(text))
            reason = (text.value or b"unknown").decode()
            raise TargetError(f"GPU {index}: {what} failed with CUDA error {code} ({reason}); check nvidia-smi")

    check(driver.cuInit(0), "cuInit")
    device, number = ctypes.c_int(), ctypes.c_int()
    check(driver.cuDeviceGet(ctypes.byref(device), index), "cuDeviceGet")
    name = ctypes.create_string_buffer(256)
    check(driver.cuDeviceGetName(name, len(name), device), "cuDeviceGetName")
    digits = []
    for attribute in (_MAJOR, _MINOR):
        check(driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device), "cuDeviceGetAttribute")
        digits.append(str(number.value))
    check(driver.cuDriverGetVersion(ctypes.byref(number)), "cuDriverGetVersion")
    version = f"{number.value // 1000}.{number.value % 1000 // 10}"
    return Gpu(name.value.decode(), ".".join(digits), version)
