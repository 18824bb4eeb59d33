"""Inspect a foreign bundle before anything parses, imports, unpacks or runs it.

    python -I untrusted.py some_bundle.zip                          # this file and Python 3.11 are enough
    python -I untrusted.py some_bundle.zip --allow network,dynamic  # what its Python code may do, once you have read it
    python tools/verify.py --untrusted some_bundle.zip              # the same

A bundle is code: MONAI evaluates the ``$`` strings of its configs, calls what ``_target_`` names and imports its
``scripts/``. Configs must keep to an allow-list. Python is read for what reaches beyond arithmetic and files; that is
refused until granted by ``--allow``, and is no sandbox: code may hide what it does. Every ``check_<what>(bundle)``
yields what it finds, refusals and notes. (``-I`` keeps Python from importing what lies beside this file.)
Exit codes: 0 nothing refused, 1 refused, 2 the command line is wrong.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import configparser
import contextlib
import itertools
import json
import pickletools
import re
import stat
import struct
import sys
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

yaml: Any = None
with contextlib.suppress(ImportError):  # MONAI needs it, this file does not
    import yaml  # type: ignore[no-redef]


def words(text: str) -> frozenset[str]:
    """Read a set of words."""
    return frozenset(text.split())


def table(text: str) -> dict[str, frozenset[str]]:
    """Read lines of ``key: words`` -> {key: words}; a key may go on in a further line."""
    found: dict[str, frozenset[str]] = {}
    for line in text.strip().splitlines():
        key, _, rest = line.strip().partition(":")
        found[key] = found.get(key, frozenset()) | words(rest)
    return found


def dotted(names: Collection[str]) -> re.Pattern[str]:
    """Make a pattern of dotted paths, and of all that lies below them; ``*`` stands for the rest of a word."""
    choices = "|".join(re.escape(name).replace(r"\*", r"\w*") for name in sorted(names))
    return re.compile(rf"({choices})(\.|$)")


# ---------------------------------------------------------------------------------------------------------------------
# What is allowed, as data

MAX_MEMBERS, MAX_BYTES = 20_000, 32 * 2**30  # of all that a bundle holds
MAX_RATIO, SMALL = 200, 2**20  # a file of more than SMALL bytes that was squeezed further is a bomb
MAX_TEXT, MAX_PICKLE = 32 * 2**20, 128 * 2**20  # bytes of what is parsed here
MAX_DEPTH, MAX_EXPRESSION, MAX_DIGITS = 64, 10_000, 30

# The head of this project's configs. `bundle_root` and `use_bundle` look at the call stack and the table of modules,
# which no other expression may: they pass word for word.
HEAD = {
    "imports": ["$import glob", "$import os", "$import sys", "$import traceback"],
    "bundle_root": "$next((str(w.config_root_path.resolve().parent) for w in (f.f_locals.get('self') for f, _ in "
    "traceback.walk_stack(None)) if isinstance(w, monai.bundle.ConfigWorkflow)), "
    "os.path.abspath('bundles/NAME' if os.path.isdir('bundles/NAME') else '.'))",
    "use_bundle": "$sys.path[0] == @bundle_root or (sys.path.insert(0, @bundle_root), "
    "[sys.modules.pop(m) for m in list(sys.modules) if m.split('.')[0] == 'scripts'])",
    "device": "$torch.device('cuda:' + os.environ.get('LOCAL_RANK', '0') if torch.cuda.is_available() else 'cpu')",
}
IDIOMS = [re.compile(re.escape(str(HEAD[key])).replace("NAME", r"\w+")) for key in ("bundle_root", "use_bundle")]

# Packages that a config may name, and of what they hold only these parts, or none named so; the longest that fits
# counts. MONAI imports the GLOBALS for every expression.
GLOBALS = {"monai": "monai", "torch": "torch", "np": "numpy", "numpy": "numpy"}
ONLY = table("""
    collections:
    copy: copy deepcopy
    datetime: datetime date time timedelta timezone
    einops:
    functools: partial reduce
    generative:
    glob: glob iglob escape
    ignite: engine handlers metrics contrib.metrics utils.convert_tensor utils.to_onehot
    itertools:
    json: dumps load loads
    logging: DEBUG INFO WARNING ERROR CRITICAL debug info warning error disable getLogger
    math:
    matplotlib: pyplot
    monai: transforms networks losses metrics inferers handlers engines data optimizers visualize utils
    monai.apps: detection pathology generation deepedit deepgrow interaction nuclick reconstruction vista3d
    monai.auto3dseg: utils.datafold_read
    monai.config: print_config
    monai.data:
    monai.networks:
    monai.utils:
    nibabel: load affines orientations
    numpy:
    os: path environ.get getenv getcwd makedirs mkdir listdir scandir walk cpu_count sep fspath
    pathlib: Path PurePath
    PIL: Image
    random:
    re:
    scipy: ndimage stats signal spatial special interpolate optimize linalg fft sparse
    scripts:
    skimage: measure morphology filters transform segmentation exposure color feature restoration util
    sklearn: metrics model_selection preprocessing decomposition cluster neighbors
    sys: maxsize platform version_info byteorder stdout stderr
    time: time perf_counter strftime
    torch:
    torch.cuda:
    torch.distributed:
    torch.utils: data checkpoint tensorboard.SummaryWriter
    torchvision: transforms models ops
    tqdm: tqdm trange auto
    traceback: print_exc
    warnings: filterwarnings simplefilter warn
""")
NEVER = table("""
    monai.apps: detection.metrics.coco.logger
    monai.data: utils.pickle_operations torchscript_utils load_net_with_metadata save_net_with_metadata
    monai.networks: utils.convert_to_onnx utils.convert_to_trt utils.convert_to_torchscript
    monai.utils: module misc.run_cmd state_cacher StateCacher jupyter_utils safeeval
    numpy: lib core ctypeslib f2py distutils testing compat rec savez_compressed genfromtxt loadtxt fromregex fromfile
    torch: ops classes package library serialization multiprocessing testing onnx export fx from_file inductor ao xpu
    torch.distributed: run launch launcher nn checkpoint all_gather_object broadcast_object_list gather_object
    torch.distributed: recv_object_list scatter_object_list send_object_list FileStore TCPStore
    torch.utils: data.datapipes
