"""Attention over a cache, as it is exported: the same bits for every number of new tokens, length of the
buffers and number of rows, whatever the heads.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

pytest.importorskip("torch", reason="graphs are exported here")

import torch

from ease_export.plan import plan_graphs
from ease_export.trace import Tracer
from ease_export.weights import WeightFiles, graph_weights
from ease_runtime.ort.sessions import load_session, start_thread_pool
from ease_train.model.decoder import Decoder
from ease_train.training.config import ModelConfig

STARTS = (100, 700, 3, 5, 0, 390, 640, 64)  # tokens in the cache, of eight rows
MANY = 256
NUM_THREADS = os.cpu_count() or 1  # at most, of a session
SKIPPED = 5  # of the many tokens: the others are compared from there
SHAPES = ((4, 4, 64), (4, 2, 80), (3, 1, 64), (8, 2, 96), (8, 1, 128))  # heads, of keys and values, width


@dataclass
class OneLayer:
    """A segment of one layer and its caches, of eight rows."""

    session: ort.InferenceSession
    config: ModelConfig
    ids: np.ndarray  # (rows, MANY)
    keys: np.ndarray  # (rows, G, T, P)
    values: np.ndarray

    def run(
        self, rows: list[int], first: int, num_places: int, length: int, form: str
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens [first, first + num_places) of some rows: states, keys, values."""
        places = np.arange(len(rows) * num_places)
        feed = {
            "input_ids": self.ids[rows, first : first + num_places].reshape(-1),
            "active": np.ones(len(places), np.bool_),
            "spread": places.reshape(len(rows), -1),
            "places": places,
            "write_indices": np.array([STARTS[row] + first for row in rows]),
            "few": np.array(form != "many"),
            "products": np.array(form == "products"),
            "past_key.0": np.ascontiguousarray(self.keys[rows, :, :length]),
            "past_value.0": np.ascontiguousarray(self.values[rows, :, :length]),
        }
        states, keys, values = self.session.run(["hidden", "present_key.0", "present_value.0"], feed)
        return states.reshape(len(rows), num_places, -1), keys, values


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: "heads{}of{}width{}".format(*shape))
def layer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> OneLayer:
    num_heads, groups, width = request.param
    return one_layer(num_heads, groups, width, tmp_path_factory.mktemp("layer"))


def one_layer(num_heads: int, groups: int, width: int, folder: Path) -> OneLayer:
    sizes = {"dim": 64, "ffn_dim": 64, "head_dim": width, "num_heads": num_heads, "num_kv_heads": groups}
    config = ModelConfig(vocab_size=64, num_layers=1, exits=(1,), max_positions=2048, **sizes)
    torch.manual_seed(0)
    model = Decoder(config).eval()
    with torch.no_grad():
        for parameter in model.layers.parameters():
            parameter.mul_(3.0)
    (plan,) = (plan for plan in plan_graphs(model, "BGTP") if plan.file == "segment_01.onnx")
    graph = Tracer(model, torch.float32).graph(plan)
    files = WeightFiles(folder)
    files.fill(graph.graph, graph_weights(plan.module, torch.float32), plan.weights)
    (folder / plan.file).write_bytes(graph.SerializeToString())
    dice = np.random.default_rng(0)
    shape = (len(STARTS), groups, 1408, width)
    caches = [dice.standard_normal(shape).astype(np.float32) for _ in range(2)]
    ids = dice.integers(0, config.vocab_size, (len(STARTS), MANY))
    alone = not start_thread_pool.cache_info().currsize  # no other test has given the process its threads
    session = load_session(folder / plan.file, 3, own_threads=alone)
    return OneLayer(session, config, ids, *caches)


def test_every_pass_gives_the_same_bits(layer: OneLayer) -> None:
    """In either form of attention, where both exist."""
    states, keys, values = layer.run(list(range(8)), 0, MANY, 1024, "many")
    old = layer.keys, layer.values
    layer.keys, layer.values = (
        np.concatenate((now, cache[:, :, 1024:]), axis=2)
        for now, cache in zip((keys, values), old, strict=True)
    )
    assert len(np.unique(states.reshape(-1, 64), axis=0)) > 0.9 * states.size / 64, "states of their own"
    grouped = layer.config.num_heads > layer.config.num_kv_heads
    for form in ("many", "few", "products") if grouped else ("many",):
        for num_places in (1, 2, 3, 8, 9, 33, 64):
            if (form, num_places, grouped) == ("many", 1, True):
                continue  # the one case that the kernel computes otherwise; a single token is always few
            for length in (1024, 1152, 1408):
                for rows in ([1], [2, 0], [5, 6, 7], list(range(8))):
                    if form == "products" and len(rows) * layer.config.num_kv_heads < NUM_THREADS:
                        continue  # which the runtime does not do, either
                    found = layer.run(rows, SKIPPED, num_places, length, form)
                    part = slice(SKIPPED, SKIPPED + num_places)
                    what = f"{num_places} tokens of rows {rows}, T = {length}, {form}"
                    np.testing.assert_array_equal(found[0], states[rows, part], err_msg=what)
    for row in range(len(STARTS)):
        written = slice(STARTS[row], STARTS[row] + MANY)
        for now, before in ((keys, old[0]), (values, old[1])):
            assert (now[row, :, written] != before[row, :, written]).any(axis=-1).all()
            np.testing.assert_array_equal(now[row, :, written.stop :], before[row, :, written.stop : 1024])
