"""Open a bundle: read its manifest, and trust nothing in it before it is checked.

In the order of the checks: the manifest is there, is JSON, is of this schema and follows it (unknown keys are errors);
it was exported for this version of the op contract; every file it names is inside the folder (also behind symbolic
links), is there, has the stated size, and has the stated hash. Nothing of a wrong size is read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from toprovar.errors import BundleError, FormatError
from toprovar.kernels.contract import CONTRACT_VERSION
from toprovar.profiles.files import model_from_json, read_document, sha256_bytes, sha256_file
from toprovar.profiles.manifest import SCHEMA, GraphInfo, Manifest

__all__ = ["Bundle", "open_bundle"]

MANIFEST = "manifest.json"
CONSTANTS = "constants.safetensors"
GOLDEN = "golden.safetensors"


@dataclass(frozen=True)
class Bundle:
    """A checked bundle. Every path it gives is inside its folder."""

    root: Path
    manifest: Manifest
    manifest_sha256: str

    def path(self, name: str) -> Path:
        """Where a file of the manifest lies.

        Raises:
            BundleError: the manifest does not list it.
        """
        if name not in self.manifest.files:
            raise BundleError(f"{self.root}: the manifest lists no {name}; export the bundle again")
        return _inside(self.root, name)

    def graph(self, name: str) -> GraphInfo:
        """The description of ``prefix``, ``step``, ``advance`` or ``decoder``.

        Raises:
            BundleError: the bundle has no such graph.
        """
        graphs: dict[str, GraphInfo] = {str(key): graph for key, graph in self.manifest.graphs.items()}
        if name not in graphs:
            raise BundleError(f"{self.root}: has no graph {name!r}, only {', '.join(graphs)}; export the bundle again")
        return graphs[name]

    @cached_property
    def constants(self) -> dict[str, npt.NDArray[Any]]:
        """The small tensors of the scales, by name.

        Raises:
            BundleError: the file is no safetensors file, or lacks a tensor that a schedule names.
        """
        tensors = self._tensors(CONSTANTS) if CONSTANTS in self.manifest.files else {}
        for schedule in self.manifest.schedules.values():
            for step in schedule.steps:
                missing = sorted(set(step.constants.values()) - set(tensors))
                if missing:
                    raise BundleError(
                        f"{self.root}: scale {step.scale} needs {missing[0]!r}, which is not in {CONSTANTS}"
                    )
        return tensors

    @cached_property
    def golden(self) -> dict[str, npt.NDArray[Any]]:
        """The golden trace, named ``<prompt class>/<tensor>`` (see `toprovar.profiles.manifest`).

        Raises:
            BundleError: the bundle carries none.
        """
        return self._tensors(GOLDEN)

    @cached_property
    def prompt_classes(self) -> dict[str, npt.NDArray[Any]]:
        """What tells the prompt class of a text: ``weights`` and ``bias`` (see `toprovar.profiles.manifest`).

        Raises:
            BundleError: the bundle carries none.
        """
        name = self.manifest.condition.prompt_classes
        tensors = {} if name is None else self._tensors(name)
        if not {"weights", "bias"} <= set(tensors):
            raise BundleError(
                f"{self.root}: has several prompt classes and nothing that tells them apart; name one (--class)"
            )
        return tensors

    @property
    def size_bytes(self) -> int:
        return sum(info.size_bytes for info in self.manifest.files.values())

    def _tensors(self, name: str) -> dict[str, npt.NDArray[Any]]:
        from safetensors import SafetensorError, safe_open

        path = self.path(name)
        try:
            with safe_open(path, framework="np") as file:
                return {key: np.ascontiguousarray(file.get_tensor(key)) for key in file.keys()}
        except (SafetensorError, TypeError) as error:
            raise BundleError(f"{path}: not a readable safetensors file: {error}; export the bundle again") from error


def open_bundle(path: Path | str, *, verify: bool = True) -> Bundle:
    """Open and check a bundle.

    Args:
        path: the bundle's folder.
        verify: also compare the hash of every file. Sizes and paths are always checked.

    Raises:
        BundleError: anything is missing, changed, of another version, or outside the folder.
    """
    root = Path(path)
    if not root.is_dir():
        found = "is a file" if root.is_file() else "no such folder"
        raise BundleError(f"{root}: {found}; a bundle is a folder with a {MANIFEST}, written by toprovar export")
    if not (root / MANIFEST).is_file():
        raise BundleError(f"{root}: has no {MANIFEST}; a bundle is a folder written by toprovar export")
    try:
        raw = read_document(_inside(root, MANIFEST), "manifest")
    except FormatError as error:
        raise BundleError(str(error)) from error
    manifest = _parse(root / MANIFEST, raw)
    if manifest.contract_version != CONTRACT_VERSION:
        raise BundleError(
            f"{root}: made for version {manifest.contract_version} of the op contract, this toprovar has version "
            f"{CONTRACT_VERSION}; export the bundle again, or install toprovar {manifest.toprovar_version}"
        )
    for name, info in manifest.files.items():
        file = _inside(root, name)
        if not file.is_file():
            raise BundleError(f"{root}: {name} is missing; copy the whole folder, or export the bundle again")
        size = file.stat().st_size
        if size != info.size_bytes:
            raise BundleError(
                f"{root}: {name} has {size} bytes, the manifest says {info.size_bytes}; copy the bundle again"
            )
    for name, info in manifest.files.items() if verify else ():
        digest = sha256_file(_inside(root, name))
        if digest != info.sha256:
            raise BundleError(
                f"{root}: {name} has changed since the bundle was written (sha256 {digest[:12]}…, the manifest says "
                f"{info.sha256[:12]}…); copy the bundle again"
            )
    return Bundle(root=root, manifest=manifest, manifest_sha256=sha256_bytes(raw))


def _parse(path: Path, raw: bytes) -> Manifest:
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: not valid JSON: {error}; copy the bundle again") from error
    # The version first: what another schema holds would only be reported as unknown keys.
    found = document.get("schema") if isinstance(document, dict) else None
    if found != SCHEMA:
        raise BundleError(f"{path}: schema is {found!r}, this toprovar reads {SCHEMA!r}; export the bundle again")
    try:
        return model_from_json(Manifest, raw, str(path), "manifest")
    except FormatError as error:
        raise BundleError(str(error)) from error


def _inside(root: Path, name: str) -> Path:
    """The path of a bundle's file; a symbolic link that leaves the folder is refused."""
    path = root / name
    try:
        real = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a NUL in the name
        raise BundleError(f"{root}: {name!r} is no usable file name: {error}") from error
    if not real.is_relative_to(root.resolve()):
        raise BundleError(f"{root}: {name} leads outside the bundle's folder, to {real}; a bundle holds its own files")
    return path
