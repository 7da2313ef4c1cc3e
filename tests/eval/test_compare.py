"""Beside other runtimes: transformers for real, the others as scripted modules that answer, crash, hang or
are not there.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from ease_common.errors import RequestError
from ease_eval.cli.main import main
from ease_eval.peers.compare import (
    ComparisonSettings,
    Peer,
    PeerProcess,
    Workload,
    agreement,
    compare_peers,
)
from ease_eval.peers.peer_worker import Told, nll
from ease_runtime.bundle.manifest import read_manifest
from ease_train.convert.huggingface import export_model
from ease_train.training.checkpoint import load_checkpoint

PROMPTS = [[5, 17, 30, 8], [44, 9, 100, 3]]


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint as a Hugging Face directory."""
    path = tmp_path_factory.mktemp("hf") / "model"
    export_model(load_checkpoint(tiny_checkpoint), path)
    return path


def plan(bundle: Path, folder: Path, tmp_path: Path, **fields: object) -> ComparisonSettings:
    return ComparisonSettings(
        bundle,
        folder,
        Path(sys.executable),
        **{"new_tokens": 12, "rounds": 2, "work": tmp_path / "work", "threads": 1, **fields},
    )  # type: ignore[arg-type]


def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    """A module that peers import in place of a runtime."""
    (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_drafts_from_text_say_the_same(tiny_bundle: Path, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    asked = plan(tiny_bundle, folder, tmp_path, runtimes=("lookup",), rounds=1, new_tokens=40)
    found = compare_peers(asked, [Workload([[5, 17, 30] * 5])])
    assert [row.runtime for row in found.rows] == [
        "ease",
        "ease, drafts from text",
        "transformers, prompt lookup",
    ]
    assert [row.error for row in found.rows] == [None] * 3
    assert [row.same_texts for row in found.rows] == [1.0] * 3


def test_transformers_says_the_same_and_what_is_absent_is_named(
    tiny_bundle: Path, folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    settings = {"threshold": [0.0], "catch_up": "propagate"}
    found = compare_peers(plan(tiny_bundle, folder, tmp_path, settings=settings), [Workload(PROMPTS)])
    names = [
        "ease",
        "ease max-prob 0 propagate",
        "transformers eager",
        "transformers early exit 4",
        "onnxruntime-genai",
    ]
    assert [row.runtime for row in found.rows] == names
    ease, early, eager, assisted, genai = found.rows
    assert (genai.error, genai.tokens_per_second) == (
        "onnxruntime_genai is not installed; run: make peers",
        None,
    )
    assert [row.error for row in found.rows[:4]] == [None] * 4
    assert (ease.same_texts, eager.same_texts, assisted.same_texts, ease.ease_over_this) == (
        1.0,
        1.0,
        1.0,
        1.0,
    )
    assert early.mean_agreement is not None
    assert early.mean_agreement < 1.0
    assert eager.version is not None
    assert eager.version.startswith("transformers ")
    for row in found.rows[:4]:
        assert row.tokens_per_second_range is not None
        low, high = row.tokens_per_second_range
        assert 0 < low <= (row.tokens_per_second or 0) <= high
        assert (row.first_token_ms or 0) > 0
    markdown = found.markdown()
    assert markdown.count("\n| ease") == 2
    assert "onnxruntime-genai: onnxruntime_genai is not installed; run: make peers" in markdown


def test_lengths_batches_and_perplexity_of_one_text(tiny_bundle: Path, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    workloads = [Workload(PROMPTS), Workload([[5, 17]], batch_size=3)]
    scored = [[5, 17, 30, 8, 44], [9, 100, 3]]
    settings = {"threshold": [0.0], "catch_up": "propagate"}
    asked = plan(
        tiny_bundle,
        folder,
        tmp_path,
        settings=settings,
        runtimes=("transformers", "early-exit"),
        others=(tiny_bundle,),
    )
    found = compare_peers(asked, workloads, scored)
    assert found.scored_tokens == 6
    one, batch = ({row.runtime: row for row in found.rows if row.batch_size == size} for size in (1, 3))
    other = f"ease {tiny_bundle.name}"
    names = ["ease", other, "ease max-prob 0 propagate", "transformers eager", "transformers early exit 4"]
    assert list(one) == names
    assert one[other].perplexity == one["ease"].perplexity
    assert list(batch) == names[:4]  # its self-speculation takes one row
    assert {row.prompt_tokens for row in one.values()} == {4}
    assert {row.prompt_tokens for row in batch.values()} == {2}
    ease = one["ease"].perplexity
    assert ease == pytest.approx(one["transformers eager"].perplexity, rel=1e-4)
    assert one["ease max-prob 0 propagate"].perplexity is None  # that of full depth is not its own
    for row in (*one.values(), *batch.values()):
        assert row.error is None
        assert row.first_token_over_this is not None
        assert (row.load_seconds or 0) > 0
    assert batch["ease"].same_texts == batch["transformers eager"].same_texts == 1.0


def test_rows_that_are_ahead_do_not_count_before_each_has_a_token() -> None:
    told = Told(2)
    told.began = 0.0
    told.clock = [[1.0, 2.0, 4.0], [3.0, 5.0]]
    told.ids = [[7, 8, 9], [7, 8]]
    answer = told.answer()
    assert {key: answer[key] for key in ("first", "rest", "tokens", "ids")} == {
        "first": 3.0,
        "rest": 2.0,
        "tokens": 2,
        "ids": [7, 8, 9],
    }


def test_the_likelihood_of_a_text_by_hand() -> None:
    logits = np.log([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]]) + 3.0
    assert nll(logits, [2, 1, 0]) == pytest.approx(-np.log(0.25) - np.log(0.1))


GGUF_THAT_COUNTS = """
from types import SimpleNamespace

def CommonParams():
    fields = ("model", "cpuparams", "cpuparams_batch")
    return SimpleNamespace(**dict((field, SimpleNamespace()) for field in fields))

class Server:
    def __init__(self, parameters):
        print("loading", parameters.model.path, parameters.n_ctx, parameters.cpuparams.n_threads)

    def handle_completions(self, asked):
        tokens = []
        while len(tokens) < asked["n_predict"]:
            token = asked["prompt"][-1] + 1 + len(tokens)
            {step}
            tokens.append(token)
        return {{"__verbose": {{"tokens": tokens}}, "timings": {{"prompt_ms": 20.0, "predicted_ms": 110.0}}}}
"""


CRASH = "if token > 40: __import__('os').kill(__import__('os').getpid(), 11)"


@pytest.mark.parametrize(
    ("step", "error"),
    [
        ("pass", None),
        (CRASH, "its process ended: killed by SIGSEGV"),
        ("if token > 40: __import__('os')._exit(3)", "its process ended: exit code 3"),
        ("raise RuntimeError('no memory')", "RuntimeError: no memory"),
        ("__import__('time').sleep(100)", "no answer in 2 seconds"),
        ("if token > 40: break", "only 1 of 12 tokens came"),
        ("return {'error': 'context full'}", "RuntimeError: {'error': 'context full'}"),
    ],
)
def test_what_is_said_of_a_peer_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: str | None
) -> None:
    script(tmp_path, monkeypatch, "xllamacpp", GGUF_THAT_COUNTS.format(step=step))
    asked = {"runtime": "llama.cpp", "gguf": "model.gguf", "context": 64, "threads": 1, "vocab_size": 101}
    worker = PeerProcess(Peer("llama.cpp", "q4", sys.executable, asked), answer_seconds=2.0)
    try:
        worker.start()
        assert (worker.version, worker.error) == ("xllamacpp of unknown version", None)
        first = worker.ask([5, 17, 39], 12)
        assert worker.error == error
        if error is None:
            assert first is not None
            assert first["ids"] == list(range(40, 52))
            assert (first["first"], first["rest"]) == (pytest.approx(0.02), pytest.approx(0.11))
        else:
            assert first is None
    finally:
        worker.stop()


def test_a_peer_that_crashes_is_a_line_and_the_rest_goes_on(
    tiny_bundle: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(tmp_path, monkeypatch, "xllamacpp", GGUF_THAT_COUNTS.format(step=CRASH))
    script(tmp_path, monkeypatch, "transformers", "raise ImportError('broken on purpose')")
    (tmp_path / "model.gguf").touch()
    found = compare_peers(
        plan(tiny_bundle, folder, tmp_path, ggufs=(tmp_path / "model.gguf",)),
        [Workload([[5, 17, 8], [44, 9, 40]])],
    )
    ease = found.rows[0]
    llama = found.rows[-1]
    assert (llama.runtime, llama.error, llama.tokens_per_second) == (
        "llama.cpp",
        "its process ended: killed by SIGSEGV",
        None,
    )
    assert [row.error for row in found.rows[1:3]] == ["ImportError: broken on purpose"] * 2
    assert (ease.error, ease.same_texts) == (None, 1.0)


def test_agreement_by_hand() -> None:
    none: frozenset[int] = frozenset()
    assert agreement([1, 2, 3, 4], [1, 2, 3, 4], none) == 1.0
    assert agreement([1, 2, 9, 4], [1, 2, 3, 4], none) == 0.5
    assert agreement([9], [1], none) == 0.0
    assert agreement([1, 2, 8, 8], [1, 2, 3, 4], frozenset({2})) == 1.0  # our text ends with the 2


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["compare", *map(str, arguments)])


def test_the_command_writes_what_it_shows(
    tiny_bundle: Path, folder: Path, corpus_file: Path, tmp_path: Path
) -> None:
    amounts = ["--texts", "1", "--prompt-tokens", "8", "--new-tokens", "8", "--rounds", "1"]
    place = [
        "--work",
        tmp_path / "work",
        "--json",
        tmp_path / "out.json",
        "--python",
        tmp_path / "no-such-python",
    ]
    result = run(
        tiny_bundle, "--checkpoint", folder, "--data", corpus_file, "--split", "train", *amounts, *place
    )
    assert result.exit_code == 0, result.output
    assert f"transformers eager: no Python at {tmp_path / 'no-such-python'}; run: make peers" in result.output
    found = json.loads((tmp_path / "out.json").read_text())
    assert found.keys() >= {"bundle", "manifest_sha256", "versions", "checkpoint", "prompts", "rows"}
    assert [row["error"] is None for row in found["rows"]] == [True, False, False, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--checkpoint", "{tiny}"],
            "is no Hugging Face directory; make one of a checkpoint: ease-train export-hf",
        ),
        (["--checkpoint", "no/such"], "no/such is no Hugging Face directory: no readable config.json"),
        (["--checkpoint", "{hf}", "--gguf", "no.gguf"], "no GGUF file at no.gguf"),
        (["--checkpoint", "{hf}", "--exit", "6"], "exit layer 6 is outside 1..5"),
        (["--checkpoint", "{hf}", "--rounds", "0"], "rounds = 0, expected at least 1"),
        (
            ["--checkpoint", "{hf}", "--prompt-tokens", "100000"],
            "are 100064 together, more than this model's context of 288",
        ),
        (["--checkpoint", "{hf}", "--threshold", "0.5", "--catch-up", "recal"], "unknown catch-up 'recal'"),
        (
            ["--checkpoint", "{hf}", "--threshold", "0.5", "--policy", "gate"],
            "policy 'gate' needs a gate at every early exit",
        ),
    ],
)
def test_bad_input_ends_in_one_line(
    tiny_bundle: Path, tiny_checkpoint: Path, folder: Path, options: list[str], message: str
) -> None:
    result = run(tiny_bundle, *(option.format(tiny=tiny_checkpoint, hf=folder) for option in options))
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