""")
LOADS = words("torch.load numpy.load")  # in one form only
EXPLICIT = LOADS | {"monai.utils.dist"} | {f"{package}.{part}" for package, parts in ONLY.items() for part in parts}

# Names that lead from a harmless object to another package, to a frame, a file or a program, wherever they stand in a
# chain of attributes. Modules of the standard library do, but for those whose names are words.
ESCAPES = words("""
    CodeType CompilationUnit DataSource FileIO ForkingPickler FunctionType GifImage IPython Image LA LambdaType
    ModuleType PIL PILImage Popen Trace ag_code ag_frame attrgetter bltns builtins cffi check_call check_output chmod
    clearml cloudpickle container_abcs copymodule cpp_extension cr_code cr_frame ctypes ctypeslib dictConfig dill dist
    download download_and_extract download_url dump elastic exec exec_ export_chrome_trace export_stacks extractall f2py
    f_back f_builtins f_code f_globals f_locals fileConfig filebasedimages fire fork format_map fsspec func_code
    func_globals gdown getoutput gi_code gi_frame hardlink_to hub huggingface_hub idist import_module import_submodule
    importer instantiate itk jit jiterator joblib lchmod link_to load load_inline load_library load_module load_objects
    load_state_dict_from_url load_submodules load_url loads locate memmap methodcaller mlflow model_zoo moves mp mpl mro
    ndimage nib ninja np_ndi npl npt numexpr open open_code optional_import pandas pd pip pkg_info pkg_resources plt
    popen psutil python_multiprocessing query reload_objects rename request requests rmdir rmtree rpc run_cmd save
    save_obj save_state savefig savetxt savez scipy scipy_ndimage setuptools six spawn switch_backend symlink_to system
    tb tb_frame tb_next tf to_csv to_file to_filename to_hdf to_json to_parquet to_pickle to_sql tofile touch triton
    unlink urlopen urlretrieve walk_stack wandb write_bytes write_text xpx yaml
""") | (
    sys.stdlib_module_names
    - words("abc array cmath copy enum io math numbers queue random select signal statistics string time trace")
)
NAMES = words("""
    Ellipsis Exception NotImplemented RuntimeError ValueError abs all any bool bytes chr complex dict divmod enumerate
    filter float frozenset getattr hasattr hash hex id input int isinstance issubclass iter len list map max min next
    ord pow print range repr reversed round set setattr slice sorted str sum tuple type zip
""")  # builtins that an expression may use; getattr, setattr and type in one form only
RULE_NAMES = {"configs/import_rules.json": words("count has shape value")}  # this project's rules for foreign weights
NODES = (
    *(ast.Expression, ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.Lambda, ast.IfExp, ast.Dict, ast.Set, ast.ListComp),
    *(ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Compare, ast.Call, ast.FormattedValue, ast.JoinedStr),
    *(ast.Constant, ast.Attribute, ast.Subscript, ast.Starred, ast.Name, ast.List, ast.Tuple, ast.Slice),
    *(ast.expr_context, ast.boolop, ast.operator, ast.unaryop, ast.cmpop, ast.comprehension, ast.arguments),
    *(ast.arg, ast.keyword),
)
DANGERS = words("""
    builtins ctypes importlib logging marshal monai multiprocessing nt numpy os pdb pickle posix pty pydoc runpy shutil
    socket subprocess sys torch urllib webbrowser
""")  # packages of which a plain string may name only what a config may name

# MONAI's classes outside of the packages above, which `_target_` could name without a package, and what talks to a
# server.
CLASSES = words("""
    Algo AlgoEnsemble AlgoEnsembleBestByFold AlgoEnsembleBestN AlgoEnsembleBuilder AlgoGen Analyzer AutoRunner
    BaseClient BundleAlgo BundleGen BundleWorkflow ClearMLHandler ClearMLImageHandler ClearMLLogger ClearMLStatsHandler
    ClientAlgo ClientAlgoStats ComponentLocator ConfigComponent ConfigExpression ConfigItem ConfigParser ConfigWorkflow
    CrossValidation DataAnalyzer DecathlonDataset DeprecatedTypesWarningFilter EnsembleRunner EnsureSameShaped
    ExchangeObject ExtraItems FgImageStats FgImageStatsSumm FilenameStats FiltersType FlPhase FlStatistics HPOGen
    HashCheckError ImageHistogram ImageHistogramSumm ImageStats ImageStatsSumm Instantiable InvalidPyTorchVersionError
    LabelStats LabelStatsSumm MLFlowHandler MLflowLogger MedNISTDataset ModelType ModelnnUNetWrapper MonaiAlgo
    MonaiAlgoStats NNIGen NNUNETMode NeptuneLogger Operations OptionalImportError OptunaGen PolyaxonLogger
    PythonicWorkflow ReferenceResolver RemoteMMARKeys SampleOperations SegSummarizer StateCacher StatusMembers
    SummaryOperations TciaDataset ThreadContainer TrainsLogger VisdomLogger WandBLogger WeightType nnUNetV2Runner
""")
# What looks up classes by strings, which may be written as a component only: then its strings are checked.
LOOK_UP = words("""
    FlexUNetEncoderRegister LoadImage LoadImageD LoadImageDict LoadImaged PatchInferer SaveImage SaveImageD
    SaveImageDict SaveImaged register_writer resolve_writer
""")
LOOKED_UP = words("reader writer merger_cls")  # their arguments that are such strings
SETTINGS = {"weights_only": True, "allow_pickle": False, "trust_remote_code": False, "trust_repo": False}
FOLDERS = words("output_dir save_dir log_dir cache_dir ckpt_dir")  # what a run writes to
FETCHING = words("PerceptualLoss")  # loads a network from a hub

# What Python code may do only by grant.
GRANTS = {
    "network": "may reach the network",
    "process": "may start or end programs",
    "native": "may load machine code",
    "dynamic": "may run code that is not in sight",
    "pickle": "may unpickle, which runs code",
    "delete": "may delete folders",
}
NEEDS = table("""
    network: aiohttp asyncio boto3 clearml comet_ml datasets diffusers fastapi flask ftplib gdown gradio grpc http httpx
    network: huggingface_hub imaplib kagglehub mlflow multiprocessing.connection multiprocessing.managers neptune
    network: nnunetv2 nntplib nvflare openai paramiko poplib pycurl requests smtpd smtplib socket socketserver ssl
    network: telnetlib timm totalsegmentator transformers urllib urllib3 wandb webbrowser websocket websockets wget
    network: wsgiref xmlrpc zmq torch.hub torch.distributed.rpc torch.utils.model_zoo torchvision.datasets
    network: monai.apps.utils monai.apps.mmars monai.apps.tcia monai.apps.datasets monai.apps.download*
    network: monai.bundle.download* monai.bundle.get_* monai.bundle.load monai.bundle.push_to_hf_hub
    network: sklearn.datasets.fetch_* scipy.datasets skimage.data logging.handlers
    process: fabric invoke pexpect plumbum psutil pty sh subprocess os.abort os.exec* os.fork* os.kill* os.popen
    process: os.posix_spawn* os.spawn* os.startfile os.system monai.utils.run_cmd monai.utils.misc.run_cmd
    process: monai.auto3dseg monai.apps.auto3dseg monai.apps.nnunet monai.fl torch.distributed.run
    process: torch.distributed.launch* torch.distributed.elastic Popen check_call check_output popen system
    native: _ctypes cffi ctypes cython mmap pycuda pyximport triton numpy.ctypeslib numpy.distutils numpy.f2py
    native: scipy.LowLevelCallable torch.classes torch.cuda.jiterator torch.ops.load_library
    native: torch.utils.cpp_extension load_inline load_library
    dynamic: bdb builtins cProfile code codeop ensurepip fire imp importlib marshal numexpr pdb pip pkgutil profile
    dynamic: pydoc runpy setuptools site sympy timeit trace venv zipimport exec_module import_module load_module
    dynamic: PIL.ImageMath gc.get_* inspect.currentframe inspect.getframeinfo inspect.stack logging.config
    dynamic: operator.attrgetter operator.methodcaller sys._current* sys._getframe sys.addaudithook sys.meta_path
    dynamic: sys.modules sys.path* sys.setprofile sys.settrace types.CodeType types.FunctionType types.ModuleType
    dynamic: types.new_class monai.bundle monai.utils.instantiate monai.utils.module monai.utils.optional_import
    dynamic: torch.fx torch.package inspect.get_annotations pandas.eval typing.get_type_hints
    pickle: _pickle cloudpickle copyreg dill joblib jsonpickle shelve pandas.read_pickle pickle.Unpickler pickle.load*
    pickle: monai.data.utils.pickle_operations numpy.load torch.load torch.serialization yaml.Loader
    pickle: yaml.UnsafeLoader yaml.full_load* yaml.load* yaml.unsafe_load* read_pickle
    delete: send2trash os.removedirs os.renames shutil.move shutil.rmtree rmtree
