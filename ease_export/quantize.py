"""int8 and int4 weights: whole numbers in blocks along a row, with a scale each.

Products become MatMulNBits, lookups in the embedding GatherBlockQuantized. The two read the same bytes, so a
tied embedding is stored once; where blocks do not fill its rows, the lookup cuts off what is behind their
end. In int4, too, the embedding and the LM heads have 8 bits: with 4, SmolLM2-135M lost twice as much
perplexity. Norms, exits' adapters, gates and routers, which are small and decide, stay fp32.

A bundle for CUDA has fp16 around: activations, caches and what is not quantised, and the blocks' scales.

A matrix that came in whole numbers, from a file of 4 or 8 bits or by `ease-export quantize`, and that nobody
has trained since, keeps these: nothing is rounded again. Where blocks have offsets, a small product of the
sums of a block is added. Others are rounded number by number, in 4 bits with a zero point for each block.

Shapes: O outputs (or words), I inputs, K blocks of a row.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name
from torch.nn.utils import parametrize

from ease_export.layers import blocks_of
from ease_export.weights import GraphTensor
from ease_runtime.bundle.manifest import WeightForm
from ease_train.convert.grid import ROUNDED, SYMMETRIC, Grid, joined, packed
from ease_train.model.decoder import Decoder
from ease_train.model.exits import ReducedHead

BITS = {"int8": 8, "int4": 4}
BLOCK = 32  # numbers; activations are rounded by the same blocks, so that larger ones cost more than time
OUTER_BITS = 8  # of the embedding and the LM heads
OUTER_BLOCK = 64
ROUNDED_AT_ONCE = 1 << 20  # numbers of a matrix
BLOCKS_AT_ONCE = 4096  # whose ranges are searched: some tensors of them fit a core's cache
ACCURACY_LEVEL = 4  # of MatMulNBits: activations are rounded to int8, which is what makes it fast
RANGES_TRIED = (1.0, 0.95, 0.85)  # of a block's largest and least number: each pair
CONTRIB = "com.microsoft"
OF_CONTRIB = ("MatMulNBits", "GatherBlockQuantized")

Weights = dict[str, GraphTensor]
Form = tuple[int, int, bool, bool]  # Grid.form


def matrices(model: Decoder, precision: str) -> Iterator[tuple[str, nn.Linear | nn.Embedding, int]]:
    """The modules whose weights are quantised, with their names and bits: layers, LM heads, the embedding."""
    names = {id(module): name for name, module in model.named_modules(remove_duplicate=False)}
    for block in blocks_of(model):
        for module in block.modules():
            if isinstance(module, nn.Linear):
                yield names[id(module)], module, BITS[precision]
    for outer in outer_modules(model):
        yield names[id(outer)], outer, OUTER_BITS


def outer_modules(model: Decoder) -> Iterator[nn.Linear | nn.Embedding]:
    """The LM heads, and the embedding."""
    for head in dict.fromkeys((model.lm_head, *(leave.head for leave in model.early_exits.values()))):
        yield head.known if isinstance(head, ReducedHead) else head
    yield model.embed


def rounded(matrix: Tensor, bits: int) -> Grid:
    """A layer's matrix (O, I), each number rounded by itself; blocks have zero points."""

    def of_rows(rows: Tensor) -> Grid:
        values = block_values(rows, BLOCK)
        scales, zeros = searched_ranges(values, bits)
        numbers = torch.addcdiv(zeros[..., None], values, scales[..., None])
        whole = packed(numbers.round_().clamp_(0, (1 << bits) - 1).to(torch.uint8).numpy(), bits)
        return Grid(ROUNDED, bits, BLOCK, whole, scales.numpy(), zeros=zeros.to(torch.uint8).numpy())

    return joined([of_rows(rows) for rows in fp32_rows(matrix)])


def rounded_outer(matrix: Tensor) -> Grid:
    """A head's or the embedding's matrix (O, I) in 8 bits, symmetric, in larger blocks."""
    middle = 1 << (OUTER_BITS - 1)

    def of_rows(rows: Tensor) -> Grid:
        values = block_values(rows, OUTER_BLOCK)
        largest = values.gather(-1, values.abs().argmax(-1, keepdim=True))
        scales = not_zero(largest / -middle)
        numbers = (values / scales).round_().clamp_(-middle, middle - 1).add_(middle)
        whole = numbers.to(torch.uint8).numpy()
        return Grid(ROUNDED, OUTER_BITS, OUTER_BLOCK, whole, scales[..., 0].contiguous().numpy())

    return joined([of_rows(rows) for rows in fp32_rows(matrix)])


