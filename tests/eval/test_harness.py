"""The lm-evaluation-harness adapter: its requests go through the exit policy, and its figures are those of
the table and of torch.
"""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ease_common.errors import RequestError
from ease_eval.measure.perplexity import score_documents
from ease_eval.tasks.likelihood import encode_pair
from ease_runtime.engine.engine import Engine
from ease_runtime.engine.sampling import Given
from ease_runtime.llm import LLM
from ease_runtime.options import SAMPLING, Options
from ease_runtime.policies import FULL_DEPTH, make_policy
from ease_train.training.checkpoint import load_checkpoint

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)
pytest.importorskip("lm_eval", reason="lm_eval is not installed", exc_type=ImportError)

TEXT = (
    "And the king went up to the mountain; and it was good. And my servant spoke unto the people; and it was "
    "night."
)
PAIRS = [
    ("And the king went up to", " the mountain"),
    ("And the king ", "spoke unto the stone"),
    ("", "And a voice"),
    ("the", " sea"),
]


@pytest.fixture(scope="module")
def instance() -> Any:
    from lm_eval.api.instance import Instance

    def make(kind: str, *arguments: Any) -> Instance:
        return Instance(kind, {}, arguments, 0)

    return make


def model(bundle: Path, arguments: str = "", **more: Any) -> Any:
    from ease_eval.tasks.harness import EaseLM

    return EaseLM.create_from_arg_string(f"bundle={bundle}{arguments}", more)


def rolling(bundle: Path, arguments: str, make: Any, text: str = TEXT) -> float:
    return float(model(bundle, arguments).loglikelihood_rolling([make("loglikelihood_rolling", text)])[0])


def test_the_model_is_found_by_its_name() -> None:
    """By older harnesses once the module is imported, by those with plugins through the entry point."""
    from lm_eval.api.registry import get_model

    from ease_eval.tasks.harness import EaseLM

    assert get_model("ease") is EaseLM
    (entry,) = importlib.metadata.entry_points(group="lm_eval.models", name="ease")
    assert entry.load() is EaseLM


def test_rolling_at_full_depth_is_torchs(tiny_bundle: Path, tiny_checkpoint: Path, instance: Any) -> None:
    ids = torch.tensor([LLM(tiny_bundle).encode(TEXT)])
    with torch.no_grad():
        logprobs = load_checkpoint(tiny_checkpoint).model.eval()(ids[:, :-1]).log_softmax(-1)
    expected = logprobs[0, torch.arange(ids.shape[1] - 1), ids[0, 1:]].sum().item()
    assert rolling(tiny_bundle, "", instance) == pytest.approx(expected, rel=1e-4)
    assert rolling(tiny_bundle, ",threshold=off", instance) == pytest.approx(expected, rel=1e-4)
    assert rolling(tiny_bundle, ",threshold=0.5,catch_up=verify", instance) == pytest.approx(
        expected, rel=1e-4
    )
    assert rolling(tiny_bundle, "", instance, "") == 0.0


@pytest.mark.parametrize("catch_up", ["recompute", "propagate"])
@pytest.mark.parametrize("threshold", ["0.4", "off/0.6"])
def test_rolling_under_a_policy_is_the_tables(
    tiny_bundle: Path, instance: Any, catch_up: str, threshold: str
) -> None:
    """Also over several windows of the context."""
    llm = LLM(tiny_bundle)
    text = TEXT * 8
    values = [None if part == "off" else float(part) for part in threshold.split("/")]
    policy = make_policy("max-prob", values, (2, 4, 6))
    ids = llm.encode(text)
    assert len(ids) > llm.stack.max_positions
    (scores,) = score_documents(llm.engine, [ids], [policy], catch_up)
    found = rolling(tiny_bundle, f",threshold={threshold},catch_up={catch_up}", instance, text)
    assert np.exp(-found / len(scores.logprobs)) == pytest.approx(scores.perplexity, rel=1e-9)
    assert found != pytest.approx(rolling(tiny_bundle, "", instance, text), rel=1e-3)


