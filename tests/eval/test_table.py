"""The table: its contract, and that its speeds are those of the wall clock."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from ease_eval.cli.main import main
from ease_eval.measure import table as table_module
from ease_eval.measure.latency import Setting, Text, Timings, ideal_seconds, measure
from ease_eval.measure.table import Scored, make_speed, quality_cells
from ease_eval.measure.weights import bytes_read
from ease_runtime.bundle.manifest import MANIFEST_FILE, load_manifest, sha256_of
from ease_runtime.engine.engine import Engine
from ease_runtime.engine.layout import Call
from ease_runtime.llm import LLM
from ease_runtime.ort.stack import OrtStack
from ease_runtime.policies import make_policy

CONTRACT = {"policy", "threshold", "catch_up", "ppl", "mean_depth", "depth_fraction", "tokens_per_second"}
CONTRACT |= {"latency_ms_p50", "latency_ms_p95", "speedup", "ideal_speedup"}
SMALL = [
    "--scored-tokens",
    "300",
    "--texts",
    "2",
    "--prompt-tokens",
    "8",
    "--new-tokens",
    "24",
    "--rounds",
    "2",
]


def test_json_and_markdown_hold_every_row_off_first(
    tiny_bundle: Path, corpus_file: Path, tmp_path: Path
) -> None:
    files = ["--json", str(tmp_path / "out" / "table.json"), "--markdown", str(tmp_path / "table.md")]
    arguments = [
        "table",
        str(tiny_bundle),
        "--data",
        str(corpus_file),
        "--thresholds",
        "0,0.6",
        "--catch-up",
        "recompute",
        "--catch-up",
        "propagate",
    ]
    result = CliRunner().invoke(main, [*arguments, *SMALL, *files])
    assert result.exit_code == 0, result.output
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert {"bundle", "data", "device", "versions", "rows"} <= table.keys()
    rows = table["rows"]
    assert [(r["threshold"], r["catch_up"]) for r in rows[1:]] == [
        (0.0, "recompute"),
        (0.6, "recompute"),
        (0.0, "propagate"),
        (0.6, "propagate"),
    ]
    assert all(r.keys() >= CONTRACT for r in rows)
    off = rows[0]
    assert (off["threshold"], off["mean_depth"], off["speedup"], off["ideal_speedup"]) == (
        "off",
        6.0,
        1.0,
        1.0,
    )
    assert rows[1]["mean_depth"] == 2.0
    assert 2.0 < rows[2]["mean_depth"] < 6.0
    assert rows[1]["ppl"] == rows[3]["ppl"], "when all leave at the first exit, no later K/V is ever read"
    assert sum(rows[2]["depth_counts"].values()) == table["num_scored_tokens"] == 300
    exits = table["exits"]
    assert [e["layer"] for e in exits] == [2, 4, 6]
    assert exits[0]["ppl"] == pytest.approx(rows[1]["ppl"], rel=0.1)  # of first windows
    assert (exits[-1]["ppl"], exits[-1]["agreement"]) == (pytest.approx(off["ppl"], rel=0.1), 1.0)
    assert 2.0 <= table["oracle_mean_depth"] <= 6.0 - 4.0 * exits[0]["agreement"]
    assert off["ppl_ratio_interval"] == [1.0, 1.0]
    low, high = rows[1]["ppl_ratio_interval"]
    assert 0.999 * low <= rows[1]["ppl_ratio"] <= 1.001 * high
    assert off["bits_per_byte"] > 0.5
    markdown = (tmp_path / "table.md").read_text()
    assert markdown.count("\n| ") == len(rows) + 1
    assert f"{off['ppl']:.2f}" in markdown


def test_a_bundle_beside_has_a_row_of_the_same_text_and_rounds(
    tiny_bundle: Path, corpus_file: Path, tmp_path: Path
) -> None:
    """A bundle beside itself says what off says; its times are its own."""
    beside = shutil.copytree(tiny_bundle, tmp_path / "same")
    file = tmp_path / "table.json"
    arguments = ["table", str(tiny_bundle), "--data", str(corpus_file), "--thresholds", "0", *SMALL]
    result = CliRunner().invoke(main, [*arguments, "--beside", str(beside), "--json", str(file)])
    assert result.exit_code == 0, result.output
    assert "beside: same" in result.output
    table = json.loads(file.read_text())
    off, (row,) = table["rows"][0], table["beside"]
    assert (row["ppl"], row["ppl_ratio"], row["ppl_ratio_interval"]) == (off["ppl"], 1.0, [1.0, 1.0])
    assert (row["num_layers"], row["manifest_sha256"]) == (6, table["manifest_sha256"])
    assert row["speedup"] > 0
    assert row["tokens_per_second"] != off["tokens_per_second"]


def test_a_bundle_beside_needs_the_same_tokens(tiny_bundle: Path, corpus_file: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_bundle, tmp_path / "other")
    tokenizer = other / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    manifest = json.loads((other / MANIFEST_FILE).read_text())
    manifest["files"]["tokenizer.json"] = {
        "sha256": sha256_of(tokenizer),
        "num_bytes": tokenizer.stat().st_size,
    }
    (other / MANIFEST_FILE).write_text(json.dumps(manifest))
    arguments = ["table", str(tiny_bundle), "--data", str(corpus_file), *SMALL, "--beside", str(other)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "other has another tokenizer" in result.output


def settings(*thresholds: float | None) -> list[Setting]:
    return [
        Setting(make_policy("max-prob", None if t is None else [t], (2, 4, 6)), "propagate")
        for t in thresholds
    ]


def test_a_slow_deep_segment_shows_in_measured_and_ideal_speed(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock on which a segment takes a millisecond and the last one, later, forty."""
    stack = OrtStack(tiny_bundle)
    texts = [Text(tuple(range(1, 31)), 10)]
    milliseconds = [1, 1, 1]
    now = 0.0
    plain_run = stack.run_segment

    def run(number: int, *arguments: object) -> None:
        nonlocal now
        now += milliseconds[number] / 1000
        plain_run(number, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    stack.run_segment = run  # type: ignore[assignment, method-assign]

    def speedups() -> tuple[float, float]:
        (off, early), seconds = measure(Engine(stack), settings(None, 0.0), texts, 3)
        assert (set(off.depths), set(early.depths)) == ({6}, {2})
        ideal = ideal_seconds(off.calls, seconds) / ideal_seconds(early.calls, seconds)
        return off.rounds[1] / early.rounds[1], ideal

    assert speedups() == pytest.approx((3.0, 3.0))
    milliseconds[2] = 40
    assert speedups() == pytest.approx((42.0, 42.0))


def test_calls_of_a_setting_are_those_its_depths_need(tiny_bundle: Path) -> None:
    stack = OrtStack(tiny_bundle)
    texts = [Text(tuple(range(1, 31)), 10)]
    (off, early), _ = measure(Engine(stack), settings(None, 0.0), texts, 1)
    kinds = [(call.graph, call.number, call.num_tokens) for call in off.calls]
    assert kinds == [("segment", 0, 1), ("segment", 1, 1), ("segment", 2, 1), ("exit", 2, 1)] * 19
    assert [(call.graph, call.number, call.num_tokens) for call in early.calls] == [
        ("segment", 0, 1),
        ("exit", 0, 1),
    ] * 19
    assert len(off.depths) == len(off.token_seconds) == 19


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policy", "maxprob"], "unknown policy 'maxprob'; did you mean 'max-prob'?"),
        (["--catch-up", "recompte"], "unknown catch-up 'recompte'; did you mean 'recompute'?"),
        (["--thresholds", "1.2"], "threshold 1.2 is outside [0, 1]"),
        (["--data", "no/such.txt"], "no data file at no/such.txt"),
        (["--split", "tests"], "unknown split 'tests'; did you mean 'test'?"),
        (["--rounds", "0"], "num_rounds = 0, expected at least 1"),
        (["--new-tokens", "5000"], "5008 tokens a text are more than this model's context of 288"),
        (["--json", "/proc/table.json"], "could not write /proc/table.json"),
    ],
)
def test_bad_input_ends_in_one_line(
    tiny_bundle: Path, corpus_file: Path, options: list[str], message: str
) -> None:
    result = CliRunner().invoke(
        main, ["table", str(tiny_bundle), "--data", str(corpus_file), *SMALL, *options]
    )
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_the_interval_of_a_ratio_by_hand() -> None:
    """One document: no spread.

    Two that differ: between their own ratios, and on both sides of the whole's.
    """
    assert Scored([range(5)], 1).interval(np.full(4, 0.5)) == pytest.approx((np.exp(0.5), np.exp(0.5)))
    low, high = Scored([range(3), range(5)], 1).interval(np.array([0.0, 0.0, 1.0, 1.0, 1.0, 1.0]))
    assert (low, high) == pytest.approx((1.0, np.e))