def fp32_rows(matrix: Tensor) -> Iterator[Tensor]:
    """A matrix in fp32, some rows at a time: what is computed of them then takes little memory."""
    count = max(1, ROUNDED_AT_ONCE // matrix.shape[1])
    return (rows.float() for rows in torch.split(matrix.detach(), count))


def block_values(matrix: Tensor, block: int) -> Tensor:
    """A matrix in blocks, the last one of a row filled with zeros. Shape: (O, I) -> (O, K, block)."""
    whole = F.pad(matrix, (0, -matrix.shape[1] % block))
    return whole.reshape(len(whole), -1, block)


def searched_ranges(values: Tensor, bits: int, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The scale and the zero point of each block: in 8 bits those of its whole range, in 4 those of several
    with the least squared error, weighed by the numbers' `importance` (K, block) where it is given.

    Shape: (O, K, block) -> two of (O, K).
    """
    blocks = values.flatten(0, 1)
    weights = None if importance is None else importance.expand(len(values), -1, -1).flatten(0, 1)
    tried = RANGES_TRIED if bits == 4 else RANGES_TRIED[:1]
    found = []
    for first in range(0, len(blocks), BLOCKS_AT_ONCE):
        part = slice(first, first + BLOCKS_AT_ONCE)
        weighed = None if weights is None else weights[part].T.contiguous()
        found.append(least_errors(blocks[part].T.contiguous(), bits, tried, weighed))
    scales, zeros = (torch.cat(parts).view(values.shape[:2]) for parts in zip(*found, strict=True))
    return scales, zeros


def least_errors(
    columns: Tensor, bits: int, tried: Sequence[float], weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Of ranges that are some parts of each column's, those with the least squared error, weighed where there
    are weights. Columns, since operations over long rows are the fast ones.

    Shape: (block, N), and weights of the same -> two of (N,).
    """
    most = (1 << bits) - 1
    above, below = torch.cartesian_prod(torch.tensor(tried), torch.tensor(tried)).T[..., None]
    high = above * columns.amax(0).clamp_(min=0)
    low = below * columns.amin(0).clamp_(max=0)
    scales = not_zero((high - low) / most)
    zeros = (-low / scales).round_().clamp_(0, most)
    errors = torch.empty_like(scales)
    exact, error = torch.empty_like(columns), torch.empty_like(columns)
    for scale, zero, total in zip(scales, zeros, errors, strict=True):
        torch.addcdiv(zero, columns, scale, out=exact)
        torch.round(exact, out=error).clamp_(0, most).sub_(exact).square_()
        torch.sum(error if weights is None else error.mul_(weights), 0, out=total)
    best = errors.mul_(scales).mul_(scales).min(0, keepdim=True).indices
    return scales.gather(0, best)[0], zeros.gather(0, best)[0]


def not_zero(scales: Tensor) -> Tensor:
    """Scales by which can be divided: 1 for a block of zeros."""
    return torch.where(scales == 0, 1.0, scales)


@dataclass(frozen=True, eq=False)
class Matrix:
    """One of a model's quantised weights; `file_grid` is that of the file it came from, where it still is
    that.
    """

    weight: Tensor
    bits: int
    outer: bool
    file_grid: Grid | None

    @property
    def kind(self) -> str:
        """Its grid's."""
        return ROUNDED if self.file_grid is None else self.file_grid.kind

    @property
    def form(self) -> Form:
        """Its grid's."""
        if self.file_grid is not None:
            return self.file_grid.form
        return (OUTER_BITS, OUTER_BLOCK, *SYMMETRIC) if self.outer else (self.bits, BLOCK, True, False)

    def grid(self, dtype: type[np.generic] = np.float32) -> Grid:
        """Its grid; `dtype` is what its scales are stored in."""
        found = self.file_grid
        if found is None:
            found = rounded_outer(self.weight) if self.outer else rounded(self.weight, self.bits)
        return found.halved() if dtype is np.float16 else found


def quantized_matrices(model: Decoder, precision: str, grids: Mapping[str, Grid]) -> Iterator[Matrix]:
    """Each quantised weight once."""
    seen = set[int]()
    outer = {id(module) for module in outer_modules(model)}
    for name, module, bits in matrices(model, precision):
        weight = module.weight
        if id(weight) in seen:
            continue
        seen.add(id(weight))
        names = (f"{name}.weight", *(("embed.weight",) if weight is model.embed.weight else ()))
        kept = (grid for grid in _own(grids, names, bits) if is_exactly(grid, weight))
        yield Matrix(weight, bits, id(module) in outer, next(kept, None))


def is_exactly(grid: Grid, weight: Tensor) -> bool:
    """Whether a weight (O, I) is a grid, number by number."""
    if len(weight) != len(grid.scales):
        return False
    row = 0
    for rows in fp32_rows(weight):
        if not grid.rows(row, row + len(rows)).is_exactly(rows.numpy()):
            return False
        row += len(rows)
    return True


def _own(grids: Mapping[str, Grid], names: tuple[str, ...], bits: int) -> Iterator[Grid]:
    """The grids of a weight's names that kernels of so many bits hold."""
    for grid in (grids[name] for name in names if name in grids):
        if bits == 4:
            yield grid
        elif grid.form[2:] == SYMMETRIC:
            yield grid.widened()


def arrays_of(grid: Grid, dtype: type[np.generic]) -> dict[str, NDArray[Any]]:
    """A grid as kernels read it, its scales and offsets of a type.

    `offsets` (K, O) are what each block's numbers, less their middle, are offset by (in fp16 times the
    block's size, since there means are offset: sums could overflow); `zero_points` (O, bytes of a row) are
    packed.
    """
    found = {"numbers": grid.numbers, "scales": np.asarray(grid.scales, dtype)}
    if grid.offsets is not None:
        from_middle = grid.offsets + grid.middle * grid.scales
        factor = grid.block if dtype is np.float16 else 1
        found["offsets"] = np.ascontiguousarray((from_middle * factor).T, dtype)
    if grid.zeros is not None:
        whole = np.pad(grid.zeros, ((0, 0), (0, grid.zeros.shape[1] % (8 // grid.bits))))
        found["zero_points"] = np.ascontiguousarray(packed(whole, grid.bits))
    return found


@dataclass(frozen=True)
class Held:
    """Matrices of one form, one below the other, as products and lookups hold them: `tensors` by the names in
    `arrays_of`.
    """

    bits: int
    block: int
    rows: int
    tensors: Mapping[str, GraphTensor]


class WeightQuantizer:
    """A model's quantised matrices, and what rewrites the nodes that use them. One is rounded when it is
    written.
    """

    def __init__(
        self, model: Decoder, precision: str, grids: Mapping[str, Grid], dtype: type[np.generic] = np.float32
    ) -> None:
        self.precision = precision
        self.dtype = dtype
        self.matrices = list(quantized_matrices(model, precision, grids))
        self.by_weight = {id(matrix.weight): matrix for matrix in self.matrices}
        self.latest: tuple[list[Matrix], dict[str, NDArray[Any]]] = [], {}

    @property
    def form(self) -> WeightForm:
        """The form of most of the products."""
        forms = [matrix.form for matrix in self.matrices]
        blocks = Counter(block for bits, block, *_ in forms if bits == BITS[self.precision])
        symmetric = all(form[2:] == SYMMETRIC for form in forms)
        exact = all(matrix.kind != ROUNDED for matrix in self.matrices)
        return WeightForm(BITS[self.precision], blocks.most_common(1)[0][0], symmetric, exact)

    def held(self, weight: GraphTensor) -> list[Held]:
        """A weight (O, I) of a graph, one of the model's or several, in as many parts, one below the other,
        as these have forms; none for one that is not quantised.
        """
        if not all(key in self.by_weight for key in weight.keys):
            return []
        matrices = [self.by_weight[key] for key in weight.keys]
        return [self._held(list(group)) for _, group in itertools.groupby(matrices, lambda m: m.form)]

    def _held(self, matrices: list[Matrix]) -> Held:
        bits, block, no_offsets, no_zeros = matrices[0].form
        rows = [len(matrix.weight) for matrix in matrices]
        blocks = -(-matrices[0].weight.shape[1] // block)
        height = sum(rows)
        kinds: dict[str, tuple[tuple[int, ...], type[np.generic]]] = {
            "numbers": ((height, blocks, block * bits // 8), np.uint8),
            "scales": ((height, blocks), self.dtype),
        }
        if not no_offsets:
            kinds["offsets"] = (blocks, height), self.dtype
        if not no_zeros:
            kinds["zero_points"] = (height, -(-blocks * bits // 8)), np.uint8
        keys = [id(matrix.weight) for matrix in matrices]
        tensors = {
            kind: GraphTensor(
                shape=shape,
                dtype=np.dtype(dtype),
                keys=tuple((kind, key) for key in keys) if kind != "offsets" else ((kind, *keys),),
                rows=tuple(rows) if kind != "offsets" else (blocks,),
                made=partial(self._made, matrices, kind),
            )
            for kind, (shape, dtype) in kinds.items()
        }
        return Held(bits, block, height, tensors)

    def _made(self, matrices: list[Matrix], kind: str) -> list[NDArray[Any]]:
        """One of the arrays of some matrices, which are kept until those of others are asked for."""
        if self.latest[0] is not matrices:
            self.latest = [], {}
            self.latest = matrices, arrays_of(joined([m.grid(self.dtype) for m in matrices]), self.dtype)
        return [self.latest[1][kind]]

    def rewrite(self, graph: onnx.GraphProto, weights: Weights) -> Weights:
        """Let a graph use quantised matrices. Returns the weights that its nodes name now."""
        rewriter = _Rewriter(self.held, weights, self.dtype)
        for node in graph.node:
            rewriter.rewrite(node)
        del graph.node[:]
        graph.node.extend(rewriter.nodes)
        return {**weights, **rewriter.added}


@dataclass
class _Rewriter:
    """The nodes of a graph that uses quantised matrices, and the weights that these name.

    `sums` are the names of sums of blocks (in fp16 of means), by the name of what was summed: products of one
    state share them.
    """

    held: Callable[[GraphTensor], list[Held]]
    weights: Weights
    dtype: type[np.generic]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    added: Weights = field(default_factory=dict)
    sums: dict[str, str] = field(default_factory=dict)

    def rewrite(self, node: onnx.NodeProto) -> None:
        place = {"Gemm": 1, "Gather": 0}.get(node.op_type)
        name = None if place is None else node.input[place]
        held = self.held(self.weights[name]) if name in self.weights else []
        if name is None or not held:
            self.nodes.append(node)
            return
        width = self.weights[name].shape[1]
        if place:
            self._products(node, name, held, width)
        else:
            (whole,) = held
            numbers = whole.tensors["numbers"]
            self.added[f"{name}/scales"] = whole.tensors["scales"]
            self.added[f"{name}/numbers"] = replace(
                numbers, shape=(numbers.shape[0], numbers.shape[1] * numbers.shape[2])
            )
            self._lookup(node, name, whole, width)

    def _products(self, node: onnx.NodeProto, name: str, parts: Sequence[Held], width: int) -> None:
        """The product with each part of a matrix, side by side."""
        output = node.output[0]
        bias = node.input[2] if len(node.input) > 2 else None
        if len(parts) == 1:
            self._product(node.input[0], name, parts[0], width, bias, output)
            return
        outputs = []
        row = 0
        for number, part in enumerate(parts):
            last = row + part.rows
            own = None
            if bias is not None:
                own = f"{bias}/{number}"
                self.added[own] = GraphTensor.of(self.weights[bias].array()[row:last])
            outputs.append(f"{output}/{number}")
            self._product(node.input[0], f"{name}/{number}", part, width, own, outputs[-1])
            row = last
        self._add("Concat", outputs, output, axis=-1)

    def _add(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> None:
        domain = CONTRIB if kind in OF_CONTRIB else None
        self.nodes.append(onnx.helper.make_node(kind, inputs, [output], output, domain=domain, **attributes))

    def _product(self, state: str, name: str, held: Held, width: int, bias: str | None, output: str) -> None:
        """The product with the whole numbers, and where there are offsets, that of the sums of blocks with
        them.
        """
        offsets, zero_points = held.tensors.get("offsets"), held.tensors.get("zero_points")
        self.added |= {f"{name}/{kind}": held.tensors[kind] for kind in ("numbers", "scales")}
        product = output if offsets is None else f"{output}/numbers"
        zeros = "" if zero_points is None else f"{name}/zero_points"
        more = [] if bias is None else ["", bias]  # after the place of g_idx
        inputs = [state, f"{name}/numbers", f"{name}/scales", zeros, *more]
        sizes = {"K": width, "N": held.rows, "bits": held.bits, "block_size": held.block}
        if self.dtype is np.float32:  # kernels for fp16 round no activations
            sizes["accuracy_level"] = ACCURACY_LEVEL
        self._add("MatMulNBits", inputs, product, **sizes)
        if zero_points is not None:
            self.added[zeros] = zero_points
        if offsets is not None:
            self.added[f"{name}/offsets"] = offsets
            reduction = "ReduceMean" if self.dtype is np.float16 else "ReduceSum"
            sums = self._summed(state, held.block, reduction)
            self._add("MatMul", [sums, f"{name}/offsets"], f"{output}/sums")
            self._add("Add", [product, f"{output}/sums"], output)

    def _summed(self, name: str, block: int, reduction: str) -> str:
        """The name of the sums (or means) of blocks of a state. Shape: (N, I) -> (N, K)."""
        if name not in self.sums:
            self.sums[name] = f"{name}/block_sums"
            constants = {"sum/shape": np.array([0, -1, block]), "sum/axis": np.array([-1])}
            self.added |= {constant: GraphTensor.of(array) for constant, array in constants.items()}
            self._add("Reshape", [name, "sum/shape"], f"{name}/blocks")
            self._add(reduction, [f"{name}/blocks", "sum/axis"], self.sums[name], keepdims=0)
        return self.sums[name]

    def _lookup(self, node: onnx.NodeProto, name: str, held: Held, width: int) -> None:
        """The lookup, whose rows are as many whole blocks; where `width` does not fill the last, the rest is
        cut off.
        """
        output = node.output[0]
        full = width % held.block == 0
        inputs = [f"{name}/numbers", node.input[1], f"{name}/scales"]
        sizes = {"bits": held.bits, "block_size": held.block, "gather_axis": 0, "quantize_axis": 1}
        self._add("GatherBlockQuantized", inputs, output if full else f"{output}/blocks", **sizes)
        if not full:
            bounds = {"first": 0, "width": width, "axis": 1}
            self.added |= {
                f"{name}/{bound}": GraphTensor.of(np.array([number])) for bound, number in bounds.items()
            }
            self._add("Slice", [f"{output}/blocks", *(f"{name}/{bound}" for bound in bounds)], output)


class Dequantized(nn.Module):
    """A weight (O, I) as products with its grid compute it, made at each use; `dtype` is what is around."""

    def __init__(self, grid: Grid, width: int, dtype: type[np.generic]) -> None:
        super().__init__()
        self.grid = grid
        self.width = width
        self.dtype = torch.float16 if dtype is np.float16 else torch.float32

    def forward(self, _: Tensor) -> Tensor:
        whole = torch.empty(len(self.grid.scales), self.width)
        row = 0
        for part in torch.split(whole, max(1, ROUNDED_AT_ONCE // self.width)):  # little memory beside it
            values = self.grid.rows(row, row + len(part)).dequantized(self.width)
            part.copy_(torch.from_numpy(values).to(self.dtype))
            row += len(part)
        return whole


def round_trip(
    model: Decoder, precision: str, grids: Mapping[str, Grid], dtype: type[np.generic] = np.float32
) -> None:
    """Give a model, in place, the weights that its quantised bundle computes with, which take the memory of
    their grids; `dtype` is what is around them.
    """
    made = {
        id(matrix.weight): Dequantized(matrix.grid(dtype), matrix.weight.shape[1], dtype)
        for matrix in quantized_matrices(model, precision, grids)
    }
    modules = [(module, made[id(module.weight)]) for _, module, _ in matrices(model, precision)]
    for module, weight in modules:
        given = module.weight
        parametrize.register_parametrization(module, "weight", weight, unsafe=True)  # of another type
        given.data = torch.empty(0)


def add_contrib_domain(model: onnx.ModelProto) -> None:
    """Say that a graph uses ONNX Runtime's own operators, if it does."""
    if any(node.domain == CONTRIB for node in model.graph.node):
        model.opset_import.append(onnx.helper.make_opsetid(CONTRIB, 1))
