"""Bundles that cannot be trusted: each is refused in one line that names the file and the remedy."""

import copy
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ease_common.errors import BundleError, EaseError, shown
from ease_runtime.bundle.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    load_manifest,
    parse_manifest,
    sha256_of,
)
from ease_runtime.llm import LLM
from ease_runtime.options import Options
from ease_runtime.ort.stack import OrtStack
from json_places import places

REMEDY = "export the bundle again: ease-export build CHECKPOINT"


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


def edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest's values."""
    path = bundle / MANIFEST_FILE
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")


def refusal(bundle: Path) -> str:
    """The one line that loading ends in, from the manifest's reader and from the stack alike."""
    with pytest.raises(BundleError) as caught:
        load_manifest(bundle)
    with pytest.raises(BundleError) as again:
        OrtStack(bundle)
    message = str(caught.value)
    assert message == str(again.value)
    assert "\n" not in message
    return message


def names(bundle: Path) -> list[str]:
    return sorted(path.name for path in bundle.iterdir() if path.name != MANIFEST_FILE)


def test_a_sound_bundle_is_read_whole(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    assert manifest.exit_layers == (2, 4, 6)
    assert [(s.first_layer, s.last_layer, s.num_layers) for s in manifest.segments] == [
        (1, 2, 2),
        (3, 4, 2),
        (5, 6, 2),
    ]
    assert [bool(s.kv_graph) for s in manifest.segments] == [False, True, True]
    assert sorted(manifest.files) == names(bundle)


def test_a_manifest_written_and_read_is_the_same(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    assert parse_manifest(json.loads(manifest.to_json()), bundle / MANIFEST_FILE) == manifest
    assert manifest.to_json() == (bundle / MANIFEST_FILE).read_text(encoding="utf-8")


def test_no_bundle(tmp_path: Path) -> None:
    assert (
        refusal(tmp_path / "none")
        == f"no bundle at {tmp_path / 'none'}; make one: ease-export build CHECKPOINT {tmp_path / 'none'}"
    )


def test_a_directory_that_is_no_bundle(bundle: Path) -> None:
    (bundle / MANIFEST_FILE).unlink()
    assert (
        refusal(bundle)
        == f"no bundle (manifest.json is missing) at {bundle}; make one: ease-export build CHECKPOINT "
        f"{bundle}"
    )


def test_a_file_in_place_of_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "bundle").write_text("text", encoding="utf-8")
    assert refusal(tmp_path / "bundle").startswith(f"no bundle at {tmp_path / 'bundle'}; make one")


def test_each_missing_file(bundle: Path) -> None:
    """Graphs, their weights, and the tokenizer."""
    for name in names(bundle):
        content = (bundle / name).read_bytes()
        (bundle / name).unlink()
        assert refusal(bundle) == f"{bundle / name} is missing; {REMEDY} {bundle}"
        (bundle / name).write_bytes(content)
    load_manifest(bundle)


def test_each_flipped_byte(bundle: Path) -> None:
    for name in names(bundle):
        content = (bundle / name).read_bytes()
        for place in (0, len(content) // 2, len(content) - 1):
            flipped = bytearray(content)
            flipped[place] ^= 1
            (bundle / name).write_bytes(flipped)
            assert (
                refusal(bundle) == f"{bundle / name} is altered (its sha256 sum differs); {REMEDY} {bundle}"
            )
        (bundle / name).write_bytes(content)
    load_manifest(bundle)


def test_a_file_cut_short_and_one_too_long(bundle: Path) -> None:
    path = bundle / "segment_02.onnx.data"
    content = path.read_bytes()
    for changed in (content[:-1], content + b"\0", b""):
        path.write_bytes(changed)
        assert (
            refusal(bundle) == f"{path} has {len(changed)} bytes, expected {len(content)}; {REMEDY} {bundle}"
        )


def test_a_directory_in_place_of_a_graph(bundle: Path) -> None:
    (bundle / "exit_01.onnx").unlink()
    (bundle / "exit_01.onnx").mkdir()
    assert refusal(bundle) == f"{bundle / 'exit_01.onnx'} is missing; {REMEDY} {bundle}"


def test_a_newer_format(bundle: Path) -> None:
    """Said first, whatever else a newer manifest holds."""
    edit(bundle, lambda values: (values.clear(), values.update(format_version=FORMAT_VERSION + 1)))
    path = bundle / MANIFEST_FILE
    assert refusal(bundle) == (
        f"{path} has format_version {FORMAT_VERSION + 1}, this runtime reads {FORMAT_VERSION}; update: "
        "pip install --upgrade ease-lm"
    )


@pytest.mark.parametrize(
    ("precision", "bits", "block", "activations"),
    [("fp32", 32, None, "fp32"), ("fp16", 16, None, "fp16"), ("int4", 4, 32, "fp32")],
)
def test_activations_of_bundles_of_before(
    bundle: Path, precision: str, bits: int, block: int | None, activations: str
) -> None:
    values = json.loads((bundle / MANIFEST_FILE).read_text(encoding="utf-8"))
    del values["activations"]
    values["precision"] = precision
    values["weights"] |= {"bits": bits, "block": block}
    assert parse_manifest(values, bundle / MANIFEST_FILE).activations == activations


def test_an_older_format(bundle: Path) -> None:
    """Said first, too, with the command that builds it again."""
    edit(bundle, lambda values: (values.clear(), values.update(format_version=FORMAT_VERSION - 1)))
    assert refusal(bundle) == (
        f"{bundle / MANIFEST_FILE} has format_version {FORMAT_VERSION - 1}, this runtime reads "
        f"{FORMAT_VERSION}; "
        f"build it again from its checkpoint: ease-export upgrade {bundle}"
    )


OUTSIDE = [
    "../segment_01.onnx",
    "/etc/hostname",
    "..",
    ".",
    "sub/segment_01.onnx",
    "..\\segment_01.onnx",
    "C:segment_01.onnx",
    "a\0b",
    "new\nline",
    "\ud800",
    "é" * 128,
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_leave_the_bundle(bundle: Path, name: str) -> None:
    """Wherever a name stands: a segment's graph, its kv graph, an exit's, a head, the tokenizer, the list of
    sums.
    """
    (bundle.parent / "segment_01.onnx").write_bytes((bundle / "segment_01.onnx").read_bytes())
    places: list[Callable[[dict[str, Any]], object]] = [
        lambda values: values["segments"][0].update(graph=name),
        lambda values: values["segments"][1].update(kv_graph=name),
        lambda values: values["segments"][1].update(route_graph=name),
        lambda values: values["exits"][2].update(graph=name),
        lambda values: values["exits"][2].update(gate=name),
        lambda values: values["exits"][2].update(head=name),
        lambda values: values.update(tokenizer=name),
        lambda values: values["files"].update({name: values["files"]["segment_01.onnx"]}),
    ]
    original = (bundle / MANIFEST_FILE).read_text(encoding="utf-8")
    for place in places:
        edit(bundle, place)
        assert (
            refusal(bundle)
            == f"{bundle / MANIFEST_FILE} is damaged: {shown(name)} is not the name of a file inside the "
            f"bundle; {REMEDY} {bundle}"
        )
        (bundle / MANIFEST_FILE).write_text(original, encoding="utf-8")


def test_a_link_to_a_file_outside(bundle: Path) -> None:
    """Even to the very same bytes."""
    path = bundle / "segment_01.onnx"
    outside = bundle.parent / "elsewhere.onnx"
    path.rename(outside)
    path.symlink_to(outside)
    assert refusal(bundle) == f"{path} points outside the bundle; {REMEDY} {bundle}"


def test_a_link_to_itself(bundle: Path) -> None:
    path = bundle / "segment_01.onnx"
    path.unlink()
    path.symlink_to(path)
    assert refusal(bundle) == f"{path} is missing; {REMEDY} {bundle}"


def test_a_bundle_reached_by_a_link(bundle: Path) -> None:
    link = bundle.parent / "link"
    link.symlink_to(bundle)
    assert load_manifest(link) == load_manifest(bundle)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"not json", b"\xff\xfe\x00", b"[" * 100_000, b'{"format_version": ' + b"9" * 5000 + b"}"],
)
def test_what_is_no_json(bundle: Path, content: bytes) -> None:
    (bundle / MANIFEST_FILE).write_bytes(content)
    assert refusal(bundle) == f"{bundle / MANIFEST_FILE} is damaged; {REMEDY} {bundle}"


def test_a_half_written_manifest(bundle: Path) -> None:
    content = (bundle / MANIFEST_FILE).read_bytes()
    (bundle / MANIFEST_FILE).write_bytes(content[: len(content) // 2])
    assert refusal(bundle) == f"{bundle / MANIFEST_FILE} is damaged; {REMEDY} {bundle}"


@pytest.mark.parametrize("values", [[], "text", 5, None, True])
def test_json_that_is_no_object(bundle: Path, values: object) -> None:
    (bundle / MANIFEST_FILE).write_text(json.dumps(values), encoding="utf-8")
    assert (
        refusal(bundle) == f"{bundle / MANIFEST_FILE} is damaged: an object was expected; {REMEDY} {bundle}"
    )


CALIBRATED: dict[str, Any] = {
    "policy": "max-prob",
    "catch_up": "recompute",
    "risk": "loss",
    "data": "x",
    "delta": 0.1,
    "epsilon": 0.05,
    "thresholds": 0.5,
}
WRONG: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a key that is not there": (lambda v: v.pop("dim"), "dim = None, expected a whole number of at least 1"),
    "a text for a number": (
        lambda v: v.update(dim="64"),
        "dim = '64', expected a whole number of at least 1",
    ),
    "a fraction": (
        lambda v: v.update(vocab_size=320.0),
        "vocab_size = 320.0, expected a whole number of at least 1",
    ),
    "a truth value": (
        lambda v: v.update(num_layers=True),
        "num_layers = True, expected a whole number of at least 1",
    ),
    "zero": (lambda v: v.update(max_positions=0), "max_positions = 0, expected a whole number of at least 1"),
    "version zero": (
        lambda v: v.update(format_version=0),
        "format_version = 0, expected a whole number of at least 1",
    ),
    "no version": (
        lambda v: v.pop("format_version"),
        "format_version = None, expected a whole number of at least 1",
    ),
    "a version in words": (
        lambda v: v.update(format_version="one"),
        "format_version = 'one', expected a whole number of at least 1",
    ),
    "a negative start": (
        lambda v: v.update(start_id=-1),
        "start_id = -1, expected a whole number of at least 0",
    ),
    "a stop that is no list": (
        lambda v: v.update(stop_ids=2),
        "stop_ids = 2, expected a list of whole numbers of at least 0",
    ),
    "a negative stop": (
        lambda v: v.update(stop_ids=[2, -1]),
        "stop_ids = [2, -1], expected a list of whole numbers of at least 0",
    ),
    "a stop outside the vocabulary": (
        lambda v: v.update(stop_ids=[2, 10**9]),
        "stop_ids has 1000000000, outside the vocabulary of 320",
    ),
    "a context without end": (
        lambda v: v.update(max_positions=10**9),
        "max_positions = 1000000000, expected at most 4194304",
    ),
    "a number without end": (
        lambda v: v.update(dim=10**400),
        f"dim = 1{'0' * 76}..., expected at most 2147483647",
    ),
    "a token that is none": (
        lambda v: v["generation"].update(bos_token_id=-1),
        "generation: bos_token_id = -1, expected a token",
    ),
    "junk without end": (
        lambda v: v.update(precision="x" * 100_000),
        f"precision = '{'x' * 76}..., expected one of: fp32, fp16, bf16, int8, int4",
    ),
    "a promise that is none": (
        lambda v: v.update(calibration={**CALIBRATED, "delta": 7.0}),
        "its calibration is not what ease-eval calibrate writes",
    ),
    "a risk that is none": (
        lambda v: v.update(calibration={**CALIBRATED, "risk": "../x"}),
        "its calibration is not what ease-eval calibrate writes",
    ),
    "a number for a text": (lambda v: v.update(tokenizer=7), "tokenizer = 7, expected a text"),
    "an empty name": (lambda v: v["exits"][0].update(graph=""), "graph = '', expected a text"),
    "an unknown precision": (
        lambda v: v.update(precision="fp7"),
        "precision = 'fp7', expected one of: fp32, fp16, bf16, int8, int4",
    ),
    "an unknown kind": (
        lambda v: v["segments"][0].update(kind="magic"),
        "kind = 'magic', expected one of: layers, routed",
    ),
    "an unknown target": (lambda v: v.update(target="tpu"), "target = 'tpu', expected one of: cpu, cuda"),
    "an unknown cache": (
        lambda v: v.update(cache_layout="TKB"),
        "cache_layout = 'TKB', expected one of: BGTP, BTK",
    ),
    "unknown activations": (
        lambda v: v.update(activations="fp8"),
        "activations = 'fp8', expected one of: fp32, fp16, bf16",
    ),
    "activations of another precision": (
        lambda v: v.update(activations="bf16"),
        "fp32 with activations in bf16: bf16 goes with itself alone",
    ),
    "an unknown exactness": (
        lambda v: v.update(exactness="none"),
        "exactness = 'none', expected one of: bits, rounding",
    ),
    "no form of the weights": (
        lambda v: v.pop("weights"),
        "bits = None, expected a whole number of at least 1",
    ),
    "weights of another precision": (
        lambda v: v["weights"].update(bits=8, block=32),
        "weights of 8 bits in blocks of 32 are not fp32",
    ),
    "blocks of what is not rounded": (
        lambda v: v["weights"].update(block=32),
        "weights of 32 bits in blocks of 32 are not fp32",
    ),
    "a switch in words": (
        lambda v: v["weights"].update(symmetric="no"),
        "symmetric = 'no', expected true or false",
    ),
    "a drafting head of nobody": (
        lambda v: v.update(drafting_head="exit_01.onnx"),
        "drafting_head 'exit_01.onnx' is the head of no early exit",
    ),
    "no segments": (lambda v: v.update(segments=[]), "segments = [], expected a list"),
    "segments by name": (lambda v: v.update(segments={"a": 1}), "segments = {'a': 1}, expected a list"),
    "a segment that is a text": (lambda v: v["segments"].insert(0, "first"), "an object was expected"),
    "an exit that is a number": (lambda v: v["exits"].insert(0, 2), "an object was expected"),
    "files in a list": (lambda v: v.update(files=["a"]), "files = ['a'], expected an object"),
    "a sum that is a number": (
        lambda v: v["files"]["head.onnx"].update(sha256=5),
        "sha256 = 5, expected a text",
    ),
    "a size below zero": (
        lambda v: v["files"]["head.onnx"].update(num_bytes=-1),
        "num_bytes = -1, expected a whole number of at least 0",
    ),
    "a source that is a text": (lambda v: v.update(source="there"), "source = 'there', expected an object"),
    "a graph without a sum": (lambda v: v["files"].pop("kv_02.onnx"), "kv_02.onnx has no sha256 sum"),
    "a tokenizer without a sum": (
        lambda v: v["files"].pop("tokenizer.json"),
        "tokenizer.json has no sha256 sum",
    ),
    "a file without a name": (
        lambda v: v["files"].update({"": v["files"]["head.onnx"]}),
        "'' is not the name of a file inside the bundle",
    ),
    "no files": (lambda v: v.pop("files"), "tokenizer.json has no sha256 sum"),
    "a segment without its kv graph": (
        lambda v: v["segments"][1].update(kv_graph=None),
        "segment segment_02.onnx has no kv_graph",
    ),
    "a gap in the layers": (
        lambda v: v["segments"][1].update(first_layer=4),
        "a segment of layers 4..4 does not follow layer 2",
    ),
    "layers back to front": (
        lambda v: v["segments"].reverse(),
        "a segment of layers 5..6 does not follow layer 0",
    ),
    "an exit inside a segment": (
        lambda v: v["exits"][0].update(layer=1),
        "exits at [1, 4, 6] do not stand at the ends of segments",
    ),
    "more layers than segments": (
        lambda v: v.update(num_layers=7),
        "3 segments and exits at [2, 4, 6] do not make 7 layers",
    ),
    "a segment back to front": (
        lambda v: v["segments"][1].update(last_layer=2),
        "a segment of layers 3..2 does not follow layer 2",
    ),
    "an exit twice": (
        lambda v: v["exits"].insert(0, v["exits"][0]),
        "exits at [2, 2, 4, 6] do not stand at the ends of segments",
    ),
    "exits in another order": (
        lambda v: v["exits"].insert(0, v["exits"].pop(1)),
        "exits at [4, 2, 6] do not stand at the ends of segments",
    ),
    "routed without a router": (
        lambda v: v["segments"][1].update(kind="routed"),
        "segment segment_02.onnx is of the kind 'routed' and has route_graph None",
    ),
    "a router for plain layers": (
        lambda v: v["segments"][1].update(route_graph="head.onnx"),
        "segment segment_02.onnx is of the kind 'layers' and has route_graph 'head.onnx'",
    ),
    "a gate without a sum": (lambda v: v["exits"][0].update(gate="gate.onnx"), "gate.onnx has no sha256 sum"),
    "an exit too few": (lambda v: v["exits"].pop(), "3 segments and exits at [2, 4] do not make 6 layers"),
    "a segment too few": (
        lambda v: v["segments"].pop(),
        "2 segments and exits at [2, 4, 6] do not make 6 layers",
    ),
}


@pytest.mark.parametrize("fault", WRONG)
def test_wrong_values(bundle: Path, fault: str) -> None:
    change, reason = WRONG[fault]
    edit(bundle, change)
    assert refusal(bundle) == f"{bundle / MANIFEST_FILE} is damaged: {reason}; {REMEDY} {bundle}"


def test_sums_are_those_of_sha256sum(tmp_path: Path) -> None:
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    assert sha256_of(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_no_end_token(bundle: Path) -> None:
    """A bundle may have none."""
    edit(bundle, lambda values: values.update(start_id=None, stop_ids=[]))
    assert (load_manifest(bundle).start_id, load_manifest(bundle).stop_ids) == (None, ())


def test_a_graph_with_the_right_sum_that_is_no_graph(bundle: Path) -> None:
    """Whoever writes a sum for rubbish is told so by the loader."""
    path = bundle / "exit_02.onnx"
    path.write_bytes(b"rubbish")
    edit(bundle, lambda values: values["files"]["exit_02.onnx"].update(sha256=sha256_of(path), num_bytes=7))
    load_manifest(bundle)
    with pytest.raises(BundleError) as caught:
        OrtStack(bundle)
    assert str(caught.value).startswith(f"{path} cannot be loaded by onnxruntime")
    assert "\n" not in str(caught.value)


def test_a_manifest_too_large_to_be_one(bundle: Path) -> None:
    """Its size is looked at before it is read."""
    with (bundle / MANIFEST_FILE).open("r+b") as file:
        file.truncate(1 << 40)  # of which the disk holds nothing
    assert refusal(bundle) == (
        f"{bundle / MANIFEST_FILE} has {1 << 40} bytes, expected at most 16777216; {REMEDY} {bundle}"
    )


JUNK: list[Any] = [
    *(None, True, -1, 0, 1, 2, 7, 2**31, 2**63, 10**400, 0.5, -0.5, 1e308, float("inf"), float("nan")),
    *("", "x", "../x", "a\nb", "\ud800", "x" * 100_000, "segment_01.onnx", "manifest.json", "max-prob"),
    *([], [0], [10**9], ["x"], [[]], {}, {"a": 1}, {"": {}}, {"thresholds": 0.5}),
]


def test_junk_in_any_place_is_refused_in_a_line_or_runs(bundle: Path) -> None:
    """Every value of a manifest, calibrated, in turn; of those that are taken, some are run."""
    path = bundle / MANIFEST_FILE
    sound = {**json.loads(path.read_text(encoding="utf-8")), "calibration": CALIBRATED}
    taken = []
    messages = []
    for place in places(sound):
        for junk in JUNK:
            values = copy.deepcopy(sound)
            inner = values
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = junk
            try:
                parse_manifest(values, path)
            except BundleError as error:
                messages.append(str(error).replace(str(bundle), ""))
            else:
                taken.append(values)
    for values in random.Random(7).sample(taken, 24):
        path.write_text(json.dumps(values), encoding="utf-8")
        try:
            list(LLM(bundle).generate("And the king", Options(max_tokens=2)))
        except EaseError as error:
            messages.append(str(error).replace(str(bundle), ""))
    assert [message for message in messages if "\n" in message or len(message) > 400] == []
    assert taken
