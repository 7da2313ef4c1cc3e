"""lm_eval's client of OpenAI's API against the server: likelihood tasks as the adapter has them."""

from pathlib import Path
from typing import Any

import pytest

from ease_eval.tasks.likelihood import encode_pair
from ease_runtime.llm import LLM
from ease_runtime.options import Options
from ease_train.convert.huggingface import export_model
from ease_train.training.checkpoint import load_checkpoint
from served import served

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)
pytest.importorskip("lm_eval", reason="lm_eval is not installed", exc_type=ImportError)
for extra in ("fastapi", "tenacity", "aiohttp"):
    pytest.importorskip(extra, reason="no server, or lm_eval without its extra 'api'")

PAIRS = [
    ("And the king went up to", " the mountain"),
    ("And the king ", "spoke unto the stone"),
    ("the", " sea"),
    ("the", " sea; and it was night."),
]


@pytest.mark.parametrize("concurrent", [1, 3])
def test_likelihoods_are_the_adapters(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, concurrent: int
) -> None:
    """To 1e-4, and with the same answer to whether a continuation is the most probable one."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from ease_eval.tasks.harness import EaseLM

    export_model(load_checkpoint(tiny_checkpoint), tmp_path / "hf")
    adapter = EaseLM(str(tiny_bundle))
    (first,) = adapter.llm.generate("the sea", Options(max_tokens=1))
    pairs = [*PAIRS, ("the sea", first.text)]
    requests: list[Any] = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    with served(LLM(tiny_bundle, num_slots=4)) as server:
        client = LocalCompletionsAPI(
            base_url=f"{server.url}/v1/completions",
            model="toy",
            tokenizer=str(tmp_path / "hf"),
            tokenizer_backend="huggingface",
            add_bos_token=True,
            max_length=adapter.llm.stack.max_positions,
            batch_size=2,
            num_concurrent=concurrent,
        )
        context, rest = encode_pair(adapter.llm, *pairs[0])
        assert client.tok_encode(pairs[0][0] + pairs[0][1]) == [*context, *rest]
        found = client.loglikelihood(requests, disable_tqdm=True)
    for (theirs, says), (ours, said) in zip(found, adapter.loglikelihood(requests), strict=True):
        assert theirs == pytest.approx(ours, abs=1e-4)
        assert says == said
    assert {says for _, says in found} == {True, False}
