"""What a run prints when it begins, from the trainer as it is by then."""

from collections.abc import Iterator, Mapping, Sized
from typing import Any

import torch
from accelerate.utils import DistributedType, is_peft_model
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import nn
from transformers.trainer_pt_utils import get_model_param_count
from trl.trainer.utils import get_config_model_id

from ...hub.versions import version_of

_PACKED = {"Params4bit": "4 bits", "Int8Params": "8 bits"}  # classes of bitsandbytes


def banner(trainer: Any) -> Group:
    """Model, data, machine, precision, KL and output of a run, for a console."""
    args = trainer.args
    length = _count(args.max_steps, "step") if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    title = f"{trainer._name}, {length} (trl_klx {version_of('trl_klx')}, trl {version_of('trl')})"
    table = Table.grid(padding=(0, 2))
    for label, text in _rows(trainer):
        table.add_row(Text(f"  {label}"), Text(text))
    return Group(Text(title), table)


def _rows(trainer: Any) -> Iterator[tuple[str, str]]:
    args, policy = trainer.args, trainer._saved_model
    yield "model", _model(trainer, policy)
    yield "data", _data(trainer)
    yield "machine", _machine(trainer.accelerator)
    yield "precision", _precision(policy, trainer.accelerator.mixed_precision)
    yield "KL", _kl(args)
    if args.kl_sampler_limit:
        yield "updates", args.kl_sampler_limit
    trackers = [name for name in args.report_to if name != "none"]
    reported = f"; {', '.join(trackers)}" if trackers else ""
    yield "output", f"{args.output_dir}{reported}"


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(trained, all) parameters, also of weights that are sharded or packed to 4 bits."""
    if is_peft_model(model):
        return model.get_nb_trainable_parameters()  # type: ignore[operator]
    return get_model_param_count(model, trainable_only=True), get_model_param_count(model)


def _model(trainer: Any, policy: Any) -> str:
    (trained, total), everything = parameter_counts(policy), parameter_counts(trainer.model)[1]
    share = "all trained" if trained == total else f"{trained:,} trained ({100 * trained / total:.2g} %)"
    value = f"; value model {everything - total:,}" if everything > total else ""  # PPO's
    name = get_config_model_id(policy.config) or "given in memory"
    return f"{name}: {total:,} parameters, {share}{value}"


def _data(trainer: Any) -> str:
    held_out = trainer.eval_dataset
    text = _size(trainer.train_dataset)
    if held_out is None:
        return text
    sets = held_out if isinstance(held_out, Mapping) else {"": held_out}
    return f"{text}; held out: " + ", ".join(f"{_size(rows)} {name}".strip() for name, rows in sets.items())


def _size(dataset: Any) -> str:
    return _count(len(dataset), "row") if isinstance(dataset, Sized) else "a stream of rows"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _machine(accelerator: Any) -> str:
    processes, device = accelerator.num_processes, accelerator.device
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    if device.type == "cpu":
        on += f" ({_count(torch.get_num_threads(), 'thread')})"
    kind = {
        DistributedType.DEEPSPEED: lambda: f" (DeepSpeed ZeRO-{accelerator.state.deepspeed_plugin.zero_stage})",
        DistributedType.FSDP: lambda: f" (FSDP{accelerator.state.fsdp_plugin.fsdp_version})",
    }.get(accelerator.distributed_type, lambda: " (DDP)" if processes > 1 else "")()
    return f"{processes} processes{kind}, each on {on}" if processes > 1 else f"1 process{kind} on {on}"


def _precision(policy: nn.Module, mixed: str) -> str:
    dtypes: dict[bool, set[str]] = {True: set(), False: set()}
    for parameter in policy.parameters():
        name = _PACKED.get(type(parameter).__name__, str(parameter.dtype).removeprefix("torch."))
        dtypes[parameter.requires_grad].add(name)
    trained, frozen = (", ".join(sorted(names)) for names in (dtypes[True], dtypes[False] - dtypes[True]))
    rest = f", frozen ones in {frozen}" if frozen else ""
    return f"weights in {trained}{rest}" + (f"; computed in {mixed}" if mixed != "no" else "")


def _kl(args: Any) -> str:
    if not args.kl_is_penalised:
        return args.kl_gradient
    return f"{args.kl_estimator} in {args.kl_placement}; {args.kl_control}. {args.kl_gradient}"
