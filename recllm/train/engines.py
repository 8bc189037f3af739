"""Engines that spread a training over processes: DDP, DeepSpeed ZeRO-1 to 3 and FSDP2.

What the launch asked for and what really wrapped the model are compared: where accelerate finds no accelerator it
trains as DDP, or as so many single processes, and says nothing. Out of a model whose weights are split over the
processes, whole adapter weights leave.
"""

import datetime
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from torch.distributed import distributed_c10d
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments

from recllm.errors import UserError

ALONE, DDP, FSDP2 = "one process", "DDP", "FSDP2"
ZERO = "ZeRO-{}"  # of DeepSpeed; also with a single process
# What gloo and NCCL say when a process that they talk to is gone, or says nothing
_LOST = re.compile(
    r"gloo/|Connection (closed|reset) by peer|Broken pipe|Timed out (waiting|after) .*ms|NCCL|Socket Timeout"
)
# What they say when nobody is gone: a port to meet at, a GPU for two ranks, memory, tensors of unequal sizes
_OURS = re.compile(r"already in use|ncclInvalid(Usage|Argument)|out of memory|enforce fail.*nbytes")


def check_launch() -> None:
    """Refuse a launch of several processes that accelerate did not join; ask after making TrainingArguments.

    Raises:
        UserError: each of them would train alone and write over the others' files.
    """
    launched, joined = int(os.environ.get("WORLD_SIZE", 1)), PartialState().num_processes
    if launched != joined:
        raise UserError(
            f"{launched} processes were launched, but accelerate joined {joined}: it finds no GPU here, and each would "
            "train alone. Launch with --num_processes 1, or for DDP over CPU processes set train.use_cpu=true"
        )


@contextmanager
def telling_of_lost_processes() -> Iterator[None]:
    """Turn the engines' errors about a process that has died, or no longer answers, into one that says what to do.

    With NCCL it is often torch's watchdog that ends the process, with its own message: that cannot be caught.

    Raises:
        UserError: in place of such an error; others pass.
    """
    try:
        yield
    except RuntimeError as error:  # torch.distributed.DistError is one
        rank, processes = os.environ.get("RANK", "0"), int(os.environ.get("WORLD_SIZE", 1))
        if processes < 2 or not _is_of_a_lost_process(error):
            raise
        said = _said(error)
        raise UserError(
            f"process {rank} of {processes} lost another one, and stops: that process or its machine died, or the "
            f"network failed or was silent for train.ddp_timeout seconds ({said}). Look for the first error in the "
            "logs of the other machines, mend what it and this one name, then give the same commands again on all of "
            "them: the run goes on from its last checkpoint"
        ) from error


def _is_of_a_lost_process(error: RuntimeError) -> bool:
    if _OURS.search(str(error)):
        return False
    return isinstance(error, torch.distributed.DistError) or _LOST.search(str(error)) is not None


def _said(error: RuntimeError) -> str:
    """An error's text in a line, NCCL's "Last error:" with it; without the frames of C++ that may follow."""
    text = re.split(r"\n(?:Exception raised from|frame #0)", str(error).strip())[0]
    return " ".join(text.split()) or type(error).__name__


def limit_waiting(limit: datetime.timedelta) -> None:
    """Have no process wait longer than `limit` for what another one is to send, whatever a launch began with.

    recllm train lets the others wait for days until the first one has fitted the encoder; DeepSpeed's groups begin with
    limits of their own. In training a machine that fell silent would be waited for as long.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for group in list(distributed_c10d._world.pg_map):
            distributed_c10d._set_pg_timeout(limit, group)


def asked_engine(arguments: TrainingArguments) -> str:
    """The engine that the launch and the recipe ask for.

    Raises:
        UserError: FSDP1; fp16 with DeepSpeed.
    """
    if arguments.deepspeed_plugin is not None:
        if _enabled(arguments.deepspeed_plugin.deepspeed_config, "fp16"):
            raise UserError("fp16 is not supported with DeepSpeed, which would cast the adapter: set train.bf16=true")
        return ZERO.format(arguments.deepspeed_plugin.zero_stage)
    from_launch = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if from_launch or arguments.fsdp_plugin_args:
        version = os.environ.get("FSDP_VERSION", "1") if from_launch else arguments.fsdp_plugin_args["fsdp_version"]
        if int(version) != 2:
            raise UserError(f"FSDP version {version} is not supported: take fsdp2.yaml, or set fsdp_version: 2")
        return FSDP2
    return DDP if PartialState().num_processes > 1 else ALONE


def found_engine(wrapped: Any) -> str:
    """The engine that wrapped a model, by its class."""
    model = getattr(wrapped, "_orig_mod", wrapped)  # torch.compile around the engine
    if type(model).__name__ == "DeepSpeedEngine":  # without importing deepspeed
        return ZERO.format(model.zero_optimization_stage())
    if isinstance(model, FSDPModule):
        return FSDP2
    if isinstance(model, FullyShardedDataParallel):
        return "FSDP1"
    return DDP if isinstance(model, DistributedDataParallel) else ALONE


def check_engine(asked: str, wrapped: Any) -> None:
    """Refuse to train with another engine than the one that was asked for.

    Raises:
        UserError: accelerate has fallen back to another one.
    """
    found = found_engine(wrapped)
    if found != asked:
        raise UserError(
            f"the launch asks for {asked}, but accelerate has wrapped the model with {found}: on a machine without "
            "GPUs it falls back without a word. Launch there with accelerate_configs/single.yaml"
        )


def keep_adapter_fp32(config: dict[str, Any], compute_dtype: torch.dtype | None = None) -> None:
    """Have DeepSpeed compute in bf16 by torch.autocast; alters its config, after transformers has filled it in.

    Where its bf16 mode is on, or `compute_dtype` asks for it: autocast around its engine would be switched off by it.

    Its own bf16 mode casts every parameter, the adapter's too (keep_in_fp32_modules exempts buffers only), and what is
    saved from fp32 masters or reloaded as fp32 is then another adapter. Under autocast the adapter stays fp32 and the
    base model as it was loaded, as with the other engines; gradients are reduced in fp32.
    """
    if compute_dtype is torch.bfloat16 or _enabled(config, "bf16"):
        config.setdefault("bf16", {})["enabled"] = False
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}


def _enabled(config: dict[str, Any], mode: str) -> bool:
    return str(config.get(mode, {}).get("enabled", False)).lower() == "true"


def whole_weights(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """The adapter's tensors, each whole and on the CPU, of a model that is split over the processes; else None.

    All processes must call it. The base model's weights are left where they are.
    """
    tensors = {name: value for name, value in model.state_dict(keep_vars=True).items() if _is_adapter(name)}
    if any(hasattr(value, "ds_id") for value in tensors.values()):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([value for value in tensors.values() if hasattr(value, "ds_id")]):
            return {name: value.detach().cpu().clone() for name, value in tensors.items()}
    if any(hasattr(value, "full_tensor") for value in tensors.values()):
        return {name: _whole(value.detach()).cpu() for name, value in tensors.items()}
    return None


def split_again(model: nn.Module) -> None:
    """Have FSDP2 give back what it keeps whole after a forward, so that all processes gather it in the next one."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _whole(value: Any) -> torch.Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _is_adapter(name: str) -> bool:
    """LoRA layers lie inside the base model, gate, soft token and encoder beside it."""
    return "lora_" in name or not name.startswith("base_model.model.")
