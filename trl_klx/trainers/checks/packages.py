"""Packages that a config asks for and that are not installed: found before anything is loaded."""

import re
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any, NamedTuple


class Package(NamedTuple):
    """What to install, and the modules of which one must be there."""

    pip: str
    modules: tuple[str, ...]
    name: str = ""  # for people, where it is not that of the first module

    @property
    def is_there(self) -> bool:
        return any(map(_is_there, self.modules))

    @property
    def is_missing(self) -> str:
        return f"and {self.name or self.modules[0]} is not installed: pip install {self.pip}"


def _is_there(module: str) -> bool:
    try:
        spec = find_spec(module)
        return spec is not None and spec.origin is not None  # a folder of that name, such as wandb's own, is no package
    except (ImportError, ValueError):  # its parent is missing, or it was put there without a spec
        return module in sys.modules


BITSANDBYTES = Package("bitsandbytes", ("bitsandbytes",))
_QLORA = BITSANDBYTES._replace(pip="'trl_klx[qlora]'")
DEEPSPEED = Package("'trl_klx[deepspeed]'", ("deepspeed",))
MATH_VERIFY = Package("math-verify", ("math_verify",))
_KERNELS = Package("kernels", ("kernels",))
_FLASH = Package("flash-attn --no-build-isolation", ("flash_attn", "kernels"))  # kernels fetches it from the Hub
_LIGER = Package("liger-kernel", ("liger_kernel",))
_VLLM = Package("'trl_klx[vllm]'", ("vllm",), "vLLM")
_TRACKERS = {
    "azure_ml": Package("azureml-sdk", ("azureml",)),
    "comet_ml": Package("comet-ml", ("comet_ml",)),
    "flyte": Package("flytekit", ("flytekit",)),
    "tensorboard": Package("tensorboard", ("tensorboard", "tensorboardX")),
    "trackio": Package("'trl_klx[trackio]'", ("trackio",)),
    **{
        name: Package(name, (name,))
        for name in ("clearml", "codecarbon", "dagshub", "dvclive", "mlflow", "neptune", "swanlab", "wandb")
    },
}
# By what the name of the optimizer matches; the first that does.
_OPTIMIZERS = {
    r"adamw_torch_[48]bit": Package("torchao", ("torchao",)),
    r"adamw_torch_xla": Package("torch_xla", ("torch_xla",)),
    r"adamw_torch_npu_fused": Package("torch_npu", ("torch_npu",)),
    r"galore_.*": Package("galore-torch", ("galore_torch",)),
    r"apollo_.*": Package("apollo-torch", ("apollo_torch",)),
    r"adamw_anyprecision": Package("torchdistX", ("torchdistx",)),
    r"(ada)?lomo": Package("lomo-optim", ("lomo_optim",)),
    r"grokadamw": Package("grokadamw", ("grokadamw",)),
    r"schedule_free_.*": Package("schedulefree", ("schedulefree",)),
    r"stable_adamw": Package("torch-optimi", ("optimi",)),
    r".*_8bit|.*_32bit|.*_bnb.*|ademamix": BITSANDBYTES,
}
# By the quant_method of a model's own config.
_QUANTISED = {
    "bitsandbytes": BITSANDBYTES,
    "gptq": Package("gptqmodel", ("gptqmodel", "auto_gptq")),
    "awq": Package("gptqmodel", ("gptqmodel", "awq")),
    "compressed-tensors": Package("compressed-tensors", ("compressed_tensors",)),
    "hqq": Package("hqq", ("hqq",)),
    "torchao": Package("torchao", ("torchao",)),
    "aqlm": Package("aqlm", ("aqlm",)),
}


def missing_packages(args: Any, loading: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each package that is asked for and not installed.

    Args:
        args: a trainer's config.
        loading: the keyword arguments with which its models are loaded.
    """
    for request, package in _wanted(args, loading):
        if not package.is_there:
            yield f"{request} {package.is_missing}, or change it."


def _wanted(args: Any, loading: Mapping[str, Any]) -> Iterator[tuple[str, Package]]:
    for name in [args.report_to] if isinstance(args.report_to, str) else args.report_to or []:
        if name in _TRACKERS:
            yield f"report_to names {name}", _TRACKERS[name]
    optimizer = str(getattr(args.optim, "value", args.optim))
    for pattern, package in _OPTIMIZERS.items():
        if re.fullmatch(pattern, optimizer):
            yield f"optim={optimizer!r}", package
            break
    for flag, package in (("use_vllm", _VLLM), ("use_liger_kernel", _LIGER), ("deepspeed", DEEPSPEED)):
        if getattr(args, flag, None):
            yield f"{flag}={getattr(args, flag)!r}", package
    for flag, package in (("load_in_4bit", _QLORA), ("load_in_8bit", _QLORA), ("use_kernels", _KERNELS)):
        if loading.get(flag):
            yield f"{flag}={loading[flag]!r}", package
    attention = str(loading.get("attn_implementation"))
    if "/" in attention:
        yield f"attn_implementation={attention!r}", _KERNELS
    elif "flash_attention" in attention:
        yield f"attn_implementation={attention!r}", _FLASH
    yield from _for_quantised(loading.get("quantization_config"), "quantization_config with")


def _for_quantised(config: Any, name: str) -> Iterator[tuple[str, Package]]:
    given = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    method = str(getattr(given, "value", given))
    if method in _QUANTISED:
        yield f"{name} quant_method={method!r}", _QUANTISED[method]


def missing_for_model(config: Any, option: str) -> Iterator[str]:
    """The same for a model that is stored quantised; `config` is its own, `option` what named it."""
    stored = getattr(config, "quantization_config", None)
    for request, package in _for_quantised(stored, f"{option} is quantised,"):
        if not package.is_there:
            yield f"{request} {package.is_missing}."
