"""Several processes, one run: each works on its share of a step's sequences, and all take the same step.

A launcher starts them and says so in the environment, which `accelerate.PartialState` reads:

    accelerate launch --num-processes 2 -m ease_train.cli fit small --out runs/small
    torchrun --nproc-per-node 2 -m ease_train.cli fit small --out runs/small --sharded

Without one there is a single process and nothing here does anything. A step reads batch_size sequences a
process, so two processes follow the curve of one with twice the batch. Weights and optimizer are whole in
every process (DDP), or in shards over them (FSDP2's `fully_shard`; asked for by `--sharded` or by `accelerate
launch --use-fsdp`). FSDP is torch's own here, since accelerate leaves it out on CPUs, where it is tested over
gloo. A checkpoint is whole whichever it was.
"""

import atexit
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from ease_common.errors import ConfigError, SettingWarning
from ease_train.model.decoder import Decoder

CPU = torch.device("cpu")


class TrainingModule(nn.Module):
    """The model behind one `forward`, which DDP and FSDP watch: all that training asks of the weights is
    asked in there.

    loss = training_module(lambda model: exit_loss(model, input_ids, targets, objective))
    """

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[Decoder], Any]) -> Any:
        return work(self.model)


@dataclass(frozen=True)
class Workers:
    """This process (`rank`, from 0) among `count`, the device it works on, and whether the weights are in
    shards.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = CPU
    sharded: bool = False

    @classmethod
    def join(cls, device: str, sharded: bool = False) -> Self:
        """Join the processes that the environment names, if any.

        `device`: cpu, cuda, or auto. Raises ConfigError.
        """
        sharded = sharded or _flag("ACCELERATE_USE_FSDP")
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            if sharded:
                raise ConfigError(
                    "one process has nothing to shard the weights over; start more: torchrun "
                    "--nproc-per-node N -m ease_train.cli …"
                )
            return cls(device=usable_device(device))
        _check_launch()
        from accelerate import PartialState

        chosen = usable_device(device)
        state = PartialState(cpu=chosen.type == "cpu")
        atexit.register(state.destroy_process_group)
        return cls(state.process_index, state.num_processes, chosen, sharded)

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    def distribute(self, model: Decoder, may_rest: bool) -> nn.Module:
        """The training_module whose gradients are means over the processes; `may_rest`: a step may leave
        weights out.
        """
        training_module = TrainingModule(model)
        if self.sharded:
            mesh = init_device_mesh(self.device.type, (self.count,))
            for layer in model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(training_module, mesh=mesh)  # in place
            return training_module
        if self.count > 1:
            return DistributedDataParallel(
                training_module, broadcast_buffers=False, find_unused_parameters=may_rest
            )
        return training_module

    @staticmethod
    def hold_gradients(training_module: nn.Module, hold: bool) -> AbstractContextManager[None]:
        """Inside, DDP adds gradients up and leaves their mean over the processes to a later pass, when `hold`
        is set.
        """
        return (
            training_module.no_sync()
            if hold and isinstance(training_module, DistributedDataParallel)
            else nullcontext()
        )

    def mean(self, values: list[float]) -> list[float]:
        """Each number's mean over the processes."""
        if self.count == 1:
            return values
        numbers = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(numbers)
        return [float(value) for value in (numbers / self.count).tolist()]

    def share(self, text: str) -> str:
        """The first process's text, in all of them."""
        texts = [text]
        if self.count > 1:
            torch.distributed.broadcast_object_list(texts)
        return texts[0]

    def wait(self) -> None:
        """Go on when all are here."""
        if self.count > 1:
            torch.distributed.barrier()

    def gathered(self, state: dict[str, Any]) -> dict[str, Any]:
        """A state dictionary with whole tensors, on the CPU of the first process; the others get None for
        each.
        """

        def gather(tensor: Tensor) -> Tensor | None:
            gathered = whole(tensor)
            return gathered.cpu() if self.first else None

        return dict(tree_map_only(Tensor, gather, state))


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its shards; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a whole state; each process keeps its shards where the weights are in shards."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    optimizer.load_state_dict(
        {
            **state,
            "state": {
                number: {name: _sharded_like(parameters[number], value) for name, value in values.items()}
                for number, values in state["state"].items()
            },
        }
    )


def _sharded_like(parameter: Tensor, value: Tensor) -> Tensor:
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:  # the count of steps is a scalar
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value


def _flag(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"


def usable_device(device: str) -> torch.device:
    """cpu, cuda (this process's GPU) or another, once a tensor fits on it; auto is cuda where there is one.

    Raises ConfigError.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() and not _flag("ACCELERATE_USE_CPU") else "cpu"
    try:
        chosen = (
            torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            if device == "cuda"
            else torch.device(device)
        )
        torch.empty(1, device=chosen)
    except (AssertionError, RuntimeError) as error:  # torch raises either
        raise ConfigError(f"device = '{device}' cannot be used here: {str(error).splitlines()[0]}") from None
    return chosen


def _check_launch() -> None:
    """Refuse an environment that would wait forever, and what is not supported.

    Raises ConfigError; warns of what is ignored.
    """
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        count = os.environ["WORLD_SIZE"]
        raise ConfigError(
            f"WORLD_SIZE = {count} without {', '.join(missing)}; start with torchrun or accelerate launch"
        )
    for engine in ("DEEPSPEED", "MEGATRON_LM"):
        if _flag(f"ACCELERATE_USE_{engine}"):
            raise ConfigError(
                f"accelerate's {engine} is not supported; choose plain data parallelism or FSDP "
                "(accelerate config)"
            )
    if (precision := os.environ.get("ACCELERATE_MIXED_PRECISION", "no")) != "no":
        warnings.warn(
            f"accelerate's mixed precision '{precision}' has no effect; the recipe sets it: --precision",
            SettingWarning,
            stacklevel=3,
        )
