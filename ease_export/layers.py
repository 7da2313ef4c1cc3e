"""A layer over a cache, in standard operators, and what all such layers share in a graph.

Shapes: N new tokens in all, B rows (sequences), S new tokens a row at most, T length of the cache buffers, D
width, H query heads, G heads of keys and values, R = H/G, P width of a head.

A cache of the layout `BGTP` holds a head's positions next to each other, so that a few tokens' attention is
two matrix products over it. `BTK` (K = G*P) holds a position's heads next to each other, which is what CUDA's
Flash kernel reads. Both make one product of queries, keys and values. The halves of the MLP stay apart: what
one product saves, the Split behind it takes (more, in prompts).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name
from torch.onnx import ops

from ease_export.functions import FEW_OR_MANY, MASK, OPSET, WINDOW_MASK
from ease_train.model.blocks import Attention, Residual
from ease_train.model.decoder import Block, Decoder, RoutedBlock


def gather(x: Tensor, index: Tensor, axis: int, shape: Sequence[int]) -> Tensor:
    """Gather along an axis, to the shape that comes of it; torch's own ways leave a table of ids in the graph
    as a constant.
    """
    return ops.symbolic("Gather", (x, index), {"axis": axis}, dtype=x.dtype, shape=shape, version=OPSET)


def reshape(x: Tensor, target: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Reshape to a target with ONNX's 0 (as it is) and -1 (what is left), so that no size is computed in the
    graph; `shape` is what comes of it.
    """
    sizes = torch.tensor(target)
    return ops.symbolic("Reshape", (x, sizes), dtype=x.dtype, shape=shape, version=OPSET)


def scatter_rows(cache: Tensor, new: Tensor, write_indices: Tensor) -> Tensor:
    """TensorScatter: `new` written into `cache` along its sequence axis, the last but one.

    Shape: (..., T, X), (..., S, X), (B) -> (..., T, X).
    """
    attributes: dict[str, Any] = {"axis": cache.ndim - 2, "mode": "linear"}
    return ops.symbolic(
        "TensorScatter",
        (cache, new, write_indices),
        attributes,
        dtype=cache.dtype,
        shape=cache.shape,
        version=OPSET,
    )


class Packed(nn.Linear):
    """Several products over the same input as one.

    Its weight is on no device, since it is only traced and written: `parts` are what it is made of, one below
    the other.
    """

    def __init__(self, *linears: nn.Linear) -> None:
        width, height = linears[0].in_features, sum(linear.out_features for linear in linears)
        biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
        super().__init__(width, height, bias=bool(biases), device="meta")
        self.parts = tuple(linear.weight for linear in linears)
        if biases:
            self.bias = nn.Parameter(torch.cat(biases), requires_grad=False)


def blocks_of(model: Decoder) -> Iterator[Block]:
    """Every layer's block, those within routed layers and the exits' own included."""
    own = [leave.block for leave in model.early_exits.values() if leave.block is not None]
    for layer in (*model.layers, *own):
        block = layer.block if isinstance(layer, RoutedBlock) else layer
        assert isinstance(block, Block)
        yield block


Tables = Sequence[tuple[Tensor, Tensor]]  # cosines and sines


@dataclass(frozen=True)
class Ragged:
    """Where the new tokens stand: the inputs that every graph over a cache shares.

    Shapes: spread (B, S), places (N), write_indices (B). Of BGTP only, () bool: `few` and `products` choose
    the form of attention (functions.py), all of which give the same bits.
    """

    spread: Tensor
    places: Tensor
    write_indices: Tensor
    few: Tensor | None = None
    products: Tensor | None = None


