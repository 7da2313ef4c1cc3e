"""Gates, adapters, own heads and routed layers: exported, run by the engine, and equal to the model
in torch.
"""

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from rich.console import Console

from ease_common.errors import BundleError, RequestError
from ease_eval.measure.perplexity import score_documents
from ease_export.cli import render_manifest
from ease_export.verify import TOLERANCE, verify_bundle
from ease_runtime.bundle.manifest import load_manifest, parse_manifest
from ease_runtime.drafters import NgramLookup
from ease_runtime.engine.engine import Engine
from ease_runtime.engine.sampling import Given, GumbelSampler
from ease_runtime.engine.sequence import TokenSequence
from ease_runtime.ort.device import Device
from ease_runtime.ort.stack import OrtStack
from ease_runtime.policies import FULL_DEPTH, make_policy
from ease_train.model.decoder import Decoder, RoutedBlock
from ease_train.training.checkpoint import load_checkpoint

Made = tuple[Path, Path]  # a checkpoint and its bundle


def text(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(1, 300, length).tolist()


@pytest.mark.parametrize("name", ["gated", "blocks", "routed", "routed_with_exits"])
def test_every_graph_equals_torch(name: str, request: pytest.FixtureRequest) -> None:
    checkpoint, bundle = request.getfixturevalue(name)
    report = verify_bundle(bundle, checkpoint, 150)
    assert max(d.relative for d in report.differences) <= TOLERANCE
    assert report.agreed == report.num_generated == 150
    compared = {d.graph for d in report.differences}
    manifest = load_manifest(bundle)
    assert compared >= {s.graph for s in manifest.segments}
    assert compared >= {e.gate for e in manifest.exits if e.gate} | {
        s.route_graph for s in manifest.segments if s.route_graph
    }


@pytest.mark.parametrize("name", ["gated", "blocks", "routed", "routed_with_exits"])
def test_no_node_computes_on_a_shape(name: str, request: pytest.FixtureRequest) -> None:
    """ONNX Runtime would move it to the CPU. And every graph runs where buffers are bound by address."""
    bundle = request.getfixturevalue(name)[1]
    for path in sorted(bundle.glob("*.onnx")):
        nodes = onnx.load(path, load_external_data=False).graph.node
        assert "Shape" not in {node.op_type for node in nodes}, path.name
    OrtStack(bundle, device=Device("cpu", "CPUExecutionProvider", own_memory=True))


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("gated", ["exit_01.onnx, gate_01.onnx", "head_02.onnx"]),
        ("blocks", ["block_02.onnx, exit_02.onnx, gate_02.onnx", "reduced_head.onnx"]),
        ("routed_with_exits", ["segment_02.onnx", "1–1", "3–3"]),
    ],
)
def test_inspect_shows_what_a_bundle_has(name: str, shown: list[str], request: pytest.FixtureRequest) -> None:
    bundle = request.getfixturevalue(name)[1]
    console = Console(file=io.StringIO(), width=200)
    render_manifest(load_manifest(bundle), bundle, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert [part for part in shown if part not in text] == []


def test_a_gate_decides_as_in_torch_and_the_head_runs_only_for_who_leaves(gated: Made) -> None:
    checkpoint, bundle = gated
    model = load_checkpoint(checkpoint).model.eval()
    stack = OrtStack(bundle)
    engine = Engine(stack)
    ids = text(90, seed=4)
    threshold = 0.5
    policy = make_policy("gate", [threshold], stack.exit_layers)
    sequence = engine.start(ids[:1], max_new_tokens=89, policy=policy, sampler=Given(ids))
    stack.trace = []
    tokens = list(engine.generate(sequence))
    calls = Counter((call.graph, call.number) for call in stack.trace)
    with torch.no_grad():
        gates = {
            e: model.exit(e).gate(model.exit_hidden(h[0], e))
            for e, h in model.exit_states(torch.tensor([ids[:-1]]))
            if e < 6
        }
    expected = [2 if gates[2][i] >= threshold else 4 if gates[4][i] >= threshold else 6 for i in range(89)]
    assert [t.depth for t in tokens] == expected
    left = Counter(expected)
    assert set(left) == {2, 4, 6}
    assert calls["exit", 0] == left[2]
    assert calls["exit", 1] == left[4]
    assert calls["exit", 2] == left[6]
    assert calls["gate", 0] == 89
    assert calls["gate", 1] == 89 - left[2]
    confidences = [t.confidence for t in tokens if t.depth == 2]
    assert confidences == pytest.approx([gates[2][i].item() for i in range(89) if expected[i] == 2], abs=1e-5)


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("gated", "gate"),
        ("gated", "max-prob"),
        ("gated", "similarity"),
        ("gated", "patience"),
        ("blocks", "max-prob"),
        ("blocks", "gate"),
        ("blocks", "similarity"),
        ("routed", "max-prob"),
        ("routed_with_exits", "max-prob"),
    ],
)
@pytest.mark.parametrize("catch_up", ["recompute", "propagate"])
def test_parallel_scores_equal_the_engines(
    name: str, policy: str, catch_up: str, request: pytest.FixtureRequest
) -> None:
    stack = OrtStack(request.getfixturevalue(name)[1])
    engine = Engine(stack)
    ids = text(120, seed=6)
    layers = stack.exit_layers
    policies = [make_policy(policy, [t], layers) for t in (0.0, 0.4, 0.6)] if len(layers) > 1 else []
    policies.append(FULL_DEPTH)
    if catch_up == "propagate" and name.startswith("routed"):
        policies = [FULL_DEPTH]  # nothing leaves early: nothing is propagated
    scores = score_documents(engine, [ids], policies, catch_up)
    for chosen, score in zip(policies, scores, strict=True):
        sequence = engine.start(
            ids[:1], max_new_tokens=119, policy=chosen, catch_up=catch_up, sampler=Given(ids)
        )
        tokens = list(engine.generate(sequence))
        assert score.depths.tolist() == [t.depth for t in tokens]
        np.testing.assert_allclose(score.logprobs, [t.logprob for t in tokens], rtol=1e-4, atol=1e-4)


