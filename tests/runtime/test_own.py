"""Code of one's own: the policies and the sampler of docs/contributing, word for word, from files outside
the packages; what is refused.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from ease_common.errors import RequestError
from ease_eval.cli.main import main as eval_main
from ease_eval.measure.calibrate import calibrate
from ease_eval.measure.documents import Document
from ease_eval.measure.table import Amounts, make_table
from ease_runtime.cli.main import main as run_main
from ease_runtime.engine.sampling import Greedy
from ease_runtime.llm import LLM
from ease_runtime.options import Options
from ease_runtime.policies import ExitOutput, HeadOutput, ThresholdPolicy, find_policy
from ease_runtime.policies.thresholds import Thresholds

PAGES = Path(__file__).parents[2] / "docs" / "contributing"


@pytest.fixture
def own_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The pages' files, in the working directory and nowhere else; the name of the policy with state."""
    for page, module in {"policy": "collision", "stateful-policy": "top_two", "sampler": "epsilon"}.items():
        (source,) = re.findall(
            r"```python\n(.*?)```", (PAGES / f"{page}.md").read_text(encoding="utf-8"), re.DOTALL
        )
        (tmp_path / f"{module}.py").write_text(source, encoding="utf-8")
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return "top_two:TopTwo"


def generated(bundle: Path, *flags: str) -> list[tuple[int, int]]:
    result = CliRunner().invoke(
        run_main,
        ["generate", str(bundle), "--prompt", "And the king", "--max-tokens", "20", "--json", *flags],
    )
    assert result.exit_code == 0, result.output
    return [(token["id"], token["depth"]) for token in json.loads(result.stdout)["tokens"]]


def test_the_pages_policy_generates(own_policy: str, tiny_bundle: Path) -> None:
    """Its first exit always has the confidence 0; by a name and as an object alike."""
    early = generated(tiny_bundle, "--policy", own_policy, "--threshold", "off,0.0")
    assert {depth for _, depth in early} == {4}
    named = generated(tiny_bundle, "--policy", own_policy, "--threshold", "0.02")
    assert 2 not in {depth for _, depth in named}
    assert 4 in {depth for _, depth in named}
    mine = find_policy(own_policy)(Thresholds.of(0.02))
    events = LLM(tiny_bundle).generate("And the king", Options(max_tokens=20), policy=mine)
    assert [(event.id, event.depth) for event in events] == named


