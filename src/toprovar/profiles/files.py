"""Reading and writing the files of a bundle's makers: strict models, hashes, atomic writes, errors of one line.

Nothing is half-written: a file is written beside its place, synced and renamed over it. A file that does not follow
its format raises a `FormatError` that names the file, the key, what was found and what was expected.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import json
import os
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from toprovar.errors import FormatError, InputError, ToprovarError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "MAX_DOCUMENT_BYTES",
    "Sha256",
    "Strict",
    "canonical_json",
    "model_from_json",
    "model_from_toml",
    "pretty_json",
    "read_document",
    "replacing",
    "sha256_bytes",
    "sha256_file",
    "sha256_files",
    "sha256_json",
    "write_bytes",
    "write_error",
    "write_text",
]

MAX_DOCUMENT_BYTES = 256 * 2**20
"""Profiles, calibrations, plans and manifests are documents; nothing larger than this is read into memory."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Strict(BaseModel):
    """Base of every on-disk model: no unknown key, no silent conversion, no NaN or infinity, immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, populate_by_name=True)


M = TypeVar("M", bound=BaseModel)


# ---------------------------------------------------------------------------------------------------------------------
# Hashes


def canonical_json(value: Any) -> bytes:
    """The one byte string of a JSON value or model: sorted keys, no spaces, ASCII; no NaN or infinity."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", by_alias=True)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode("ascii")


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_json(value: Any) -> str:
    """Hash of `canonical_json`: two files that differ in comments, order or spacing only have the same."""
    return sha256_bytes(canonical_json(value))


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hash of a file's bytes, read in pieces.

    Raises:
        InputError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    except OSError as error:
        raise InputError(f"{os.fspath(path)}: cannot be read: {_reason(error)}") from error
    return digest.hexdigest()


def sha256_files(paths: Sequence[str | os.PathLike[str]]) -> str:
    """Hash of a checkpoint: of its file, or, where it is sharded, of the table of its files' names and hashes."""
    if not paths:
        raise InputError("no file to hash: a checkpoint is one file or several shards")
    if len(paths) == 1:
        return sha256_file(paths[0])
    return sha256_json({Path(path).name: sha256_file(path) for path in paths})


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__


def write_error(path: Path, error: OSError, left: str = "nothing was left behind") -> ToprovarError:
    """What to raise where writing `path` failed: one line that says why and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        what = _reason(error).lower()
        return ToprovarError(f"{path}: cannot be written: {what}; {left}; free some space and try again")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return InputError(f"{path}: cannot be written: {_reason(error).lower()}; choose a place that can be written")
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return InputError(f"{path}: cannot be written: its folder {path.parent} does not exist; make it first")
    return ToprovarError(f"{path}: cannot be written: {_reason(error).lower()}")


def _sync_folder(folder: Path) -> None:
    """Make a rename durable. Not every file system can sync a folder; the rename itself is atomic on all of them."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path`: write it, and it takes the place of `path` when the block ends.

    The file is synced before the rename. Where the block raises, the temporary file is removed and `path` is as before.

    Raises:
        ToprovarError: the disk is full (or over quota); one line, nothing left behind.
        InputError: the folder does not exist or cannot be written.
    """
    target = Path(path)
    if target.is_dir():
        raise InputError(f"{target}: cannot be written: it is a folder; name a file")
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    except OSError as error:
        raise write_error(target, error) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        # mkstemp makes private files; a result is as readable as any other file of this user.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, target)
    except OSError as error:
        raise write_error(target, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    _sync_folder(target.parent)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a whole file atomically; see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a whole UTF-8 file atomically; see `replacing`."""
    write_bytes(path, text.encode("utf-8"))


