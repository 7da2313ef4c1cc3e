"""The serving form of the model: small modules over the trained weights, one an ONNX graph.

Shapes: N new tokens in all, B rows (sequences), S new tokens a row at most, T length of the cache buffers, M
rows of the hidden pool, D width, V vocabulary, G*P width of a token's keys (and of its values) in one layer.

Every segment follows one contract. Rows may have different numbers of new tokens, and none: everything but
attention runs over the N real tokens, ragged; for attention `spread` (B, S) says which token stands at each
place of a row, and `places` (N) where each token stands, as b*S+s. A row has `write_indices[b]` tokens in the
cache; its S places are written there, at those positions, and attend to all before them. What pads wrote past
a row's real length is overwritten later and never attended to. Lengths and positions are computed inside the
graph: a caller cannot pass a wrong one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name
from torch.onnx import ops

from ease_train.model import exits
from ease_train.model.decoder import Block, Decoder, RoutedBlock

OPSET = 24


def scatter_rows(cache: Tensor, new: Tensor, write_indices: Tensor) -> Tensor:
    """TensorScatter: `new` written into `cache` along its sequence axis.

    Shape: (B, T, X), (B, S, X), (B) -> (B, T, X).
    """
    attributes: dict[str, Any] = {"axis": 1, "mode": "linear"}
    return ops.symbolic(
        "TensorScatter",
        (cache, new, write_indices),
        attributes,
        dtype=cache.dtype,
        shape=cache.shape,
        version=OPSET,
    )


def gather(x: Tensor, index: Tensor, axis: int, shape: Sequence[int]) -> Tensor:
    """Gather along an axis, to the shape that comes of it; torch's own ways leave a table of ids in the graph
    as a constant.
    """
    return ops.symbolic("Gather", (x, index), {"axis": axis}, dtype=x.dtype, shape=shape, version=OPSET)


def _per_head(norm: nn.Module, x: Tensor, heads: tuple[int, int]) -> Tensor:
    """A norm over each head, where the model has one. Shape: (B, S, heads*P) -> same."""
    if isinstance(norm, nn.Identity):
        return x
    out: Tensor = norm(torch.unflatten(x, -1, heads)).flatten(-2)
    return out


class ServingBlock(nn.Module):
    """One layer over a cache, written with the standard operators RotaryEmbedding, TensorScatter and
    Attention.
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def scatter(
        self, x: Tensor, past_key: Tensor, past_value: Tensor, where: "Placement"
    ) -> tuple[Tensor, Tensor]:
        """The caches with the new tokens' keys (rotated) and values.

        Shape: (N, D), (B, T, G*P) -> two of (B, T, G*P).
        """
        attention = self.block.attention
        normed = self.block.attention_norm(x)
        k = _per_head(
            attention.k_norm, attention.k_proj(normed), (attention.num_kv_heads, attention.head_dim)
        )
        k = where.rotate(where.spread_out(k), where.positions, attention.num_kv_heads)
        v = where.spread_out(attention.v_proj(normed))
        return scatter_rows(past_key, k, where.write_indices), scatter_rows(
            past_value, v, where.write_indices
        )

    def forward(
        self, x: Tensor, past_key: Tensor, past_value: Tensor, where: "Placement"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Shape: x (N, D), past (B, T, G*P) -> (N, D) and two of (B, T, G*P)."""
        attention = self.block.attention
        key, value = self.scatter(x, past_key, past_value, where)
        q = attention.q_proj(self.block.attention_norm(x))
        q = _per_head(attention.q_norm, q, (attention.num_heads, attention.head_dim))
        x = x + attention.o_proj(self._attend(q, key, value, where))
        return x + self.block.mlp(self.block.mlp_norm(x)), key, value

    def _attend(self, q: Tensor, key: Tensor, value: Tensor, where: "Placement") -> Tensor:
        """Attention to the cache, causal from its bottom right. Shape: (N, H*P) -> (N, H*P).

        A copy of each row's first query goes in front and is dropped after: ONNX Runtime's kernel takes
        another path for S = 1 whose last bits differ, and with the extra one every S gives the same bits.
        """
        attention = self.block.attention
        q = where.rotate(
            F.embedding(where.query_spread, q), where.query_positions, attention.num_heads
        )  # (B, S+1, H*P)
        attributes: dict[str, int | str] = {
            "is_causal": 1,
            "q_num_heads": attention.num_heads,
            "kv_num_heads": attention.num_kv_heads,
        }
        inputs = (q, key, value, None, None, None, where.lengths)
        mixed = ops.symbolic("Attention", inputs, attributes, dtype=q.dtype, shape=q.shape, version=OPSET)  # type: ignore[arg-type]
        return F.embedding(where.query_places, mixed.flatten(0, 1))


@dataclass(frozen=True)
class Ragged:
    """Where the new tokens stand: the inputs that every graph over a cache shares.

    Shapes: spread (B, S), places (N), write_indices (B).
    """

    spread: Tensor
    places: Tensor
    write_indices: Tensor


class Placement:
    """Where the new tokens of each row go: their positions, and the length of the row's cache once they are
    written.

    Positions follow from where the tokens are written, unless they are given, as (N): a routed layer's cache
    has gaps. Places are counted by sums over ones: ONNX Runtime moves what computes on a Shape to the CPU,
    and then no graph loads on CUDA.
    """

    def __init__(self, ragged: Ragged, cos: Tensor, sin: Tensor, positions: Tensor | None = None) -> None:
        self.spread = ragged.spread
        self.write_indices = ragged.write_indices
        self.cos = cos
        self.sin = sin
        limit = cos.shape[0] - 1
        ones = (ragged.spread == ragged.spread).long()  # (B, S)
        self.lengths = ragged.write_indices + ones.sum(dim=1)  # (B)
        dense = (
            ragged.write_indices[:, None] + ones.cumsum(dim=1) - 1
            if positions is None
            else torch.take(positions, ragged.spread)
        )
        self.positions = dense.clamp(max=limit - 1)  # (B, S); pads may reach past the limit
        self.query_positions = torch.cat(
            (self.positions[:, :1], self.positions), dim=1
        )  # (B, S+1), as the queries
        self.query_spread = torch.cat((ragged.spread[:, :1], ragged.spread), dim=1)
        copies = gather(
            ones.cumsum(dim=0).flatten(), ragged.places, 0, ragged.places.shape
        )  # (N): of first queries before a token
        self.query_places = ragged.places + copies

    def spread_out(self, x: Tensor) -> Tensor:
        """Tokens in their rows. Shape: (N, X) -> (B, S, X)."""
        return F.embedding(self.spread, x)

    def rotate(self, x: Tensor, positions: Tensor, num_heads: int) -> Tensor:
        """RotaryEmbedding at some positions. Shape: (B, S, heads*P), (B, S) -> (B, S, heads*P)."""
        return ops.rotary_embedding(x, self.cos, self.sin, positions, num_heads=num_heads)


class RotaryTables:
    """The rotary tables that all graphs share, in the type of the weights.

    Each has its last position twice: RotaryEmbedding refuses more places than positions, and queries have S +
    1.
    """

    def __init__(self, model: Decoder) -> None:
        self.cos, self.sin = (
            torch.cat((table, table[-1:])).to(model.embed.weight.dtype) for table in (model.cos, model.sin)
        )


class _OverCache(nn.Module):
    """What segment and kv graphs share: the layers and the rotary tables."""

    cos: Tensor
    sin: Tensor

    def __init__(self, rotary: RotaryTables, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ServingBlock(block) for block in blocks)  # type: ignore[arg-type]
        self.register_buffer("cos", rotary.cos)
        self.register_buffer("sin", rotary.sin)

    def run(
        self, hidden: Tensor, active: Tensor, ragged: Ragged, past: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """All layers; a frozen token (`active` False) passes through.

        Returns the hidden state and the new caches.
        """
        where = Placement(ragged, self.cos, self.sin)
        present = []
        for i, block in enumerate(self.blocks):
            after, key, value = block(hidden, past[2 * i], past[2 * i + 1], where)
            hidden = torch.where(active[:, None], after, hidden)
            present += [key, value]
        return hidden, *present


class FirstSegment(_OverCache):
    """segment_01: input_ids (N), active (N), spread, places, write_indices, past (B, T, G*P)... -> embedded,
    hidden (N, D), present...

    `embedded` is what entered the first layer: the state before the first exit, for policies that compare.
    """

    def __init__(self, rotary: RotaryTables, blocks: Iterable[nn.Module], embed: nn.Embedding) -> None:
        super().__init__(rotary, blocks)
        self.embed = embed

    def forward(
        self,
        input_ids: Tensor,
        active: Tensor,
        spread: Tensor,
        places: Tensor,
        write_indices: Tensor,
        past: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        embedded = self.embed(input_ids)
        return embedded, *self.run(embedded, active, Ragged(spread, places, write_indices), past)


class Segment(_OverCache):
    """segment_k: pool (M, D), index (N), then as the first segment -> hidden (N, D), present...

    Also block_k, an exit's own layer.
    """

    def forward(
        self,
        pool: Tensor,
        index: Tensor,
        active: Tensor,
        spread: Tensor,
        places: Tensor,
        write_indices: Tensor,
        past: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        return self.run(F.embedding(index, pool), active, Ragged(spread, places, write_indices), past)


class PropagateKV(_OverCache):
    """kv_k: keys and values of tokens that have left, every layer's from the one frozen hidden state.

    No `active`, no hidden out.
    """

    def forward(
        self,
        pool: Tensor,
        index: Tensor,
        spread: Tensor,
        places: Tensor,
        write_indices: Tensor,
        past: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        hidden = F.embedding(index, pool)
        where = Placement(Ragged(spread, places, write_indices), self.cos, self.sin)
        present: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            assert isinstance(block, ServingBlock)
            present += block.scatter(hidden, past[2 * i], past[2 * i + 1], where)
        return tuple(present)


class Routed(nn.Module):
    """segment_k of the kind `routed`: pool (M, D), index (N), positions (N), spread, places, write_indices,
    past -> as a segment.

    Runs only the tokens that go in: x + router(x) * (block(x) - x). `write_indices` counts those that went in
    before.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, model: Decoder, rotary: RotaryTables, layer: int) -> None:
        super().__init__()
        routed = model.layers[layer - 1]
        assert isinstance(routed, RoutedBlock)
        self.block = ServingBlock(routed.block)
        self.router = routed.router
        self.register_buffer("cos", rotary.cos)
        self.register_buffer("sin", rotary.sin)

    def forward(
        self,
        pool: Tensor,
        index: Tensor,
        positions: Tensor,
        spread: Tensor,
        places: Tensor,
        write_indices: Tensor,
        past: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        x = F.embedding(index, pool)
        where = Placement(Ragged(spread, places, write_indices), self.cos, self.sin, positions)
        after, key, value = self.block(x, past[0], past[1], where)
        return x + self.router(x)[..., None] * (after - x), key, value


class Route(nn.Module):
    """route_k: pool (M, D), index (N) -> goes_in (N) bool, the causal rule of a routed layer."""

    def __init__(self, model: Decoder, layer: int) -> None:
        super().__init__()
        routed = model.layers[layer - 1]
        assert isinstance(routed, RoutedBlock)
        self.routed = routed

    def forward(self, pool: Tensor, index: Tensor) -> Tensor:
        return self.routed.goes_in(F.embedding(index, pool))


class ExitHead(nn.Module):
    """exit_k: pool (M, D), index (N) -> exit_hidden (N, D), after the exit's adapter and norm.

    Where the exit has a layer of its own, the rows are what came out of that.
    """

    def __init__(self, model: Decoder, layer: int) -> None:
        super().__init__()
        self.module = model.exit(layer).tokenwise()

    def forward(self, pool: Tensor, index: Tensor) -> Tensor:
        out: Tensor = self.module(F.embedding(index, pool))
        return out


class GateHead(ExitHead):
    """gate_k: pool (M, D), index (N) -> exit_hidden (N, D), and probability (N) that the full-depth model
    would say what this exit says.

    The hidden state comes out too, so that the head of a token that leaves can go on from there.
    """

    def __init__(self, model: Decoder, layer: int) -> None:
        super().__init__(model, layer)
        gate = model.exit(layer).gate
        assert gate is not None
        self.gate = gate

    def forward(self, pool: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        exit_hidden = self.module(F.embedding(index, pool))
        return exit_hidden, self.gate(exit_hidden)


class Similarity(nn.Module):
    """similarity: pool (M, D), index (N), before (N) -> similarity (N), max(0, cosine) of two hidden states
    of a token.
    """

    def forward(self, pool: Tensor, index: Tensor, before: Tensor) -> Tensor:
        now = F.embedding(index, pool).float()
        then = F.embedding(before, pool).float()
        norms = now.square().sum(-1).sqrt() * then.square().sum(-1).sqrt()
        return ((now * then).sum(-1) / norms.clamp(min=1e-12)).clamp(min=0.0, max=1.0).to(pool.dtype)


class Head(nn.Module):
    """head: exit_hidden (N, D) -> logits (N, V), and what exit policies need of them, reduced in the graph.

    top_id (N) int64, top_prob (N), margin (N) = p1 - p2, entropy (N) in nats.
    """

    def __init__(self, lm_head: nn.Linear) -> None:
        super().__init__()
        self.lm_head = lm_head

    def forward(self, exit_hidden: Tensor) -> tuple[Tensor, ...]:
        logits = self.lm_head(exit_hidden)  # (N, V)
        top_id, *figures = self.figures(logits)
        return logits, top_id, *figures

    def figures(self, logits: Tensor) -> tuple[Tensor, ...]:
        """The place of the largest logit, and the three figures. Shape: (N, V) -> (N) each."""
        wide = logits.float()  # sums over a vocabulary need more than 16 bits
        top, ids = torch.topk(wide, 2, dim=-1)  # (N, 2)
        shifted = wide - top[:, :1]
        exponentials = shifted.exp()
        total = exponentials.sum(dim=-1)  # (N)
        top_prob = 1.0 / total
        margin = top_prob - (top[:, 1] - top[:, 0]).exp() / total
        entropy = total.log() - (exponentials * shifted).sum(dim=-1) / total
        return ids[:, 0], *(figure.to(logits.dtype) for figure in (top_prob, margin, entropy))


class ReducedHead(Head):
    """A head that knows M tokens, and how likely another is: the same outputs, over the whole vocabulary.

    `places` (V) says where a token's logit stands among the M, and M for those that it does not know, each of
    which has its share of the rest; the two with the largest stand for them where the most likely tokens are
    looked for.
    """

    ids: Tensor
    log_shares: Tensor
    first_log_shares: Tensor
    places: Tensor

    def __init__(self, head: exits.ReducedHead) -> None:
        super().__init__(head.known)
        self.rest = head.rest
        known = head.ids
        log_shares = head.log_shares
        places = torch.full((len(log_shares),), len(known)).index_copy(0, known, torch.arange(len(known)))
        unknown = (places == len(known)).nonzero().flatten()
        first = unknown[log_shares[unknown].argsort(descending=True)[:2]]
        self.register_buffer("ids", torch.cat((known, first)))
        self.register_buffer("log_shares", log_shares)
        self.register_buffer("first_log_shares", log_shares[first])
        self.register_buffer("places", places)
        self.rest_entropy = torch.special.entr(log_shares[unknown].double().exp()).sum().item()

    def forward(self, exit_hidden: Tensor) -> tuple[Tensor, ...]:
        known, rest = self.lm_head(exit_hidden), self.rest(exit_hidden)  # (N, M), (N, 1)
        place, *figures = self.figures_with(known, rest)
        logits = (
            gather(torch.cat((known, rest), dim=-1), self.places, 1, (*known.shape[:1], *self.places.shape))
            + self.log_shares
        )
        return logits, gather(self.ids, place, 0, place.shape), *figures

    def figures_with(self, known: Tensor, rest: Tensor) -> tuple[Tensor, ...]:
        """As `figures`, with the rest's logit. Shape: (N, M), (N, 1) -> (N) each."""
        wide = known.float()
        rest = rest.float()
        top, ids = torch.topk(torch.cat((wide, rest + self.first_log_shares), dim=-1), 2, dim=-1)  # (N, 2)
        largest = torch.maximum(top[:, :1], rest)
        shifted = wide - largest
        rest = rest - largest
        exponentials = shifted.exp()
        mass = rest.exp()
        total = exponentials.sum(dim=-1) + mass[:, 0]  # (N)
        first, second = ((top - largest).exp() / total[:, None]).unbind(-1)
        moments = (exponentials * shifted).sum(dim=-1) + (mass * (rest - self.rest_entropy))[:, 0]
        return ids[:, 0], *(
            figure.to(known.dtype) for figure in (first, first - second, total.log() - moments / total)
        )
