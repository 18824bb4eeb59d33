"""A bundle as files, in a zip or a folder, and whether it may be unpacked at all.

A zip may lead out of its folder, swell without end, and show other files to this program than to another. Here it is
read as it stands, in place; one that lies is not read further.
"""

from __future__ import annotations

import itertools
import re
import stat
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

METADATA = "configs/metadata.json"  # which every bundle has
MAX_MEMBERS, MAX_BYTES = 20_000, 32 * 2**30  # of all that a bundle holds
MAX_RATIO, SMALL = 200, 2**20  # a file of more than SMALL bytes that was squeezed further is a bomb
MAX_TEXT = 32 * 2**20  # bytes of a file that is parsed here
RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d|conin\$|conout\$)(\..*)?")  # names of devices
DAMAGED = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, RuntimeError, ValueError)  # a zip's errors
NOTE = "a note"


class Finding(NamedTuple):
    """What a check found; `needs` is the grant that makes it acceptable, or `NOTE` for what is only told."""

    member: str
    text: str
    needs: str = ""


class Member(NamedTuple):
    """A file of the bundle."""

    size: int
    open: Callable[[], IO[bytes]]

    def read(self) -> bytes:
        """Read it whole; one that is too large to be parsed here is an error."""
        if self.size > MAX_TEXT:
            raise ValueError(f"is too large to be judged ({self.size} bytes, at most {MAX_TEXT})")
        with self.open() as file:
            return file.read(MAX_TEXT)


class Bundle(NamedTuple):
    """A bundle's files by their path inside of it, the content of its configs, and what they import."""

    members: dict[str, Member]
    documents: dict[str, Any]
    imported: dict[str, set[str]]  # name in expressions -> what it stands for

    def named(self, *suffixes: str) -> Iterator[tuple[str, Member]]:
        """Yield the members with one of the suffixes."""
        return ((name, member) for name, member in self.members.items() if suffix(name) in suffixes)


Check = Callable[[Bundle], Iterator[Finding]]


def suffix(name: str) -> str:
    """The last suffix, in lower case."""
    return Path(name).suffix.lower()


def leads_out(path: str) -> bool:
    """Whether a path of a config is not below the current folder."""
    return path.startswith(("/", "~")) or ":" in path[:3] or ".." in re.split(r"[/\\]", path)


def unsafe_name(name: str) -> str:
    """Why a path must not be unpacked, on any system -> reason, or none."""
    parts = name.rstrip("/").split("/")
    if name.startswith(("/", "~")) or re.match(r"[A-Za-z]:", name):
        return "is an absolute path"
    if "\\" in name or ":" in name:
        return "holds a backslash or a colon, which is a path elsewhere on Windows"
    if any(part in ("", ".", "..") for part in parts):
        return "leads out of the bundle's folder"
    if any(unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Co") for letter in name):
        return "holds characters that are not shown"
    if any(part != part.rstrip(". ") for part in parts):
        return "ends in a dot or a space, which Windows drops"
    return "is a device on Windows" if any(RESERVED.fullmatch(part) for part in parts) else ""


def unsafe_names(names: Collection[str]) -> Iterator[Finding]:
    """Names that no system may unpack, and names that are one on some."""
    for name in names:
        if reason := unsafe_name(name):
            yield Finding(repr(name)[1:-1], f"the name {reason}")
    alike = itertools.groupby(sorted(names, key=folded), key=folded)
    for group in (list(group) for _, group in alike):
        if len(group) > 1:
            yield Finding(group[0], f"stands {len(group)} times, on some systems at least: one would replace another")


def folded(name: str) -> str:
    """A name as systems see it that know no difference between some letters."""
    return unicodedata.normalize("NFKC", name.rstrip("/")).casefold()


def layout(archive: zipfile.ZipFile) -> Iterator[Finding]:
    """A zip lists its files at its end, and each says once more what it is: programs that read it differently from
    this one would find other files, so both must agree, without gaps or overlaps."""
    file: Any = archive.fp
    end, slack = 0, 0
    for entry in sorted(archive.infolist(), key=lambda entry: entry.header_offset):
        name = entry.orig_filename
        file.seek(entry.header_offset)
        header = file.read(30)
        if len(header) < 30 or header[:4] != b"PK\3\4":
            yield Finding(name, "has no header of its own: the zip is damaged or forged")
            return
        flags, method, name_length, extra_length = struct.unpack("<6xHH16xHH", header)
        extra = file.read(name_length + extra_length)[name_length:]
        if not 0 <= entry.header_offset - end <= slack:
            yield Finding(name, "overlaps another file, or hides bytes before it: the zip is forged")
        if (flags ^ entry.flag_bits) & 1 or method != entry.compress_type:
            yield Finding(name, "is described in two ways: the zip is forged")
        if flags & 0x41 or entry.flag_bits & 0x41:
            yield Finding(name, "is encrypted, so that it cannot be judged")
        if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            yield Finding(name, f"is compressed in a rare way (method {method})")
        if 0x7075 in [*extra_tags(extra), *extra_tags(entry.extra)]:
            yield Finding(name, "has a second name, which some programs prefer")
        end = entry.header_offset + 30 + name_length + extra_length + entry.compress_size
        slack = 24 if flags & 8 else 0  # a descriptor may follow
    if not 0 <= archive.start_dir - end <= slack:
        yield Finding("", "bytes between the last file and the directory belong to none: the zip is forged")
    file.seek(archive.start_dir)
    directory = file.read()
    if directory.find(b"PK\5\6") != len(directory) - 22:
        yield Finding("", "something follows the directory, where another program may find other files")


def extra_tags(extra: bytes) -> Iterator[int]:
    """The kinds of a zip entry's extra fields."""
    while len(extra) >= 4:
        tag, size = struct.unpack_from("<HH", extra)
        yield tag
        extra = extra[4 + size :]


def kinds(entries: Collection[zipfile.ZipInfo]) -> Iterator[Finding]:
    """Entries of one top folder, each a plain file or a folder."""
    tops = {entry.orig_filename.split("/")[0] for entry in entries}
    if len(tops) != 1:
        yield Finding("", f"{len(tops)} things at the top ({', '.join(sorted(tops)[:3])}): expected one folder")
    for entry in entries:
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR) or (kind == stat.S_IFDIR) > entry.is_dir():
            what = "a symbolic link" if kind == stat.S_IFLNK else "no regular file"
            yield Finding(entry.orig_filename, f"is {what}: it may lead anywhere once unpacked")
        if entry.external_attr >> 16 & 0o6000:
            yield Finding(entry.orig_filename, "would run with its owner's rights (setuid)")


