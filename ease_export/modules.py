"""The serving form of the model: small modules over the trained weights, one an ONNX graph.

Shapes: N new tokens in all, B rows (sequences), S new tokens a row at most, T length of the cache buffers, M
rows of the hidden pool, D width, V vocabulary; `past` and `present` are of the cache's layout (layers.py).

Every segment follows one contract. Rows may have different numbers of new tokens, and none: everything but
attention runs over the N real tokens, ragged; for attention `spread` (B, S) says which token stands at each
place of a row, and `places` (N) where each token stands, as b*S+s. A row has `write_indices[b]` tokens in the
cache; its S places are written there, at those positions, and attend to all before them. What pads wrote past
a row's real length is overwritten later and never attended to. Lengths and positions are computed inside the
graph: a caller cannot pass a wrong one.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name

from ease_export.layers import CacheForm, Placement, Ragged, Tables, gather
from ease_export.weights import read_as
from ease_train.model import exits
from ease_train.model.decoder import Decoder, Embedding, RoutedBlock


def wide_of_bf16(x: Tensor) -> Tensor:
    """bf16 as fp32, any other type as it is. Shape: (...) -> same."""
    return x.to(read_as(x.dtype))


class OverCache(nn.Module):
    """What graphs over a cache share: the layers and the rotary tables."""

    def __init__(self, form: CacheForm, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.form = form
        self.blocks = nn.ModuleList(blocks)
        for name, table in form.tables.items():
            self.register_buffer(name, table)

    @property
    def tables(self) -> Tables:
        """Cosines and sines, and those of windowed layers where these have their own."""
        found = [getattr(self, name) for name in self.form.tables]
        return list(zip(found[::2], found[1::2], strict=True))

    def placement(
        self, ragged: Sequence[Tensor], past: Sequence[Tensor], positions: Tensor | None = None
    ) -> Placement:
        """Where the new tokens go."""
        return self.form.placement(Ragged(*ragged), self.tables, past[0], positions)

    def run(
        self, hidden: Tensor, active: Tensor, ragged: Sequence[Tensor], past: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """All layers; a frozen token (`active` False) passes through.

        Returns the hidden state and the new caches.
        """
        where = self.placement(ragged, past)
        present = []
        for i, block in enumerate(self.blocks):
            after, key, value = block(hidden, past[2 * i], past[2 * i + 1], where)
            hidden = torch.where(active[:, None], after, hidden)
            present += [key, value]
        return hidden, *present


class FirstSegment(OverCache):
    """segment_01: input_ids (N), active (N), ragged, past -> embedded, hidden (N, D), present.

    `embedded` is what entered the first layer: the state before the first exit, for policies that compare.
    `ragged` are the tensors of `layers.Ragged`.
    """

    def __init__(self, form: CacheForm, blocks: Iterable[nn.Module], embed: Embedding) -> None:
        super().__init__(form, [form.block(block) for block in blocks])
        self.embed = embed

    def forward(
        self, input_ids: Tensor, active: Tensor, ragged: Sequence[Tensor], past: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        rows = F.embedding(input_ids, self.embed.weight)
        if self.embed.scale != 1.0:  # which bf16 would round, as it would 33.94 to 34
            rows = self.embed.scaled(wide_of_bf16(rows)).to(rows.dtype)
        return rows, *self.run(rows, active, ragged, past)


class Segment(OverCache):
    """segment_k: pool (M, D), index (N), then as the first segment -> hidden (N, D), present.

    Also block_k, an exit's own layer.
    """

    def __init__(self, form: CacheForm, blocks: Iterable[nn.Module]) -> None:
        super().__init__(form, [form.block(block) for block in blocks])

    def forward(
        self,
        pool: Tensor,
        index: Tensor,
        active: Tensor,
        ragged: Sequence[Tensor],
        past: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        return self.run(F.embedding(index, pool), active, ragged, past)


class PropagateKV(OverCache):
    """kv_k: keys and values of tokens that have left, every layer's from the one frozen hidden state.

    No `active`, no hidden out.
    """

    def __init__(self, form: CacheForm, blocks: Iterable[nn.Module]) -> None:
        super().__init__(form, [form.kv(block) for block in blocks])

    def forward(
        self, pool: Tensor, index: Tensor, ragged: Sequence[Tensor], past: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        hidden = F.embedding(index, pool)
        where = self.form.kv_placement(Ragged(*ragged), self.tables)
        present: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            present += block(hidden, past[2 * i], past[2 * i + 1], where)
        return tuple(present)


class Routed(OverCache):
    """segment_k of the kind `routed`: pool (M, D), index (N), positions (N), ragged, past -> as a segment.

    Runs only the tokens that go in: x + router(x) * (block(x) - x). `write_indices` counts those that went in
    before.
    """

    def __init__(self, form: CacheForm, layers: Iterable[nn.Module]) -> None:
        (routed,) = layers
        assert isinstance(routed, RoutedBlock)
        super().__init__(form, [form.block(routed.block)])
        self.router = routed.router

    def forward(
        self,
        pool: Tensor,
        index: Tensor,
        positions: Tensor,
        ragged: Sequence[Tensor],
        past: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        x = F.embedding(index, pool)
        where = self.placement(ragged, past, positions)
        after, key, value = self.blocks[0](x, past[0], past[1], where)
        wide = wide_of_bf16(x)
        mixed = wide + self.router(wide)[..., None] * (after - wide)
        return mixed.to(x.dtype), key, value


class Route(nn.Module):
    """route_k: pool (M, D), index (N) -> goes_in (N) bool, the causal rule of a routed layer."""

    def __init__(self, model: Decoder, layer: int) -> None:
        super().__init__()
        routed = model.layers[layer - 1]
        assert isinstance(routed, RoutedBlock)
        self.routed = routed

    def forward(self, pool: Tensor, index: Tensor) -> Tensor:
        return self.routed.goes_in(wide_of_bf16(F.embedding(index, pool)))


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
        return exit_hidden, self.gate(wide_of_bf16(exit_hidden))


class Similarity(nn.Module):
    """similarity: pool (M, D), index (N), before (N) -> similarity (N), max(0, cosine) of two hidden states
    of a token.
    """

    def forward(self, pool: Tensor, index: Tensor, before: Tensor) -> Tensor:
        now = F.embedding(index, pool).float()
        then = F.embedding(before, pool).float()
        norms = now.square().sum(-1).sqrt() * then.square().sum(-1).sqrt()
        cosine = ((now * then).sum(-1) / norms.clamp(min=1e-12)).clamp(min=0.0, max=1.0)
        return cosine.to(read_as(pool.dtype))


class Head(nn.Module):
    """head: exit_hidden (N, D) -> logits (N, V), and what exit policies need of them, reduced in the graph.

    top_id (N) int64, top_prob (N), margin (N) = p1 - p2, entropy (N) in nats.
    """

    def __init__(self, lm_head: nn.Linear) -> None:
        super().__init__()
        self.lm_head = lm_head

    def forward(self, exit_hidden: Tensor) -> tuple[Tensor, ...]:
        logits = wide_of_bf16(self.lm_head(exit_hidden))  # (N, V)
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

    def __init__(self, head: exits.ReducedHead, dtype: torch.dtype) -> None:
        super().__init__(head.known)
        self.rest = head.rest
        known = head.ids
        log_shares = head.log_shares.to(read_as(dtype))
        places = torch.full((len(log_shares),), len(known)).index_copy(0, known, torch.arange(len(known)))
        unknown = (places == len(known)).nonzero().flatten()
        first = unknown[log_shares[unknown].argsort(descending=True)[:2]]
        self.register_buffer("ids", torch.cat((known, first)))
        self.register_buffer("log_shares", log_shares)
        self.register_buffer("first_log_shares", log_shares[first])
        self.register_buffer("places", places)
        self.rest_entropy = torch.special.entr(log_shares[unknown].double().exp()).sum().item()

    def extra_repr(self) -> str:
        """What graphs of the same modules may differ in."""
        return f"rest_entropy={self.rest_entropy}"

    def forward(self, exit_hidden: Tensor) -> tuple[Tensor, ...]:
        known = wide_of_bf16(self.lm_head(exit_hidden))  # (N, M)
        rest = wide_of_bf16(self.rest(exit_hidden))  # (N, 1)
        place, *figures = self.figures_with(known, rest)
        logits = (
            gather(torch.cat((known, rest), dim=-1), self.places, 1, (*known.shape[:1], *self.places.shape))
            + self.log_shares
        )
        return logits, gather(self.ids, place, 0, place.shape), *figures

    def figures_with(self, known: Tensor, rest: Tensor) -> tuple[Tensor, ...]:
        """As `figures`, with the rest's logit. Shape: (N, M), (N, 1) -> (N) each."""
        wide = known.float()
        likely = (
            rest + self.first_log_shares
        ).float()  # a small weight by itself would be folded into its cast
        rest = rest.float()
        top, ids = torch.topk(torch.cat((wide, likely), dim=-1), 2, dim=-1)  # (N, 2)
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