""")
NEEDED_FOR = {grant: dotted(names) for grant, names in NEEDS.items()}
HARMLESS = dotted(
    words("""
    http.HTTPStatus importlib.metadata importlib.resources importlib.util.find_spec monai.bundle.ConfigWorkflow
    monai.bundle.utils.DEFAULT_EXP_MGMT_SETTINGS torch.fx.wrap urllib.parse
""")
)
# Names of NEEDS that tell what they do whatever they belong to.
BY_NAME = frozenset(name for names in NEEDS.values() for name in names if name in ESCAPES - sys.stdlib_module_names)
BY_NAME |= words("exec_module read_pickle")
BUILTINS = words(
    "__builtins__ __import__ __loader__ __path__ __spec__ breakpoint compile eval exec globals locals vars"
)
DUNDERS = words("""
    base bases builtins closure code getattribute globals loader mro reduce reduce_ex spec subclasses
""")  # attributes that lead from any object to all others
STDLIB = words("""
    __future__ abc argparse array ast atexit base64 binascii bisect bz2 calendar cmath collections colorsys concurrent
    configparser contextlib contextvars copy csv dataclasses datetime decimal difflib enum errno filecmp fnmatch
    fractions functools gc getpass glob gzip hashlib heapq hmac html inspect io itertools json keyword linecache locale
    logging lzma math mimetypes multiprocessing numbers operator os pathlib pickle platform pprint queue random re
    reprlib secrets shutil signal statistics string struct sys tarfile tempfile textwrap threading time token tokenize
    traceback types typing typing_extensions unicodedata uuid warnings weakref xml zipfile zlib
""")  # what Python code may import; some of what is in there needs a grant still
LIBRARIES = words("""
    PIL SimpleITK cupy cv2 einops generative h5py ignite imageio itk jsonschema lpips matplotlib monai networkx nibabel
    numba numpy openslide pandas pydicom pywt safetensors scipy shapely skimage sklearn tensorboard tensorboardX
    tifffile torch torchmetrics torchvision tqdm yaml
""")
GUARDED = words("builtins importlib monai numpy os pickle shutil sys torch")  # modules that must not be handed on
WRITING = words("chmod extractall hardlink_to rename rmdir symlink_to tofile touch unlink write_bytes write_text")
WRITERS = words("os.chmod os.link os.open os.remove os.rename os.replace os.rmdir os.symlink os.unlink")

# Files, by their last suffix.
METADATA = "configs/metadata.json"
RUN_ALONE = words("conftest.py setup.py sitecustomize.py usercustomize.py")
PROGRAMS = words("""
    .a .app .bash .bat .class .cmd .com .desktop .dll .dylib .engine .exe .hta .jar .js .lib .lnk .msi .o .plan .ps1
    .pyc .pyd .pyo .pyw .pyz .reg .scr .service .sh .so .url .vbe .vbs .wsf
""")
ARCHIVES = words(".7z .bz2 .cab .deb .dmg .egg .gz .iso .rar .rpm .tar .tbz .tgz .txz .whl .xz .zip .zst")
PICKLES = words(".dill .joblib .p .pck .pickle .pkl")
TORCH = words(".bin .ckpt .pt .pth .ts")
YAML = words(".yaml .yml")
CONFIGS = YAML | {".json"}
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
RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d|conin\$|conout\$)(\..*)?")  # names of devices

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
LOG_CLASSES = words("""
    FileHandler Formatter NullHandler StreamHandler handlers.RotatingFileHandler handlers.TimedRotatingFileHandler
    logging.FileHandler logging.Formatter logging.NullHandler logging.StreamHandler logging.handlers.RotatingFileHandler
    logging.handlers.TimedRotatingFileHandler
""")

# ---------------------------------------------------------------------------------------------------------------------
# Reading a bundle as data

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


def sizes(archive: zipfile.ZipFile) -> Iterator[Finding]:
    """Sizes as declared, then each file read to its end, as declarations may lie."""
    entries = archive.infolist()
    if len(entries) > MAX_MEMBERS or sum(entry.file_size for entry in entries) > MAX_BYTES:
        yield Finding("", f"more than {MAX_MEMBERS} files, or {MAX_BYTES / 2**30:.0f} GB: a bomb, or no bundle")
        return
    for entry in entries:
        if entry.file_size > max(SMALL, MAX_RATIO * entry.compress_size):
            yield Finding(entry.orig_filename, f"swells from {entry.compress_size} to {entry.file_size} bytes: a bomb")
            return
    for entry in entries:
        try:
            with archive.open(entry) as file:
                while file.read(2**20):
                    pass
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError) as error:
            yield Finding(entry.orig_filename, f"cannot be read: {error or type(error).__name__}")


def read_zip(archive: zipfile.ZipFile) -> tuple[dict[str, Member], list[Finding]]:
    """Judge a zip as a container -> its files by their path in the one top folder, and what is wrong with it."""
    entries = archive.infolist()
    names = [entry.orig_filename for entry in entries]
    found = [*unsafe_names(names), *layout(archive)]
    tops = {name.split("/")[0] for name in names}
    if len(tops) != 1:
        found.append(Finding("", f"{len(tops)} things at the top ({', '.join(sorted(tops)[:3])}): expected one folder"))
    for entry in entries:
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR) or (kind == stat.S_IFDIR) > entry.is_dir():
            what = "a symbolic link" if kind == stat.S_IFLNK else "no regular file"
            found.append(Finding(entry.orig_filename, f"is {what}: it may lead anywhere once unpacked"))
        if entry.external_attr >> 16 & 0o6000:
            found.append(Finding(entry.orig_filename, "would run with its owner's rights (setuid)"))
    found += [] if found else sizes(archive)
    files = [entry for entry in entries if not entry.is_dir()]
    opened = {
        entry.orig_filename.partition("/")[2]: Member(entry.file_size, lambda entry=entry: archive.open(entry))  # type: ignore[misc]
        for entry in files
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
    if len(members) > MAX_MEMBERS or sum(member.size for member in members.values()) > MAX_BYTES:
        found.append(Finding("", f"more than {MAX_MEMBERS} files, or {MAX_BYTES / 2**30:.0f} GB"))
    return members, [*found, *unsafe_names(members)]


# ---------------------------------------------------------------------------------------------------------------------
# Files


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


# ---------------------------------------------------------------------------------------------------------------------
# Configs


def parse_json(text: str) -> Any:
    """Parse JSON of which every reader makes the same: no key twice, no NaN, no number that takes forever."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if len(set(keys)) < len(keys):
            raise ValueError(
                f"key {max(keys, key=keys.count)!r} stands twice: MONAI takes the last, a reader the first"
            )
        return dict(pairs)

    def number(digits: str) -> int:
        if len(digits) > MAX_DIGITS:
            raise ValueError(f"a number of {len(digits)} digits")
        return int(digits)

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    return json.loads(text, object_pairs_hook=unique, parse_int=number, parse_constant=constant)


