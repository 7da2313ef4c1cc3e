"""Rounding to int4 that makes up for itself: GPTQ (Frantar et al. 2022, arXiv 2210.17323).

    checkpoint, weights = quantize(load_checkpoint(path), calibration_ids(checkpoint, None, 8192))
    save_checkpoint(checkpoint, out, weights)

The layers' matrices are rounded column by column, those whose inputs are largest first, and what rounding one
changes in a text's outputs the columns after it take back. The result is a checkpoint whose layers lie on a
grid of 4 bits, which `ease-export build --precision int4` keeps as it is. Layers are rounded one after the
other, each on what the rounded ones before it give.

Shapes: O outputs, I inputs, K blocks of a row, B texts, S tokens of each, D width.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from ease_common.errors import DataError
from ease_export.quantize import BITS, BLOCK, block_values, searched_ranges
from ease_train.convert.grid import Grid, packed
from ease_train.data.corpora import load_documents
from ease_train.data.tokens import check_rows
from ease_train.training.checkpoint import Checkpoint, untied
from ease_train.training.tensors import Tensors

KIND = "gptq"
TEXT_LENGTH = 512  # tokens of a calibration text
TEXTS_AT_ONCE = 4
DAMPING = 1.0  # times the mean of the diagonal: with less, texts unlike the one read lose more
COLUMNS_AT_ONCE = 64  # whose effect on later columns is added up before it is passed on
PRECISION = "int4"


def calibration_ids(checkpoint: Checkpoint, data: str | None, num_tokens: int) -> Tensor:
    """The first tokens of a source's training split, by default of Python's own help texts.

    Shape: (B, S). Raises DataError when that is less than one text.
    """
    documents = help_texts() if data is None else load_documents(data, "train")
    length = min(TEXT_LENGTH, checkpoint.model.config.max_positions)
    ids = list[int]()
    text_format = checkpoint.text_format
    before = [*text_format.stop_ids[:1]] if text_format.start_id is None else [text_format.start_id]
    for document in documents:
        ids += [*before, *checkpoint.tokenizer.encode(document, add_special_tokens=False).ids]
        if len(ids) >= num_tokens:
            break
    what = "Python's help" if data is None else data
    check_rows(np.array(ids), checkpoint.tokenizer, checkpoint.model.config.vocab_size, what)
    count = min(len(ids), num_tokens) // length
    if not count:
        raise DataError(
            f"{what} has {len(ids)} tokens; calibration needs {length} at least: give more text (--data)"
        )
    return torch.tensor(ids[: count * length]).view(count, length)


def help_texts() -> Sequence[str]:
    """What Python's `help` says of the language: English that every machine has."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


@torch.no_grad()
def quantize(
    checkpoint: Checkpoint, ids: Tensor, progress: Callable[[int], object] | None = None
) -> tuple[Checkpoint, Tensors]:
    """The checkpoint with its layers on a grid of 4 bits, and its weights (of layers in fp32) as they are
    asked for: its model is left as it is.

    `progress` is called with the number of each layer that is done. One layer at a time is held in fp32.
    """
    model = checkpoint.model.eval()
    names = {id(module): name for name, module in model.named_modules()}
    grids = dict[str, Grid]()
    hidden = model.embed(ids)
    for layer, block in enumerate(model.layers, start=1):
        copy = model.layers[layer - 1] = deepcopy(block).float()
        run = partial(model.run_layers, first=layer, last=layer)
        parts = torch.split(hidden, TEXTS_AT_ONCE)
        grids |= rounded_block(copy, names[id(block)], run, parts)
        hidden = torch.cat([run(part) for part in parts])
        model.layers[layer - 1] = block
        leave = model.early_exits.get(layer)
        if leave is not None and (own := leave.block) is not None:
            leave.adapter = copy = deepcopy(own).float()
            run = partial(model.exit_hidden, layer=layer)
            grids |= rounded_block(copy, names[id(own)], run, torch.split(hidden, TEXTS_AT_ONCE))
            leave.adapter = own
        if progress:
            progress(layer)
    done = replace(checkpoint, grids={**checkpoint.grids, **grids}, train_state=None)
    return done, on_grids(untied(model), grids)


def on_grids(weights: Mapping[str, Tensor], grids: Mapping[str, Grid]) -> Tensors:
    """Weights by name, those of grids in fp32."""
    described = {
        name: (torch.float32 if name in grids else weight.dtype, weight.shape)
        for name, weight in weights.items()
    }

    def made(name: str) -> Tensor:
        if name not in grids:
            return weights[name]
        return torch.from_numpy(grids[name].dequantized(weights[name].shape[1]))

    return Tensors(described, made)


