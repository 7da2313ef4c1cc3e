"""How many bytes of weights a graph call reads, from the sizes of a bundle's files."""

from collections.abc import Sequence

from ease_runtime.bundle.manifest import Manifest
from ease_runtime.engine.layout import Call


def bytes_read(manifest: Manifest, calls: Sequence[Call]) -> int:
    """Of all calls together.

    K/V of tokens that have left are not counted: what they read is little, and in no file of its own.
    """
    each = {(call.graph, call.number): _bytes_of(manifest, call) for call in set(calls)}
    return sum(each[call.graph, call.number] for call in calls)


def _bytes_of(manifest: Manifest, call: Call) -> int:
    if call.graph == "segment":
        return _segment_bytes(manifest, call.number)
    if call.graph in ("exit", "gate", "block"):
        leave = manifest.exits[call.number]
        parts = {"exit": (leave.graph, leave.head), "gate": (leave.gate,), "block": (leave.block,)}[
            call.graph
        ]
        return sum(_file_bytes(manifest, name) for name in parts)
    return 0


def _segment_bytes(manifest: Manifest, number: int) -> int:
    """A segment's layers; the first one's file may hold the embedding, too, of which a call reads a row a
    token.
    """
    segments = manifest.segments
    whole = _file_bytes(manifest, segments[number].graph)
    others = [_file_bytes(manifest, s.graph) / s.num_layers for s in segments[1:]]
    return min(whole, round(segments[0].num_layers * min(others))) if number == 0 and others else whole


def _file_bytes(manifest: Manifest, graph: str | None) -> int:
    found = manifest.files.get(f"{graph}.data")
    return 0 if found is None else found.num_bytes
