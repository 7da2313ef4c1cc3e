"""What a directory's files say and hold: read as transformers reads it, or refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer

import source_models
from ease_common.errors import ModelImportError, SettingWarning
from ease_train.cli import main
from ease_train.convert.families import family_named, known
from ease_train.convert.family import UNSAID
from ease_train.convert.huggingface import import_model

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
TOLERANCE = 1e-4  # of the largest logit
IDS = torch.arange(2, 26)[None] * 5 % 320
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a family, written once: name -> directory, with 4 K/V heads where it ends in
    "-mha".
    """
    root = tmp_path_factory.mktemp("sources")

    def source(name: str) -> Path:
        family = name.removesuffix("-mha")
        if not (root / name).is_dir():
            heads = 4 if name.endswith("-mha") else 2
            source_models.write_model(
                source_models.make_model(family, **SMALL, num_key_value_heads=heads), root / name
            )
        return root / name

    return source


def edited(
    source: Path,
    target: Path,
    values: dict[str, Any] | None = None,
    weights: Callable[[Weights], Weights] | None = None,
    without: tuple[str, ...] = (),
) -> Path:
    """A copy of a directory with other values in its config.json, and other tensors."""
    shutil.copytree(source, target)
    config = {**json.loads((target / "config.json").read_text()), **(values or {})}
    kept = {name: value for name, value in config.items() if name not in without}
    (target / "config.json").write_text(json.dumps(kept))
    if weights is not None:
        save_file(
            weights(load_file(target / "model.safetensors")),
            target / "model.safetensors",
            metadata={"format": "pt"},
        )
    return target