def command(name: str, *arguments: object) -> Result:
    return CliRunner().invoke(main, [name, *map(str, arguments), *SMALL])


def test_ppl_and_depth_are_the_tables(tiny_bundle: Path, corpus_file: Path, tmp_path: Path) -> None:
    flags = [tiny_bundle, "--data", corpus_file, "--thresholds", "0,0.6"]
    for name in ("table", "ppl", "depth", "latency"):
        result = command(name, *flags, "--json", tmp_path / f"{name}.json")
        assert result.exit_code == 0, result.output
    found = {
        name: json.loads((tmp_path / f"{name}.json").read_text())
        for name in ("table", "ppl", "depth", "latency")
    }
    rows = found["table"]["rows"]
    for name in ("ppl", "depth"):
        for row, whole in zip(found[name]["rows"], rows, strict=True):
            assert {key: whole[key] for key in row} == row
    assert [row["threshold"] for row in found["latency"]["rows"]] == ["off", 0.0, 0.6]
    assert found["latency"]["rows"][1].keys() >= {
        "latency_ms_p50",
        "latency_ms_p99",
        "prefill_ms_p95",
        "speedup",
        "tokens_per_second",
    }
    for one in found.values():
        assert one.keys() >= {"bundle", "manifest_sha256", "precision", "versions", "seed", "device"}