def parse_yaml(text: str) -> Any:
    """Parse YAML without tags, aliases and keys that stand twice."""
    if yaml is None:
        raise ValueError("YAML cannot be judged without PyYAML: pip install pyyaml, or convert it to JSON")
    try:
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            if isinstance(token, (yaml.TagToken, yaml.AliasToken)):
                raise ValueError(f"a tag or an alias in line {token.start_mark.line + 1}: write it out")
        nodes = [yaml.compose(text, Loader=yaml.SafeLoader)]
        while nodes:
            node = nodes.pop()
            if isinstance(node, yaml.MappingNode):
                keys = [str(key.value) for key, _ in node.value]
                if len(set(keys)) < len(keys):
                    raise ValueError(f"key {max(keys, key=keys.count)!r} stands twice: MONAI takes the last")
                nodes += [part for pair in node.value for part in pair]
            elif isinstance(node, yaml.SequenceNode):
                nodes += node.value
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"is no YAML: {' '.join(str(error).split())}") from error


def read_documents(members: dict[str, Member]) -> tuple[dict[str, Any], list[Finding]]:
    """Parse all JSON and YAML, wherever it lies, as a macro or a command may name any of it."""
    documents, found = dict[str, Any](), list[Finding]()
    for name, member in members.items():
        if suffix(name) in CONFIGS:
            try:
                text = member.read().decode()
                documents[name] = (parse_yaml if suffix(name) in YAML else parse_json)(text)
                deepest = max(path.count("::") for path, *_ in walk(documents[name]))
                if deepest >= MAX_DEPTH:
                    found.append(Finding(name, f"is nested {deepest} deep"))
            except (ValueError, RecursionError) as error:
                documents.pop(name, None)
                deep = isinstance(error, RecursionError)
                found.append(Finding(name, "is nested too deep" if deep else f"cannot be judged: {error}"))
    return documents, found


def walk(content: Any) -> Iterator[tuple[str, str, Any, dict]]:
    """Yield (id, key, value, the dict that holds it) of all that a config holds; ids as MONAI makes them.

    A key may be a path itself ("train#net#_target_" of an overlay): the key is then its last part.
    """
    stack: list[tuple[str, str, Any, dict]] = [("", "", content, {})]
    while stack:
        path, _, value, _ = item = stack.pop()
        yield item
        pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for name, part in pairs:
            name = str(name).replace("#", "::")
            name = name.removeprefix("+") if not path else name
            holder = value if isinstance(value, dict) and "::" not in name else {}
            stack.append((f"{path}::{name}" if path else name, name.rpartition("::")[2], part, holder))


def absolute(value: str, path: str) -> str:
    """A string of a config as MONAI has it once relative ids are absolute: keys become a part of its text."""
    value, here = value.replace("#", "::"), path.split("::")
    for prefix in sorted(set(re.findall(r"[@%]::+", value)), reverse=True):
        up = prefix[1:].count("::")
        value = value.replace(prefix, prefix[0] + "".join(f"{part}::" for part in here[: max(len(here) - up, 0)]))
    return value


def as_evaluated(value: str, path: str) -> str:
    """The text that MONAI hands to eval() for an expression, with what stands for the references spliced in.

    It is a replacement of text, quotes and all, also within strings: only the result tells what is run.
    """
    value = absolute(value, path)
    for reference in sorted(re.findall(r"@\w*(?:::\w*)*", value), key=len, reverse=True):
        value = value.replace(reference, f"__local_refs['{reference[1:]}']")
    return value[1:]


def parse_expression(value: str, path: str) -> ast.AST:
    """Parse a ``$`` string as MONAI does -> an import statement, or the expression."""
    text = as_evaluated(value, path)
    if len(text) > MAX_EXPRESSION:
        raise ValueError(f"is an expression of {len(text)} characters")
    try:
        first = ast.parse(text).body[:1]
        if first and isinstance(first[0], (ast.Import, ast.ImportFrom)):
            return first[0]
        return ast.parse(text.lstrip(" \t"), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"cannot be parsed ({error})") from error


def expressions(bundle: Bundle) -> Iterator[tuple[str, str, ast.AST]]:
    """Yield (member, id, parsed) of all expressions that can be parsed."""
    for name, content in bundle.documents.items():
        for path, _, value, _ in walk(content):
            if isinstance(value, str) and value.startswith("$"):
                with contextlib.suppress(ValueError):
                    yield name, path, parse_expression(value, path)


def bindings(node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, str]]:
    """Yield (name, what it stands for) of an import."""
    for alias in node.names:
        if isinstance(node, ast.Import):
            yield alias.asname or alias.name, alias.name
        else:
            yield alias.asname or alias.name, f"{'.' * node.level}{node.module or ''}.{alias.name}"


def imports(bundle: Bundle) -> dict[str, set[str]]:
    """The names of expressions that are modules, or parts of them; overlays use what another file imports."""
    found = {name: {origin} for name, origin in GLOBALS.items()}
    for _, _, node in expressions(bundle):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for name, origin in bindings(node):
                found.setdefault(name, set()).add(origin)
    return found


def within(inside: str, parts: Collection[str]) -> bool:
    """Whether a dotted path is one of the parts, or lies below one."""
    return any(inside == part or inside.startswith(f"{part}.") for part in parts)


def forbidden(path: str, *, importing: bool = False) -> str:
    """Why a config may not name something by its dotted path -> reason, or none if it may.

    Args:
        path: e.g. ``torch.optim.Adam``.
        importing: whether a module is meant, which may then hold more than what is allowed.
    """
    parts = path.split(".")
    for number, part in enumerate(parts[1:], 1):
        if part.startswith("_"):
            return f"{part!r} is private, and may lead anywhere"
        if part in ESCAPES and ".".join(parts[: number + 1]) not in EXPLICIT:
            return f"{part!r} leads out of {'.'.join(parts[:number])}"
    package = next((p for n in range(len(parts), 0, -1) if (p := ".".join(parts[:n])) in ONLY), "")
    if not package:
        return f"{parts[0]} is not among the packages that a config may use"
    inside, only = path.removeprefix(package).removeprefix("."), ONLY[package]
    if within(inside, NEVER.get(package, ())) or parts[-1] in CLASSES:
        return f"{path} is not for configs"
    above = importing and (not inside or any(part.startswith(f"{inside}.") for part in only))
    if only and not above and not within(inside, only):
        return f"{path} is not among what a config may use of {package}"
    # A package met again within another: by its own rules.
    again = next((n for n in range(1, len(parts)) if GLOBALS.get(parts[n], parts[n]) in GUARDED), 0)
    return forbidden(".".join([GLOBALS.get(parts[again], parts[again]), *parts[again + 1 :]])) if again else ""