def transformers_logits(folder: Path) -> torch.Tensor:
    """Those of transformers, which must find all that it looks for, and use all that it finds."""
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(told[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(IDS).logits
    return logits


def bare(weights: Weights) -> Weights:
    return {name.removeprefix("model."): value for name, value in weights.items()}


def head_of_its_own(weights: Weights) -> Weights:
    return {**weights, HEAD: weights[EMBEDDING].flip(0).contiguous()}


def same_head(weights: Weights) -> Weights:
    return {**weights, HEAD: weights[EMBEDDING].clone()}


def head_alone(weights: Weights) -> Weights:
    return {HEAD if name == EMBEDDING else name: value for name, value in weights.items()}


def rotary_tables(weights: Weights) -> Weights:
    return {
        **weights,
        "model.rotary_emb.inv_freq": torch.ones(4),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }


def half_in_double(weights: Weights) -> Weights:
    return {name: value.double() if "layers.0" in name else value for name, value in weights.items()}


LINEAR = {"type": "linear", "factor": 2.0}
READ: dict[str, tuple[str, dict[str, Any]]] = {
    "tied, and the same head beside": ("smollm2", {"weights": same_head}),
    "tied, and another head beside": ("smollm2", {"weights": head_of_its_own}),
    "tied, and the head alone": ("qwen3", {"weights": head_alone}),
    "tying unsaid, and a head": ("llama2-mha", {"without": ("tie_word_embeddings",)}),
    "names without the prefix": ("llama2-mha", {"weights": bare}),
    "tied names without the prefix": ("smollm2", {"weights": bare}),
    "old rotary tables": ("llama2-mha", {"weights": rotary_tables}),
    "several precisions": ("llama2-mha", {"weights": half_in_double}),
    "heads null": ("qwen2-mha", {"values": {"num_key_value_heads": None}}),
    "heads unsaid": ("llama2-mha", {"without": ("num_key_value_heads", "head_dim")}),
    "epsilon and positions unsaid": ("llama2-mha", {"without": ("rms_norm_eps", "max_position_embeddings")}),
    "rotary settings twice": ("llama2-mha", {"values": {"rope_theta": 500.0, "rope_scaling": LINEAR}}),
    "rotary settings of before": (
        "llama2-mha",
        {"values": {"rope_theta": 500.0, "rope_scaling": LINEAR}, "without": ("rope_parameters",)},
    ),
    "another activation": ("llama2-mha", {"values": {"hidden_act": "gelu_new"}}),
    "another name of the activation": ("llama2-mha", {"values": {"hidden_act": "swish"}}),
    "a bias that the family has not": ("qwen2-mha", {"values": {"attention_bias": True}}),
}


@pytest.mark.parametrize("case", READ)
def test_it_is_read_as_transformers_reads_it(
    case: str, sources: Callable[[str], Path], tmp_path: Path
) -> None:
    family, changes = READ[case]
    folder = edited(sources(family), tmp_path / "hf", **changes)
    expected = transformers_logits(folder)
    with torch.no_grad():
        found = import_model(str(folder)).model(IDS)
    assert ((found - expected).abs().max() / expected.abs().max()).item() <= TOLERANCE


def without_head(weights: Weights) -> Weights:
    return {name: value for name, value in weights.items() if name != HEAD}


def with_value(name: str, value: float) -> Callable[[Weights], Weights]:
    def change(weights: Weights) -> Weights:
        changed = weights[name].clone()
        changed[1, 3] = value
        return {**weights, name: changed}

    return change


UP = "model.layers.1.mlp.up_proj.weight"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no head, untied": (
        {"weights": without_head},
        rf"lack 1 weights, the first is {HEAD}; config\.json ties no",
    ),
    "no head, tying unsaid": (
        {"weights": without_head, "without": ("tie_word_embeddings",)},
        f"the first is {HEAD}",
    ),
    "a bias beside": (
        {"weights": lambda w: {**w, "model.layers.0.self_attn.q_proj.bias": torch.ones(32)}},
        r"no place for, the first is .*q_proj\.bias",
    ),
    "a mask beside": (
        {"weights": lambda w: {**w, "model.layers.0.self_attn.masked_bias": torch.ones(1)}},
        "masked_bias",
    ),
    "a layer more": (
        {"values": {"num_hidden_layers": 1}},
        r"hold 9 weights .* the first is model\.layers\.1\.",
    ),
    "a layer less": (
        {"values": {"num_hidden_layers": 3}},
        r"lack 9 weights, the first is model\.layers\.2\.",
    ),
    "many layers": (
        {"values": {"num_hidden_layers": 10**6}},
        "num_hidden_layers = 1000000, but the model's files hold 21 tensors",
    ),
    "more rows": (
        {"values": {"vocab_size": 330}},
        r"model\.embed_tokens\.weight has the shape \[320, 32\], but config\.json makes it \[330, 32\]",
    ),
    "fewer heads": (
        {"values": {"num_key_value_heads": 2}},
        r"k_proj\.weight has the shape \[32, 32\], but config\.json makes it \[16, 32\]",
    ),
    "NaN": (
        {"weights": with_value(UP, float("nan"))},
        rf"{UP} holds nan at \[1, 3\] \(1 of 1536 numbers are not finite\)",
    ),
    "infinity": ({"weights": with_value(HEAD, float("inf"))}, rf"{HEAD} holds inf at \[1, 3\]"),
    "tying null": (
        {"values": {"tie_word_embeddings": None}},
        "tie_word_embeddings = None, expected true or false",
    ),
    "epsilon null": ({"values": {"rms_norm_eps": None}}, "rms_norm_eps = None, expected a number"),
    "positions null": (
        {"values": {"max_position_embeddings": None}},
        "max_position_embeddings = None, expected a whole number",
    ),
    "no rows": (
        {"values": {"vocab_size": 0}},
        "vocab_size = 0, expected a whole number of at least 1 and at most 1048576",
    ),
    "a text for a number": (
        {"values": {"num_attention_heads": "4"}},
        "num_attention_heads = '4', expected a whole number",
    ),
    "many positions": (
        {"values": {"max_position_embeddings": 10**12}},
        "a context of 1000000000000 tokens, expected at most .* --max-positions",
    ),
    "theta null": (
        {"values": {"rope_theta": None}, "without": ("rope_parameters",)},
        "'default' with rope_theta = None",
    ),
    "scaling without a factor": (
        {"values": {"rope_scaling": {"rope_type": "llama3"}}},
        "'llama3' with factor = None",
    ),
    "part of a head": (
        {"values": {"partial_rotary_factor": 0.5}},
        r"'default' of 4 numbers of a head cannot be imported",
    ),
    "an activation": (
        {"values": {"hidden_act": "relu2"}},
        "hidden_act = 'relu2', expected one that this decoder computes: silu, swish, gelu",
    ),
    "scaling that is no object": (
        {"values": {"rope_scaling": [2.0]}},
        r"rope_scaling = \[2\.0\], expected an object",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_disagrees_is_refused_by_name(case: str, sources: Callable[[str], Path], tmp_path: Path) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(ModelImportError, match=message):
        import_model(str(edited(sources("llama2-mha"), tmp_path / "hf", **changes)))


@pytest.mark.parametrize("kind", known())
def test_what_is_unsaid_is_as_transformers_takes_it(kind: str) -> None:
    config = transformers.AutoConfig.for_model(
        kind, **({"use_sliding_window": True} if kind.startswith("qwen") else {})
    )
    taken = {**UNSAID, **family_named(kind).unsaid}
    follows = {
        "num_key_value_heads": config.num_attention_heads,
        "head_dim": config.hidden_size // config.num_attention_heads,
    }
    for name, value in taken.items():
        if hasattr(config, name):
            assert getattr(config, name) == (follows.get(name) if value is None else value), name


def test_one_file_goes_before_an_index(sources: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    source_models.write_model(
        source_models.make_model("llama2", **SMALL, num_key_value_heads=4), folder, shard_size="30KB"
    )
    doubled = {
        name: 2 * value for name, value in load_file(sources("llama2-mha") / "model.safetensors").items()
    }
    save_file(doubled, folder / "model.safetensors", metadata={"format": "pt"})
    expected = transformers_logits(folder)
    with torch.no_grad():
        found = import_model(str(folder)).model(IDS)
    assert ((found - expected).abs().max() / expected.abs().max()).item() <= TOLERANCE


def test_an_index_names_files_of_its_own_directory(sources: Callable[[str], Path], tmp_path: Path) -> None:
    folder = edited(sources("llama2-mha"), tmp_path / "hf")
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    for places, message in (
        (
            {"weight_map": {EMBEDDING: "../model.safetensors"}},
            r"names '\.\./model\.safetensors', which is no file of its own directory",
        ),
        ({"weight_map": [EMBEDDING]}, "is damaged: weight_map"),
    ):
        index.write_text(json.dumps(places))
        with pytest.raises(ModelImportError, match=message):
            import_model(str(folder))


def test_what_is_there_in_place_of_weights_is_said(sources: Callable[[str], Path], tmp_path: Path) -> None:
    folder = edited(sources("llama2-mha"), tmp_path / "hf")
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    with pytest.raises(ModelImportError, match=r"is consolidated\.safetensors meant"):
        import_model(str(folder))
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(
        ModelImportError, match="it is an adapter of peft; import the model it belongs to, with --adapter"
    ):
        import_model(str(folder))
    (folder / "config.json").unlink()  # as peft saves one
    with pytest.raises(
        ModelImportError, match=r"config\.json is missing; it is an adapter of peft; import the model"
    ):
        import_model(str(folder))
    (folder / "adapter_config.json").unlink()
    (folder / "params.json").write_text("{}")
    with pytest.raises(ModelImportError, match="weights in their maker's own form: take the same model"):
        import_model(str(folder))


def test_tokens_without_a_row_are_said_and_a_start_without_one_is_refused(
    sources: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = edited(sources("llama2-mha"), tmp_path / "hf")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken("<tool>", special=False), AddedToken("</tool>", special=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    said = "2 tokens that the model, of 320 rows, knows nothing of (ids from 320: '<tool>', '</tool>')"
    with pytest.warns(SettingWarning, match="2 tokens that the model"):
        import_model(str(folder))
    result = CliRunner().invoke(main, ["import", str(folder), "--out", str(tmp_path / "checkpoint")])
    assert (result.exit_code, said in result.output) == (0, True), result.output
    fewer = edited(
        folder,
        tmp_path / "fewer",
        {"vocab_size": 1},
        lambda w: {n: v[:1].clone() if n in (EMBEDDING, HEAD) else v for n, v in w.items()},
    )
    tokenizer = Tokenizer.from_file(str(fewer / "tokenizer.json"))
    foreign = json.loads(tokenizer.to_str())
    foreign["post_processor"]["special_tokens"]["<s>"] = {"id": "</s>", "ids": [1], "tokens": ["</s>"]}
    (fewer / "tokenizer.json").write_text(json.dumps(foreign))
    with pytest.raises(
        ModelImportError, match=r"'</s>' \(id 1\) stands before every text, but the embedding has 1 rows"
    ):
        import_model(str(fewer))
