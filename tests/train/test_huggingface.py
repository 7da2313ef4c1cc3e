"""Pretrained models: what is imported computes what transformers computes, and goes back as it came."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import source_models
from ease_common.errors import ModelImportError
from ease_train.cli import main
from ease_train.convert import families
from ease_train.convert.families import family_named
from ease_train.convert.huggingface import export_exits, export_model, import_model
from ease_train.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from ease_train.training.config import load_recipe
from ease_train.training.tune import tuned_recipe, with_exits

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
TOLERANCE = 1e-4  # of the largest logit
IDS = torch.arange(2, 50).reshape(2, 24) * 5 % 320


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model(IDS)
    return found if isinstance(found, torch.Tensor) else found.logits


def greedy(model: Any, num_tokens: int = 24) -> list[int]:
    """The whole text anew for each token."""
    ids = IDS[:1, :8]
    with torch.no_grad():
        for _ in range(num_tokens):
            out = model(ids)
            logits = out if isinstance(out, torch.Tensor) else out.logits
            ids = torch.cat((ids, logits[:, -1:].argmax(-1)), dim=1)
    return ids[0, 8:].tolist()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source_models.write_model(
        source_models.make_model("llama2"), tmp_path_factory.mktemp("llama") / "hf"
    )


@pytest.mark.parametrize("family", source_models.FAMILIES)
def test_an_imported_model_is_transformers_and_goes_back_as_it_came(family: str, tmp_path: Path) -> None:
    reference = source_models.make_model(family)
    folder = source_models.write_model(
        reference, tmp_path / "hf", shard_size="60KB" if family == "llama3" else "1GB"
    )
    assert (folder / "model.safetensors.index.json").exists() == (family == "llama3")
    save_checkpoint(import_model(str(folder), (2,)), tmp_path / "checkpoint")
    checkpoint = load_checkpoint(tmp_path / "checkpoint")
    expected = logits_of(reference)
    assert ((logits_of(checkpoint.model) - expected).abs().max() / expected.abs().max()).item() <= TOLERANCE
    assert greedy(checkpoint.model) == greedy(reference) == generated(reference)
    export_model(checkpoint, tmp_path / "back")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32).eval()
    assert torch.equal(logits_of(back), expected)
    again = import_model(str(tmp_path / "back"))
    assert again.recipe.model == checkpoint.recipe.model
    assert again.text_format == checkpoint.text_format
    weights = checkpoint.model.state_dict()
    assert again.model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in again.model.state_dict().items())


def test_the_pages_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/contributing/family.md adds one in a few lines."""
    page = Path(__file__).parents[2] / "docs" / "contributing" / "family.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "seed_oss.py").write_text(code)
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    monkeypatch.setitem(
        sys.modules, "ease_train.convert.families.seed_oss", None
    )  # taken out again afterwards
    del sys.modules["ease_train.convert.families.seed_oss"]
    reference = source_models.make_model("SeedOss", head_dim=16)
    model = import_model(str(source_models.write_model(reference, tmp_path / "hf"))).model
    expected = logits_of(reference)
    assert ((logits_of(model) - expected).abs().max() / expected.abs().max()).item() <= TOLERANCE
    assert greedy(model) == greedy(reference)
    unsaid = transformers.SeedOssConfig().to_dict()
    assert all(unsaid[name] == value for name, value in family_named("seed_oss").unsaid.items())


def generated(reference: Any) -> list[int]:
    """transformers' own greedy generation, over its cache."""
    mask = torch.ones(1, 8, dtype=torch.int64)
    out = reference.generate(
        IDS[:1, :8], attention_mask=mask, do_sample=False, max_new_tokens=24, eos_token_id=-1, pad_token_id=0
    )
    return out[0, 8:].tolist()


@pytest.mark.parametrize("family", ["llama3", "qwen3"])
def test_matrices_of_half_precision_files_stay_as_they_are(family: str, tmp_path: Path) -> None:
    model = source_models.make_model(family).to(torch.bfloat16)
    source_models.write_model(model, tmp_path / "hf")
    weights = import_model(str(tmp_path / "hf"), (1, 3)).model.state_dict()
    for value in weights.values():
        assert value.dtype == (torch.bfloat16 if value.ndim > 1 else torch.float32)
    assert torch.equal(weights["layers.1.mlp.up_proj.weight"], model.model.layers[1].mlp.up_proj.weight)
    assert torch.equal(weights["exits.3.norm.weight"], weights["norm.weight"])