def names_danger(text: str) -> bool:
    """Whether a string is the dotted path of something that a class looking up strings must not find."""
    is_path = re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", text)
    return bool(is_path and text.split(".")[0] in DANGERS and forbidden(text))


class Expression:
    """Judges one expression by what it may consist of; `problems` are the reasons against it."""

    def __init__(self, node: ast.AST, imported: dict[str, set[str]], known: Collection[str], modules: Collection[str]):
        self.imported, self.modules = imported, modules
        nodes = list(ast.walk(node))
        self.names = {*known, *(n.arg for n in nodes if isinstance(n, ast.arg))}
        self.names |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        self.problems = [f"{type(n).__name__} has no place in a config" for n in nodes if not isinstance(n, NODES)]
        places = [n for n in nodes if isinstance(n, (ast.Attribute, ast.Subscript)) and not isinstance(n.ctx, ast.Load)]
        self.problems += [f"assigns to {ast.unparse(n)[:40]}" for n in places]
        if not self.problems:
            self.judge(node)

    def judge(self, node: ast.AST, called: ast.Call | None = None, indexed: bool = False) -> None:
        """Judge a node and all below it; `called` is the call whose function it is."""
        if isinstance(node, (ast.Attribute, ast.Name)):
            self.chain(node, called, indexed)
        elif isinstance(node, ast.Subscript) and getattr(node.value, "id", "") == "__local_refs":
            self.reference(node)
        elif isinstance(node, ast.Constant):
            if isinstance(node.value, str) and ("__" in node.value or names_danger(node.value)):
                self.problems.append(f"the string {node.value[:40]!r} may name something that is not for configs")
        elif isinstance(node, ast.Call):
            self.call(node)
        else:
            for part in ast.iter_child_nodes(node):
                self.judge(part, indexed=isinstance(node, ast.Subscript))

    def reference(self, node: ast.Subscript) -> None:
        """References are judged where they lead to, except to an import, which is a module."""
        key = node.slice.value if isinstance(node.slice, ast.Constant) else None
        if not isinstance(key, str) or not key or key in self.modules:
            self.problems.append(f"a reference to {key!r} hands on a module, or everything")

    def chain(self, node: ast.AST, called: ast.Call | None, indexed: bool) -> None:
        """A name with attributes: from a known package by its dotted path, else by each attribute."""
        attributes: list[str] = []
        while isinstance(node, ast.Attribute):
            attributes.insert(0, node.attr)
            node = node.value
        if not isinstance(node, ast.Name):
            self.judge(node)
            self.attributes(attributes, called)
        elif node.id in self.imported:
            for dotted in (".".join([origin, *attributes]) for origin in sorted(self.imported[node.id])):
                self.named(dotted, called, indexed, handed_on=not attributes and "." not in dotted)
        elif node.id in NAMES and not attributes and node.id in ("getattr", "setattr", "type"):
            self.special(node.id, called)
        elif node.id not in NAMES and (node.id not in self.names or node.id in dir(builtins)):
            self.problems.append(f"the name {node.id!r} is not for configs, or unknown")
        else:
            self.attributes(attributes, called)

    def named(self, dotted: str, called: ast.Call | None, indexed: bool, handed_on: bool) -> None:
        """Something of a package."""
        reason = forbidden(dotted)
        if dotted == "os.environ" and indexed:
            reason = ""
        elif handed_on or dotted in ONLY:
            reason = f"{dotted} itself is handed on, so that what is used of it cannot be seen"
        elif dotted == "pathlib.Path.replace":
            reason = f"{dotted} moves a file"
        elif dotted.rpartition(".")[2] in LOOK_UP:
            reason = f"{dotted} looks up classes by strings: write it as a component, with _target_"
        elif dotted in LOADS:
            reason = reason or unsafe_load(dotted, called)
        if reason:
            self.problems.append(reason)

    def attributes(self, attributes: list[str], called: ast.Call | None) -> None:
        """Attributes of something unknown."""
        for attribute in attributes:
            if re.match(r"_[^a-z]", attribute) or attribute in ESCAPES:
                self.problems.append(f"the attribute {attribute!r} may lead anywhere")
        count = visible_arguments(called)
        if attributes[-1:] == ["eval"] and count != 0:
            self.problems.append("eval runs its arguments, and is for networks, without any")
        if attributes[-1:] == ["replace"] and (count is None or count < 2):
            self.problems.append("replace with one argument moves a file, and is for texts, with two")

    def special(self, name: str, called: ast.Call | None) -> None:
        """getattr and setattr with a name in sight; setattr for torch's backends alone; type of one thing."""
        arguments = called.args if called and not called.keywords else []
        if any(isinstance(argument, ast.Starred) for argument in arguments):
            arguments = []
        second = getattr(arguments[1], "value", None) if len(arguments) > 1 else None
        if name == "type" and len(arguments) == 1:
            return
        if name == "getattr" and isinstance(second, str):
            self.judge(ast.Attribute(arguments[0], second, ast.Load()))
        elif name == "setattr" and isinstance(second, str) and len(arguments) == 3:
            if not ast.unparse(arguments[0]).startswith("torch.backends.") or second.startswith("_"):
                self.problems.append("setattr is for torch.backends alone")
        else:
            self.problems.append(f"{name} hides what it works on")

    def call(self, node: ast.Call) -> None:
        """A call: its function, its arguments, and settings that make a harmless function dangerous."""
        self.judge(node.func, called=node)
        for argument in [*node.args, *(keyword.value for keyword in node.keywords)]:
            self.judge(argument)
        for keyword in node.keywords:
            value = getattr(keyword.value, "value", ...)
            if keyword.arg in SETTINGS and value is not SETTINGS[keyword.arg]:
                self.problems.append(f"{keyword.arg} must be {SETTINGS[keyword.arg]}")
            if keyword.arg in LOOKED_UP:
                self.problems.append(f"{keyword.arg} is looked up by its name: write a component, with _target_")


def visible_arguments(called: ast.Call | None) -> int | None:
    """The number of a call's arguments, if there is a call and no ``*`` hides it."""
    if not called or any(isinstance(a, ast.Starred) for a in called.args) or None in [k.arg for k in called.keywords]:
        return None
    return len(called.args) + len(called.keywords)


def unsafe_load(dotted: str, called: ast.Call | None) -> str:
    """torch.load and numpy.load run code unless told not to -> reason."""
    if not called or visible_arguments(called) is None:
        return f"{dotted} is used in a way that hides its arguments"
    settings = {k.arg: getattr(k.value, "value", ...) for k in called.keywords}
    if dotted == "torch.load":
        return "" if settings.get("weights_only") is True else "torch.load runs code unless it has weights_only=True"
    safe = settings.get("allow_pickle", False) is False and len(called.args) < 3
    return "" if safe else "numpy.load with allow_pickle runs code"