def pretty_json(value: Any, width: int = 120) -> str:
    """JSON for people: indented, but an object or list that fits in a line stays on it. Key order is kept."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", by_alias=True)

    def lines(item: Any, indent: int) -> str:
        flat = json.dumps(item, ensure_ascii=False, allow_nan=False)
        if len(flat) + indent <= width or not isinstance(item, (dict, list)) or not item:
            return flat
        pad = " " * (indent + 1)
        if isinstance(item, dict):
            body = [f"{json.dumps(key, ensure_ascii=False)}: {lines(part, indent + 1)}" for key, part in item.items()]
            return "{\n" + ",\n".join(pad + row for row in body) + "\n" + " " * indent + "}"
        return "[\n" + ",\n".join(pad + lines(part, indent + 1) for part in item) + "\n" + " " * indent + "]"

    return lines(value, 0) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_document(path: str | os.PathLike[str], kind: str) -> bytes:
    """The bytes of a document, after a look at its size.

    Raises:
        FormatError: missing, not a file, or larger than `MAX_DOCUMENT_BYTES`.
    """
    place = Path(path)
    try:
        if place.is_dir():
            raise FormatError(f"{place}: is a folder; expected a {kind} file")
        size = place.stat().st_size
        if size > MAX_DOCUMENT_BYTES:
            raise FormatError(f"{place}: {size} bytes; a {kind} has at most {MAX_DOCUMENT_BYTES}")
        return place.read_bytes()
    except FileNotFoundError as error:
        raise FormatError(f"{place}: no such file; expected a {kind}") from error
    except OSError as error:
        raise FormatError(f"{place}: cannot be read: {_reason(error).lower()}; expected a {kind}") from error


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise ValueError(f"key {key!r} appears twice")
        table[key] = value
    return table


def model_from_json(model: type[M], data: bytes, source: str, kind: str) -> M:
    """Parse and validate a JSON document.

    Raises:
        FormatError: one line with `source`, key, found and expected.
    """
    try:
        value = json.loads(data, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise FormatError(f"{source}: not a {kind}: not valid JSON: {_line(error)}") from error
    return _validate(model, value, source, kind)


def model_from_toml(
    model: type[M], data: bytes, source: str, kind: str, before: Callable[[Any], Any] | None = None
) -> M:
    """Parse and validate a TOML document; `before` may rewrite the parsed table first.

    Raises:
        FormatError: one line with `source`, key, found and expected.
    """
    try:
        value = tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{source}: not a {kind}: not valid TOML: {_line(error)}") from error
    return _validate(model, before(value) if before else value, source, kind)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _validate(model: type[M], value: Any, source: str, kind: str) -> M:
    # Through JSON, so that strict mode takes lists for tuples from TOML just as from JSON (a "before" validator in a
    # model would undo that). NaN and Infinity pass through to pydantic, which names the key; a TOML date becomes text.
    if not isinstance(value, dict):
        raise FormatError(f"{source}: not a {kind}: found {_shown(value)}, expected an object with keys")
    schema = model.model_fields.get("schema_version")  # first: of another kind of document every key is unknown
    if schema is not None and value.get("schema", expected := get_args(schema.annotation)[0]) != expected:
        found = _shown(value["schema"])
        raise FormatError(f"{source}: not a {kind}: schema: found {found}, expected {expected!r}")
    try:
        return model.model_validate_json(json.dumps(value, default=str))
    except ValidationError as error:
        raise FormatError(f"{source}: {explain_validation(error, model)}") from error


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _members(annotation: Any) -> list[Any]:
    """The alternatives of an annotation, without None and without Annotated's extras."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [one for member in get_args(annotation) if member is not type(None) for one in _members(member)]
    return [annotation]


def _keys(annotation: Any) -> dict[str, Any]:
    """Keys, as the file spells them, and annotations of their values; empty where it is no model."""
    for member in _members(annotation):
        if isinstance(member, type) and issubclass(member, BaseModel):
            return {field.alias or name: field.annotation for name, field in member.model_fields.items()}
    return {}


def _walk(location: Sequence[str | int], annotation: Any) -> tuple[list[str | int], Any]:
    """`location` without the names of union members that pydantic puts in, and the annotation of what lies there."""
    found: list[str | int] = []
    parts = list(location)
    while parts:
        if len(_members(annotation)) > 1:
            parts.pop(0)
            if not parts:
                break
        part = parts.pop(0)
        found.append(part)
        inner: Any = None
        for member in _members(annotation):
            arguments = get_args(member)
            if str(part) in _keys(member):
                inner = _keys(member)[str(part)]
            elif get_origin(member) in (dict, Mapping):
                inner = arguments[1]
            elif arguments and isinstance(part, int):
                inner = arguments[part] if part < len(arguments) and arguments[-1] is not Ellipsis else arguments[0]
        annotation = inner
    return found, annotation


def explain_validation(error: ValidationError, model: type[BaseModel]) -> str:
    """The first finding of a pydantic error in one line: key, found, expected; unknown keys get the valid ones."""
    findings = error.errors(include_url=False)
    places = [_walk(finding["loc"], model)[0] for finding in findings]
    # An unknown key is most often a misspelt one, and then says more than the missing key that follows from it; of the
    # alternatives of a union, the one that was followed deepest is the one that was meant.
    first = next((i for i, one in enumerate(findings) if one["type"] == "extra_forbidden"), 0)
    for i, where in enumerate(places):
        if len(where) > len(places[first]) and where[: len(places[first])] == places[first]:
            first = i
    finding, place = findings[first], places[first]
    key = ".".join(str(part) for part in place if part != "[key]")
    if finding["type"] == "extra_forbidden":
        valid = sorted(_keys(_walk(finding["loc"][:-1], model)[1]))
        close = difflib.get_close_matches(str(place[-1]), valid, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        text = f"{key}: unknown key; {hint}valid keys: {', '.join(valid)}"
    elif finding["type"] == "missing":
        text = f"{key}: found nothing, expected this key"
    elif finding["type"] in ("value_error", "assertion_error"):
        message = str(finding["ctx"]["error"])
        text = f"{key}: {message}" if key else message
    else:
        # One finding per alternative of a union: say them all.
        expected = [_expected(one["msg"]) for one, where in zip(findings, places, strict=True) if where == place]
        text = f"{key}: found {_shown(finding['input'])}, expected {' or '.join(dict.fromkeys(expected))}"
    more = sum(place[: len(where)] != where for where in {tuple(where): where for where in places}.values())
    return " ".join(text.split()) + (f" (and {more} more)" if more else "")


def _expected(message: str) -> str:
    for opening in ("Input should be ", "Value should be ", "Value should have ", "String should "):
        if message.startswith(opening):
            return message[len(opening) :].replace("valid array", "list")
    return message