@pytest.mark.parametrize("catch_up", ["recompute", "propagate"])
def test_loglikelihood_is_the_engines_token_by_token(tiny_bundle: Path, instance: Any, catch_up: str) -> None:
    one = model(tiny_bundle, f",threshold=0.4,catch_up={catch_up}")
    depths: list[int] = []
    for (context, continuation), (found, greedy) in zip(
        PAIRS, one.loglikelihood([instance("loglikelihood", *pair) for pair in PAIRS]), strict=True
    ):
        first, rest = encode_pair(one.llm, context, continuation)
        engine = Engine(one.llm.stack)
        ids = [*first, *rest]
        tokens = list(
            engine.generate(
                engine.start(
                    first,
                    max_new_tokens=len(rest),
                    policy=one.policy,
                    catch_up=catch_up,
                    sampler=Given(ids),
                    num_logprobs=1,
                )
            )
        )
        assert found == pytest.approx(sum(t.logprob for t in tokens), rel=1e-4)
        assert greedy == ([t.top_logprobs[0][0] for t in tokens] == rest)
        depths += [t.depth for t in tokens]
    assert one.get_model_info()["mean_depth"] == pytest.approx(np.mean(depths))
    assert len(set(depths)) > 1, "the threshold must separate tokens, or the test shows nothing"


@pytest.mark.parametrize("batch_size", [1, 2])
def test_generation_is_the_runtimes(tiny_bundle: Path, instance: Any, batch_size: int) -> None:
    options = Options(max_tokens=12, threshold=(0.4,), catch_up="propagate", stop=("went",))
    wanted = {"until": ["went"], "max_gen_toks": 12, "do_sample": False, "temperature": 1.0}
    prompts = ["And the king", "And my servant looked", "the river"]
    one = model(tiny_bundle, ",threshold=0.4,catch_up=propagate", batch_size=batch_size)
    found = one.generate_until([instance("generate_until", prompt, wanted) for prompt in prompts])
    llm = LLM(tiny_bundle)
    assert found == ["".join(event.text for event in llm.generate(prompt, options)) for prompt in prompts]
    assert 2.0 < one.get_model_info()["mean_depth"] < 6.0