def target_problem(value: Any, holder: dict, imported: dict[str, set[str]], path: str) -> str:
    """Why MONAI must not call what a ``_target_`` names -> reason, or none."""
    if not isinstance(value, str) or value[:1] in ("@", "%"):
        return "must be the name itself, not a reference"
    if value.startswith("$"):
        node = parse_expression(value, path)
        dotted = ast.unparse(node)
        root = dotted.split(".")[0]
        if not re.fullmatch(r"\w+(\.\w+)+", dotted) or root not in imported:
            return "computes what to call, which could be the name of anything"
        return next(filter(None, (uncallable(f"{o}{dotted.removeprefix(root)}", holder) for o in imported[root])), "")
    if "." not in value:
        ours = re.fullmatch(r"[A-Z]\w*", value) and value not in CLASSES
        return "" if ours else f"{value} is no class of MONAI that a config may use: write its full path, if it is one"
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", value):
        return f"{value[:60]!r} is no dotted path"
    return uncallable(value, holder)


def uncallable(path: str, holder: dict) -> str:
    """Why a component, with the settings it has, must not call something -> reason, or none."""
    setting, safe = {"torch.load": ("weights_only", True), "numpy.load": ("allow_pickle", False)}.get(path, ("", False))
    if holder.get(setting, False) is not safe:
        return f"{path} runs code unless {setting} is {safe}"
    return forbidden(path)


def check_expressions(bundle: Bundle) -> Iterator[Finding]:
    """Every ``$`` string keeps to the allow-list."""
    modules = {path for _, path, node in expressions(bundle) if isinstance(node, (ast.Import, ast.ImportFrom))}
    modules |= {path.rpartition("::")[0] for path in modules} - {""}
    scripts = any(name.startswith("scripts/") for name in bundle.members)
    for name, content in bundle.documents.items():
        known = RULE_NAMES.get(name, frozenset())
        known |= {key for _, key, _, _ in walk(content) if known}
        for path, _, value, _ in walk(content):
            if not isinstance(value, str) or not value.startswith("$") or any(i.fullmatch(value) for i in IDIOMS):
                continue
            where = f"{path} {value[:80]!r}"
            try:
                node = parse_expression(value, path)
            except ValueError as error:
                yield Finding(name, f"{where}: {error}")
                continue
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                problems = [forbidden(origin, importing=True) for _, origin in bindings(node)]
                if not scripts and any(origin.split(".")[0] == "scripts" for _, origin in bindings(node)):
                    problems.append("scripts is not in this bundle: another one's would run")
                if isinstance(node, ast.ImportFrom) and "*" in [alias.name for alias in node.names]:
                    problems.append("imports everything, under names not in sight")
            else:
                problems = Expression(node, bundle.imported, known, modules).problems
            yield from (Finding(name, f"{where}: {problem}") for problem in dict.fromkeys(filter(None, problems)))


def check_components(bundle: Bundle) -> Iterator[Finding]:
    """Every ``_target_`` is of an allowed package, and arguments that name code are plain and allowed."""
    for name, content in bundle.documents.items():
        for path, key, value, holder in walk(content):
            problem = ""
            if key == "_target_":
                try:
                    problem = target_problem(value, holder, bundle.imported, path)
                except ValueError as error:
                    problem = str(error)
                if not problem and str(value).startswith("scripts.") and not has_module(bundle, value):
                    problem = f"{value} is not in this bundle: another one's scripts would run"
                if not problem and str(value).rpartition(".")[2] in FETCHING:
                    yield Finding(name, f"{path}: {value} may download a network from a hub, and run its code", NOTE)
            elif key == "_mode_":
                looks_up = str(holder.get("_target_", "?LoadImage")).rpartition(".")[2].lstrip("?") in LOOK_UP
                if value != "default" and (value != "callable" or looks_up):
                    problem = f"_mode_ {value!r} is not for this component: debug stops in a debugger"
            elif key == "_debug_" and value is not False:
                problem = "_debug_ stops in a debugger"
            elif key in SETTINGS and value is not SETTINGS[key] and name.startswith("configs/"):
                problem = f"must be {str(SETTINGS[key]).lower()}, written out"
            elif key in LOOKED_UP:
                problem = next(filter(None, (looked_up(bundle, v) for v in _listed(value))), "")
            elif key == "pretrained" and value is True:
                yield Finding(name, f"{path}: weights may be downloaded", NOTE)
            elif key in FOLDERS and isinstance(value, str) and value[:1] not in "$@%" and leads_out(value):
                problem = f"{value!r} is outside of the bundle: what is written there may do harm"
            if problem:
                yield Finding(name, f"{path}: {problem}")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def looked_up(bundle: Bundle, value: Any) -> str:
    """Why MONAI must not look up a class by this string -> reason, or none."""
    if not isinstance(value, str):
        return ""
    if value.startswith("@"):
        path = value[1:].replace("#", "::")
        ends = [v for content in bundle.documents.values() for p, _, v, _ in walk(content) if p == path]
        if not ends or any(isinstance(v, (str, list)) for v in ends):
            return f"{value} must be the name itself, not a reference"
        return ""
    if value[:1] in ("$", "%"):
        return f"{value[:60]!r} computes a name that is looked up: write the name"
    if value in dir(builtins) or not re.fullmatch(r"\w+(\.\w+)*", value):
        return f"{value!r} is no class to look up"
    return forbidden(value) if "." in value else ""


def has_module(bundle: Bundle, dotted: str) -> bool:
    """Whether the module of a dotted path below ``scripts`` lies in the bundle."""
    stems = {str(Path(name).with_suffix("")).removesuffix("/__init__") for name, _ in bundle.named(".py")}
    return dotted.rpartition(".")[0].replace(".", "/") in stems


def leads_out(path: str) -> bool:
    """Whether a path of a config is not below the current folder."""
    return path.startswith(("/", "~")) or ":" in path[:3] or ".." in re.split(r"[/\\]", path)


def check_strings(bundle: Bundle) -> Iterator[Finding]:
    """Macros stay in the bundle; plain strings name nothing that a class could look up; addresses are told."""
    for name, content in bundle.documents.items():
        for path, _, value, _ in walk(content):
            if not isinstance(value, str):
                continue
            macro = re.match(r"%(.*\.(?:json|ya?ml))(?=::|$)", absolute(value, path), re.IGNORECASE)
            if macro and (leads_out(macro[1]) or not any(f"/{n}".endswith(f"/{macro[1]}") for n in bundle.documents)):
                yield Finding(name, f"{path}: the macro {value!r} reads a file that is not in the bundle")
            if names_danger(value):
                yield Finding(name, f"{path}: {value!r} may be looked up, and is not for configs")
            if re.match(r"(?i)(https?|ftp|s3|gs|file|hf)://", value) and name != METADATA:
                yield Finding(name, f"{path}: the address {value[:100]}", NOTE)


# ---------------------------------------------------------------------------------------------------------------------
# Metadata, logging.conf, large_files