def test_an_exits_layer_and_reduced_head_say_what_they_say_in_torch(blocks: Made) -> None:
    """Token by token over its own K/V, with others that came and went before; tokens that the head does not
    know have their share.
    """
    checkpoint, bundle = blocks
    model = load_checkpoint(checkpoint).model.eval()
    stack = OrtStack(bundle)
    engine = Engine(stack)
    ids = text(90, seed=5)
    policy = make_policy("fixed", None, stack.exit_layers, exit_layer=4)
    sequence = engine.start(ids[:7], max_new_tokens=83, policy=policy, sampler=Given(ids), num_logprobs=1)
    tokens = list(engine.generate(sequence))
    with torch.no_grad():
        (hidden,) = (h for e, h in model.exit_states(torch.tensor([ids[:-1]])) if e == 4)
        logprobs = model.exit(4).head(model.exit_hidden(hidden, 4))[0].log_softmax(-1)
    assert {t.depth for t in tokens} == {4}
    known = set(model.reduced_head.ids.tolist())
    assert [t.top_logprobs[0][0] for t in tokens] == logprobs[6:].argmax(-1).tolist()
    expected = [logprobs[i, ids[i + 1]].item() for i in range(6, 89)]
    np.testing.assert_allclose([t.logprob for t in tokens], expected, rtol=1e-3, atol=1e-4)
    assert any(t.id not in known for t in tokens)


def test_verify_with_a_reduced_head_is_full_depth(blocks: Made) -> None:
    stack = OrtStack(blocks[1])
    for sampler in (None, GumbelSampler(0.9, 0, 1.0, 3)):
        engine = Engine(stack, num_slots=2)
        prompt = text(20, seed=8)
        off = engine.start(prompt, max_new_tokens=60, sampler=sampler)
        policy = make_policy("max-prob", [0.0], stack.exit_layers)
        drafted = engine.start(prompt, max_new_tokens=60, policy=policy, catch_up="verify", sampler=sampler)
        while engine.busy:
            engine.step()
        assert drafted.tokens == off.tokens
        assert drafted.drafts.judged > 0


def routes_in_torch(model: Decoder, ids: list[int]) -> dict[int, list[bool]]:
    """Which positions go into each routed layer, in one teacher-forced pass of the whole text."""
    hidden = model.embed(torch.tensor([ids]))
    routes = {}
    for layer, block in enumerate(model.layers, 1):
        if isinstance(block, RoutedBlock):
            routes[layer] = block.goes_in(hidden)[0].tolist()
        hidden = model.run_layers(hidden, layer, layer)
    return routes


def test_decoding_routes_as_teacher_forcing_and_skips_for_real(routed: Made) -> None:
    """The same routing and logits as one pass in torch, and a routed block runs once for each token that goes
    in, no more.
    """
    checkpoint, bundle = routed
    model = load_checkpoint(checkpoint).model.eval()
    stack = OrtStack(bundle)
    engine = Engine(stack)
    ids = text(150, seed=9)
    sequence = engine.start(ids[:1], max_new_tokens=149, sampler=Given(ids))
    stack.trace = []
    tokens = list(engine.generate(sequence))
    with torch.no_grad():
        routes = routes_in_torch(model, ids[:-1])
        logprobs = model(torch.tensor([ids[:-1]])).log_softmax(-1)[
            0, torch.arange(149), torch.tensor(ids[1:])
        ]
    ran = Counter(call.number for call in stack.trace if call.graph == "segment")
    for segment, info in enumerate(stack.manifest.segments):
        if info.kind == "routed":
            inside = routes[info.first_layer]
            assert sequence.counters.inside[segment, :149].tolist() == inside
            assert ran[segment] == sum(inside)
            assert 20 < sum(inside) < 130, "the routing must choose, or the test shows nothing"
        else:
            assert ran[segment] == 149
    skipped = [sum(not route[i] for route in routes.values()) for i in range(149)]
    assert [t.depth for t in tokens] == [6 - s for s in skipped]
    np.testing.assert_allclose([t.logprob for t in tokens], logprobs.numpy(), rtol=1e-4, atol=1e-4)