class Placement:
    """Where the new tokens of each row go: their positions, and the length of the row's cache once they are
    written.

    Positions follow from where the tokens are written, unless they are given, as (N): a routed layer's cache
    has gaps. Places are counted by sums over ones: ONNX Runtime moves what computes on a Shape to the CPU,
    and then no graph loads on CUDA. `tables` are the rotary tables (cos, sin), and those of windowed layers
    where these have their own.
    """

    def __init__(self, ragged: Ragged, tables: Tables, positions: Tensor | None = None) -> None:
        self.ragged = ragged
        self.spread = ragged.spread
        self.places = ragged.places
        self.write_indices = ragged.write_indices
        self.tables = tables
        limit = tables[0][0].shape[0] - 1
        self.ones = (ragged.spread == ragged.spread).long()  # (B, S)
        self.lengths = ragged.write_indices + self.ones.sum(dim=1)  # (B)
        self.written = ragged.write_indices[:, None] + self.ones.cumsum(dim=1) - 1  # (B, S), in the cache
        found = self.written if positions is None else torch.take(positions, ragged.spread)
        self.positions = found.clamp(max=limit - 1)  # (B, S); pads may reach past the limit
        self.masks = dict[int, Tensor]()  # by window

    @property
    def first_copied(self) -> Tensor:
        """Where in the cache the queries stand, of which each row's first comes twice. Shape: (B, S+1)."""
        return torch.cat((self.written[:, :1], self.written), dim=1)

    def window_mask(self, window: int, rows: Tensor, past_key: Tensor) -> Tensor:
        """0 where a query at `rows` of its cache sees a position, -inf elsewhere; layers of one window share
        it. Shape: (B, R), (B, G, T, P) -> (B, 1, R, T).
        """
        if window not in self.masks:
            shape = (rows.shape[0], 1, rows.shape[1], past_key.shape[2])
            self.masks[window] = ops.symbolic(
                WINDOW_MASK,
                (rows, past_key),
                {"window": window},
                dtype=past_key.dtype,
                shape=shape,
                version=1,
            )
        return self.masks[window]

    def spread_out(self, x: Tensor) -> Tensor:
        """Tokens in their rows. Shape: (N, X) -> (B, S, X)."""
        return F.embedding(self.spread, x)

    def rotate(self, x: Tensor, positions: Tensor, num_heads: int, table: int | None) -> Tensor:
        """RotaryEmbedding at some positions, by one of the tables or by none.

        Shape: (B, S, heads*P) or (B, heads, S, P), (B, S) -> the same.
        """
        if table is None:
            return x
        return ops.rotary_embedding(x, *self.tables[table], positions, num_heads=num_heads)


def rotary_table(attention: Attention) -> int | None:
    """Which of the rotary tables turns a layer's heads; None for none."""
    return int(attention.local) if attention.rotated else None