def check_metadata(bundle: Bundle) -> Iterator[Finding]:
    """Packages that the bundle asks for are installed by people who trust it."""
    content = bundle.documents.get(METADATA)
    asked = [content.get(f"{kind}_packages_version") for kind in ("required", "optional")] if content else []
    known = LIBRARIES | words("pytorch-ignite scikit-learn scikit-image pillow opencv-python transformers")
    unknown = sorted({str(name) for names in asked if isinstance(names, dict) for name in names} - known)
    if unknown:
        yield Finding(METADATA, f"asks for {', '.join(unknown)[:200]}: look before you install it", NOTE)


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
                nodes: list[ast.AST]
                try:
                    nodes = list(ast.walk(ast.parse(text or "()", mode="eval").body))
                except (SyntaxError, ValueError, RecursionError, MemoryError):
                    nodes = [ast.Pass()]
                literal = (ast.Constant, ast.Tuple, ast.List, ast.Dict, ast.Load, ast.Name)
                for node in nodes:
                    stream = isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.stdout", "sys.stderr")
                    if not (stream or isinstance(node, literal)) or getattr(node, "id", "sys") != "sys":
                        yield Finding(name, f"[{section}] {key}={text[:60]} is code, which logging evaluates")
                        break
                    if isinstance(node, ast.Constant) and isinstance(node.value, str) and leads_out(node.value):
                        yield Finding(name, f"[{section}] {key}={text[:60]} writes outside of the bundle")


def check_large_files(bundle: Bundle) -> Iterator[Finding]:
    """Files that are fetched later come by https, with a checksum, into the bundle."""
    for name, content in bundle.documents.items():
        if not Path(name).stem.startswith("large_files"):
            continue
        entries = content.get("large_files") if isinstance(content, dict) else None
        for entry in _listed(entries):
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


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def pickle_problem(file: IO[bytes], limit: int) -> str:
    """Why a pickle is more than tensors -> reason, or none. It is read opcode by opcode, and nothing is built."""
    data = file.read(limit + 1)
    if len(data) > limit:
        return f"its pickle has more than {limit} bytes"
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
            elif (
                strange := [p for p in parts if not TORCH_PARTS.fullmatch(p)] or ["data.pkl"][parts.count("data.pkl") :]
            ):
                yield Finding(name, f"is no plain file of torch.save: {strange[0]!r}")
            for part in (part for part in names if part.endswith(".pkl")):
                with archive.open(part) as content:
                    if problem := pickle_problem(content, MAX_PICKLE):
                        yield Finding(name, problem)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError) as error:
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
    except (SyntaxError, ValueError, KeyError, TypeError, MemoryError, RecursionError):
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
        except (zipfile.BadZipFile, struct.error, zlib.error, EOFError, OSError, RuntimeError) as error:
            yield Finding(name, f"is damaged: {error}")


# ---------------------------------------------------------------------------------------------------------------------
# Python


def grant_for(dotted: str, own: Collection[str] = ()) -> str:
    """The grant that naming something in Python code needs -> its name, or none.

    A module reached through another (``torch.serialization.os.system``) counts like itself; the bundle's `own` do not.
    """
    parts = dotted.split(".")
    for start in (start for start, part in enumerate(parts) if start == 0 or part not in own):
        path = ".".join(parts[start:])
        if HARMLESS.match(path):
            return ""
        for grant, pattern in NEEDED_FOR.items():
            if pattern.match(path):
                return grant
    return ""


