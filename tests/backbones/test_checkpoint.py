"""Reading checkpoints: every format, and every way in which a file can be wrong, each with one line."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.backbones.conftest import make_var
from toprovar import backbones
from toprovar.backbones.checkpoint import identify, load_strict, read_state_dict
from toprovar.errors import CheckpointError

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2])}


class Malicious:
    """Unpickling it would run code."""

    def __reduce__(self):
        return (print, ("this must never be printed",))


def _equal(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == STATE.keys() and all(torch.equal(found[key], STATE[key]) for key in STATE)


def _shards(folder: Path) -> Path:
    save_file({"a.weight": STATE["a.weight"]}, folder / "m-00001-of-00002.safetensors")
    save_file({"b": STATE["b"]}, folder / "m-00002-of-00002.safetensors")
    index = folder / "m.safetensors.index.json"
    weight_map = {"a.weight": "m-00001-of-00002.safetensors", "b": "m-00002-of-00002.safetensors"}
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_formats(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "m.safetensors")
    torch.save(STATE, tmp_path / "m.pth")
    torch.save(STATE, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save({"epoch": 3, "trainer": {"var_wo_ddp": STATE}}, tmp_path / "training.pth")
    for name in ("m.safetensors", "m.pth", "old.pth"):
        assert _equal(read_state_dict(tmp_path / name))
    assert _equal(read_state_dict(tmp_path / "training.pth", wrappers=(("trainer", "var_wo_ddp"),)))


def test_shards_and_folders(tmp_path: Path) -> None:
    assert _equal(read_state_dict(_shards(tmp_path)))
    assert _equal(read_state_dict(tmp_path))  # a folder with one index
    (tmp_path / "one").mkdir()
    save_file(STATE, tmp_path / "one" / "only.safetensors")
    assert _equal(read_state_dict(tmp_path / "one"))


def _broken(folder: Path, name: str) -> Path:
    """A file that is wrong in the way its name says."""
    path = folder / name
    good = folder / "good.pth"
    torch.save(STATE, good)
    save_file(STATE, folder / "good.safetensors")
    match path.stem:
        case "truncated":
            source = folder / f"good{path.suffix}"
            path.write_bytes(source.read_bytes()[: source.stat().st_size * 2 // 3])
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("<html>404 not found</html>")
        case "code":
            torch.save({"a": Malicious()}, path)
        case "code4":
            torch.save({"a": Malicious()}, path, pickle_protocol=4)
        case "bare_pickle":
            path.write_bytes(pickle.dumps({"a": Malicious()}))
        case "other_zip":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("readme.txt", "no tensors")
        case "list":
            torch.save([1, 2], path)
        case "nested":
            torch.save({"epoch": 3, "model": STATE}, path)
    return path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.pth", "there is no such file"),
        ("missing.safetensors", "there is no such file"),
        ("truncated.pth", "truncated"),
        ("truncated.safetensors", "truncated or not a safetensors file"),
        ("empty.pth", "not a PyTorch checkpoint, or truncated"),
        ("empty.safetensors", "truncated or not a safetensors file"),
        ("text.pth", "not a PyTorch checkpoint, or truncated"),
        ("text.safetensors", "truncated or not a safetensors file"),
        ("code.pth", r"holds pickled code \(.*print\), which is never run"),
        ("code4.pth", r"holds pickled code \(.*print\), which is never run"),
        ("bare_pickle.pth", r"holds pickled code \(.*print\), which is never run"),
        ("other_zip.pth", "not a PyTorch checkpoint, or truncated"),
        ("list.pth", "holds a list: expected tensors by name"),
        ("nested.pth", "holds a dict of epoch, model: expected tensors by name"),
        ("text.gguf", "unknown kind of checkpoint: give .safetensors"),
    ],
)
def test_broken_files(name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _broken(tmp_path, name)
    with pytest.raises(CheckpointError, match=message) as error:
        read_state_dict(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.write_text("{}"), "needs 'weight_map'"),
        (lambda index: index.write_text("{"), "not an index of shards"),
        (
            lambda index: index.write_text(json.dumps({"weight_map": {"b": "../m-00002-of-00002.safetensors"}})),
            "outside its folder",
        ),
        (lambda index: (index.parent / "m-00002-of-00002.safetensors").unlink(), "this shard of .* is missing"),
        (
            lambda index: index.write_text(json.dumps({"weight_map": {"c": "m-00002-of-00002.safetensors"}})),
            "lacks c, which m.safetensors.index.json places there",
        ),
    ],
)
def test_broken_indexes(change: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    index = _shards(tmp_path)
    change(index)
    with pytest.raises(CheckpointError, match=message):
        read_state_dict(index)


def test_folders_that_do_not_say_which(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"this folder holds no \.safetensors"):
        read_state_dict(tmp_path)
    for name in ("a", "b"):
        save_file(STATE, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="holds 2 files"):
        read_state_dict(tmp_path)


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        (["pos_1LC", "word_embed.weight"], "var"),
        (["cfg_uncond", "word_embed.weight"], "infinity"),
        (["context_embed.weight", "word_embed.weight"], "hart"),
        (["encoder_proj.weight", "word_embed.weight"], "star"),
        (["quantize.embedding.weight", "decoder.conv_in.weight"], "vqvae"),
        (["vae.quantize.embedding.weight"], "hart-vae"),
        (["decoder.conv_in.conv.weight"], "infinity-vae"),
    ],
)
def test_a_state_dict_is_known_by_its_keys(keys: list[str], kind: str) -> None:
    found = identify(keys)
    assert found is not None and found[0] == kind
    assert identify(["weight"]) is None


def _files(folder: Path) -> tuple[Path, Path]:
    model = make_var(depth=2)
    state = model.state_dict()
    save_file({k: v for k, v in state.items() if not k.startswith("vae.")}, folder / "var.safetensors")
    save_file(model.vae.state_dict(), folder / "vae.safetensors")
    return folder / "var.safetensors", folder / "vae.safetensors"


def _changed(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = read_state_dict(path)
    change(state)
    save_file({key: value.clone() for key, value in state.items()}, path)


@pytest.mark.parametrize(
    ("which", "change", "message"),
    [
        (0, lambda s: s.pop("blocks.1.ffn.fc2.bias"), "1 missing: blocks.1.ffn.fc2.bias"),
        (0, lambda s: s.update(extra=torch.zeros(1)), "1 left over: extra"),
        (0, lambda s: s.pop("head.weight"), "'head.weight' is missing, which gives the sizes"),
        (0, lambda s: s.update({"head.bias": torch.zeros(7)}), r"head.bias \[7\] instead of \[48\]"),
        (0, lambda s: s.update({"pos_1LC": torch.zeros(66, 64)}), r"'pos_1LC' has shape \[66, 64\]: expected 3 axes"),
        (0, lambda s: s.update(cfg_uncond=torch.zeros(1)), "an Infinity transformer, expected a VAR transformer"),
        (1, lambda s: s.pop("decoder.norm_out.bias"), "1 missing: decoder.norm_out.bias"),
        (1, lambda s: s.pop("quantize.embedding.weight"), "of no known model, expected a VQVAE"),
        (1, lambda s: [s.pop(k) for k in list(s) if k.startswith("decoder.")], "holds no decoder.up"),
        (1, lambda s: [s.pop(k) for k in list(s) if "quant_resi" in k], "holds no quantize.quant_resi"),
    ],
)
def test_checkpoints_that_do_not_fit(which: int, change: Callable, message: str, tmp_path: Path) -> None:
    files = _files(tmp_path)
    _changed(files[which], change)
    with pytest.raises(CheckpointError, match=message) as error:
        backbones.load("var", *files)
    assert str(files[which]) in str(error.value) and "\n" not in str(error.value)


def test_swapped_files(tmp_path: Path) -> None:
    checkpoint, vae = _files(tmp_path)
    with pytest.raises(CheckpointError, match=r"a VQVAE \(VAR, STAR\), expected a VAR transformer: check --backbone"):
        backbones.load("var", vae, checkpoint)


def test_many_keys_are_counted_not_all_listed() -> None:
    with torch.device("meta"):
        module = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(9))
    with pytest.raises(CheckpointError, match=r"18 missing: 0\.weight, .* and 10 more"):
        load_strict(module, {}, "m.pth")


def test_loading_leaves_nothing_on_the_meta_device() -> None:
    with torch.device("meta"):
        module = torch.nn.Linear(3, 2)
    state = {"weight": torch.ones(2, 3, dtype=torch.float16), "bias": torch.zeros(2)}
    load_strict(module, state, "m.pth", dtype=torch.bfloat16)
    assert state == {} and {p.device.type for p in module.parameters()} == {"cpu"}
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