def test_generation_arguments(tiny_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = model(
        tiny_bundle, ",max_gen_toks=9", device="cuda:0"
    )  # as the harness's command says when nobody asked for one
    assert one._read({"until": "\n\n", "num_beams": 4}) == Options(max_tokens=9, stop=("\n\n",))
    assert "generation arguments without effect here: num_beams" in caplog.text
    assert one._read({"temperature": 0.5, "top_p": 0.9, "max_new_tokens": 3}) == Options(
        max_tokens=3, temperature=0.5, top_p=0.9
    )
    assert one._read({"do_sample": True}).temperature == 1.0
    assert one._read({"max_tokens": 10**6}).max_tokens == 287
    penalties = {"presence_penalty": 0.5, "frequency_penalty": 0.25, "logit_bias": {"7": -1.0}, "seed": 3}
    asked = Options(max_tokens=9, presence_penalty=0.5, frequency_penalty=0.25, logit_bias={7: -1.0}, seed=3)
    assert one._read(penalties) == asked


def test_every_option_of_sampling_is_a_tasks_or_the_models() -> None:
    """A field of Options needs no second list: a task may say it, or it is said why it may not."""
    from ease_eval.tasks.harness import OF_REQUESTS, OF_TASKS

    assert {*OF_REQUESTS, *OF_TASKS} == {*SAMPLING} - {"sampler"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (",threshold=high", "threshold 'high' is not a number in"),
        (",threshold=0.5/0.5/0.5", "3 thresholds given; this bundle has 2 early exits"),
        (",treshold=0.5", "unknown option 'treshold'; did you mean 'threshold'?"),
        (",catch_up=recompte", "unknown catch-up 'recompte'; did you mean 'recompute'?"),
    ],
)
def test_bad_arguments(tiny_bundle: Path, arguments: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        model(tiny_bundle, arguments)


def test_a_base_model_has_no_chat_template(tiny_bundle: Path) -> None:
    with pytest.raises(RequestError, match="no chat template"):
        model(tiny_bundle).apply_chat_template([{"role": "user", "content": "Hello"}])


TASK = """
task: ease_local
dataset_path: json
dataset_kwargs:
  data_files: {file}
output_type: multiple_choice
test_split: train
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
"""


def test_a_task_of_the_harness_runs_through_the_policy(tiny_bundle: Path, tmp_path: Path) -> None:
    """A local task file from end to end: its accuracy is that of the engine's own likelihoods."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    people = ("the king", "a shepherd", "the river", "my servant", "a voice")
    choices = ["went up to the sea", "spoke", "was with"]
    rows = [{"context": f"And {who}", "choices": choices, "answer": i % 3} for i, who in enumerate(people)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    one = model(tiny_bundle, ",threshold=0.4")
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    result = lm_eval.simple_evaluate(model=one, tasks=["ease_local"], task_manager=manager, bootstrap_iters=0)
    right = []
    for row in rows:
        sums = []
        for choice in row["choices"]:
            first, rest = encode_pair(one.llm, str(row["context"]), f" {choice}")
            sampler = Given([*first, *rest])
            budget = len(rest)
            sequence = one.llm.engine.start(first, max_new_tokens=budget, policy=one.policy, sampler=sampler)
            sums.append(sum(t.logprob for t in one.llm.engine.generate(sequence)))
        right.append(int(np.argmax(sums)) == row["answer"])
    assert result["results"]["ease_local"]["acc,none"] == pytest.approx(np.mean(right))
    assert result["config"]["threshold"] == 0.4
    assert 2.0 < result["config"]["mean_depth"] < 6.0


def test_no_pair_ends_a_run(tiny_bundle: Path, instance: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is certain to follow, what has no tokens cannot, and the others get what they get alone."""
    one = model(tiny_bundle)
    long = TEXT * 12
    asked = [("And the king", ""), ("And", "\ud83d"), ("And", long), PAIRS[0]]
    found = one.loglikelihood([instance("loglikelihood", *pair) for pair in asked])
    assert found[:2] == [(0.0, True), (-np.inf, False)]
    assert "half of a surrogate pair" in caplog.text
    (scores,) = score_documents(one.llm.engine, [one.llm.encode("And" + long)], [FULL_DEPTH], "recompute")
    assert found[2][0] == pytest.approx(scores.logprobs[len(one.llm.encode("And")) - 1 :].sum())
    assert found[3] == one.loglikelihood([instance("loglikelihood", *PAIRS[0])])[0]


@pytest.mark.parametrize("argument", ["temperature=0.7", "n=2", "logprobs=2", "max_tokens=5", "stop=x"])
def test_arguments_that_are_the_tasks_are_refused(tiny_bundle: Path, argument: str) -> None:
    with pytest.raises(RequestError, match=f"{argument.partition('=')[0]} in --model_args has no effect"):
        model(tiny_bundle, f",{argument}")


@pytest.mark.parametrize(("arguments", "named"), [("pretrained=a/b", "a/b"), ("threshold=0.5", "BUNDLE")])
def test_a_model_without_a_bundle(arguments: str, named: str) -> None:
    from lm_eval.api.registry import get_model

    with pytest.raises(RequestError, match=f"^--model_args names no bundle; give bundle={named}$"):
        get_model("ease").create_from_arg_string(arguments)


CONTEXTS = [
    ("", "And a voice"),
    ("", "<s>And a voice"),
    ("", "<|end|>And"),
    ("<s>the", " sea"),
    ("<|end|>the", " sea"),
    ("the ", "sea<s>"),
    ("And", " it"),
]


@pytest.mark.parametrize("kind", ["trained here", "start token", "named only", "no name"])
def test_likelihoods_are_those_of_the_harness_own_model(
    tiny_checkpoint: Path, tmp_path: Path, instance: Any, kind: str
) -> None:
    """Of the same directory, by `lm_eval --model hf` with its default arguments, whatever stands before a
    text there.
    """
    from lm_eval.models.huggingface import HFLM

    import source_models
    from ease_export.build import export_bundle
    from ease_train.convert.huggingface import export_model, import_model
    from ease_train.training.checkpoint import save_checkpoint

    checkpoint = tiny_checkpoint
    folder = tmp_path / "hf"
    if kind == "trained here":
        export_model(load_checkpoint(checkpoint), folder)
    else:
        source_models.write_model(source_models.make_model("llama2"), folder, start=kind == "start token")
        if kind == "no name":  # as Qwen2.5
            described = json.loads((folder / "tokenizer_config.json").read_text())
            (folder / "tokenizer_config.json").write_text(json.dumps({**described, "bos_token": None}))
        checkpoint = tmp_path / "checkpoint"
        save_checkpoint(import_model(str(folder), (2,)), checkpoint)
        export_model(load_checkpoint(checkpoint), tmp_path / "back")
    export_bundle(checkpoint, tmp_path / "bundle")
    requests = [instance("loglikelihood", *pair) for pair in CONTEXTS]
    ours = model(tmp_path / "bundle").loglikelihood(requests)
    for path in (folder, tmp_path / "back"):
        if path.exists():
            theirs = HFLM(pretrained=str(path), device="cpu", dtype="float32").loglikelihood(
                requests, disable_tqdm=True
            )
            assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
            assert [found for found, _ in ours] == pytest.approx([found for found, _ in theirs], rel=1e-4)