def too_much(sizes: Collection[int]) -> Iterator[Finding]:
    """More files, or bytes, than any bundle has."""
    if len(sizes) > MAX_MEMBERS or sum(sizes) > MAX_BYTES:
        yield Finding("", f"more than {MAX_MEMBERS} files, or {MAX_BYTES / 2**30:.0f} GB: a bomb, or no bundle")


def bombs(entries: Collection[zipfile.ZipInfo]) -> Iterator[Finding]:
    """Files that were squeezed further than files of a bundle can be, as far as their sizes are declared."""
    for entry in entries:
        if entry.file_size > max(SMALL, MAX_RATIO * entry.compress_size):
            yield Finding(entry.orig_filename, f"swells from {entry.compress_size} to {entry.file_size} bytes: a bomb")


def unreadable(archive: zipfile.ZipFile) -> Iterator[Finding]:
    """Each file, read to its end, as what is declared of it may be a lie."""
    for entry in archive.infolist():
        try:
            with archive.open(entry) as file:
                while file.read(2**20):
                    pass
        except DAMAGED as error:
            yield Finding(entry.orig_filename, f"cannot be read: {error or type(error).__name__}")


def read_zip(archive: zipfile.ZipFile) -> tuple[dict[str, Member], list[Finding]]:
    """Judge a zip as a container -> its files by their path in the one top folder, and what is wrong with it."""
    entries = archive.infolist()
    found = [*unsafe_names([entry.orig_filename for entry in entries]), *layout(archive), *kinds(entries)]
    found = found or [*too_much([entry.file_size for entry in entries])] or [*bombs(entries)] or [*unreadable(archive)]
    opened = {
        entry.orig_filename.partition("/")[2]: Member(entry.file_size, lambda entry=entry: archive.open(entry))  # type: ignore[misc]
        for entry in entries
        if not entry.is_dir()
    }
    return opened, found


def read_folder(root: Path) -> tuple[dict[str, Member], list[Finding]]:
    """The same of a folder."""
    members, found = dict[str, Member](), list[Finding]()
    for path in sorted(root.rglob("*")):
        name, mode = path.relative_to(root).as_posix(), path.lstat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            found.append(Finding(name, "is a symbolic link, or no regular file: it may lead anywhere"))
        elif stat.S_ISREG(mode):
            members[name] = Member(path.stat().st_size, lambda path=path: path.open("rb"))  # type: ignore[misc]
    return members, [*found, *too_much([member.size for member in members.values()]), *unsafe_names(members)]