def test_conventions_come_along(llama: Path, tmp_path: Path) -> None:
    found = import_model(str(llama)).text_format
    assert (found.start_id, found.stop_ids, found.chat_template) == (0, (1, 2), source_models.TEMPLATE)
    assert {
        name: found.generation[name] for name in ("temperature", "top_p", "bos_token_id", "eos_token_id")
    } == {"temperature": 0.6, "top_p": 0.9, "bos_token_id": 0, "eos_token_id": [1, 2]}
    source_models.write_model(source_models.make_model("llama2"), tmp_path / "plain", start=False)
    assert import_model(str(tmp_path / "plain")).text_format.start_id is None


def test_the_tokenizer_goes_back(llama: Path, tmp_path: Path) -> None:
    export_model(import_model(str(llama), (2,)), tmp_path / "back")
    before, after = (transformers.AutoTokenizer.from_pretrained(path) for path in (llama, tmp_path / "back"))
    assert after("And the king spoke").input_ids == before("And the king spoke").input_ids
    messages = [{"role": "user", "content": "Hello"}]
    assert after.apply_chat_template(messages, tokenize=False) == before.apply_chat_template(
        messages, tokenize=False
    )
    assert (after.bos_token, after.eos_token) == ("<s>", "</s>")


TEXTS = ("And the king spoke", "the <s>stone</s> <tag> x", "a 1234, <|eot|> ", "")


def with_tokenizer(llama: Path, folder: Path, described: dict[str, Any], written: dict[str, Any]) -> Path:
    """A model whose tokenizer_config.json and tokenizer.json have other values."""
    shutil.copytree(llama, folder)
    for name, values in (("tokenizer_config.json", described), ("tokenizer.json", written)):
        found = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**found, **values}))
    return folder


def ids_of(checkpoint: Checkpoint, text: str) -> list[int]:
    start = checkpoint.text_format.start_id
    return [
        *([] if start is None else [start]),
        *checkpoint.tokenizer.encode(text, add_special_tokens=False).ids,
    ]


