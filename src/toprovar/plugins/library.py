"""Where the plugin library is, and how it gets into a TensorRT registry.

It is looked for in this order: the environment variable ``TOPROVAR_PLUGIN_LIBRARY``, the folder of this package
(``lib/``), and the build folder of a checkout. TensorRT 10 and 11 take ``libtoprovar_plugins.so`` (IPluginV3), 8.6 takes
``libtoprovar_plugins86.so`` (IPluginV2DynamicExt).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import TargetError
from ..kernels import contract
from .contract_header import PLUGINS

__all__ = ["ENVIRONMENT_VARIABLE", "find_library", "library_name", "library_sha256", "load_library", "noise_of"]

ENVIRONMENT_VARIABLE = "TOPROVAR_PLUGIN_LIBRARY"
_PACKAGE = Path(__file__).resolve().parent
_CHECKOUT = _PACKAGE.parents[2]
_BUILD = "cmake -S {source} -B build -DTENSORRT_ROOT=<TensorRT> && cmake --build build -j --target {target}"


def library_name(tensorrt_version: str) -> str:
    """File name of the library for a version of TensorRT such as ``10.16.1``.

    Raises:
        TargetError: a version that has no library.
    """
    parts = tensorrt_version.split(".")
    major, minor = int(parts[0]), int(parts[1]) if len(parts) > 1 else 0
    if (major, minor) == (8, 6):
        return "libtoprovar_plugins86.so"
    if major == 11 or (major == 10 and minor >= 15):
        return "libtoprovar_plugins.so"
    raise TargetError(f"TensorRT {tensorrt_version}: has no plugin library; valid are 8.6, and 10.15 to 11")


def find_library(tensorrt_version: str) -> Path:
    """The plugin library for a version of TensorRT.

    Raises:
        TargetError: it is nowhere; the message has the command that builds it.
    """
    name = library_name(tensorrt_version)
    given = os.environ.get(ENVIRONMENT_VARIABLE)
    if given:
        path = Path(given)
        if not path.is_file():
            raise TargetError(f"{ENVIRONMENT_VARIABLE} is {given!r}, where no file is; set it to a {name}, or unset it")
        return path.resolve()
    for folder in (_PACKAGE / "lib", _CHECKOUT / "build" / "src" / "toprovar" / "plugins" / "cpp"):
        if (folder / name).is_file():
            return folder / name
    source = _CHECKOUT if (_CHECKOUT / "CMakeLists.txt").is_file() else "<checkout of toprovar>"
    command = _BUILD.format(source=source, target=name.removeprefix("lib").removesuffix(".so"))
    raise TargetError(
        f"the plugin library {name} for TensorRT {tensorrt_version} was not found; build it ({command}) and set "
        f"{ENVIRONMENT_VARIABLE} to it"
    )


def library_sha256(path: Path) -> str:
    """Hash of the library's bytes: part of the key of every engine that was built with it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_library(tensorrt: Any, registry: Any | None = None) -> Path:
    """Register every plugin with a TensorRT registry, once.

    Args:
        tensorrt: the module of the Python binding (8.6, or 10.15 to 11).
        registry: default: the global one. A builder and a runtime have their own, which ask the global one too.

    Returns: the library's path.

    Raises:
        TargetError: there is no library, or TensorRT refuses it.
    """
    path = find_library(tensorrt.__version__)
    registry = tensorrt.get_plugin_registry() if registry is None else registry
    if _registered(registry):
        return path
    try:
        registry.load_library(str(path))
    except Exception as error:  # the binding raises RuntimeError in some versions and returns None in others
        raise TargetError(f"TensorRT {tensorrt.__version__} refuses {path}: {error}; build it again") from error
    if not _registered(registry):
        raise TargetError(
            f"TensorRT {tensorrt.__version__} took no plugin from {path}; build it with the headers of that version"
        )
    return path


def noise_of(path: Path) -> Callable[[Sequence[int], int, int, int], npt.NDArray[np.float32]]:
    """`toprovar.profiles.noise.scale_noise` as the plugin library has it: the same bytes in a fifth of the time, and
    without the interpreter's lock, so that it is drawn while a target runs. It checks no argument.

    Raises:
        TargetError: the library cannot be loaded, or has no noise: it is of another version of toprovar.
    """
    try:
        draw = ctypes.CDLL(str(path)).toprovarScaleNoise
    except (OSError, AttributeError) as error:
        raise TargetError(f"{path}: {error}; build it again") from error
    draw.restype = None
    u32, u64, pointer = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_void_p
    draw.argtypes = [pointer, u64, u32, u64, u64, pointer]

    def scale_noise(seeds: Sequence[int], scale: int, tokens: int, logits: int) -> npt.NDArray[np.float32]:
        given, noise = np.array(seeds, np.uint64), np.empty((tokens, len(seeds), logits), np.float32)
        draw(given.ctypes.data, len(seeds), scale, tokens, logits, noise.ctypes.data)
        return noise

    return scale_noise


def _registered(registry: Any) -> bool:
    """Whether all creators are there, whichever way this version lists them."""
    get = getattr(registry, "get_creator", None) or registry.get_plugin_creator
    return all(get(plugin.name, contract.PLUGIN_VERSION, contract.PLUGIN_NAMESPACE) is not None for plugin in PLUGINS)
