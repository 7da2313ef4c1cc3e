"""The bundle's manifest: what the runtime must know of a bundle before it opens a graph.

This is the schema of `manifest.json`; ease_export writes through it. A manifest names files of its own
directory only, literally, with the sha256 sum of each. `load_manifest` refuses, in one line that names the
file and the remedy, a bundle of another format than this version's, incomplete, altered, or one that points
outside its directory.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ease_common.chat import SPECIAL_TOKENS
from ease_common.errors import BundleError, RequestError, shown
from ease_runtime.policies.thresholds import Thresholds

# the only one that is read; 5: target, cache layout, form of the weights, drafting head, exactness
FORMAT_VERSION = 5
MANIFEST_FILE = "manifest.json"
SEGMENT_KINDS = ("layers", "routed")
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4")
TARGETS = ("cpu", "cuda")
OF_CUDA = ("fp16", "bf16")  # precisions that are made for CUDA alone
# of activations; numpy has no bf16, whose bits these are (ort/bfloat.py)
FLOATS: dict[str, type[np.generic]] = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16}
CACHE_LAYOUTS = {
    "cpu": "BGTP",  # slots, heads, positions, width of a head
    "cuda": "BTK",  # slots, positions, width of all heads: what Flash reads; also older bundles for the CPU
}  # of keys and values, by target
EXACTNESS = ("bits", "rounding")  # of several tokens in one pass against one at a time
WEIGHT_BITS = {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8, "int4": 4}
LARGEST = 2**31 - 1  # of any count or id
MOST_POSITIONS = 1 << 22  # whose rotary tables take 2 GB
LARGEST_MANIFEST = 1 << 24  # bytes, as the next two
LARGEST_TEMPLATE = 1 << 20
LARGEST_TOKENIZER = 1 << 28
RISKS = ("disagreement", "loss")  # what a calibration holds a tolerance of
LONGEST_NAME = 255  # bytes: what file systems take


@dataclass(frozen=True)
class SegmentInfo:
    """Layers that run together, and the graphs that run them. Layers are numbered from 1.

    A `layers` segment runs for every token. A `routed` one is a Mixture-of-Depths layer: `route_graph` says
    which tokens go in; the others go around it, and have no K/V there.
    """

    kind: str
    first_layer: int
    last_layer: int
    graph: str
    # what `propagate` runs for tokens that have left; the first segment has none, nor has a routed one
    kv_graph: str | None
    route_graph: str | None = None

    @property
    def num_layers(self) -> int:
        """How many layers the segment runs."""
        return self.last_layer - self.first_layer + 1


@dataclass(frozen=True)
class ExitInfo:
    """A place where a token may leave: after `layer` (the last of a segment), through the exit's own graph,
    then a head.

    A `gate`, where there is one, says from the exit's hidden state whether to leave, without a head. A
    `block` is a layer of the exit's own before its graph, with a cache as a segment has.
    """

    layer: int
    graph: str
    head: str
    gate: str | None = None
    block: str | None = None


@dataclass(frozen=True)
class FileInfo:
    """What a file of the bundle must be."""

    sha256: str
    num_bytes: int


@dataclass(frozen=True)
class WeightForm:
    """How the layers' products hold their weights: `bits` each; in blocks of `block`, where they are rounded
    to whole numbers.

    `symmetric`: blocks have a scale and no zero point. `exact_grid`: they are the grid of a file that was
    rounded before, so that nothing is rounded again.
    """

    bits: int
    block: int | None = None
    symmetric: bool = False
    exact_grid: bool = False


@dataclass(frozen=True)
class Manifest:
    """A bundle's contents.

    `start_id` is the token that stands before a text, if there is one; each of `stop_ids` ends one, the first
    in training.

    `target` is the device that its graphs were made for; `activations` is what is around the weights: states,
    caches and what is not quantised. `drafting_head` is the head that early exits draft with, where that is
    not full depth's; `exactness` what its makers expect of passes over several tokens: the same bits as one
    at a time, or the same up to rounding. `similarity` is the graph that compares two
    hidden states; `chat_template` a jinja2 file, for models that have one; `special_tokens` the texts of its
    special tokens by their names (`bos_token`, ...), which templates write; `generation` what the model's
    makers sample with, never used unasked.
    """

    format_version: int
    target: str
    precision: str
    activations: str
    weights: WeightForm
    cache_layout: str
    exactness: str
    vocab_size: int
    dim: int
    kv_dim: int  # width of one token's keys (and of its values) in one layer
    num_layers: int
    max_positions: int
    start_id: int | None
    stop_ids: tuple[int, ...]
    tokenizer: str
    similarity: str
    segments: tuple[SegmentInfo, ...]
    exits: tuple[ExitInfo, ...]
    files: dict[str, FileInfo]
    num_kv_heads: int = 1  # of the layout BGTP: `kv_dim` is so many heads' keys
    drafting_head: str | None = None
    chat_template: str | None = None
    special_tokens: dict[str, str] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(
        default_factory=dict
    )  # thresholds that hold a tolerance, and their certificate
    source: dict[str, Any] = field(default_factory=dict)  # where it came from: checkpoint, metrics, versions

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """The layer of each exit; the last is the last layer."""
        return tuple(e.layer for e in self.exits)

    def to_json(self) -> str:
        """The text of manifest.json."""
        return json.dumps(asdict(self), indent=2) + "\n"


def load_manifest(bundle: Path) -> Manifest:
    """Read and check a bundle's manifest and every file it names.

    Raises BundleError when the bundle is missing, incomplete, altered, newer, or points outside its
    directory.
    """
    manifest = read_manifest(bundle)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # sums take most of the time, and let others run
        list(pool.map(lambda item: _check_file(bundle, *item), manifest.files.items()))
    for extra in sorted({path.name for path in bundle.iterdir()} - {MANIFEST_FILE, *manifest.files}):
        raise BundleError(
            f"{bundle / extra} has no sha256 sum in the manifest, and a graph could read it; remove it, "
            f"or {_remedy(bundle)}"
        )
    return manifest


def read_manifest(bundle: Path) -> Manifest:
    """What a bundle's manifest says, its files unchecked: for a look at it before it is loaded. Raises
    BundleError.
    """
    path = bundle / MANIFEST_FILE
    if not path.is_file():
        what = "no bundle" if not bundle.is_dir() else f"no bundle ({MANIFEST_FILE} is missing)"
        raise BundleError(f"{what} at {bundle}; make one: ease-export build CHECKPOINT {bundle}")
    if path.stat().st_size > LARGEST_MANIFEST:
        raise BundleError(
            f"{path} has {path.stat().st_size} bytes, expected at most {LARGEST_MANIFEST}; {_remedy(bundle)}"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise BundleError(f"{path} is damaged; {_remedy(bundle)}") from None
    return parse_manifest(values, path)


def parse_manifest(values: Any, path: Path) -> Manifest:
    """Build a manifest from JSON values, checking types, ranges and names. Raises BundleError."""
    table = _Table(values, path)
    version = table.integer("format_version")
    if version > FORMAT_VERSION:
        raise BundleError(
            f"{path} has format_version {version}, this runtime reads {FORMAT_VERSION}; update: pip "
            "install --upgrade ease-lm"
        )
    if version < FORMAT_VERSION:
        remedy = f"build it again from its checkpoint: ease-export upgrade {path.parent}"
        raise BundleError(
            f"{path} has format_version {version}, this runtime reads {FORMAT_VERSION}; {remedy}"
        )
    manifest = Manifest(
        format_version=version,
        target=table.choice("target", TARGETS),
        precision=table.choice("precision", PRECISIONS),
        activations=_activations(table),
        weights=_weights(table.table("weights")),
        cache_layout=table.choice("cache_layout", tuple(CACHE_LAYOUTS.values())),
        exactness=table.choice("exactness", EXACTNESS),
        vocab_size=table.integer("vocab_size"),
        dim=table.integer("dim"),
        kv_dim=table.integer("kv_dim"),
        num_layers=table.integer("num_layers"),
        max_positions=table.integer("max_positions", at_most=MOST_POSITIONS),
        start_id=table.integer("start_id", at_least=0) if table.has("start_id") else None,
        stop_ids=table.integers("stop_ids", at_least=0),
        tokenizer=table.file("tokenizer"),
        similarity=table.file("similarity"),
        segments=tuple(_segment(t) for t in table.tables("segments")),
        exits=tuple(_exit(t) for t in table.tables("exits")),
        files={
            name: FileInfo(t.text("sha256"), t.integer("num_bytes", at_least=0, at_most=2**53))
            for name, t in table.named_tables("files")
        },
        num_kv_heads=table.integer("num_kv_heads") if table.has("num_kv_heads") else 1,
        drafting_head=table.optional_file("drafting_head"),
        chat_template=table.optional_file("chat_template"),
        special_tokens=_special_tokens(table),
        generation=table.mapping("generation"),
        calibration=table.mapping("calibration"),
        source=table.mapping("source"),
    )
    _check_shape(manifest, table)
    return manifest


def _activations(table: "_Table") -> str:
    """Bundles of before do not say it: fp16 in those of fp16 alone."""
    if table.has("activations"):
        return table.choice("activations", tuple(FLOATS))
    return "fp16" if table.text("precision") == "fp16" else "fp32"


def _special_tokens(table: "_Table") -> dict[str, str]:
    found = table.mapping("special_tokens")
    if not found.keys() <= set(SPECIAL_TOKENS) or not all(isinstance(text, str) for text in found.values()):
        table.fail(
            f"special_tokens = {str(found)[:80]}, expected texts by the names {', '.join(SPECIAL_TOKENS)}"
        )
    return found


def _weights(table: "_Table") -> WeightForm:
    block = table.integer("block") if table.has("block") else None
    return WeightForm(table.integer("bits"), block, table.switch("symmetric"), table.switch("exact_grid"))


def _segment(table: "_Table") -> SegmentInfo:
    first = table.integer("first_layer")
    last = table.integer("last_layer")
    segment = SegmentInfo(
        table.choice("kind", SEGMENT_KINDS),
        first,
        last,
        table.file("graph"),
        table.optional_file("kv_graph"),
        table.optional_file("route_graph"),
    )
    if segment.kind == "layers" and first > 1 and segment.kv_graph is None:
        table.fail(f"segment {segment.graph} has no kv_graph")
    if (segment.kind == "routed") != (segment.route_graph is not None):
        table.fail(
            f"segment {segment.graph} is of the kind '{segment.kind}' and has route_graph "
            f"{segment.route_graph!r}"
        )
    return segment


def _exit(table: "_Table") -> ExitInfo:
    files = (
        table.file("graph"),
        table.file("head"),
        table.optional_file("gate"),
        table.optional_file("block"),
    )
    return ExitInfo(table.integer("layer"), *files)


def _check_shape(manifest: Manifest, table: "_Table") -> None:
    """Segments must cover the layers without a gap, exits must stand at their ends, and every file named must
    have a sum.
    """
    _check_calibration(manifest, table)
    if manifest.start_id is not None and manifest.start_id >= manifest.vocab_size:
        table.fail(f"start_id = {manifest.start_id} is outside the vocabulary of {manifest.vocab_size}")
    if strange := [token for token in manifest.stop_ids if token >= manifest.vocab_size]:
        table.fail(f"stop_ids has {strange[0]}, outside the vocabulary of {manifest.vocab_size}")
    begin = manifest.generation.get("bos_token_id")
    if begin is not None and (type(begin) is not int or not 0 <= begin <= LARGEST):
        table.fail(f"generation: bos_token_id = {shown(begin)}, expected a token")
    for name, most in ((manifest.chat_template, LARGEST_TEMPLATE), (manifest.tokenizer, LARGEST_TOKENIZER)):
        if name in manifest.files and manifest.files[name].num_bytes > most:
            table.fail(f"{name} has {manifest.files[name].num_bytes} bytes, expected at most {most}")
    weights = manifest.weights
    if weights.bits != WEIGHT_BITS[manifest.precision] or (weights.block is None) != (weights.bits > 8):
        table.fail(
            f"weights of {weights.bits} bits in blocks of {weights.block} are not {manifest.precision}"
        )
    if (manifest.precision == "bf16") != (manifest.activations == "bf16"):
        table.fail(
            f"{manifest.precision} with activations in {manifest.activations}: bf16 goes with itself alone"
        )
    if manifest.drafting_head not in (None, *(leave.head for leave in manifest.exits[:-1])):
        table.fail(f"drafting_head {manifest.drafting_head!r} is the head of no early exit")
    expected = 1
    for segment in manifest.segments:
        if segment.first_layer != expected or segment.last_layer < expected:
            table.fail(
                f"a segment of layers {segment.first_layer}..{segment.last_layer} does not follow layer "
                f"{expected - 1}"
            )
        expected = segment.last_layer + 1
    layers = manifest.exit_layers
    if expected != manifest.num_layers + 1 or layers[-1] != manifest.num_layers:
        table.fail(
            f"{len(manifest.segments)} segments and exits at {list(layers)} do not make "
            f"{manifest.num_layers} layers"
        )
    if list(layers) != sorted(set(layers)) or not set(layers) <= {s.last_layer for s in manifest.segments}:
        table.fail(f"exits at {list(layers)} do not stand at the ends of segments")
    graphs = [manifest.tokenizer, manifest.similarity, manifest.chat_template]
    graphs += [name for s in manifest.segments for name in (s.graph, s.kv_graph, s.route_graph)]
    graphs += [name for e in manifest.exits for name in (e.graph, e.head, e.gate, e.block)]
    if manifest.exits[-1].block is not None:
        table.fail("the last exit has a block; only early exits have")
    for name in graphs:
        if name is not None and name not in manifest.files:
            table.fail(f"{name} has no sha256 sum")


def _remedy(bundle: Path) -> str:
    return f"export the bundle again: ease-export build CHECKPOINT {bundle}"


def _check_calibration(manifest: Manifest, table: "_Table") -> None:
    """What a request without thresholds takes over must be something that it could have asked for."""
    if not manifest.calibration:
        return
    found = manifest.calibration
    names = [found.get(name) for name in ("policy", "catch_up", "data")]
    numbers = [found.get("delta"), found.get("epsilon")]
    try:
        sound = bool(Thresholds.of(found.get("thresholds")).for_exits(len(manifest.exits) - 1))
    except RequestError:
        sound = False
    if not (
        sound
        and found.get("risk") in RISKS
        and all(isinstance(n, str) for n in names)
        and all(type(n) is float and 0 < n < 1 for n in numbers)
    ):
        table.fail("its calibration is not what ease-eval calibrate writes")


def _check_file(bundle: Path, name: str, info: FileInfo) -> None:
    path = bundle / name
    remedy = _remedy(bundle)
    if os.path.dirname(os.path.realpath(path)) not in (os.path.realpath(bundle), _hub_blobs(bundle)):
        raise BundleError(f"{path} points outside the bundle; {remedy}")
    if not path.is_file():
        raise BundleError(f"{path} is missing; {remedy}")
    if path.stat().st_size != info.num_bytes:
        raise BundleError(f"{path} has {path.stat().st_size} bytes, expected {info.num_bytes}; {remedy}")
    if sha256_of(path) != info.sha256:
        raise BundleError(f"{path} is altered (its sha256 sum differs); {remedy}")


def _hub_blobs(bundle: Path) -> str | None:
    """Where a snapshot in the hub's cache has its files, to which it holds links; None for other bundles."""
    snapshots = Path(os.path.realpath(bundle)).parent
    blobs = snapshots.parent / "blobs"
    return str(blobs) if snapshots.name == "snapshots" and blobs.is_dir() else None


