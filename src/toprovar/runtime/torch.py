"""Target `torch`: the bundle's plan, run by PyTorch from the original checkpoint. What other targets are compared with.

It reads schedules, constants and roles from the bundle, as every target does, and takes the mathematics of the four
graphs from `toprovar.backbones`. So it needs PyTorch and the checkpoint, which a deployment machine does not. On a GPU,
Infinity in half precision runs as CUDA graphs of fused kernels instead (`toprovar.runtime.torch_graphs`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from toprovar.errors import CheckpointError, InputError, TargetError
from toprovar.profiles.manifest import LoopNames as Names
from toprovar.profiles.manifest import sha256_checkpoint
from toprovar.runtime.bundle import Bundle
from toprovar.runtime.target import Array, Buffer, Run

if TYPE_CHECKING:
    import torch

    from toprovar.runtime.torch_graphs import GraphLoop

__all__ = ["Torch", "open"]


def open(
    bundle: Bundle,
    *,
    checkpoint: Path | str | None = None,
    vae: Path | str | None = None,
    device: str = "cpu",
    threads: int | None = None,
) -> Torch:
    """Load the checkpoint that the bundle was made of.

    Args:
        bundle: the bundle.
        checkpoint: the transformer's original checkpoint.
        vae: the tokenizer's.
        device: ``cpu`` or ``cuda``.
        threads: that share one operator; a setting of the whole process.

    Raises:
        TargetError: PyTorch is not installed, or has no such device.
        InputError: a checkpoint is not given.
        CheckpointError: a checkpoint cannot be read, or is not the one that the bundle was made of.
    """
    try:
        import torch
    except ImportError as error:
        raise TargetError("target torch: PyTorch is not installed; pip install 'toprovar[export]'") from error
    if checkpoint is None or vae is None:
        raise InputError("target torch: runs the original checkpoint; give --checkpoint and --vae")
    if device not in ("cpu", "cuda"):
        raise TargetError(f"target torch: no device {device!r}; valid: cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise TargetError("target torch: PyTorch finds no CUDA device; use cpu")
    if threads is not None:
        torch.set_num_threads(threads)
    return Torch(bundle, Path(checkpoint), Path(vae), device)


class Torch:
    """The modules behind the four graphs, with the same inputs and outputs by the same names."""

    def __init__(self, bundle: Bundle, checkpoint: Path, vae: Path, device: str):
        import torch

        from toprovar import backbones
        from toprovar.backbones.base import Sampling
        from toprovar.backbones.checkpoint import checkpoint_files
        from toprovar.backbones.step import Step

        manifest = bundle.manifest
        found = sha256_checkpoint(checkpoint_files(checkpoint), checkpoint_files(vae))
        expected = manifest.provenance.checkpoint_sha256
        if found != expected:
            raise CheckpointError(
                f"{checkpoint} with {vae}: sha256 {found[:12]}…, but {bundle.root} was made of {expected[:12]}…; "
                "give the checkpoints that it was exported from"
            )
        sampling = Sampling(
            guidance=manifest.sampling.guidance,
            temperature=manifest.sampling.temperature,
            top_k=manifest.sampling.top_k,
            top_p=manifest.sampling.top_p,
            guided=manifest.model.rows_per_image == 2,
        )
        dtype = getattr(torch, manifest.precision)
        self.backbone = backbones.load(
            manifest.backbone,
            checkpoint,
            vae,
            sampling=sampling,
            dtype=dtype,
            device=torch.device(device),
            **manifest.provenance.load_options,
        )
        names = {tensor.name for tensor in bundle.graph("step").inputs}
        restore = "cache" if Names.SPAN_CACHE.format(i=0) in names else "identity"
        self.step = Step(self.backbone, manifest.model.roles, restore)  # type: ignore[arg-type]
        self.description = f"torch {torch.__version__} {device}"
        self._bundle = bundle
        self._torch = torch
        self._device = device

    def loop(self, batch: int) -> GraphLoop | None:
        """The loop over scales where this target has a faster one of its own; None: the four graphs are bound."""
        from toprovar.backbones.infinity import Infinity

        half = self._bundle.manifest.precision != "float32"
        if self._device != "cuda" or not half or not isinstance(self.backbone, Infinity):
            return None
        try:
            from toprovar.runtime.torch_graphs import GraphLoop
        except ModuleNotFoundError as error:
            if error.name != "triton":
                raise
            return None
        return GraphLoop(self._bundle, self.backbone, batch)

    def graph(self, name: str) -> _Graph:
        """``prefix``, ``step``, ``advance`` or ``decoder``."""
        return _Graph(self, name, getattr(self, f"_{name}"))

    def allocate(self, size_bytes: int) -> torch.Tensor:
        """Zeroed bytes, a multiple of eight of them, so that they can be seen as any dtype."""
        memory: torch.Tensor = self._torch.zeros(-(-size_bytes // 8) * 8, dtype=self._torch.uint8, device=self._device)
        return memory

    def write(self, buffer: Buffer, values: Array) -> None:
        """Host to buffer."""
        self.tensor(buffer).copy_(self._torch.from_numpy(np.ascontiguousarray(values)))

    def read(self, buffer: Buffer) -> Array:
        """Buffer to host, as a copy."""
        values: Array = self.tensor(buffer).cpu().numpy()
        return values.copy()

    def synchronize(self) -> None:
        """Wait for the GPU."""
        if self._device == "cuda":
            self._torch.cuda.synchronize()

    def tensor(self, buffer: Buffer) -> torch.Tensor:
        """A buffer as a tensor over the same memory."""
        piece = buffer.memory[buffer.offset_bytes : buffer.offset_bytes + buffer.size_bytes]
        tensor: torch.Tensor = piece.view(getattr(self._torch, buffer.dtype)).view(buffer.shape)
        return tensor

    # -----------------------------------------------------------------------------------------------------------------
    # The graphs: inputs by name -> outputs by name

    def _prefix(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        prefix = self.backbone.prefix(*inputs.values())
        return {Names.X: prefix.x0, **prefix.context}

    def _step(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        context = {
            tensor.name: inputs[tensor.name]
            for tensor in self._bundle.graph("prefix").outputs
            if tensor.name != Names.X and tensor.name in inputs
        }
        layers = range(self._bundle.manifest.model.depth)
        logits, new_kv, deltas = self.step(
            inputs[Names.X],
            context,
            inputs.get("rope"),
            inputs.get(Names.KEEP_SLOTS),
            inputs.get(Names.AREA_ROWS),
            inputs.get(Names.AREA_COLS),
            [inputs[name.format(i=layer)] for layer in layers for name in (Names.PAST_K, Names.PAST_V)],
            [inputs[Names.SPAN_CACHE.format(i=span)] for span in range(len(self.step.spans))]
            if self.step.restore == "cache"
            else [],
        )
        outputs = {Names.LOGITS.value: logits}
        for layer in layers:
            outputs[Names.NEW_K.format(i=layer)] = new_kv[2 * layer]
            outputs[Names.NEW_V.format(i=layer)] = new_kv[2 * layer + 1]
        outputs |= {Names.SPAN_DELTA.format(i=span): delta for span, delta in enumerate(deltas)}
        return outputs

    def _advance(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        own = (Names.LOGITS, Names.NOISE, Names.CODES)
        constants = {name: tensor for name, tensor in inputs.items() if name not in own}
        noise: Any = inputs.get(Names.NOISE)
        tokens, codes, next_x = self.backbone.advance(inputs[Names.LOGITS], noise, inputs[Names.CODES], constants)
        assert next_x is not None  # the constants of the last scale lead to the first
        return {Names.TOKENS: tokens, Names.CODES_OUT: codes, Names.NEXT_X: next_x}

    def _decoder(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {Names.IMAGE: self.backbone.decode(inputs[Names.CODES])}


class _Graph:
    def __init__(self, target: Torch, name: str, compute: Any):
        self._target = target
        self._name = name
        self._compute = compute

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Run:
        """Views of the buffers, once; see `toprovar.runtime.target.GraphRunner`."""
        given = {name: self._target.tensor(buffer) for name, buffer in inputs.items()}
        wanted = {name: self._target.tensor(buffer) for name, buffer in outputs.items()}
        no_grad = self._target._torch.no_grad

        def run() -> None:
            with no_grad():
                for name, tensor in self._compute(given).items():
                    if tensor.shape != wanted[name].shape:
                        found, expected = list(tensor.shape), list(wanted[name].shape)
                        raise CheckpointError(
                            f"target torch: {self._name} gives {name} {found}, the bundle expects {expected}"
                        )
                    wanted[name].copy_(tensor)

        return run
