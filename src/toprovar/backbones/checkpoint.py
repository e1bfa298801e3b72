"""Reading original checkpoints: safetensors (also sharded) and PyTorch files, never running code out of one.

Loading is strict: a model is built on the meta device from sizes found in the file, and every key of the file must be
used and every parameter found. The released checkpoints hold some tensors that generation does not need; the caller
names those it drops.
"""

from __future__ import annotations

import json
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from toprovar.errors import CheckpointError

__all__ = [
    "State",
    "block_count",
    "checkpoint_files",
    "identify",
    "load_strict",
    "read_state_dict",
    "require_kind",
    "shape_of",
]

State = dict[str, Tensor]

# What a state dict is, by a key that only it has. More telling keys come first.
_SIGNATURES: tuple[tuple[str, str, str], ...] = (
    ("cfg_uncond", "infinity", "an Infinity transformer"),
    ("context_embed.weight", "hart", "a HART transformer"),
    ("encoder_proj.weight", "star", "a STAR transformer"),
    ("pos_1LC", "var", "a VAR transformer"),
    ("vae.quantize.embedding.weight", "hart-vae", "a HART tokenizer"),
    ("quantize.embedding.weight", "vqvae", "a VQVAE (VAR, STAR)"),
    ("quantizer.lfq.mask", "infinity-vae", "an Infinity VAE"),
    ("decoder.conv_in.conv.weight", "infinity-vae", "an Infinity VAE"),
)


def read_state_dict(path: str | Path, wrappers: Sequence[Sequence[str]] = ()) -> State:
    """Reads the tensors of a checkpoint, memory-mapped where the format allows it.

    Args:
        path: `.safetensors`, an index of shards `.index.json`, `.pth` / `.pt` / `.bin` / `.ckpt`, or a folder with
            exactly one index or one such file.
        wrappers: where a file may nest its tensors, each a path of keys, such as `("trainer", "gpt_fsdp")`.

    Raises:
        CheckpointError: missing, truncated, of an unknown format, holding pickled code, or without tensors.
    """
    path = _resolve(Path(path))
    if path.name.endswith(".index.json"):
        return _read_sharded(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in (".pth", ".pt", ".bin", ".ckpt"):
        return _read_torch(path, wrappers)
    raise CheckpointError(f"{path}: unknown kind of checkpoint: give .safetensors, .safetensors.index.json or .pth")


def _resolve(path: Path) -> Path:
    if path.is_dir():
        for pattern in ("*.index.json", "*.safetensors", "*.pth"):
            if found := sorted(path.glob(pattern)):
                if len(found) > 1:
                    raise CheckpointError(f"{path}: holds {len(found)} files {pattern}: name the one to load")
                return found[0]
        raise CheckpointError(f"{path}: this folder holds no .safetensors, .index.json or .pth: give a checkpoint")
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file: give the path of a checkpoint")
    return path


def _read_safetensors(path: Path) -> State:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: truncated or not a safetensors file ({_one_line(error)}): download or save it again"
        ) from error


def checkpoint_files(path: str | Path) -> tuple[Path, ...]:
    """The files that a checkpoint consists of, as `read_state_dict` takes it: one, or an index and its shards.

    Raises:
        CheckpointError: missing, or an index that is none or names a shard that is not there.
    """
    path = _resolve(Path(path))
    if not path.name.endswith(".index.json"):
        return (path,)
    return (path, *(path.parent / shard for shard in sorted(_shards(path))))


