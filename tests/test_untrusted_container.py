"""A zip or a folder is refused that would lead out, swell, or show other files to another program."""

from __future__ import annotations

import stat
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
from foreign import BENIGN, Attack, Files, reasons, write, zipped

from tools import untrusted
from tools.untrusted import container, weights


def entry(name: str, mode: int = 0o100644, content: bytes = b"x", **fields: Any) -> Attack:
    """Make an attack by an entry of the zip."""

    def attack(files: Files) -> bytes:
        info = zipfile.ZipInfo(name)
        info.external_attr, info.create_system = mode << 16, 3
        for field, value in fields.items():
            setattr(info, field, value)
        return zipped(files, (info, content))

    return attack


def forged(old: bytes, new: bytes, count: int = -1) -> Attack:
    """Make an attack by changing the bytes of a zip that holds two files more."""

    def attack(files: Files) -> bytes:
        stored = zipfile.ZipInfo("spleen/docs/second.txt")  # not compressed
        data = zipped(files, ("spleen/docs/first.txt", b"one"), (stored, b"unforgeable"))
        assert old in data
        return data.replace(old, new, count)

    return attack


def around(before: bytes = b"", after: bytes = b"") -> Attack:
    return lambda files: before + zipped(files) + after


def overlapping(files: Files) -> bytes:
    """The directory leads to one file twice."""
    data = bytearray(zipped(files))
    second = data.index(b"PK\1\2", data.index(b"PK\1\2") + 4)
    struct.pack_into("<I", data, second + 42, 0)
    return bytes(data)


def encrypted(files: Files) -> bytes:
    data = bytearray(zipped(files))
    data[6] |= 1
    data[data.index(b"PK\1\2") + 8] |= 1
    return bytes(data)


def described_twice(files: Files) -> bytes:
    data = bytearray(zipped(files))
    data[8] = 0  # stored, says the file; deflated, says the directory
    return bytes(data)


def hiding(files: Files) -> bytes:
    """Bytes between the last file and the directory."""
    data = bytearray(zipped(files))
    start = struct.unpack_from("<I", data, len(data) - 6)[0]
    struct.pack_into("<I", data, len(data) - 6, start + 6)
    return bytes(data[:start] + b"hidden" + data[start:])


def commented(files: Files) -> bytes:
    data = bytearray(zipped(files))
    struct.pack_into("<H", data, len(data) - 2, 5)
    return bytes(data) + b"hello"


CONTAINERS: dict[str, tuple[Attack, str]] = {
    "path upwards": (entry("spleen/../../canary"), "leads out of the bundle's folder"),
    "absolute path": (entry("/tmp/canary"), "absolute path"),
    "home folder": (entry("~/canary"), "absolute path"),
    "drive": (entry("C:/canary"), "absolute path"),
    "backslash": (forged(b"spleen/docs/first.txt", b"spleen\\..\\..\\canaries"), "backslash"),
    "colon": (entry("spleen/docs/a.txt:stream"), "colon"),
    "NUL in a name": (forged(b"docs/first.txt", b"docs/first\0txt"), "not shown"),
    "text runs backwards": (entry("spleen/docs/\u202etxt.exe"), "not shown"),
    "dot at the end": (entry("spleen/docs/a.txt."), "Windows drops"),
    "space at the end": (entry("spleen/docs /a.txt"), "Windows drops"),
    "device": (entry("spleen/docs/NUL.txt"), "device on Windows"),
    "symbolic link": (entry("spleen/docs/link", stat.S_IFLNK | 0o777, b"/etc/passwd"), "symbolic link"),
    "pipe": (entry("spleen/docs/pipe", stat.S_IFIFO | 0o644), "no regular file"),
    "setuid": (entry("spleen/docs/tool", stat.S_IFREG | 0o4755), "setuid"),
    "name twice": (entry("spleen/configs/metadata.json"), "stands 2 times"),
    "name twice but for capitals": (entry("spleen/configs/METADATA.json"), "stands 2 times"),
    "name twice but for its letters": (entry("spleen/configs/\uff4detadata.json"), "stands 2 times"),
    "second name": (entry("spleen/docs/a.txt", extra=struct.pack("<HH", 0x7075, 1) + b"x"), "has a second name"),
    "two folders": (entry("other/docs/a.txt"), "2 things at the top"),
    "no folder": (lambda files: zipped(files, top=""), "things at the top"),
    "bomb": (entry("spleen/docs/a.txt", content=b"0" * 2**21, compress_type=zipfile.ZIP_DEFLATED), "a bomb"),
    "rare compression": (entry("spleen/docs/a.txt", compress_type=zipfile.ZIP_LZMA), "compressed in a rare way"),
    "encrypted": (encrypted, "is encrypted"),
    "two names of one file": (forged(b"docs/first.txt", b"docs/other.txt", 1), "cannot be read"),
    "other content than its checksum": (forged(b"unforgeable", b"unfOrgeable"), "cannot be read"),
    "no header": (forged(b"PK\3\4", b"PK\3\5", 1), "has no header of its own"),
    "compressed in two ways": (described_twice, "is described in two ways"),
    "bytes before the directory": (hiding, "belong to none"),
    "overlapping files": (overlapping, "overlaps another file"),
    "program before the zip": (around(b"#!/bin/sh\ntouch canary\n"), "hides bytes before it"),
    "second zip behind the zip": (lambda files: zipped(files) + zipped(files), "hides bytes before it"),
    "bytes behind the zip": (around(after=b"touch canary"), "follows the directory"),
    "comment": (commented, "follows the directory"),
    "cut off": (lambda files: zipped(files)[:-200], "no zip"),
    "cut in the middle": (lambda files: zipped(files)[100:], "no zip, or a damaged one"),
    "not a zip": (lambda files: b"<html>404</html>", "no zip"),
    "empty": (lambda files: b"", "no zip"),
}


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_hostile_container_is_refused(name: str, tmp_path: Path):
    attack, words = CONTAINERS[name]
    data = attack(dict(BENIGN))
    assert isinstance(data, bytes)
    found = reasons(data, tmp_path)
    assert [reason for reason in found if words in reason], found


def test_a_link_in_a_folder_is_refused(tmp_path: Path):
    write(BENIGN, tmp_path / "bundle")
    (tmp_path / "bundle" / "docs" / "passwords").symlink_to("/etc/passwd")
    assert "symbolic link" in untrusted.inspect(tmp_path / "bundle")[0]


def test_a_bundle_of_any_size_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(container, "MAX_MEMBERS", 5)
    assert "more than 5 files" in reasons(zipped(BENIGN), tmp_path)[0]
    assert "more than 5 files" in reasons(BENIGN, tmp_path)[0]
    monkeypatch.setattr(container, "MAX_MEMBERS", 100)
    monkeypatch.setattr(weights, "MAX_PICKLE", 10)
    assert [reason for reason in reasons(BENIGN, tmp_path) if "its pickle has more than 10 bytes" in reason]
    monkeypatch.setattr(container, "MAX_TEXT", 50)
    assert [reason for reason in reasons(BENIGN, tmp_path) if "too large to be judged" in reason]