TRUNCATION = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 9},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 1,
    "pad_type_id": 0,
    "pad_token": "</s>",
}
END = {"SpecialToken": {"id": "</s>", "type_id": 0}}
OF_END = {"special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}}}
TAG = {
    "content": "<tag>",
    "lstrip": True,
    "rstrip": False,
    "normalized": False,
    "single_word": False,
    "special": True,
}


@pytest.mark.parametrize(
    ("described", "written"),
    [
        ({}, {"truncation": TRUNCATION, "padding": PADDING}),
        ({"add_bos_token": False}, {}),
        ({"add_bos_token": True, "add_eos_token": True}, {"post_processor": None}),
        ({"bos_token": None}, {}),
        ({"added_tokens_decoder": {"320": TAG}}, {}),
        ({"additional_special_tokens": ["<tag>", "ing"]}, {}),
        ({"tokenizer_class": "LlamaTokenizer", "add_prefix_space": True}, {}),
        ({"tokenizer_class": "GPT2Tokenizer"}, {}),
        ({"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": True}, {"post_processor": None}),
    ],
    ids=["cut", "flag off", "flags on", "no name", "added", "more", "llama", "gpt2", "qwen"],
)
def test_texts_have_transformers_ids(
    llama: Path, tmp_path: Path, described: dict[str, Any], written: dict[str, Any]
) -> None:
    """As imported, and as exported again: read by transformers, saved by it, and imported from there."""
    folder = with_tokenizer(llama, tmp_path / "hf", described, written)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    checkpoint = import_model(str(folder), (2,))
    expected = [theirs(text).input_ids for text in TEXTS]
    assert [ids_of(checkpoint, text) for text in TEXTS] == expected
    export_model(checkpoint, tmp_path / "back")
    back = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert [back(text).input_ids for text in TEXTS] == expected
    assert (back.bos_token_id, back.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    back.save_pretrained(tmp_path / "back")
    assert import_model(str(tmp_path / "back")).text_format == checkpoint.text_format


def test_what_transformers_does_with_an_exported_models_text(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """It puts the start token before a text, and says the same as this model after it."""
    checkpoint = load_checkpoint(tiny_checkpoint)
    export_model(checkpoint, tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    found = theirs("And it came", return_tensors="pt")
    assert found.input_ids[0].tolist() == ids_of(checkpoint, "And it came")
    assert theirs("And", "it").input_ids == [
        0,
        *theirs("And", add_special_tokens=False).input_ids,
        *theirs("it").input_ids,
    ]
    said = model.generate(**found, max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)[
        0
    ].tolist()
    ids = torch.tensor([ids_of(checkpoint, "And it came")])
    with torch.no_grad():
        for _ in range(8):
            ids = torch.cat((ids, checkpoint.model.eval()(ids)[:, -1:].argmax(-1)), dim=1)
    assert said == ids[0].tolist()
    assert theirs.decode(said, skip_special_tokens=True) == checkpoint.tokenizer.decode(said)


def test_a_start_token_of_its_generation_defaults_is_not_the_tokenizers(llama: Path, tmp_path: Path) -> None:
    """Qwen2.5: generation_config.json has a bos_token_id, the tokenizer none."""
    folder = with_tokenizer(llama, tmp_path / "hf", {"bos_token": None}, {"post_processor": None})
    found = import_model(str(folder)).text_format
    assert json.loads((folder / "generation_config.json").read_text())["bos_token_id"] == 0
    assert (found.start_id, found.generation["bos_token_id"]) == (None, None)


@pytest.mark.parametrize(
    ("described", "written", "message"),
    [
        (
            {},
            {
                "post_processor": {
                    "type": "TemplateProcessing",
                    "single": [{"Sequence": {"id": "A", "type_id": 0}}, END],
                    "pair": [],
                    **OF_END,
                }
            },
            r"the tokenizer makes a </s> of the text 'a'; expected nothing more than one token before "
            r"the text",
        ),
        (
            {"split_special_tokens": True},
            {},
            "has split_special_tokens = true: its chat template would be read as plain text",
        ),
    ],
)
def test_what_no_prompt_should_have_is_refused(
    llama: Path, tmp_path: Path, described: dict[str, Any], written: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelImportError, match=message):
        import_model(str(with_tokenizer(llama, tmp_path / "hf", described, written)))


def test_without_transformers_a_tokenizer_is_its_file_or_refused(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    folder = with_tokenizer(
        llama, tmp_path / "cut", {"add_bos_token": False}, {"truncation": TRUNCATION, "padding": PADDING}
    )
    found = import_model(str(folder))
    plain = import_model(str(llama))
    assert found.text_format == plain.text_format
    assert ids_of(found, TEXTS[0]) == ids_of(plain, TEXTS[0])
    folder = with_tokenizer(llama, tmp_path / "added", {"added_tokens_decoder": {"320": TAG}}, {})
    with pytest.raises(
        ModelImportError,
        match=r"names tokens that tokenizer.json has not \(<tag>\); adding them needs transformers: pip "
        r"install",
    ):
        import_model(str(folder))


def test_a_sliding_window_is_of_some_layers_and_none_where_texts_are_no_longer(tmp_path: Path) -> None:
    model = source_models.make_model("windowed qwen2")
    source_models.write_model(model, tmp_path / "hf")
    found = import_model(str(tmp_path / "hf")).recipe.model
    assert (found.max_positions, found.sliding_window, found.windowed_layers) == (128, 10, (3, 4))
    short = import_model(str(tmp_path / "hf"), (), 10).recipe.model
    assert (short.max_positions, short.sliding_window, short.windowed_layers) == (10, 0, ())


def test_exits_of_an_untouched_model_are_layerskips(tmp_path: Path) -> None:
    """The final norm and the head, after any layer."""
    theirs = source_models.make_model("llama3")
    model = import_model(str(source_models.write_model(theirs, tmp_path / "hf")), (1, 2, 3)).model
    with torch.no_grad():
        states = theirs(IDS, output_hidden_states=True).hidden_states
        for layer, hidden in model.exit_states(IDS):
            if layer < 4:
                expected = theirs.lm_head(theirs.model.norm(states[layer]))
                found = model.exit(layer).head(model.exit_hidden(hidden, layer))
                assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_longropes_context_ends_where_its_other_factors_begin(tmp_path: Path) -> None:
    """Past it transformers turns every position anew."""
    source_models.write_model(source_models.make_model("phi4"), tmp_path / "hf")
    assert import_model(str(tmp_path / "hf")).recipe.model.max_positions == 64


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"model_type": "mixtral"}, "mixtures of experts are not computed here"),
        ({"model_type": "unheard_of", "num_local_experts": 8}, "mixtures of experts"),
        ({"model_type": "bloom"}, "ALiBi"),
        ({"model_type": "falcon", "alibi": True}, "ALiBi"),
        ({"model_type": "gpt2"}, "learned positions"),
        ({"model_type": "gemma3", "vision_config": {}}, "images or sound"),
        ({"model_type": "gemma2"}, "softcapped scores"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoders"),
    ],
)
def test_an_unknown_type_is_refused_with_what_is_missing(values: dict[str, Any], why: str) -> None:
    with pytest.raises(ModelImportError, match=rf"'{values['model_type']}' cannot be imported \({why}"):
        families.family_of(values)


def test_a_model_with_trained_exits_and_untrained_tokens_round_trips(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint)
    export_model(checkpoint, tmp_path / "hf")
    again = import_model(str(tmp_path / "hf"))
    assert (again.recipe.model, again.text_format.separator) == (
        checkpoint.recipe.model,
        checkpoint.text_format.separator,
    )
    weights = checkpoint.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in again.model.state_dict().items())


def test_block_exits_and_a_reduced_head_round_trip(tiny_checkpoint: Path, tmp_path: Path) -> None:
    trained = load_checkpoint(tiny_checkpoint)
    settings = {"exit_adapter": "block", "exit_head": "reduced", "exit_vocab_size": 9}
    first = min(trained.recipe.model.exits)
    recipe = tuned_recipe(
        trained.recipe,
        load_recipe("ee-tuning"),
        {"exits": [first], "layer_weights": {first: 1.0}, **settings},
    )
    grown = with_exits(trained.model, recipe)
    grown.reduced_head.choose_tokens(torch.arange(recipe.model.vocab_size), grown.lm_head.weight)
    export_model(Checkpoint(recipe, grown, trained.tokenizer, 0, "unknown"), tmp_path / "hf")
    again = import_model(str(tmp_path / "hf"))
    assert again.recipe.model == recipe.model
    assert again.model.state_dict().keys() == grown.state_dict().keys()
    assert all(
        torch.equal(value, grown.state_dict()[name]) for name, value in again.model.state_dict().items()
    )


def test_exits_alone_go_back_onto_their_model(llama: Path, tmp_path: Path) -> None:
    plain = import_model(str(llama))
    reduced = {"exit_head": "reduced", "exit_vocab_size": 9}
    settings = {
        "exits": [2],
        "layer_weights": {2: 1.0},
        "sequence_length": 32,
        "exit_adapter": "low-rank",
        **reduced,
    }
    recipe = tuned_recipe(plain.recipe, load_recipe("ee-tuning"), settings)
    grown = with_exits(plain.model, recipe)
    grown.reduced_head.choose_tokens(torch.arange(recipe.model.vocab_size), grown.lm_head.weight)
    torch.nn.init.normal_(grown.exit(2).adapter.up.weight)
    metrics = [
        {"step": 1, "agreement": {"2": 0.2}},
        {"step": 2, "agreement": {"2": 0.5}},
        {"step": 2, "gates": {"2": {"auc": 0.7}}},
    ]
    export_exits(Checkpoint(recipe, grown, plain.tokenizer, 2, "unknown", metrics), tmp_path / "exits")
    tensors = load_file(tmp_path / "exits" / "ease_exits.safetensors")
    assert "reduced_head.known.weight" not in tensors, "its rows are the LM head's"
    kinds = {name: value.dtype for name, value in tensors.items()}
    assert kinds.pop("reduced_head.ids") == torch.int64
    assert set(kinds.values()) == {torch.float16}
    written = json.loads((tmp_path / "exits" / "ease.json").read_text())
    assert written["figures"] == {"agreement": {"2": 0.5}, "gates": {"2": {"auc": 0.7}}}
    assert (written["name"], written["step"], written["method"]["trains"]) == ("ee-tuning", 2, "exits")
    again = import_model(str(llama), with_exits=tmp_path / "exits")
    assert again.recipe.model == recipe.model
    for name, value in again.model.state_dict().items():
        expected = grown.state_dict()[name]
        assert torch.equal(value, expected.half().float() if name in kinds else expected), name
    grown.reduced_head.known.weight.data[0, 0] += 1
    export_exits(Checkpoint(recipe, grown, plain.tokenizer, 2, "unknown"), tmp_path / "exits")
    again = import_model(str(llama), with_exits=tmp_path / "exits")
    assert torch.equal(again.model.reduced_head.known.weight, grown.reduced_head.known.weight.half().float())


def test_exits_of_another_model_are_refused(llama: Path, tmp_path: Path) -> None:
    export_exits(import_model(str(llama), (2,)), tmp_path / "exits")
    source_models.write_model(source_models.make_model("mistral"), tmp_path / "other")
    described = json.loads((tmp_path / "exits" / "ease.json").read_text())
    described["model"]["dim"] = 96
    (tmp_path / "exits" / "ease.json").write_text(json.dumps(described))
    with pytest.raises(ModelImportError, match=r"exits in .* belong to another model: dim = 96, but 48 in"):
        import_model(str(llama), with_exits=tmp_path / "exits")
    with pytest.raises(
        ModelImportError,
        match=r"holds no exits: expected ease.json and ease_exits.safetensors, as `ease-train export-exits`",
    ):
        import_model(str(llama), with_exits=tmp_path)
    with pytest.raises(ModelImportError, match="is there already and was not written by export-exits"):
        export_exits(import_model(str(llama), (2,)), llama)


def edited(source: Path, folder: Path, **changes: Any) -> Path:
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "gemma2"},
            "models of the type 'gemma2' cannot be imported (softcapped scores are not computed here); "
            "expected one of: llama, gemma3_text, gpt_neox, mistral, phi3, qwen2, qwen3, smollm3",
        ),
        ({"hidden_act": "relu2"}, "hidden_act = 'relu2', expected one that this decoder computes: silu"),
        ({"attention_bias": True}, "attention_bias = True, which this decoder does not compute"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}, which"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rotary embeddings of the kind 'yarn'"),
        ({"num_hidden_layers": 5}, "lack 9 weights, the first is model.layers.4.input_layernorm.weight"),
        (
            {"num_hidden_layers": 3},
            "hold 9 weights that this decoder has no place for, the first is model.layers.3",
        ),
        ({"intermediate_size": 64}, "has the shape [96, 48], but config.json makes it [64, 48]"),
    ],
)
def test_what_cannot_be_imported_is_one_clear_line(
    llama: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = edited(llama, tmp_path / "hf", **changes)
    result = CliRunner().invoke(main, ["import", str(folder), "--out", str(tmp_path / "out"), "--exits", "2"])
    assert result.exit_code == 1
    assert message in result.output
    assert len(result.output.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_missing_shards_and_damaged_files(llama: Path, tmp_path: Path, tiny_checkpoint: Path) -> None:
    folder = source_models.write_model(
        source_models.make_model("qwen2"), tmp_path / "sharded", shard_size="60KB"
    )
    next(iter(sorted(folder.glob("model-*.safetensors")))).unlink()
    with pytest.raises(ModelImportError, match=r"lacks model-00001-of-\d+\.safetensors \(1 of \d+ shards\)"):
        import_model(str(folder))
    damaged = edited(llama, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(ModelImportError, match="is no safetensors file"):
        import_model(str(damaged))
    (damaged / "model.safetensors").unlink()
    with pytest.raises(ModelImportError, match=r"lacks model\.safetensors; weights in another form"):
        import_model(str(damaged))
    (damaged / "config.json").write_text("{")
    with pytest.raises(ModelImportError, match="is no JSON"):
        import_model(str(damaged))
    with pytest.raises(ModelImportError, match="is a checkpoint of this project already"):
        import_model(str(tiny_checkpoint))


def test_quantised_weights_are_refused(llama: Path, tmp_path: Path) -> None:
    folder = edited(llama, tmp_path / "hf")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.int8)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ModelImportError, match=r"model\.norm\.weight is stored as torch\.int8"):
        import_model(str(folder))


def test_a_hub_id_without_network_and_no_id_at_all(tmp_path: Path) -> None:
    with pytest.raises(ModelImportError, match="did not come from the Hugging Face hub"):
        import_model("some-owner/some-gated-model")
    for source in ("nowhere", str(tmp_path / "not" / "there")):
        with pytest.raises(
            ModelImportError, match=f"no model at {source}: expected a Hugging Face directory"
        ):
            import_model(source)


def test_without_transformers_only_some_files_are_out_of_reach(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.delitem(sys.modules, "ease_train.convert.gguf", raising=False)
    assert import_model(str(llama), (2,)).recipe.model.exits == (2, 4)
    (edited(llama, tmp_path / "hf") / "tokenizer.json").unlink()
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for source in (tmp_path / "hf", tmp_path / "model.gguf"):
        with pytest.raises(ModelImportError, match=r"pip install 'ease-lm\[hf\]'"):
            import_model(str(source))


def test_the_commands(llama: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    checkpoint = str(tmp_path / "checkpoint")
    back = str(tmp_path / "back")
    result = run(main, ["import", str(llama), "--out", checkpoint, "--exits", "1,3"])
    assert (result.exit_code, "exits at [1, 3, 4]" in result.output) == (0, True), result.output
    assert run(main, ["export-hf", checkpoint, back]).exit_code == 0
    assert run(main, ["import", str(llama), "--out", checkpoint, "--exits", "1,x"]).exit_code == 2
    assert run(main, ["import", str(llama), "--out", checkpoint]).exit_code == 1
    (tmp_path / "mine").mkdir()
    result = run(main, ["export-hf", checkpoint, str(tmp_path / "mine")])
    assert (result.exit_code, "was not written by export-hf" in result.output) == (1, True)
