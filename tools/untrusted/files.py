"""Files: only kinds that a bundle needs, holding what their names tell; what those ask for that are no recipes.

That is the packages of metadata.json, the handlers of logging.conf, and the files that large_files.yml fetches later.
"""

from __future__ import annotations

import ast
import configparser
import re
from collections.abc import Iterator
from pathlib import Path

from .configs import CONFIGS, listed
from .container import METADATA, NOTE, Bundle, Finding, leads_out, suffix, unsafe_name
from .policy import LIBRARIES, words
from .syntax import UNPARSABLE
from .weights import TORCH

# By their last suffix.
RUN_ALONE = words("conftest.py setup.py sitecustomize.py usercustomize.py")
PROGRAMS = words("""
    .a .app .bash .bat .class .cmd .com .desktop .dll .dylib .engine .exe .hta .jar .js .lib .lnk .msi .o .plan .ps1
    .pyc .pyd .pyo .pyw .pyz .reg .scr .service .sh .so .url .vbe .vbs .wsf
""")
ARCHIVES = words(".7z .bz2 .cab .deb .dmg .egg .gz .iso .rar .rpm .tar .tbz .tgz .txz .whl .xz .zip .zst")
PICKLES = words(".dill .joblib .p .pck .pickle .pkl")
KNOWN = CONFIGS | TORCH | words(".py .conf .npy .npz .safetensors .txt .md .rst .csv .tsv .toml .png .jpg .jpeg .gif")
KNOWN |= words(".bmp .tif .nii .gz .mha .mhd .nrrd .dcm") | {""}
MAGIC: list[tuple[bytes, str, frozenset[str]]] = [  # first bytes, what they tell, where that is expected
    (b"PK", "an archive", TORCH | {".npz"}),
    (b"\x1f\x8b", "an archive", words(".gz")),
    *((magic, "an archive", words("")) for magic in (b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!", b"\x28\xb5\x2f\xfd")),
    *(
        (magic, "a program", words(""))
        for magic in (b"\x7fELF", b"MZ", b"\xcf\xfa\xed\xfe", b"\xca\xfe\xba\xbe", b"#!")
    ),
    *((b"\x80" + bytes([n]), "a bare pickle, which may run code", words("")) for n in range(2, 6)),
]

LITERAL = (ast.Constant, ast.Tuple, ast.List, ast.Dict, ast.Load, ast.Name)  # of what is evaluated
LOG_CLASSES = words("""
    FileHandler Formatter NullHandler StreamHandler handlers.RotatingFileHandler handlers.TimedRotatingFileHandler
    logging.FileHandler logging.Formatter logging.NullHandler logging.StreamHandler logging.handlers.RotatingFileHandler
    logging.handlers.TimedRotatingFileHandler
""")


def check_files(bundle: Bundle) -> Iterator[Finding]:
    """Only kinds of files that a bundle needs, each with the content that its name tells."""
    if METADATA not in bundle.members:
        yield Finding(METADATA, "is missing: this is no bundle")
    for name, member in bundle.members.items():
        parts, kind = name.split("/"), suffix(name)
        if any(part.startswith(".") or part in ("__pycache__", "__MACOSX") for part in parts):
            yield Finding(name, "is hidden, or a leftover: no bundle needs it")
        elif kind in PROGRAMS:
            yield Finding(name, "is a program, which no bundle needs")
        elif kind in PICKLES:
            yield Finding(name, "is a pickle, which runs code when loaded: ask for tensors or JSON")
        elif kind in ARCHIVES and not name.lower().endswith(".nii.gz"):
            yield Finding(name, "is an archive in the archive, which hides its content")
        elif kind == ".py" and (parts[0] != "scripts" or parts[-1] in RUN_ALONE):
            yield Finding(name, "is Python outside of scripts/, or run by itself: it may take a library's place")
        elif kind not in KNOWN:
            yield Finding(name, f"{kind} files are not judged here", NOTE)
        with member.open() as file:
            start = file.read(512)
        for magic, what, expected in MAGIC:
            if start.startswith(magic) and kind not in expected:
                yield Finding(name, f"is in truth {what}")
        if start[257:262] == b"ustar":
            yield Finding(name, "is in truth an archive")


def check_metadata(bundle: Bundle) -> Iterator[Finding]:
    """Packages that the bundle asks for are installed by people who trust it."""
    content = bundle.documents.get(METADATA)
    asked = [content.get(f"{kind}_packages_version") for kind in ("required", "optional")] if content else []
    known = LIBRARIES | words("pytorch-ignite scikit-learn scikit-image pillow opencv-python transformers")
    unknown = sorted({str(name) for names in asked if isinstance(names, dict) for name in names} - known)
    if unknown:
        yield Finding(METADATA, f"asks for {', '.join(unknown)[:200]}: look before you install it", NOTE)


def evaluated(text: str) -> str:
    """Why logging must not evaluate the arguments of a handler -> reason, or none."""
    try:
        nodes = list(ast.walk(ast.parse(text or "()", mode="eval").body))
    except UNPARSABLE:
        return "is code, which logging evaluates"
    for node in nodes:
        stream = isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.stdout", "sys.stderr")
        if not (stream or isinstance(node, LITERAL)) or getattr(node, "id", "sys") != "sys":
            return "is code, which logging evaluates"
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and leads_out(node.value):
            return "writes outside of the bundle"
    return ""


def check_logging(bundle: Bundle) -> Iterator[Finding]:
    """logging.conf names handlers that write to the terminal or below the current folder, with literal arguments."""
    for name, member in bundle.named(".conf"):
        parser = configparser.RawConfigParser()
        try:
            parser.read_string(member.read().decode())
        except (configparser.Error, ValueError) as error:
            yield Finding(name, f"cannot be judged: {' '.join(str(error).split())}")
            continue
        for section in parser.sections():
            kind = parser.get(section, "class", fallback="").strip()
            if kind and kind not in LOG_CLASSES:
                yield Finding(name, f"[{section}] class={kind[:60]} is not among {', '.join(sorted(LOG_CLASSES)[:4])}")
            for key in ("args", "kwargs"):
                text = parser.get(section, key, fallback="").strip()
                if problem := evaluated(text):
                    yield Finding(name, f"[{section}] {key}={text[:60]} {problem}")


def check_large_files(bundle: Bundle) -> Iterator[Finding]:
    """Files that are fetched later come by https, with a checksum, into the bundle."""
    for name, content in bundle.documents.items():
        if not Path(name).stem.startswith("large_files"):
            continue
        entries = content.get("large_files") if isinstance(content, dict) else None
        for entry in listed(entries):
            if not isinstance(entry, dict):
                yield Finding(name, "is no list of files")
                continue
            path, url = str(entry.get("path", "")), str(entry.get("url", ""))
            if unsafe_name(path) or suffix(path) in PROGRAMS | ARCHIVES | PICKLES | CONFIGS | {".py"}:
                yield Finding(name, f"{path!r} would be fetched into a place, or of a kind, that is refused here")
            if not url.startswith("https://"):
                yield Finding(name, f"{path}: {url[:80]!r} is not https://, so anybody on the way may change the file")
            if not re.fullmatch(r"[0-9a-fA-F]{32,128}", str(entry.get("hash_val", ""))):
                yield Finding(name, f"{path}: no hash_val, so that whatever comes is taken")
            yield Finding(name, f"{path} is fetched later, from {url[:80]}: judge it then", NOTE)
