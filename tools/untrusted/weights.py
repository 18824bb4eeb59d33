"""Weights: files of tensors and numbers, and nothing in them that runs when loaded.

Pickles are read opcode by opcode, and nothing is built.
"""

from __future__ import annotations

import ast
import contextlib
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterator
from typing import IO

from .container import DAMAGED, MAX_MEMBERS, SMALL, Bundle, Finding, Member, layout, suffix, unsafe_names
from .policy import words
from .syntax import UNPARSABLE

TORCH = words(".bin .ckpt .pt .pth .ts")
MAX_PICKLE = 128 * 2**20  # bytes of a pickle
# What an unpickler for weights alone may build, as torch.load(weights_only=True) has it.
PICKLE_GLOBALS = re.compile(
    r"collections\.(OrderedDict|Counter)|_codecs\.encode|torch\.(Size|Tensor|device)|torch\.nn\.parameter\.Parameter"
    r"|torch\._utils\._rebuild_(parameter|parameter_with_state|qtensor|tensor|tensor_v2|tensor_v3|sparse_tensor)"
    r"|torch\.storage\.(TypedStorage|UntypedStorage)|torch\.serialization\._get_layout"
    r"|torch\.(Float|Double|Half|BFloat16|Byte|Char|Short|Int|Long|Bool|ComplexFloat|ComplexDouble)Storage"
    r"|torch\.(float16|float32|float64|bfloat16|u?int8|u?int16|u?int32|u?int64|bool|complex64|complex128)"
    r"|torch\._tensor\._rebuild_from_type_v2|(__builtin__|builtins)\.(set|bytearray|complex)"
)
PICKLE_REFUSED = words("STACK_GLOBAL INST OBJ NEWOBJ_EX EXT1 EXT2 EXT4 PERSID")
TORCH_PARTS = re.compile(
    r"data\.pkl|version|byteorder|\.format_version|\.storage_alignment|data/\d+|\.data/serialization_id"
)


def pickle_problem(file: IO[bytes]) -> str:
    """Why a pickle is more than tensors -> reason, or none."""
    data = file.read(MAX_PICKLE + 1)
    if len(data) > MAX_PICKLE:
        return f"its pickle has more than {MAX_PICKLE} bytes"
    end = 0
    try:
        for opcode, argument, position in pickletools.genops(data):
            end = (position or 0) + 1
            if opcode.name in PICKLE_REFUSED:
                return f"its pickle uses {opcode.name}, as plain weights never do"
            if opcode.name == "GLOBAL" and not PICKLE_GLOBALS.fullmatch(str(argument).replace(" ", ".")):
                return f"its pickle calls {str(argument).replace(' ', '.')}, which may run code"
    except Exception as error:  # the bytes are anything, and so are pickletools' complaints
        return f"its pickle is damaged ({error})"
    return "" if end == len(data) else "something follows its pickle"


def torch_findings(name: str, member: Member) -> Iterator[Finding]:
    """A file of torch.save is a zip with one pickle, of tensors alone."""
    try:
        with member.open() as file, zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            yield from (Finding(name, f"{f.member}: {f.text}") for f in (*unsafe_names(names), *layout(archive)))
            entries = archive.infolist()
            if len(entries) > MAX_MEMBERS * 10 or sum(entry.file_size for entry in entries) > 2 * member.size + SMALL:
                yield Finding(name, "is a bomb: it swells")
                return
            parts = [part.partition("/")[2] for part in names]
            if any(part.startswith("code/") or part == "constants.pkl" for part in parts):
                text = "is TorchScript, a program that torch runs and that is not judged here"
                yield Finding(name, text, "torchscript")
            elif strange := [part for part in parts if not TORCH_PARTS.fullmatch(part)]:
                yield Finding(name, f"is no plain file of torch.save: {strange[0]!r}")
            elif "data.pkl" not in parts:
                yield Finding(name, "is no plain file of torch.save: 'data.pkl' is missing")
            for part in (part for part in names if part.endswith(".pkl")):
                with archive.open(part) as content:
                    if problem := pickle_problem(content):
                        yield Finding(name, problem)
    except DAMAGED as error:
        yield Finding(name, f"is no zip, as torch.save writes ({error}): load it safely and save it anew")


def numpy_problem(file: IO[bytes]) -> str:
    """Why an .npy file is more than numbers -> reason, or none."""
    start = file.read(12)
    if start[:6] != b"\x93NUMPY":
        return "is no .npy file"
    long = start[6] > 1
    length = struct.unpack("<I" if long else "<H", start[8 : 12 if long else 10])[0]
    header = (start[12 if long else 10 :] + file.read(min(length, SMALL)))[:length].decode("latin-1")
    try:
        kinds = str(ast.literal_eval(header.strip())["descr"])
    except (*UNPARSABLE, KeyError, TypeError):
        return "has a damaged header"
    return "holds pickled objects, which run code when loaded" if re.search(r"[|<>=]?O\d*'|^\|?O$", kinds) else ""


def check_weights(bundle: Bundle) -> Iterator[Finding]:
    """Weights are tensors and numbers, nothing that runs when loaded."""
    for name, member in bundle.named(*TORCH):
        yield from torch_findings(name, member)
    for name, member in bundle.named(".npy", ".npz"):
        try:
            with contextlib.ExitStack() as stack:
                files: list[IO[bytes]] = [stack.enter_context(member.open())]
                if suffix(name) == ".npz":
                    archive = stack.enter_context(zipfile.ZipFile(files[0]))
                    files = [stack.enter_context(archive.open(part)) for part in archive.namelist()]
                yield from (Finding(name, problem) for problem in filter(None, map(numpy_problem, files)))
        except DAMAGED as error:
            yield Finding(name, f"is damaged: {error}")