class CachedBlock(Residual):
    """One layer over a cache: what both layouts share. Around its attention it is the trained layer."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        attention = block.attention
        self.num_heads = attention.num_heads
        self.num_kv_heads = attention.num_kv_heads
        self.head_dim = attention.head_dim
        self.window = attention.window
        self.scale = attention.scale
        self.table = rotary_table(attention)
        self.parallel = block.parallel
        self.attention_norm = block.attention_norm
        self.qkv = Packed(attention.q_proj, attention.k_proj, attention.v_proj)
        self.q_norm = attention.q_norm
        self.k_norm = attention.k_norm
        self.o_proj = attention.o_proj
        self.attention_out_norm = block.attention_out_norm
        self.mlp_norm = block.mlp_norm
        self.mlp = block.mlp
        self.mlp_out_norm = block.mlp_out_norm

    def extra_repr(self) -> str:
        """What graphs of the same modules may differ in."""
        return f"window={self.window}, table={self.table}"

    def forward(
        self, x: Tensor, past_key: Tensor, past_value: Tensor, where: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Shape: x (N, D), past of the layout -> (N, D) and two of the layout."""
        mixed, key, value = self.attend(self.qkv(self.attention_norm(x)), past_key, past_value, where)
        return self.close(x, self.o_proj(mixed)), key, value

    def attend(
        self, qkv: Tensor, past_key: Tensor, past_value: Tensor, where: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attention to the cache once it holds the new tokens, causal from its bottom right.

        Shape: (N, (H+2G)*P) -> (N, H*P), and the caches.
        """
        raise NotImplementedError


class CachedKV(nn.Module):
    """The part of a layer that writes keys and values, of a frozen state."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.num_kv_heads = block.attention.num_kv_heads
        self.head_dim = block.attention.head_dim
        self.table = rotary_table(block.attention)
        self.attention_norm = block.attention_norm
        self.kv = Packed(block.attention.k_proj, block.attention.v_proj)
        self.k_norm = block.attention.k_norm

    def extra_repr(self) -> str:
        """What graphs of the same modules may differ in."""
        return f"table={self.table}"

    def forward(
        self, x: Tensor, past_key: Tensor, past_value: Tensor, where: Placement
    ) -> tuple[Tensor, Tensor]:
        """Shape: x (N, D) -> the caches."""
        kv = self.kv(self.attention_norm(x))
        k, v = self.keys_values(kv, where)
        return scatter_rows(past_key, k, where.write_indices), scatter_rows(
            past_value, v, where.write_indices
        )

    def keys_values(self, kv: Tensor, where: Any) -> tuple[Tensor, Tensor]:
        """Rotated keys, and values, as the cache's layout has them. Shape: (N, 2*G*P)."""
        raise NotImplementedError


@dataclass(frozen=True)
class HeadSizes:
    """H query heads and G of keys and of values, each of width P, of one product: (N, (H+2G)*P)."""

    num_heads: int
    groups: int
    head_dim: int

    @property
    def in_a_group(self) -> int:
        """R: query heads that share keys."""
        return self.num_heads // self.groups


class HeadPlacement(Placement):
    """With where each head of a token stands, which a pass computes once.

    `queries`, `keys` and `values` say which rows of (N*C, P) stand at (B, heads, S); a token has C heads in
    all: `num_heads` of queries (none in graphs that only write), then `groups` of each other. `back` (N,
    H) says where they stand in (B*H*S, P). `mask` is that of the form of attention for few tokens; it follows
    from where tokens are written, not from their positions, which have gaps in routed layers.

    Where a group has one query head, a copy of each row's first query goes in front and is dropped after:
    ONNX Runtime's kernel takes another path for a single query whose last bits differ.
    """

    def __init__(self, ragged: Ragged, tables: Tables, positions: Tensor | None, sizes: HeadSizes) -> None:
        super().__init__(ragged, tables, positions)
        self.head_dim = sizes.head_dim
        self.in_all = sizes.num_heads + 2 * sizes.groups
        self.keys = self._heads(ragged.spread, sizes.num_heads, sizes.groups)
        self.values = self._heads(ragged.spread, sizes.num_heads + sizes.groups, sizes.groups)

    def _heads(self, spread: Tensor, first: int, count: int) -> Tensor:
        """Shape: (B, S) -> (B, count, S)."""
        return spread[:, None] * self.in_all + torch.arange(first, first + count)[:, None]

    def by_head(self, x: Tensor) -> Tensor:
        """Shape: (N, C*P) -> (N*C, P)."""
        return reshape(x, [-1, self.head_dim], (x.shape[0] * self.in_all, self.head_dim))


class QueryPlacement(HeadPlacement):
    """HeadPlacement, with what queries need."""

    def __init__(
        self,
        ragged: Ragged,
        tables: Tables,
        positions: Tensor | None,
        sizes: HeadSizes,
        past_key: Tensor,
    ) -> None:
        super().__init__(ragged, tables, positions, sizes)
        assert ragged.few is not None, "of the layout BGTP"
        self.forms = ragged.few, ragged.products
        self.mask: Tensor | None = None
        self.past_key = past_key
        self.in_a_group = sizes.in_a_group
        copied = int(sizes.in_a_group == 1)
        self.query_positions = self.positions
        spread = ragged.spread
        if copied:
            self.query_positions = torch.cat((self.positions[:, :1], self.positions), dim=1)  # (B, S+1)
            spread = torch.cat((spread[:, :1], spread), dim=1)
        else:
            rows = torch.cat([self.written] * sizes.in_a_group, dim=1)  # (B, R*S)
            shape = (rows.shape[0], 1, rows.shape[1], past_key.shape[2])
            inputs = (rows, past_key, ragged.few)
            self.mask = ops.symbolic(MASK, inputs, dtype=past_key.dtype, shape=shape, version=1)
        self.queries = self._heads(spread, 0, sizes.num_heads)
        num_places = self.ones[:1].sum(dim=1)  # (1): S
        row = ragged.places.div(num_places, rounding_mode="floor")  # (N)
        places = ragged.places + row * copied + copied
        num_places = num_places + copied
        head = torch.arange(sizes.num_heads) * num_places  # (H)
        self.back = (places + row * num_places * (sizes.num_heads - 1))[:, None] + head  # (N, H)

    @cached_property
    def window_rows(self) -> Tensor:
        """Where in the cache each query of a group stands. Shape: (B, R*S), or (B, S+1) of a single head."""
        if self.in_a_group == 1:
            return self.first_copied
        return torch.cat([self.written] * self.in_a_group, dim=1)


class HeadBlock(CachedBlock):
    """One layer over a cache (B, G, T, P)."""

    def attend(
        self, qkv: Tensor, past_key: Tensor, past_value: Tensor, where: QueryPlacement
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See CachedBlock."""
        heads = where.by_head(qkv)
        q = self.q_norm(F.embedding(where.queries, heads))  # (B, H, S, P)
        k = self.k_norm(F.embedding(where.keys, heads))
        q = where.rotate(q, where.query_positions, self.num_heads, self.table)
        k = where.rotate(k, where.positions, self.num_kv_heads, self.table)
        key = scatter_rows(past_key, k, where.write_indices)
        value = scatter_rows(past_value, F.embedding(where.values, heads), where.write_indices)
        mixed = self._mix(q, key, value, where)
        num_tokens = where.places.shape[0]
        rows = F.embedding(where.back, mixed)  # (N, H, P)
        width = self.num_heads * self.head_dim
        return reshape(rows, [-1, width], (num_tokens, width)), key, value

    def _mix(self, q: Tensor, key: Tensor, value: Tensor, where: QueryPlacement) -> Tensor:
        """Shape: (B, H, S, P) -> (B*H*S, P)."""
        attributes: dict[str, Any] = {"scale": self.scale or self.head_dim**-0.5}
        inputs: tuple[Tensor | None, ...]
        mask, forms = where.mask, where.forms
        if self.window:
            mask = where.window_mask(self.window, where.window_rows, where.past_key)
            forms = torch.tensor(True), forms[1]
        if mask is not None:
            attributes["by_group"] = [0, self.num_kv_heads, -1, self.head_dim]
            inputs = (q, key, value, mask, where.lengths, *forms)
            mixed = ops.symbolic(FEW_OR_MANY, inputs, attributes, dtype=q.dtype, shape=q.shape, version=1)
        else:
            attributes["is_causal"] = 1
            inputs = (q, key, value, None, None, None, where.lengths)
            mixed = ops.symbolic("Attention", inputs, attributes, dtype=q.dtype, shape=q.shape, version=OPSET)
        num_rows = q.shape[0] * q.shape[1] * q.shape[2]
        return reshape(mixed, [-1, self.head_dim], (num_rows, self.head_dim))


class HeadKV(CachedKV):
    """Keys and values for a cache (B, G, T, P)."""

    def keys_values(self, kv: Tensor, where: HeadPlacement) -> tuple[Tensor, Tensor]:
        """See CachedKV."""
        heads = where.by_head(kv)
        k = self.k_norm(F.embedding(where.keys, heads))
        k = where.rotate(k, where.positions, self.num_kv_heads, self.table)
        return k, F.embedding(where.values, heads)


class FlatPlacement(Placement):
    """With a copy of each row's first query, and where each token stands then."""

    def __init__(self, ragged: Ragged, tables: Tables, positions: Tensor | None, past_key: Tensor) -> None:
        super().__init__(ragged, tables, positions)
        self.past_key = past_key
        self.query_positions = torch.cat((self.positions[:, :1], self.positions), dim=1)  # (B, S+1)
        self.query_spread = torch.cat((ragged.spread[:, :1], ragged.spread), dim=1)
        copies = gather(
            self.ones.cumsum(dim=0).flatten(), ragged.places, 0, ragged.places.shape
        )  # (N): of first queries before a token
        self.query_places = ragged.places + copies


class FlatBlock(CachedBlock):
    """One layer over a cache (B, T, G*P)."""

    def attend(
        self, qkv: Tensor, past_key: Tensor, past_value: Tensor, where: FlatPlacement
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See CachedBlock.

        A copy of each row's first query goes in front and is dropped after: ONNX Runtime's kernel takes
        another path for S = 1 whose last bits differ, and with the extra one every S gives the same bits.
        """
        kv_width = self.num_kv_heads * self.head_dim
        q, k, v = torch.split(qkv, [self.num_heads * self.head_dim, kv_width, kv_width], dim=-1)
        q = _per_head(self.q_norm, q, self.num_heads)
        k = _per_head(self.k_norm, k, self.num_kv_heads)
        k = where.rotate(where.spread_out(k), where.positions, self.num_kv_heads, self.table)
        key = scatter_rows(past_key, k, where.write_indices)
        value = scatter_rows(past_value, where.spread_out(v), where.write_indices)
        q = where.rotate(
            F.embedding(where.query_spread, q), where.query_positions, self.num_heads, self.table
        )  # (B, S+1, H*P)
        attributes: dict[str, Any] = {
            "is_causal": int(not self.window),
            "q_num_heads": self.num_heads,
            "kv_num_heads": self.num_kv_heads,
        }
        if self.scale is not None:
            attributes["scale"] = self.scale
        inputs: tuple[Tensor | None, ...] = (q, key, value, None, None, None, where.lengths)
        if self.window:
            mask = where.window_mask(self.window, where.first_copied, where.past_key[:, None])
            inputs = (q, key, value, mask)
        mixed = ops.symbolic("Attention", inputs, attributes, dtype=q.dtype, shape=q.shape, version=OPSET)
        return F.embedding(where.query_places, mixed.flatten(0, 1)), key, value


class FlatKV(CachedKV):
    """Keys and values for a cache (B, T, G*P)."""

    def keys_values(self, kv: Tensor, where: Placement) -> tuple[Tensor, Tensor]:
        """See CachedKV."""
        k, v = kv.chunk(2, dim=-1)
        k = _per_head(self.k_norm, k, self.num_kv_heads)
        k = where.rotate(where.spread_out(k), where.positions, self.num_kv_heads, self.table)
        return k, where.spread_out(v)


def _per_head(norm: nn.Module, x: Tensor, num_heads: int) -> Tensor:
    """A norm over each head, where the model has one. Shape: (N, heads*P) -> same."""
    if isinstance(norm, nn.Identity):
        return x
    out: Tensor = norm(torch.unflatten(x, -1, (num_heads, -1))).flatten(-2)
    return out


class CacheForm:
    """What all graphs over a cache share: its layout, their type, and the rotary tables in it.

    The tables have their last position twice: RotaryEmbedding refuses more places than positions, and queries
    of the layout BTK have S + 1.
    """

    def __init__(self, model: Decoder, layout: str, dtype: torch.dtype) -> None:
        config = model.config
        self.layout = layout
        self.dtype = dtype
        self.dim = config.dim
        self.by_head = layout == "BGTP"
        names = ("cos", "sin", "local_cos", "local_sin") if config.local_rope_theta else ("cos", "sin")
        self.tables = {
            name: torch.cat((table, table[-1:])).to(dtype)
            for name, table in ((name, getattr(model, name)) for name in names)
        }
        self.sizes = HeadSizes(config.num_heads, config.num_kv_heads, config.head_dim)

    def placement(
        self, ragged: Ragged, tables: Tables, past_key: Tensor, positions: Tensor | None = None
    ) -> Placement:
        """Where the new tokens of a pass go, by the graph's own rotary tables."""
        if not self.by_head:
            return FlatPlacement(ragged, tables, positions, past_key)
        return QueryPlacement(ragged, tables, positions, self.sizes, past_key)

    def kv_placement(self, ragged: Ragged, tables: Tables) -> Placement:
        """The same of a pass that only writes keys and values."""
        if not self.by_head:
            return Placement(ragged, tables)
        return HeadPlacement(ragged, tables, None, replace(self.sizes, num_heads=0))

    def block(self, block: nn.Module) -> CachedBlock:
        """A layer over a cache of this layout."""
        assert isinstance(block, Block)
        return HeadBlock(block) if self.by_head else FlatBlock(block)

    def kv(self, block: nn.Module) -> CachedKV:
        """The part of a layer that writes keys and values."""
        assert isinstance(block, Block)
        return HeadKV(block) if self.by_head else FlatKV(block)

    def shape(self, num_rows: int, length: int) -> tuple[int, ...]:
        """Of a buffer of keys or values."""
        if self.by_head:
            return num_rows, self.sizes.groups, length, self.sizes.head_dim
        return num_rows, length, self.sizes.groups * self.sizes.head_dim

    @property
    def axes(self) -> dict[int, str]:
        """Which of its axes may be of any length."""
        return {0: "B", 2 if self.by_head else 1: "T"}
