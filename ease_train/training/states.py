"""The hidden states of a frozen model, computed once and read by every epoch that trains its exits (or
gates).

    cache = StateCache(Path("runs/cache"), model, blocks, temperature=1.0, precision="fp32")
    for done in cache.fill(ask):    # nothing to do where it was filled before; goes on where it was killed
        print(done, "of", len(blocks))
    states = cache.of(numbers)      # of these blocks

The directory's name is a sum over all that the states depend on: the weights below the exits, the tokens, the
exits' layers, temperature and precision. It is written under another name until it is whole. Files are plain
fp32 and int32, row after row.

Shapes: B blocks, S tokens of a block, D width.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - its usual name

from ease_common.errors import DataError
from ease_common.files import held, settle
from ease_train.model.blocks import widened
from ease_train.model.decoder import Decoder
from ease_train.training.tensors import bytes_of

BLOCKS_AT_ONCE = 4
LOGITS_AT_ONCE = 1 << 24  # elements: 64 MB
Ask = Callable[..., Any]  # question, blocks -> question(model, input_ids, targets), as the trainer asks it


@dataclass(frozen=True)
class States:
    """What the frozen model made of some blocks.

    hidden       early exit's layer -> (B, S, D)
    last         at the last layer, after the final norm: (B, S, D)
    top          the last layer's most likely token: (B, S) int64
    log_sums     of its exponentiated logits divided by the temperature: (B, S)
    losses       its cross-entropy with the text, in nats: (B, S)
    """

    hidden: dict[int, Tensor]
    last: Tensor
    top: Tensor
    log_sums: Tensor
    losses: Tensor


@torch.no_grad()
def compute_states(model: Decoder, input_ids: Tensor, targets: Tensor, temperature: float) -> States:
    """Run the whole model. Shape: (B, S) int64 twice."""
    found = dict(model.exit_states(input_ids))
    last = model.norm(found.pop(model.config.num_layers)).float()
    tops = []
    sums = []
    losses = []
    size = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    lm_head = widened(model.lm_head)
    for rows, wanted in zip(
        torch.split(last.flatten(0, 1), size), torch.split(targets.flatten(), size), strict=True
    ):
        logits = lm_head(rows).float()
        tops.append(logits.argmax(dim=-1))
        losses.append(F.cross_entropy(logits, wanted, reduction="none"))
        sums.append((logits / temperature).logsumexp(dim=-1))
    each = (torch.cat(parts).view_as(targets) for parts in (tops, sums, losses))
    return States({layer: hidden.float() for layer, hidden in found.items()}, last, *each)


class StateCache:
    """The states of all of `blocks` (n, S + 1) in one directory under `folder`."""

    def __init__(
        self, folder: Path, model: Decoder, blocks: NDArray[np.int32], temperature: float, precision: str
    ) -> None:
        self.blocks = blocks
        self.temperature = temperature
        self.layers = model.config.exits[:-1]
        self.path = folder / f"states-{self._sum(model, precision)}"
        wide = (blocks.shape[1] - 1, model.config.dim)
        self.shapes: dict[str, tuple[int, ...]] = {f"exit_{layer}": wide for layer in self.layers}
        self.shapes |= {"last": wide, "top": wide[:1], "log_sums": wide[:1], "losses": wide[:1]}

    def _sum(self, model: Decoder, precision: str) -> str:
        digest = hashlib.sha256(
            f"1:{self.layers}:{self.temperature}:{precision}:{self.blocks.shape}".encode()
        )
        state = model.state_dict()
        for name in sorted(state.keys() - model.exit_state().keys()):
            digest.update(name.encode())
            digest.update(bytes_of(state[name]).data)
        digest.update(np.ascontiguousarray(self.blocks).data)
        return digest.hexdigest()[:32]

    @property
    def num_bytes(self) -> int:
        """What all of it takes on disk."""
        return len(self.blocks) * sum(self._row_bytes(name) for name in self.shapes)

    @property
    def full(self) -> bool:
        """Whether it is all there."""
        return self.path.is_dir()

    def fill(self, ask: Ask) -> Iterator[int]:
        """Compute what is not there yet; yield the number of blocks done.

        Raises DataError when it does not fit on the disk.
        """
        if not self.full:
            with held(self.path):
                yield from self._fill(ask)

    def _fill(self, ask: Ask) -> Iterator[int]:
        partial = self.path.with_suffix(".partial")
        partial.mkdir(parents=True, exist_ok=True)
        done = self._done(partial)
        missing = self.num_bytes * (len(self.blocks) - done) // len(self.blocks)
        free = shutil.disk_usage(partial).free
        if missing > free:
            raise DataError(
                f"hidden states take {missing / 1e9:.1f} GB more in {partial.parent}, which has "
                f"{free / 1e9:.1f} GB; use another --cache, "
                "less text, or none"
            )
        try:
            for start in range(done, len(self.blocks), BLOCKS_AT_ONCE):
                yield start
                self._append(
                    partial,
                    ask(compute_states, self.blocks[start : start + BLOCKS_AT_ONCE], self.temperature),
                )
        except OSError as error:
            raise DataError(
                f"could not write hidden states to {partial}: {error}; what is there is kept"
            ) from None
        settle(partial)
        partial.rename(self.path)
        yield len(self.blocks)

    def of(self, numbers: NDArray[np.int64], device: torch.device | str = "cpu") -> States:
        """The states of the blocks of these numbers."""
        hidden = {layer: self._read(f"exit_{layer}", numbers).to(device) for layer in self.layers}
        last, top, log_sums, losses = (
            self._read(name, numbers).to(device) for name in ("last", "top", "log_sums", "losses")
        )
        return States(hidden, last, top.long(), log_sums, losses)

    def _append(self, folder: Path, states: States) -> None:
        columns = {f"exit_{layer}": hidden for layer, hidden in states.hidden.items()}
        columns |= {
            "last": states.last,
            "top": states.top.int(),
            "log_sums": states.log_sums,
            "losses": states.losses,
        }
        for name, values in columns.items():
            with (folder / name).open("ab") as file:
                file.write(values.cpu().contiguous().numpy().data)

    def _done(self, folder: Path) -> int:
        """How many blocks a killed run has left whole in all files; what is more is cut off."""
        files = {name: folder / name for name in self.shapes}
        done = min(
            path.stat().st_size // self._row_bytes(name) if path.is_file() else 0
            for name, path in files.items()
        )
        for name, path in files.items():
            with path.open("ab") as file:
                file.truncate(done * self._row_bytes(name))
        return done

    def _row_bytes(self, name: str) -> int:
        return 4 * int(np.prod(self.shapes[name]))

    def _read(self, name: str, numbers: NDArray[np.int64]) -> Tensor:
        kind = np.int32 if name == "top" else np.float32
        rows: NDArray[Any] = np.memmap(
            self.path / name, dtype=kind, mode="r", shape=(len(self.blocks), *self.shapes[name])
        )
        return torch.from_numpy(np.asarray(rows[numbers]))