class Code:
    """Reads one Python file: `needs` tells which grant each line needs, `writes` the lines that change files."""

    def __init__(self, source: bytes, own: Collection[str] = ()):
        self.needs: list[tuple[str, int, str]] = []
        self.writes: set[int] = set()
        self.origins: dict[str, set[str]] = {}
        self.own = own
        tree = ast.parse(source)
        self.parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        nodes = list(ast.walk(tree))
        for node in nodes:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                self.imports(node)
        for node in nodes:
            if isinstance(node, ast.Name):
                self.name(node)
            elif isinstance(node, ast.Attribute):
                self.attribute(node)
            elif isinstance(node, ast.Call):
                self.call(node)

    def need(self, grant: str, node: ast.AST, what: str) -> None:
        """Note that a line needs a grant."""
        self.needs += [(grant, getattr(node, "lineno", 0), what)] if grant else []

    def imports(self, node: ast.Import | ast.ImportFrom) -> None:
        """What is imported, and under which names; a package that is not known needs a grant of its own name."""
        for name, origin in bindings(node):
            if origin.startswith(".") or origin.split(".")[0] == "scripts":
                origin = f"scripts.{origin.lstrip('.')}"
            root = origin.split(".")[0]
            known = root in STDLIB | LIBRARIES | {"scripts"} or any(
                grant_for(part, self.own) for part in (root, origin)
            )
            self.need(grant_for(origin, self.own) if origin not in LOADS else "pickle", node, origin)
            self.need("" if known else root, node, f"{root} is not known here")
            if name == "*" and root != "scripts":
                self.need("dynamic", node, f"everything of {origin.removesuffix('.*')}")
            bound = name if isinstance(node, ast.ImportFrom) or "." not in name else root
            self.origins.setdefault(bound, set()).add(
                root if bound == root and isinstance(node, ast.Import) else origin
            )

    def chains(self, node: ast.AST) -> list[str]:
        """The dotted paths that a name with attributes may stand for."""
        attributes: list[str] = []
        while isinstance(node, ast.Attribute):
            attributes.insert(0, node.attr)
            node = node.value
        name = node.id if isinstance(node, ast.Name) else ""
        origins = sorted(self.origins.get(name, {name} & GUARDED))  # one from elsewhere is what its name says
        return [".".join([origin, *attributes]) for origin in origins]

    def name(self, node: ast.Name) -> None:
        """A builtin that runs text, or a module handed on, of which nobody sees what is used."""
        if node.id in BUILTINS and not self.is_argument(node):
            self.need("dynamic", node, node.id)
        alone = not isinstance(self.parents[node], ast.Attribute) and isinstance(node.ctx, ast.Load)
        call = self.parents[node]
        if alone and node.id in ("getattr", "setattr") and not (isinstance(call, ast.Call) and call.func is node):
            self.need("dynamic", node, f"{node.id} handed on")
        if alone and set(self.chains(node)) & GUARDED and not is_first_of_getattr(call, node):
            self.need("dynamic", node, f"{node.id} handed on")

    def attribute(self, node: ast.Attribute) -> None:
        """Something of a module, or a name that tells what it does whatever it belongs to."""
        chains = self.chains(node)
        for dotted in chains:
            if dotted in WRITERS:
                self.writes.add(node.lineno)
            if dotted not in LOADS or not self.is_called(node):
                self.need(grant_for(dotted, self.own), node, dotted)
        if not chains:
            self.need(grant_for(node.attr) if node.attr in BY_NAME else "", node, f".{node.attr}")
        if leads_anywhere(node.attr) and not ast.unparse(node.value).startswith("super("):
            self.need("dynamic", node, f".{node.attr}")
        if node.attr in WRITING and self.is_called(node) and not chains:
            self.writes.add(node.lineno)

    def is_argument(self, node: ast.Name) -> bool:
        """Whether a name is an argument of a function around it."""
        above: ast.AST | None = node
        while above := self.parents.get(above):  # type: ignore[arg-type]
            if isinstance(above, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                inside = {argument.arg for argument in ast.walk(above.args) if isinstance(argument, ast.arg)}
                if node.id in inside:
                    return True
        return False

    def is_called(self, node: ast.AST) -> bool:
        """Whether a node is the function of a call."""
        call = self.parents.get(node)
        return isinstance(call, ast.Call) and call.func is node

    def call(self, node: ast.Call) -> None:
        """Calls whose arguments decide."""
        for dotted in self.chains(node.func):
            if dotted in LOADS and unsafe_load(dotted, node):
                self.need("pickle", node, f"{dotted} that may unpickle")
        for keyword in node.keywords:
            value = getattr(keyword.value, "value", ...)
            if keyword.arg in SETTINGS and isinstance(value, bool) and value is not SETTINGS[keyword.arg]:
                self.need("pickle", node, f"{keyword.arg}={value}")
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name in ("getattr", "setattr") and len(node.args) > 1:
            second = getattr(node.args[1], "value", None)
            self.need("dynamic" if leads_anywhere(str(second)) else "", node, f".{second}")
            for dotted in self.chains(node.args[0]):
                if isinstance(second, str):
                    self.need(grant_for(f"{dotted}.{second}"), node, f"{dotted}.{second}")
                elif dotted.split(".")[0] != "scripts" and (dotted.split(".")[0] == dotted or dotted.islower()):
                    self.need("dynamic", node, f"{name} of {dotted} by a computed name")
        opens = 1 if name == "open" else 0 if getattr(node.func, "attr", "") == "open" else None
        if opens is not None:
            modes = [*node.args[opens : opens + 1], *(k.value for k in node.keywords if k.arg == "mode")]
            if modes and not re.fullmatch(r"r[bt]?", str(getattr(modes[0], "value", "?"))):
                self.writes.add(node.lineno)


def leads_anywhere(attribute: str) -> bool:
    """Whether an attribute leads from any object to all others."""
    return attribute.startswith("__") and attribute.strip("_") in DUNDERS


def is_first_of_getattr(call: ast.AST, node: ast.AST) -> bool:
    """Whether a module is what getattr or setattr is asked of: `Code.call` judges that."""
    return (
        isinstance(call, ast.Call)
        and getattr(call.func, "id", "") in ("getattr", "setattr", "hasattr")
        and (call.args[:1] == [node])
    )


def check_python(bundle: Bundle) -> Iterator[Finding]:
    """Python code keeps to arithmetic and files; what reaches further is refused until granted."""
    files = dict(bundle.named(".py"))
    if files:
        lines = sum(member.read().count(b"\n") for member in files.values())
        yield Finding("scripts", f"{len(files)} Python files, {lines} lines, run with your rights: read them", NOTE)
    own = {Path(name).stem for name in files} - sys.stdlib_module_names - GUARDED
    for name, member in files.items():
        try:
            code = Code(member.read(), own)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            yield Finding(name, f"cannot be parsed, so it cannot be judged: {error}")
            continue
        for grant in dict.fromkeys(grant for grant, _, _ in code.needs):
            spots = sorted({(line, what) for needed, line, what in code.needs if needed == grant})
            places = ", ".join(f"{what} (line {line})" for line, what in spots[:4])
            more = f" and {len(spots) - 4} more" if len(spots) > 4 else ""
            does = GRANTS.get(grant, "uses a package unknown here")
            yield Finding(name, f"{does}: {places}{more}", grant)
        if code.writes:
            yield Finding(
                name, f"writes, moves or deletes files: line {', '.join(map(str, sorted(code.writes)))}", NOTE
            )


# ---------------------------------------------------------------------------------------------------------------------
# All together

CHECKS: list[Check] = [check_files, check_expressions, check_components, check_strings, check_logging]
CHECKS += [check_metadata, check_large_files, check_weights, check_python]


def attempt(check: Check, bundle: Bundle) -> list[Finding]:
    """Run a check; one that cannot even run has found something that it was not made for."""
    try:
        return list(check(bundle))
    except Exception as error:
        return [Finding("", f"{check.__name__} cannot judge this bundle ({type(error).__name__}: {str(error)[:200]})")]


def examine(path: Path) -> list[Finding]:
    """All that is to be told of a bundle, in a zip or a folder."""
    with contextlib.ExitStack() as stack:
        if path.is_dir():
            members, found = read_folder(path)
        else:
            try:
                archive = stack.enter_context(zipfile.ZipFile(path))
                members, found = read_zip(archive)
            except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
                return [Finding("", f"is no zip, or a damaged one: {error}")]
        if found:  # a container that lies is not read further
            return found
        documents, found = read_documents(members)
        bundle = Bundle(members, documents, {})
        bundle = bundle._replace(imported=imports(bundle))
        return found + [finding for check in CHECKS for finding in attempt(check, bundle)]


def inspect(path: Path, allowed: Collection[str] = ()) -> list[str]:
    """Judge a bundle -> reasons to refuse it, one a line; none if there is none.

    Args:
        path: a zip or a folder.
        allowed: grants, see `GRANTS`; also ``torchscript``, and packages that are not known here.
    """
    return [sentence(f) for f in dict.fromkeys(examine(path)) if f.needs != NOTE and f.needs not in allowed]


def sentence(finding: Finding) -> str:
    """One finding in one line, without what a terminal would obey."""
    text = f"{finding.member}: {finding.text}" if finding.member else finding.text
    how = f"; read it, then grant it: --allow {finding.needs}" if finding.needs not in ("", NOTE) else ""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join((text + how).split()))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line -> exit code."""
    grants = ", ".join([*GRANTS, "torchscript", "or the name of a package"])
    cli = argparse.ArgumentParser(
        description="Inspect foreign bundles.", epilog="Exit codes: 0 ok, 1 refused, 2 usage."
    )
    cli.add_argument("paths", nargs="+", type=Path, metavar="ZIP_OR_FOLDER")
    cli.add_argument("--allow", default="", metavar="GRANT[,GRANT]", help=f"what its Python code may do: {grants}")
    args = cli.parse_args(argv)
    allowed = set(filter(None, re.split(r"[\s,]+", args.allow)))
    for path in args.paths:
        if not path.exists():
            cli.error(f"no file or folder {path}")
    refused = False
    for path in args.paths:
        found = list(dict.fromkeys(examine(path)))
        problems = [finding for finding in found if finding.needs != NOTE and finding.needs not in allowed]
        for finding in found:
            mark = "REFUSED" if finding in problems else "note   " if finding.needs == NOTE else "allowed"
            print(f"{mark} {sentence(finding if finding in problems else finding._replace(needs=NOTE))}")
        verdict = (
            f"refused, {len(problems)} reasons" if problems else "nothing to refuse; that is no proof of good will"
        )
        print(f"{path}: {verdict}", flush=True)
        refused |= bool(problems)
    return int(refused)


if __name__ == "__main__":
    sys.exit(main())
