"""Transformer Engine on the CPU: its own Python files, over a stand-in for its compiled module.

Modules, recipes, quantizers, weight caches, queues of weight gradients and FP8 state are Transformer Engine's. Only what is
compiled, ``transformer_engine_torch``, is stood in for: casts, products, norms, activations, the update of delayed scales,
Adam. So a run shows which module does what in which order with which tensors. It does not show a kernel's speed, memory or last
bits, nor what a kernel refuses.

The files come from the wheel ``transformer-engine``, which holds no compiled code. They lie in a folder of their own (`FOLDER`),
off the path: Megatron, which asks whether Transformer Engine can be imported, finds it only where the stand-in is in force. A
Transformer Engine that is compiled for a GPU is never touched.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from counterflow.errors import OptionError
from counterflow.patching import Patches

PACKAGE = "transformer-engine"
# The private interface of the compiled module changes from version to version.
VERSIONS = ("2.20.2",)
# The wheel, and what its files import; none of them compiles anything.
REQUIREMENTS = (f"{PACKAGE}=={VERSIONS[-1]}", "onnxscript", "onnx", "onnx-ir", "ml_dtypes", "einops")
FOLDER = Path(sys.prefix, "share", "counterflow", "transformer_engine")
INSTALL = f"{sys.executable} -m counterflow.platform.engine"

VARIABLE = "COUNTERFLOW_CPU_CAPABILITY"
# Hopper keeps transposes of FP8 tensors and has no MXFP8, Blackwell the other way round.
CAPABILITIES = {"9.0": (9, 0), "10.0": (10, 0)}
FLAG, YAML_FLAG, KEY = "--transformer-impl", "--yaml-cfg", "transformer_impl"


def asks_for_engine(arguments: Sequence[str]) -> bool:
    """Tell whether a command line, or its ``--yaml-cfg`` file, names Transformer Engine by ``--transformer-impl``."""
    # Megatron reads the file alone where one is given.
    path = _find_value(arguments, YAML_FLAG)
    return (_read_key(Path(path)) if path else _find_value(arguments, FLAG)) == "transformer_engine"


def _find_value(arguments: Sequence[str], flag: str) -> str:
    """Return the value of a flag; the last mention counts."""
    chosen = ""
    for place, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        if name == flag:
            chosen = value if equals else "".join(arguments[place + 1 : place + 2])
    return chosen


def _read_key(path: Path) -> Any:
    """Return ``transformer_impl`` of a YAML file, from its top or from a section; what is no such file, Megatron will refuse."""
    if importlib.util.find_spec("yaml") is None:
        return None
    yaml: Any = importlib.import_module("yaml")
    try:
        read = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return None
    parts = [read, *(read.values() if isinstance(read, dict) else ())]
    return next((part[KEY] for part in parts if isinstance(part, dict) and KEY in part), None)


def read_capability() -> tuple[int, int]:
    """Return the compute capability of the GPU that is stood for: 9.0 unless the environment names another."""
    given = os.environ.get(VARIABLE, "9.0")
    if given not in CAPABILITIES:
        raise OptionError(f"{VARIABLE}={given} given, {' (Hopper) or '.join(CAPABILITIES)} (Blackwell) are allowed")
    return CAPABILITIES[given]


def install(patches: Patches) -> None:
    """Let Transformer Engine be imported over the stand-in, and let torch answer as a GPU of the wanted capability.

    ``patches`` is the undo log; what was imported stays imported. Raises `OptionError` where the files are missing, of another
    version or compiled, and where Megatron was imported without them.
    """
    capability = read_capability()
    if not is_in_force():
        _find_files()
        _require_first()
    _answer_as_gpu(patches, capability)
    if not is_in_force():
        _import_over_stand_in()
    elif _read_believed() != capability:
        raise OptionError(f"{VARIABLE} changed in this process, in which Transformer Engine has read it: start another")
    if os.environ.get("RANK", "0") == "0":
        print(f"counterflow: {describe()}", flush=True)


def is_in_force() -> bool:
    """Tell whether Transformer Engine has been imported over the stand-in in this process."""
    from counterflow.platform.engine.module import NAME

    return getattr(sys.modules.get(NAME), "is_stand_in", False)


def describe() -> str:
    """Return what is installed of Transformer Engine, and whether it is stood in for, in one line."""
    version = find_version()
    if version is None:
        return f"Transformer Engine is not installed; for the CPU: {INSTALL}"
    if _is_compiled():
        return f"Transformer Engine {version} is real, compiled for a GPU: the CPU platform does not touch it"
    gpu = "Blackwell" if read_capability()[0] > 9 else "Hopper"
    return (
        f"Transformer Engine {version} runs on the CPU as on a GPU of {gpu}, over a stand-in for its kernels: it shows what runs "
        "in which order, not speed, memory or a kernel's last bits"
    )


def find_version() -> str | None:
    """Return the version of Transformer Engine's files that are installed, beside torch or in `FOLDER`."""
    found = list(metadata.distributions(name=PACKAGE)) or list(metadata.distributions(name=PACKAGE, path=[str(FOLDER)]))
    return found[0].version if found else None


def _is_compiled() -> bool:
    """Tell whether a core library is installed, or a build lies beside the package."""
    if any(list(metadata.distributions(name=f"{PACKAGE}-{cuda}")) for cuda in ("cu12", "cu13")):
        return True
    spec = importlib.util.find_spec("transformer_engine")
    if spec is None or spec.origin is None:
        return False
    home = Path(spec.origin).parent
    return any(next(folder.glob("*transformer_engine*.so"), None) for folder in (home, home.parent, home / "wheel_lib"))