def test_depth_by_position(tiny_bundle: Path, corpus_file: Path, tmp_path: Path) -> None:
    assert (
        command(
            "depth",
            tiny_bundle,
            "--data",
            corpus_file,
            "--thresholds",
            "0,0.6",
            "--json",
            tmp_path / "d.json",
        ).exit_code
        == 0
    )
    off, first, some = json.loads((tmp_path / "d.json").read_text())["rows"]
    assert set(off["depth_by_position"]) == {6.0}
    assert set(first["depth_by_position"]) == {2.0}
    assert len(set(some["depth_by_position"])) > 2
    scored = Scored([range(21), range(19)], 1)
    assert scored.by_position(np.array([2] * 16 + [4] * 4 + [6] * 18), 17) == [
        4.0,
        5.0,
    ]  # positions of 20 and 18 tokens, the last ones out


def test_batches_are_rows_of_their_own(tiny_bundle: Path, corpus_file: Path, tmp_path: Path) -> None:
    flags = ["--thresholds", "0", "--batch", 1, "--batch", 3, "--json", tmp_path / "t.json"]
    result = command("table", tiny_bundle, "--data", corpus_file, *flags)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "t.json").read_text())
    assert [(one["batch"], one["threshold"]) for one in found["batches"]] == [
        (1, "off"),
        (1, 0.0),
        (3, "off"),
        (3, 0.0),
    ]
    assert [one["speedup"] for one in found["batches"][::2]] == [1.0, 1.0]
    assert all(one["tokens_per_second"] > 0 for one in found["batches"])
    assert found["peak_memory_mb"] > 50


