"""The policy, as data: what configs may name, and what Python code may do only by grant.

Configs keep to an allow-list: a dotted path must be among `ONLY`, not among `NEVER`, and pass no word of `ESCAPES`; an
expression knows the builtins `NAMES` and is made of `NODES`. Python code may do anything but what `NEEDS` a grant, and
names `BUILTINS`, `DUNDERS` and modules in the open. Kinds of files stand in `files`, those of tensors in `weights`.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Collection


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


def below(names: Collection[str]) -> re.Pattern[str]:
    """Make a pattern of dotted paths, and of all that lies below them; ``*`` stands for the rest of a word."""
    choices = "|".join(re.escape(name).replace(r"\*", r"\w*") for name in sorted(names))
    return re.compile(rf"({choices})(\.|$)")


# ---------------------------------------------------------------------------------------------------------------------
# Configs

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

# ---------------------------------------------------------------------------------------------------------------------
# Python

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
NEEDED_FOR = {grant: below(names) for grant, names in NEEDS.items()}
HARMLESS = below(
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