def _find_files() -> None:
    """Let imports of this process find the folder of the files, behind all others."""
    version = find_version()
    if version is None:
        raise OptionError(
            f"{FLAG} transformer_engine on the CPU needs Transformer Engine's Python files, which are not installed: run "
            f"'{INSTALL}' (55 MB), or give {FLAG} local"
        )
    if _is_compiled():
        raise OptionError(
            f"Transformer Engine {version} is compiled for a GPU here and the CPU platform does not stand in for it: give "
            f"--cf-platform cuda, or {FLAG} local"
        )
    if any(Path(str(one.locate_file(""))) != FOLDER for one in metadata.distributions(name=PACKAGE)):
        # The processes that Megatron starts to save would import them without the stand-in.
        raise OptionError(
            f"Transformer Engine {version} is installed beside torch without its compiled part, so nothing can import it: run "
            f"'{sys.executable} -m pip uninstall {PACKAGE}' and then '{INSTALL}', which puts its files elsewhere"
        )
    if version not in VERSIONS:
        raise OptionError(
            f"{FLAG} transformer_engine on the CPU knows Transformer Engine {', '.join(VERSIONS)}, {version} is installed: run "
            f"'{INSTALL}', or give {FLAG} local"
        )
    if importlib.util.find_spec("transformer_engine") is None:
        sys.meta_path.append(_Files())


class _Files(metadata.DistributionFinder):
    """Finds what lies in `FOLDER`, in this process alone.

    A process that `multiprocessing` starts, as Megatron does to save a checkpoint, has this one's ``sys.path`` and no stand-in.
    Were the folder on that path, the files would be imported there and look for their compiled module.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Find a package in the folder."""
        return PathFinder.find_spec(name, [str(FOLDER)], target) if path is None else None

    def find_distributions(self, context: Any = None) -> Any:
        """Find versions of what lies in the folder, unless another one is named."""
        if context is None or "path" in vars(context):
            return iter(())
        return metadata.MetadataPathFinder.find_distributions(
            metadata.DistributionFinder.Context(name=context.name, path=[str(FOLDER)])
        )


def _require_first() -> None:
    early = sys.modules.get("megatron.core.extensions.transformer_engine")
    if early is not None and not early.HAVE_TE:
        raise OptionError(
            f"{FLAG} transformer_engine on the CPU has to be set up before Megatron is imported: start the script by "
            "python -m counterflow.launch, or call counterflow.enable() above the imports of megatron"
        )


def _answer_as_gpu(patches: Patches, capability: tuple[int, int]) -> None:
    import torch

    describe_device: Any = torch.cuda.get_device_properties

    def get_device_properties(device: Any = None) -> Any:
        found = describe_device(device)
        found.major, found.minor = capability
        return found

    patches.set(torch.cuda, "get_device_properties", get_device_properties)
    patches.set(torch.cuda, "get_device_capability", lambda device=None: capability)
    if torch.version.cuda is None:
        patches.set(torch.version, "cuda", "12.9")
    is_cuda: Any = torch._C.TensorBase.is_cuda

    def tell_engine(tensor: Any) -> bool:
        # Transformer Engine refuses inputs that are not on a GPU; nobody else is told so.
        asking = sys._getframe(1).f_globals.get("__name__", "")
        return asking.startswith("transformer_engine") or bool(is_cuda.__get__(tensor))

    patches.set(torch.Tensor, "is_cuda", property(tell_engine))


def _read_believed() -> Any:
    from transformer_engine.pytorch.utils import get_device_compute_capability

    return get_device_compute_capability()


def _import_over_stand_in() -> None:
    from counterflow.platform.engine.module import NAME, make_module, make_wgrad_module

    module = make_module()
    module.is_stand_in = True  # type: ignore[attr-defined]
    sys.modules[NAME] = module
    sys.modules.setdefault("fused_weight_gradient_mlp_cuda", make_wgrad_module())
    # The first is Transformer Engine's own switch: no look for compiled libraries. The second keeps it from compiling functions.
    switches = {"NVTE_PROJECT_BUILDING": "1", "NVTE_TORCH_COMPILE": "0"}
    before = {name: os.environ.get(name) for name in switches}
    os.environ.update(switches)
    try:
        _import_package()
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            os.environ.update({name: value} if value is not None else {})


def _import_package() -> ModuleType:
    """Import ``transformer_engine`` without its loader of the compiled module."""
    spec = importlib.util.find_spec("transformer_engine")
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["transformer_engine"] = package
    common = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda framework: None  # type: ignore[attr-defined]
    spec.loader.exec_module(package)
    # The package swallows what goes wrong in it.
    importlib.import_module("transformer_engine.pytorch")
    _mend_package()
    return package


def _mend_package() -> None:
    """Replace the three functions of Transformer Engine's Python that reach for a GPU by themselves."""
    import torch
    from transformer_engine.pytorch import distributed
    from transformer_engine.pytorch.tensor.storage import mxfp8_tensor_storage

    from counterflow.platform.engine.casts import dequantize

    mxfp8_tensor_storage._FromMXFP8Func.forward = staticmethod(lambda ctx, tensor, dtype: dequantize(tensor, dtype))
    distributed._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    distributed._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


def fetch() -> int:
    """Install the files into `FOLDER` by pip, unless they are there; return pip's exit status."""
    if find_version() in VERSIONS:
        print(f"Transformer Engine {find_version()} is there")
        return 0
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-deps", "--upgrade", "--target"]
    return subprocess.run([*command, str(FOLDER), *REQUIREMENTS], check=False).returncode