def test_the_pages_policy_in_a_table_and_a_calibration(
    own_policy: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    pytest.importorskip("datasets", reason="a text file is read with it")
    text = tmp_path / "text.jsonl"
    words = ["king", "went", "out", "and", "the", "son", "of"]
    text.write_text(
        "".join(
            json.dumps({"text": " ".join(words[(i * k) % 7] for k in range(20))}) + "\n" for i in range(1, 31)
        )
    )
    small = [
        "--scored-tokens",
        "200",
        "--texts",
        "1",
        "--prompt-tokens",
        "4",
        "--new-tokens",
        "8",
        "--rounds",
        "1",
    ]
    asked = [str(tiny_bundle), "--data", str(text), "--split", "train", "--policy", own_policy]
    result = CliRunner().invoke(
        eval_main, ["table", *asked, "--thresholds", "off,0.02", "--json", "table.json", *small]
    )
    assert result.exit_code == 0, result.output
    rows = json.loads(Path("table.json").read_text())["rows"]
    assert [(row["policy"], row["threshold"]) for row in rows] == [(own_policy, "off"), (own_policy, 0.02)]
    assert rows[1]["mean_depth"] < 6.0
    assert "2" not in rows[1]["depth_counts"]
    flags = ["--delta", "0.9", "--epsilon", "0.9", "--dry-run", "--json", "certificate.json"]
    result = CliRunner().invoke(eval_main, ["calibrate", *asked, *flags])
    assert result.exit_code == 0, result.output
    certificate = json.loads(Path("certificate.json").read_text())
    assert certificate["policy"] == own_policy
    assert Thresholds.of(certificate["thresholds"])


class Certain(ThresholdPolicy):
    """Leaves wherever it is asked."""

    def confidence(self, said, state):
        return np.ones_like(said.head.top_prob)


def test_objects_in_a_table_and_a_calibration(tiny_bundle: Path) -> None:
    llm = LLM(tiny_bundle)
    random = np.random.default_rng
    encoded = [random(seed).integers(1, 300, 40).tolist() for seed in range(6)]
    documents = [Document(llm.tokenizer.decode(ids), ids) for ids in encoded]
    amounts = Amounts(scored_tokens=100, num_texts=1, prompt_tokens=4, new_tokens=4, num_rounds=1)
    table = make_table(
        tiny_bundle,
        llm,
        documents,
        source="x",
        split="y",
        policy=Certain(),
        thresholds=[0.9],
        catch_ups=["recompute"],
        amounts=amounts,
    )
    assert [row.mean_depth for row in table.rows] == [6.0, 2.0]
    assert table.rows[1].policy.endswith(":Certain")
    found = calibrate(
        llm.engine,
        encoded,
        policy=Certain,
        catch_up="recompute",
        risk="disagreement",
        delta=0.9,
        epsilon=0.9,
        data="x",
        split="y",
    )
    assert found.policy == table.rows[1].policy


def test_the_pages_policy_without_state(own_policy: str, tiny_bundle: Path) -> None:
    """Its confidence is the sum of the squared probabilities: between 1 / V and the largest of them."""
    flags = ["--policy", "collision:Collision", "--threshold"]
    assert {depth for _, depth in generated(tiny_bundle, *flags, "0.0")} == {2}
    assert {depth for _, depth in generated(tiny_bundle, *flags, "1.0")} == {6}
    logits = np.log(np.array([[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3]], np.float32))
    said = ExitOutput(0, np.arange(2), HeadOutput(logits, *[np.zeros(2)] * 4))
    found = find_policy("collision:Collision")().confidence(said, None)
    assert found == pytest.approx([0.375, 1 / 3])


def test_the_pages_sampler(own_policy: str, tiny_bundle: Path) -> None:
    """With probability 1 every token is a draw from (seed, position); under verify the same."""
    flags = ["--sampler", "epsilon:Epsilon", "--temperature", "1.0"]
    found = generated(tiny_bundle, *flags)
    assert found != generated(tiny_bundle, *flags, "--seed", "1")
    verified = generated(tiny_bundle, *flags, "--threshold", "0.0", "--catch-up", "verify")
    assert [token for token, _ in verified] == [token for token, _ in found]
    greedy = generated(tiny_bundle)
    assert found != greedy
    same = LLM(tiny_bundle).generate(
        "And the king", Options(max_tokens=20, temperature=1.0), sampler=Greedy()
    )
    assert [(event.id, event.depth) for event in same] == greedy


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--policy", "nowhere:Policy"],
            "policy 'nowhere:Policy' cannot be loaded (ModuleNotFoundError: No module named 'nowhere')",
        ),
        (["--policy", "top_two:Nobody"], "policy 'top_two:Nobody' cannot be loaded (AttributeError"),
        (
            ["--policy", "top_two:np"],
            "policy 'top_two:np' is no class derived from ease_runtime.policies.ThresholdPolicy",
        ),
        (["--policy", "broken:Policy"], "policy 'broken:Policy' cannot be loaded (SyntaxError"),
        (["--sampler", "nowhere:Sampler"], "sampler 'nowhere:Sampler' cannot be loaded"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(
    own_policy: str, tmp_path: Path, tiny_bundle: Path, flags: list[str], message: str
) -> None:
    (tmp_path / "broken.py").write_text("class Policy(:", encoding="utf-8")
    result = CliRunner().invoke(
        run_main, ["generate", str(tiny_bundle), "--prompt", "a", "--threshold", "0.5", *flags]
    )
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_request_cannot_name_code(own_policy: str) -> None:
    for name in ("policy", "sampler"):
        with pytest.raises(RequestError, match="only who runs the command can name code of their own"):
            Options.from_json({name: own_policy})
    assert "top_two" not in sys.modules
    assert Options.from_json({"max_tokens": 3}, Options(policy=own_policy)).policy == own_policy


def test_a_bundle_cannot_name_code(own_policy: str, tiny_bundle: Path, tmp_path: Path) -> None:
    """Calibrated for a policy of one's own: nothing is imported before its user names it; then its thresholds
    hold.
    """
    llm = LLM(tiny_bundle)
    llm.manifest.calibration.update(
        {
            "policy": own_policy,
            "thresholds": 0.02,
            "catch_up": "recompute",
            "risk": "loss",
            "delta": 0.1,
            "epsilon": 0.1,
            "data": "x",
        }
    )
    unasked = llm.submit("And the king", Options(max_tokens=2))
    assert "top_two" not in sys.modules
    assert not unasked.choices[0].sequence.decision.policy.thresholds
    assert unasked.choices[0].sequence.notes == [
        f"this bundle was calibrated for a policy of one's own; to use it: --policy {own_policy}"
    ]
    llm.cancel(unasked)
    asked = llm.submit("And the king", Options(max_tokens=2, policy=own_policy)).choices[0].sequence
    assert asked.decision.policy.thresholds == Thresholds((0.02, 0.02))
    assert "thresholds from the bundle's calibration" in asked.notes[0]