CPU_PEERS = [
    ("transformers eager", "fp32", "fp32"),
    ("transformers early exit 3", "fp32", "fp32"),
    ("onnxruntime-genai", "fp32", None),
]


@pytest.mark.parametrize(
    ("device", "precision", "expected"),
    [
        ("cpu", "fp16", CPU_PEERS),
        (
            "cuda",
            "fp16",
            [
                ("transformers eager", "fp16", "fp16"),
                ("transformers early exit 3", "fp16", "fp16"),
                ("onnxruntime-genai", "fp16", None),
                ("onnxruntime-genai, CUDA graphs", "fp16", None),
            ],
        ),
        (
            "cuda",
            "bf16",
            [
                ("transformers eager", "bf16", "bf16"),
                ("transformers early exit 3", "bf16", "bf16"),
                ("onnxruntime-genai", "bf16", None),
                ("onnxruntime-genai, CUDA graphs", "bf16", None),
            ],
        ),
        ("cpu", "fp32", CPU_PEERS),
        ("cuda", "fp32", [*CPU_PEERS, ("onnxruntime-genai, CUDA graphs", "fp32", None)]),
    ],
)
def test_peers_compute_as_the_bundle_does_on_its_device(
    precisions: tuple[Path, dict[str, Path]],
    tmp_path: Path,
    device: str,
    precision: str,
    expected: list[tuple[str, str, str | None]],
) -> None:
    """In halves on a GPU alone. genai is made for the device by its builder."""
    bundle = precisions[1][precision]
    manifest = read_manifest(bundle)
    sizes = {"num_hidden_layers": manifest.num_layers, "vocab_size": manifest.vocab_size}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    ease, *peers = plan(bundle, tmp_path, tmp_path, device=device).peers()
    assert {peer.asked["device"] for peer in (ease, *peers)} == {device}
    kinds = [
        (peer.name, peer.precision, None if "genai" in peer.name else peer.asked["floats"]) for peer in peers
    ]
    assert kinds == expected


def test_another_model_is_refused(tiny_bundle: Path, folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 7}))
    with pytest.raises(RequestError, match=r"has 7 layers and .* not the same model"):
        plan(tiny_bundle, tmp_path, tmp_path)
