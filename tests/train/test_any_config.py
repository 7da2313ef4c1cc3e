"""Any value in any place of a foreign model's JSON files: the model is read, or refused in a line.

    EASE_CONFIGS=100000 pytest tests/train/test_any_config.py       # all values in all places

A table of junk in every place; a run takes a sample of it, the same every time.
"""

import copy
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

import source_models
from ease_common.errors import EaseError
from ease_train.convert.families import known
from ease_train.convert.huggingface import import_model
from ease_train.convert.source_model import model_config
from json_places import places

pytestmark = pytest.mark.filterwarnings("ignore")
NUM_CONFIGS = int(os.environ.get("EASE_CONFIGS", "120"))  # that are imported with their weights, per file
GONE = object()
JUNK: list[Any] = [
    GONE,
    *(None, True, -1, 0, 1, 2, 2**31, 10**9, 2**63, 10**400, 0.5, 1e308, float("inf"), float("nan")),
    *("", "x", "a\nb", "\ud800", "x" * 100_000, [], [1], ["x"], [[]], [-1], [10**400], {}, {"a": 1}),
    *({"rope_type": kind} for kind in ("llama3", "linear", [], {})),
    {"rope_type": "linear", "factor": float("nan")},
    {"rope_type": "linear", "factor": 10**400},
    {"content": 1},
]
ROPE = {**source_models.ROPE3, "original_max_position_embeddings": 32, "partial_rotary_factor": 1.0}
UNSAID = {  # what a config.json may say besides what transformers writes
    "rope_scaling": ROPE,
    "rope_theta": 1e4,
    "head_dim": 8,
    "sliding_window": 64,
    "use_sliding_window": True,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_activation": "gelu_pytorch_tanh",
    "layer_types": ["full_attention", "sliding_attention"] * 2,
    "max_window_layers": 1,
    "no_rope_layers": [1, 0, 1, 1],
    "rotary_pct": 0.5,
    "layer_norm_eps": 1e-5,
    "use_parallel_residual": True,
    "original_max_position_embeddings": 64,
    "sliding_window_pattern": 2,
    "query_pre_attn_scalar": 8,
    "rope_local_base_freq": 1e4,
}
BESIDE = {
    "split_special_tokens": False,
    "add_bos_token": True,
    "chat_template": [{"name": "default", "template": "x"}],
    "unk_token": {"__type": "AddedToken", "content": "<s>"},
    "added_tokens_decoder": {"0": {"content": "<s>", "special": True}},
}


def spoilt(sound: dict[str, Any], place: tuple[Any, ...], junk: Any) -> dict[str, Any]:
    """A copy with junk in one place, or with nothing there."""
    values = copy.deepcopy(sound)
    inner: Any = values
    for key in place[:-1]:
        inner = inner[key]
    if junk is GONE:
        del inner[place[-1]]
    else:
        inner[place[-1]] = junk
    return values


def cases(sound: dict[str, Any], count: int) -> list[tuple[tuple[Any, ...], Any]]:
    """Some of the places and their junk, the same every time."""
    known = [(place, junk) for place in places(sound) for junk in JUNK]
    return known if count >= len(known) else random.Random(11).sample(known, count)


def check_line(said: str) -> None:
    assert len(said.splitlines()) == 1, ascii(said[:300])
    assert len(said) <= 600, ascii(said[:300])
    said.encode()  # a terminal can show it


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("any") / "hf"
    return source_models.write_model(source_models.make_model("llama3"), folder)


@pytest.mark.parametrize("family", known())
def test_any_value_of_a_config_is_ours_or_refused_in_a_line(source: Path, family: str) -> None:
    """Without weights: all of them."""
    sound = {**json.loads((source / "config.json").read_text()), **UNSAID, "model_type": family}
    refused = 0
    for place, junk in cases(sound, 10**9):
        try:
            model_config(spoilt(sound, place, junk), (), None, False)
        except EaseError as error:
            check_line(str(error))
            refused += 1
    assert refused > 200


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_any_value_in_a_directory_is_imported_or_refused_in_a_line(
    source: Path, tmp_path: Path, name: str
) -> None:
    folder = shutil.copytree(source, tmp_path / "hf")
    sound = json.loads((folder / name).read_text())
    sound |= {"config.json": UNSAID, "tokenizer_config.json": BESIDE}.get(name, {})
    outcomes = []
    for place, junk in cases(sound, NUM_CONFIGS):
        (folder / name).write_text(json.dumps(spoilt(sound, place, junk)))
        try:
            import_model(str(folder))
        except EaseError as error:
            check_line(str(error).replace(str(folder), ""))
            outcomes.append("refused")
        else:
            outcomes.append("imported")
    assert {*outcomes} == {"imported", "refused"} if name == "config.json" else "imported" in outcomes