def test_several_bundles_give_a_table_each(tiny_bundle: Path, corpus_file: Path, tmp_path: Path) -> None:
    result = command(
        "table",
        tiny_bundle,
        tiny_bundle,
        "--data",
        corpus_file,
        "--thresholds",
        "0",
        "--json",
        tmp_path / "t.json",
    )
    assert result.exit_code == 0, result.output
    one, other = json.loads((tmp_path / "t.json").read_text())["tables"]
    assert (one["precision"], one["rows"][1]["ppl"]) == ("fp32", other["rows"][1]["ppl"])


def test_a_killed_table_ends_in_the_same_json(
    tiny_bundle: Path, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was measured before the kill stands, times too; the rest is measured once."""
    flags = [
        tiny_bundle,
        "--data",
        corpus_file,
        "--thresholds",
        "0",
        "--batch",
        2,
        "--json",
        tmp_path / "t.json",
    ]
    counted: list[str] = []

    def counting(name: str, run: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            counted.append(name)
            if counted == ["scores", "times", "exits"]:
                raise KeyboardInterrupt
            return run(*arguments, **named)

        return call

    for name, function in (
        ("scores", "score_settings"),
        ("times", "measure"),
        ("exits", "exit_figures"),
        ("batch", "measure_batch"),
    ):
        monkeypatch.setattr(table_module, function, counting(name, getattr(table_module, function)))
    assert command("table", *flags).exit_code == 130
    journal = tmp_path / ".t.json.journal"
    kept = [json.loads(line) for line in journal.read_text().splitlines()]
    assert [part["name"] for part in kept[1:]] == ["scores", "times"]
    result = command("table", *flags)
    assert result.exit_code == 0, result.output
    assert counted == ["scores", "times", "exits", "exits", "batch"]
    found = json.loads((tmp_path / "t.json").read_text())
    times, beside = kept[2]["value"]
    assert beside == []
    assert [
        {key: row[key] for key in speed} for row, (speed, _) in zip(found["rows"], times, strict=True)
    ] == [speed for speed, _ in times]
    assert found["rows"][0]["ppl"] == pytest.approx(np.exp(-np.mean(kept[1]["value"][0][0])))
    assert not journal.exists()


def test_bytes_that_calls_read(tiny_bundle: Path) -> None:
    """Two layers of a segment, whatever else stands in its file; an exit is its own weights and its
    head's.
    """
    manifest = load_manifest(tiny_bundle)
    size = {name: info.num_bytes for name, info in manifest.files.items()}
    layers = size["segment_02.onnx.data"]
    head = size.get("exit_01.onnx.data", 0) + size["head.onnx.data"]
    calls = [
        Call("segment", 0, 1, 256),
        Call("segment", 0, 3, 256),
        Call("kv", 1, 2, 256),
        Call("exit", 0, 1),
    ]
    assert size["segment_01.onnx.data"] > layers, "its embedding is not tied"
    assert bytes_read(manifest, calls) == 2 * layers + head
    assert bytes_read(manifest, [Call("segment", 1, 1, 256)]) == layers > 2 * 64 * 64 * 4 * 4


def test_the_share_of_heads_is_that_of_the_time_of_their_calls(tiny_bundle: Path) -> None:
    """What an exit costs beside layers: its graph and head, its gate, its own layer; not the K/V of those
    that left.
    """
    layers = Call("segment", 0, 1, 256)
    own = Call("block", 0, 1, 256)
    head = Call("exit", 0, 1)
    debt = Call("kv", 1, 2, 256)
    timing = Timings(
        rounds=[1.0], prefills=[1.0], token_seconds=[1.0], depths=[2], calls=[layers, own, head, debt]
    )
    speed = make_speed(timing, timing, {layers: 0.5, own: 0.1, head: 0.3, debt: 0.1}, LLM(tiny_bundle))
    assert speed.head_share == pytest.approx(0.4)


def test_a_perplexity_beyond_all_measure_is_a_power_of_ten() -> None:
    """A reduced head gives tokens that it does not know no probability to speak of."""
    assert quality_cells(25.571, 1.0489) == ("25.57", "+4.9 %")
    assert quality_cells(3.85e80, 2.6e79) == ("4e+80", "+3e+81 %")
