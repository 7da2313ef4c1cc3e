"""What each graph of a bundle takes and gives, as names and shapes. None stands for any length.

Buffers are bound to graphs by address, so a graph that is not what the manifest says must be refused before
it runs.
"""

from ease_runtime.bundle.manifest import Manifest, SegmentInfo

Shape = tuple[int | None, ...]
Signature = tuple[dict[str, Shape], dict[str, Shape]]  # inputs, outputs

ANY: Shape = (None,)


def _looks(manifest: Manifest) -> dict[str, Shape]:
    return {"pool": (None, manifest.dim), "index": ANY}


def _over_cache(
    manifest: Manifest, segment: SegmentInfo, inputs: dict[str, Shape], outputs: dict[str, Shape]
) -> Signature:
    names = [f"{name}.{i}" for i in range(segment.num_layers) for name in ("key", "value")]
    by_head = manifest.cache_layout == "BGTP"
    groups = manifest.num_kv_heads
    flat: Shape = (None, None, manifest.kv_dim)
    shape = (None, groups, None, manifest.kv_dim // groups) if by_head else flat
    inputs = {
        **inputs,
        "spread": (None, None),
        "places": ANY,
        "write_indices": ANY,
        **(dict.fromkeys(("few", "products"), ()) if by_head else {}),
        **{f"past_{name}": shape for name in names},
    }
    return inputs, {**outputs, **{f"present_{name}": shape for name in names}}


def of_segment(manifest: Manifest, segment: SegmentInfo) -> Signature:
    """Of a segment's graph: the first takes ids and also gives their embeddings, a routed one takes
    positions.
    """
    states: dict[str, Shape] = {"hidden": (None, manifest.dim)}
    if segment.first_layer == 1:
        return _over_cache(
            manifest, segment, {"input_ids": ANY, "active": ANY}, {"embedded": (None, manifest.dim), **states}
        )
    return _over_cache(
        manifest,
        segment,
        {**_looks(manifest), "positions" if segment.kind == "routed" else "active": ANY},
        states,
    )


def of_kv(manifest: Manifest, segment: SegmentInfo) -> Signature:
    """Of a segment's graph for tokens that have left."""
    return _over_cache(manifest, segment, _looks(manifest), {})


def of_block(manifest: Manifest) -> Signature:
    """Of an exit's own layer: as a segment of one."""
    own = SegmentInfo("layers", 2, 2, "", None)
    return of_segment(manifest, own)


def of_route(manifest: Manifest) -> Signature:
    """Of a routed segment's rule."""
    return _looks(manifest), {"goes_in": ANY}


def of_similarity(manifest: Manifest) -> Signature:
    """Of the comparison of two states."""
    return {**_looks(manifest), "before": ANY}, {"similarity": ANY}


def of_exit(manifest: Manifest) -> Signature:
    """Of what an exit does before its head."""
    return _looks(manifest), {"exit_hidden": (None, manifest.dim)}


def of_gate(manifest: Manifest) -> Signature:
    """Of an exit's gate, which also gives what the head reads."""
    return _looks(manifest), {"exit_hidden": (None, manifest.dim), "probability": ANY}


def of_head(manifest: Manifest) -> Signature:
    """Of a head, with the figures that exit policies need."""
    figures = dict.fromkeys(("top_id", "top_prob", "margin", "entropy"), ANY)
    return {"exit_hidden": (None, manifest.dim)}, {"logits": (None, manifest.vocab_size), **figures}