def test_keys_and_values_are_written_only_for_routed_tokens(routed: Made) -> None:
    stack = OrtStack(routed[1])
    engine = Engine(stack)
    sequence = engine.start(text(40, seed=2), max_new_tokens=20, keep=True)
    list(engine.generate(sequence))
    for segment, info in enumerate(stack.manifest.segments):
        keys, _ = engine.cache.read(info.first_layer - 1, 0, len(sequence.tokens))
        filled = np.abs(keys).sum(axis=1) > 0
        expected = (
            np.count_nonzero(sequence.counters.inside[segment])
            if info.kind == "routed"
            else len(sequence.tokens) - 1
        )
        assert np.count_nonzero(filled) == expected
        assert filled[:expected].all()


@pytest.mark.parametrize("name", ["routed", "routed_with_exits"])
def test_routed_rows_of_a_batch_do_not_meet(name: str, request: pytest.FixtureRequest) -> None:
    """Rows with routes, lengths and catch-ups of their own, verify and drafts from text too: tokens, depths
    and figures as alone.
    """
    stack = OrtStack(request.getfixturevalue(name)[1])
    policy = make_policy("max-prob", [0.4], stack.exit_layers) if len(stack.exit_layers) > 1 else FULL_DEPTH

    def begin(engine: Engine, i: int) -> TokenSequence:
        prompt = text(10 + 9 * i, seed=i)
        catch_up = ("recompute", "verify")[i % 2]
        return engine.start(
            prompt,
            max_new_tokens=50,
            policy=policy,
            catch_up=catch_up,
            sampler=GumbelSampler(0.8, 0, 1.0, i),
            drafters=[NgramLookup()] if i == 3 else [],
        )

    alone = []
    for i in range(5):
        engine = Engine(stack)
        alone.append(list(engine.generate(begin(engine, i))))
    engine = Engine(stack, num_slots=4)
    sequences = [begin(engine, i) for i in range(5)]
    stack.trace = []
    while engine.busy:
        engine.step()
    routed = {k for k, shape in enumerate(stack.layout) if shape.routed}
    assert any(
        call.num_tokens > 1 for call in stack.trace[50:] if call.graph == "segment" and call.number in routed
    )
    assert [s.produced for s in sequences] == alone
    plain = Engine(stack)
    off = plain.start(text(37, seed=3), max_new_tokens=50, sampler=GumbelSampler(0.8, 0, 1.0, 3))
    assert [t.id for t in plain.generate(off)] == [t.id for t in sequences[3].produced]
    assert sequences[3].drafts.counts["ngram"].judged > 0


def test_what_a_bundle_cannot_do_is_said(routed_with_exits: Made, tiny_bundle: Path) -> None:
    engine = Engine(OrtStack(routed_with_exits[1]))
    similarity = make_policy("similarity", [0.5], engine.stack.exit_layers)
    with pytest.raises(RequestError, match="policy 'similarity' compares the states around a segment"):
        engine.start([1], max_new_tokens=2, policy=similarity)
    with pytest.raises(RequestError, match="'propagate' has no K/V for routed layers; use recompute"):
        engine.start(
            [1],
            max_new_tokens=2,
            policy=make_policy("max-prob", [0.5], engine.stack.exit_layers),
            catch_up="propagate",
        )
    plain = Engine(OrtStack(tiny_bundle))
    with pytest.raises(
        RequestError, match="policy 'gate' needs a gate at every early exit; train them: ease-train gates"
    ):
        plain.start([1], max_new_tokens=2, policy=make_policy("gate", [0.5], plain.stack.exit_layers))


def test_a_routed_segment_without_its_route_graph_is_refused(routed: Made) -> None:
    manifest = load_manifest(routed[1])
    values = json.loads(manifest.to_json())
    values = {**values, "segments": [{**s, "route_graph": None} for s in values["segments"]]}
    with pytest.raises(BundleError, match="is of the kind 'routed' and has route_graph None"):
        parse_manifest(values, routed[1] / "manifest.json")