def rounded_block(
    block: nn.Module, name: str, run: Callable[[Tensor], object], parts: Sequence[Tensor]
) -> dict[str, Grid]:
    """Round a block's matrices in place; those that read the same input together. Returns their grids, by the
    names that they have where the block's is `name`.

    `parts` are the states, as (B, S, D), for which `run` runs it.
    """
    bits = BITS[PRECISION]
    names = {id(module): f"{name}.{part}.weight" for part, module in block.named_modules()}
    found = dict[str, Grid]()
    for linears, squares in input_squares(block, run, parts):
        sizes = [len(linear.weight) for linear in linears]
        rounded = rounded_columns(torch.cat([linear.weight.float() for linear in linears]), squares)
        parted = (torch.split(part, sizes) for part in rounded)
        for linear, numbers, scales, zeros in zip(linears, *parted, strict=True):
            points = zeros.to(torch.uint8).numpy()
            whole = packed(numbers.numpy(), bits)
            grid = Grid(KIND, bits, BLOCK, whole, scales.numpy(), zeros=points)
            linear.weight.data = torch.from_numpy(grid.dequantized(linear.in_features))
            found[names[id(linear)]] = grid
    return found


def input_squares(
    block: nn.Module, run: Callable[[Tensor], object], parts: Sequence[Tensor]
) -> list[tuple[list[nn.Linear], Tensor]]:
    """For each input that some of a block's matrices read: these, and the mean of its outer products, (I,
    I).
    """
    seen = dict[int, tuple[list[nn.Linear], list[Tensor]]]()  # by the identity of what was read
    sums = list[tuple[list[nn.Linear], Tensor]]()

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        linears, _ = seen.setdefault(id(inputs[0]), ([], [inputs[0]]))
        linears.append(cast(nn.Linear, module))

    linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
    hooks = [linear.register_forward_pre_hook(look) for linear in linears]
    for part in parts:
        run(part)
        read = [(group, states[0].flatten(0, -2)) for group, states in seen.values()]
        seen.clear()
        squares = [(group, states.T @ states / len(states)) for group, states in read]
        if not sums:
            sums = squares
        else:
            sums = [(group, before + now) for (group, before), (_, now) in zip(sums, squares, strict=True)]
    for hook in hooks:
        hook.remove()
    return [(group, total / len(parts)) for group, total in sums]


def rounded_columns(matrix: Tensor, squares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix (O, I) rounded for inputs with these mean outer products (I, I).

    Shape: numbers (O, K, block) uint8, scales and zero points (O, K).
    """
    most = (1 << BITS[PRECISION]) - 1
    width = matrix.shape[1]
    diagonal = squares.diagonal().clone()
    diagonal[diagonal == 0] = diagonal.mean().clamp(min=1e-9)  # of an input that is always 0
    importance = block_values(diagonal[None], BLOCK)[0]
    scales, zeros = searched_ranges(block_values(matrix, BLOCK), BITS[PRECISION], importance)
    order = diagonal.argsort(descending=True, stable=True)
    squares = squares.clone()
    squares.diagonal().copy_(diagonal + DAMPING * diagonal.mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(squares[order][:, order]))
    passed_on = torch.linalg.cholesky(inverse, upper=True)  # (I, I): what a column's error does to later ones
    rest = matrix.T[order].contiguous()  # (I, O)
    numbers = torch.zeros(-(-width // BLOCK) * BLOCK, len(matrix), dtype=torch.uint8)
    for first in range(0, width, COLUMNS_AT_ONCE):
        last = min(first + COLUMNS_AT_ONCE, width)
        errors = torch.empty(last - first, len(matrix))
        for column in range(first, last):
            place = int(order[column])
            scale = scales[:, place // BLOCK]
            zero = zeros[:, place // BLOCK]
            rounded = (rest[column] / scale).add_(zero).round_().clamp_(0, most)
            numbers[place] = rounded
            error = (rest[column] - (rounded - zero) * scale) / passed_on[column, column]
            errors[column - first] = error
            rest[column + 1 : last].addr_(passed_on[column, column + 1 : last], error, alpha=-1)
        rest[last:].addmm_(passed_on[first:last, last:].T, errors, alpha=-1)
    return numbers.T.reshape(len(matrix), -1, BLOCK).contiguous(), scales, zeros
