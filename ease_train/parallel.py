"""Several processes, one run: each works on its share of a step's sequences, and all hold the same weights.

A launcher starts them and says so in the environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT):

    torchrun --nproc-per-node 2 -m ease_train.cli fit small --out runs/small
    accelerate launch --num-processes 2 -m ease_train.cli fit small --out runs/small

Without one there is a single process and nothing here does anything. A step reads batch_size sequences a process, so two
processes follow the curve of one with twice the batch.
"""

import os
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch import distributed as dist

from ease_train.errors import ConfigError


@dataclass(frozen=True)
class Workers:
    """This process (`rank`, from 0) among `count`."""

    rank: int = 0
    count: int = 1

    @classmethod
    def join(cls, device: str) -> tuple[Self, str]:
        """Join the processes that the environment names; also the device of this one. Raises ConfigError."""
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count == 1:
            return cls(), device
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise ConfigError(f"WORLD_SIZE = {count} without {', '.join(missing)}; start with torchrun or accelerate launch")
        if device == "cuda":
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        return cls(dist.get_rank(), count), device

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    def mean_gradients(self, model: nn.Module) -> None:
        """Replace every gradient by its mean over the processes; one that no process has stays absent."""
        if self.count == 1:
            return
        parameters = [p for p in model.parameters() if p.requires_grad]
        present = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
        dist.all_reduce(present, dist.ReduceOp.MAX)
        shared = [p for p, there in zip(parameters, present.tolist(), strict=True) if there]
        flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in shared])
        self._mean(flat)
        for parameter, mean in zip(shared, flat.split([p.numel() for p in shared]), strict=True):  # type: ignore[no-untyped-call]
            parameter.grad = mean.view_as(parameter)

    def mean(self, values: list[float], device: torch.device) -> list[float]:
        """Each number's mean over the processes."""
        if self.count == 1:
            return values
        numbers = torch.tensor(values, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        self._mean(numbers)
        return [float(value) for value in numbers.tolist()]

    def share(self, text: str) -> str:
        """The first process's text, in all of them."""
        texts = [text]
        if self.count > 1:
            dist.broadcast_object_list(texts)
        return texts[0]

    def wait(self) -> None:
        """Go on when all are here."""
        if self.count > 1:
            dist.barrier()

    def _mean(self, numbers: Tensor) -> None:
        dist.all_reduce(numbers)
        numbers /= self.count