def _shards(path: Path) -> dict[str, list[str]]:
    """Shard -> its keys, from an index."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        shards: dict[str, list[str]] = {}
        for key, shard in weight_map.items():
            shards.setdefault(str(shard), []).append(key)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not an index of shards ({_one_line(error)}): it needs 'weight_map'") from error
    for shard in shards:
        if Path(shard).name != shard:
            raise CheckpointError(f"{path}: names the shard '{shard}' outside its folder: shards lie beside it")
        if not (path.parent / shard).exists():
            raise CheckpointError(f"{path.parent / shard}: this shard of {path.name} is missing: download it as well")
    return shards


def _read_sharded(path: Path) -> State:
    state: State = {}
    for shard, keys in _shards(path).items():
        read = read_state_dict(path.parent / shard)
        if absent := [key for key in keys if key not in read]:
            raise CheckpointError(f"{path.parent / shard}: lacks {_some(absent)}, which {path.name} places there")
        state.update((key, read[key]) for key in keys)
    return state


def _read_torch(path: Path, wrappers: Sequence[Sequence[str]]) -> State:
    is_zip = zipfile.is_zipfile(path)
    if not is_zip and path.open("rb").read(2) == b"PK":
        raise CheckpointError(f"{path}: truncated (its zip directory is missing): download or save it again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols, before the error
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        if name := _foreign_global(path, is_zip):
            raise CheckpointError(
                f"{path}: holds pickled code ({name}), which is never run: get the tensors alone, as safetensors"
            ) from error
        reason = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
        raise CheckpointError(
            f"{path}: not a PyTorch checkpoint, or truncated ({reason}): download or save it again"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"{path}: not a PyTorch checkpoint, or truncated ({_one_line(error)}): download or save it again"
        ) from error
    return _unwrap(loaded, path, wrappers)


def _foreign_global(path: Path, is_zip: bool) -> str | None:
    """The first class or function outside PyTorch that a pickle would import, found by reading its opcodes."""
    strings: list[str] = []
    try:
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                member = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                stream = archive.read(member)
        else:
            stream = path.read_bytes()
        for opcode, argument, _ in pickletools.genops(stream):
            name = None
            if opcode.name in ("GLOBAL", "INST"):
                name = str(argument).replace(" ", ".")
            elif opcode.name == "STACK_GLOBAL":
                name = ".".join(strings[-2:])
            elif isinstance(argument, str):
                strings.append(argument)
            if name and not name.startswith(("torch.", "collections.OrderedDict")):
                return name
    except (OSError, ValueError, StopIteration, zipfile.BadZipFile):
        pass  # not a pickle all the way: what torch said stands
    return None


def _unwrap(loaded: Any, path: Path, wrappers: Sequence[Sequence[str]]) -> State:
    for keys in (*wrappers, ()):
        state = loaded
        for key in keys:
            state = state.get(key) if isinstance(state, Mapping) else None
        if isinstance(state, Mapping) and state and all(isinstance(value, Tensor) for value in state.values()):
            return dict(state)
    if isinstance(loaded, Mapping):
        found = f"a dict of {_some(map(str, loaded))}"
    else:
        found = f"a {type(loaded).__name__}"
    valid = " or ".join(["tensors by name", *("under " + repr("/".join(keys)) for keys in wrappers)])
    raise CheckpointError(f"{path}: holds {found}: expected {valid}")


def identify(keys: Iterable[str]) -> tuple[str, str] | None:
    """What a state dict is, from its key names: `(kind, words for a message)`, or None."""
    keys = set(keys)
    for signature, kind, words in _SIGNATURES:
        if signature in keys:
            return kind, words
    return None


def require_kind(state: State, kind: str, path: str | Path) -> None:
    """Raises CheckpointError unless the keys look like `kind`, and says what they look like instead."""
    found = identify(state)
    if found is None or found[0] != kind:
        wanted = next(words for _, name, words in _SIGNATURES if name == kind)
        looks = f"this is {found[1]}" if found else f"its keys ({_some(state)}) are of no known model"
        raise CheckpointError(f"{path}: {looks}, expected {wanted}: check --backbone, --checkpoint and --vae")


def shape_of(state: State, key: str, path: str | Path, dims: int) -> tuple[int, ...]:
    """Shape of a tensor that sizes are inferred from; CheckpointError if it is absent or has another number of axes."""
    if key not in state:
        raise CheckpointError(f"{path}: '{key}' is missing, which gives the sizes of the model: is the file complete?")
    shape = tuple(state[key].shape)
    if len(shape) != dims:
        raise CheckpointError(f"{path}: '{key}' has shape {list(shape)}: expected {dims} axes")
    return shape


def block_count(state: State, pattern: str) -> int:
    """How many layers a state dict has: 1 + the largest number that group 1 of `pattern` matches in a key."""
    return 1 + max((int(match[1]) for key in state if (match := re.match(pattern, key))), default=-1)


def load_strict(
    module: nn.Module,
    state: State,
    path: str | Path,
    *,
    ignore: Callable[[str], bool] = lambda key: False,
    elsewhere: tuple[str, ...] = (),
    dtype: torch.dtype | Callable[[str], torch.dtype] = torch.float32,
    device: torch.device | str = "cpu",
) -> None:
    """Puts `state` into a module built on the meta device; afterwards nothing of the module is left there.

    Args:
        module: its `state_dict()` keys are what the file must hold.
        state: emptied as it is read, so that weights are never held twice.
        path: of the file, for messages.
        ignore: keys of the file that are dropped.
        elsewhere: prefixes of the module's keys that come from another file.
        dtype: of floating point parameters, or a function from key to dtype.

    Raises:
        CheckpointError: missing or left-over keys or tensors of another shape, all listed in one line.
    """
    expected = {key: value for key, value in module.state_dict().items() if not key.startswith(elsewhere)}
    missing = [key for key in expected if key not in state]
    left_over = [key for key in state if key not in expected and not ignore(key)]
    wrong = [
        f"{key} {list(state[key].shape)} instead of {list(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    problems = [
        f"{len(keys)} {what}: {_some(keys)}"
        for what, keys in (("missing", missing), ("left over", left_over), ("of another shape", wrong))
        if keys
    ]
    if problems:
        raise CheckpointError(f"{path}: does not fit the model its sizes describe: {'; '.join(problems)}")
    ready: State = {}
    for key in expected:
        tensor = state.pop(key)
        wanted = tensor.dtype
        if tensor.is_floating_point():
            wanted = dtype if isinstance(dtype, torch.dtype) else dtype(key)
        ready[key] = tensor.to(device=device, dtype=wanted)
    module.load_state_dict(ready, strict=not elsewhere, assign=True)


def _some(names: Iterable[str], limit: int = 8) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _one_line(error: BaseException, limit: int = 120) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