def sha256_of(path: Path) -> str:
    """The sha256 sum of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Table:
    """A JSON object read key by key; whatever is not as expected ends in a BundleError that names the file
    and the key.
    """

    def __init__(self, values: Any, path: Path) -> None:
        self.path = path
        if not isinstance(values, Mapping):
            self.fail("an object was expected")
        self.values = values

    def fail(self, reason: str) -> NoReturn:
        raise BundleError(f"{self.path} is damaged: {reason}; {_remedy(self.path.parent)}")

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def integer(self, key: str, at_least: int = 1, at_most: int = LARGEST) -> int:
        value = self.values.get(key)
        if type(value) is not int or value < at_least:
            self.fail(f"{key} = {shown(value)}, expected a whole number of at least {at_least}")
        if value > at_most:
            self.fail(f"{key} = {shown(value)}, expected at most {at_most}")
        return value

    def integers(self, key: str, at_least: int = 1) -> tuple[int, ...]:
        values = self.values.get(key)
        if not isinstance(values, list) or not all(
            type(value) is int and at_least <= value <= LARGEST for value in values
        ):
            self.fail(f"{key} = {shown(values)}, expected a list of whole numbers of at least {at_least}")
        return tuple(values)

    def text(self, key: str) -> str:
        value = self.values.get(key)
        if not isinstance(value, str) or not value:
            self.fail(f"{key} = {shown(value)}, expected a text")
        return value

    def switch(self, key: str) -> bool:
        value = self.values.get(key)
        if type(value) is not bool:
            self.fail(f"{key} = {shown(value)}, expected true or false")
        return value

    def choice(self, key: str, known: tuple[str, ...]) -> str:
        value = self.text(key)
        if value not in known:
            self.fail(f"{key} = {shown(value)}, expected one of: {', '.join(known)}")
        return value

    def file(self, key: str) -> str:
        return self.file_name(self.text(key))

    def optional_file(self, key: str) -> str | None:
        return self.file(key) if self.has(key) else None

    def file_name(self, name: str) -> str:
        inside = name not in ("", ".", "..") and not set(name) & set("/\\:") and name.isprintable()
        if not inside or len(name.encode()) > LONGEST_NAME:
            self.fail(f"{shown(name)} is not the name of a file inside the bundle")
        return name

    def mapping(self, key: str) -> dict[str, Any]:
        value = self.values.get(key, {})
        if not isinstance(value, Mapping):
            self.fail(f"{key} = {shown(value)}, expected an object")
        return dict(value)

    def table(self, key: str) -> "_Table":
        return _Table(self.mapping(key), self.path)

    def tables(self, key: str) -> list["_Table"]:
        value = self.values.get(key)
        if not isinstance(value, list) or not value:
            self.fail(f"{key} = {shown(value)}, expected a list")
        return [_Table(item, self.path) for item in value]

    def named_tables(self, key: str) -> list[tuple[str, "_Table"]]:
        return [(self.file_name(name), _Table(item, self.path)) for name, item in self.mapping(key).items()]
