"""Files are written whole or not at all, and hashes mean what they say."""

import errno
import hashlib
import os
import stat
import subprocess
import sys

import pytest

from toprovar.errors import FormatError, InputError, ToprovarError
from toprovar.profiles import files
from toprovar.profiles.files import (
    canonical_json,
    pretty_json,
    read_document,
    replacing,
    sha256_file,
    sha256_files,
    sha256_json,
    write_bytes,
    write_text,
)


def test_a_written_file_has_its_content_and_usual_permissions(tmp_path):
    write_text(tmp_path / "a.json", "é")
    assert (tmp_path / "a.json").read_bytes() == "é".encode()
    (tmp_path / "b").touch()
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == stat.S_IMODE((tmp_path / "b").stat().st_mode)
    assert sorted(os.listdir(tmp_path)) == ["a.json", "b"]


def test_what_raises_inside_leaves_the_old_file_and_nothing_else(tmp_path):
    write_text(tmp_path / "a", "old")
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, number):
    def full(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(ToprovarError, match="cannot be written") as caught:
        write_bytes(tmp_path / "a", b"x")
    assert "\n" not in str(caught.value) and str(tmp_path / "a") in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_write_that_the_system_refuses_half_way_leaves_nothing(tmp_path):
    code = f"""
import resource, signal, sys
from toprovar.errors import ToprovarError
from toprovar.profiles.files import write_bytes
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_bytes({str(tmp_path / "a")!r}, b"x" * 5000)
except ToprovarError as error:
    sys.exit(0 if "cannot be written" in str(error) else 3)
sys.exit(4)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert os.listdir(tmp_path) == []


def test_a_missing_folder_and_a_folder_as_file_are_the_users_to_mend(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        write_text(tmp_path / "no" / "a", "")
    with pytest.raises(InputError, match="is a folder"):
        write_text(tmp_path, "")


def test_hashes_of_files_and_of_content(tmp_path):
    for name, content in (("a", b"1"), ("b", b"2")):
        write_bytes(tmp_path / name, content)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(b"1").hexdigest()
    assert sha256_files([tmp_path / "a"]) == sha256_file(tmp_path / "a")
    shards = sha256_files([tmp_path / "a", tmp_path / "b"])
    assert shards == sha256_files([tmp_path / "b", tmp_path / "a"]) != sha256_files([tmp_path / "a"])
    assert sha256_json({"a": 1, "b": 2.5}) == sha256_json({"b": 2.5, "a": 1})
    with pytest.raises(InputError, match="cannot be read"):
        sha256_file(tmp_path / "c")


def test_canonical_json_has_no_nan():
    with pytest.raises(ValueError):
        canonical_json({"a": float("nan")})


def test_pretty_json_keeps_short_lists_on_a_line():
    assert pretty_json({"a": [1, 2], "b": {}}) == '{"a": [1, 2], "b": {}}\n'
    assert pretty_json({"a": [[1] * 10] * 5}, width=40).splitlines()[2] == "  [1, 1, 1, 1, 1, 1, 1, 1, 1, 1],"


def test_documents_are_looked_at_before_they_are_read(tmp_path, monkeypatch):
    with pytest.raises(FormatError, match=r"no such file; expected a plan"):
        read_document(tmp_path / "a", "plan")
    with pytest.raises(FormatError, match="is a folder"):
        read_document(tmp_path, "plan")
    write_text(tmp_path / "a", "12345")
    monkeypatch.setattr(files, "MAX_DOCUMENT_BYTES", 4)
    with pytest.raises(FormatError, match="5 bytes; a plan has at most 4"):
        read_document(tmp_path / "a", "plan")


def test_the_formats_import_neither_torch_nor_onnx_nor_anything_slow():
    code = (
        "import sys, toprovar.profiles.profile, toprovar.profiles.calibration, toprovar.profiles.plan, "
        "toprovar.profiles.flops, toprovar.profiles.files; "
        "heavy = {'torch', 'onnx', 'rich', 'numpy'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
