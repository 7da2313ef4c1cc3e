"""Whatever a small Llama, Mistral or Qwen directory legally says: transformers' ids, logits, chats and
answers, or one clear line.

EASE_IMPORTS=500 pytest tests/train/test_any_import.py      # more directories than a test run has time for
"""

import json
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

import source_models
import tiny_model
from ease_common.chat import ChatTemplate
from ease_common.errors import TrainError
from ease_runtime.engine.mock import MockStack
from ease_runtime.llm import TextEngine
from ease_runtime.text.streaming import Detokenizer
from ease_train.convert.huggingface import import_model
from ease_train.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
NUM_DIRECTORIES = int(os.environ.get("EASE_IMPORTS", "25"))
TOLERANCE = 1e-4  # of the largest logit
TEXTS = ["And the king spoke", " a  river\n\n", "Hé, 日€!", "the <|eot|> of <tool>it</tool>", "1234567"]
CHATS = [
    [{"role": "user", "content": "Hello "}],
    [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ],
]
TEMPLATES = [
    source_models.TEMPLATE,
    "{% if tools is not none %}TOOLS{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content|trim "
    "}}{% endfor %}{{ pad_token }}",
    "{% for m in messages %}{% generation %}{{ m.content }}{{ unk_token }}{% endgeneration %}{% endfor %}",
    "{{ bos_token }}{{ messages|tojson(separators=(',', ':')) }}{% if add_generation_prompt %}<a>{% "
    "endif %}\n",
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}{{ "
    "messages[0].content }}",
    "{% blink %}",
]
ROTARY: dict[str, dict[str, Any]] = {
    "plain": {"rope_type": "default", "rope_theta": 5e3},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    "llama3": {**source_models.ROPE3, "original_max_position_embeddings": 32},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32},
}
STARTS = {
    "none": None,
    "start": processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)]),
    "start of a sequence": processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)]),
        ]
    ),
    "bytes": processors.ByteLevel(trim_offsets=False),
    "both ends": processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    ),
}
often = st.sampled_from([False, False, False, True])  # an oddity: most directories have one or two


def one_of(*values: Any) -> Any:
    return st.sampled_from(values)


DIRECTORIES = st.fixed_dictionaries(
    {
        "kind": one_of("Llama", "Mistral", "Qwen2", "Qwen3"),
        "layers": st.integers(1, 3),
        "heads": one_of((4, 4), (4, 2), (6, 1), (3, 3)),
        "head_dim": one_of(None, None, 6, 16),
        "width": one_of(24, 48),
        "tied": st.booleans(),
        "rotary": one_of("plain", "plain", "linear", "llama3", "yarn"),
        "old_rotary": often,
        "biases": often,
        "window": one_of(None, None, 64),
        "more_rows": one_of(0, 0, 0, 7),
        "dtype": one_of(torch.float32, torch.float32, torch.bfloat16, torch.float16),
        "shards": often,
        "buffers": often,
        "head_though_tied": often,
        "words": one_of("bytes", "pieces"),
        "start": st.sampled_from(list(STARTS)),
        "says_start": one_of(None, None, True, False),
        "says_end": often,
        "cut": often,
        "padded": often,
        "added": often,
        "added_beside": often,
        "special_map": often,
        "tidied": often,
        "named": st.sets(one_of("unk_token", "pad_token")),
        "stops": one_of(1, [1], [1, 2], None),
        "template": st.sampled_from(TEMPLATES),
        "template_in": one_of("file", "settings", "list", "nowhere"),
    }
)


@cache
def words(kind: str) -> str:
    """The JSON of a tokenizer: byte-level BPE, or pieces with bytes for what is missing, as Llama 2
    has it.
    """
    if kind == "bytes":
        return str(source_models.make_tokenizer(start=False).to_str())
    letters = sorted({*tiny_model.corpus(), "▁"} - {" ", "\n"})
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "a"), ("n", "d")]
    names = ["<s>", "</s>", "<|eot|>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    names += [left + right for left, right in merges]
    vocabulary = {name: place for place, name in enumerate(names)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names[:4]])
    return str(tokenizer.to_str())


def write_tokenizer(plan: dict[str, Any], folder: Path) -> int:
    """The files of a tokenizer and its template; how many tokens it has."""
    tokenizer = Tokenizer.from_str(words(plan["words"]))
    if (start := STARTS[plan["start"]]) is not None:
        tokenizer.post_processor = start
    if plan["added"]:
        tokenizer.add_tokens(
            [AddedToken("<tool>", special=False), AddedToken("</tool>", special=False, lstrip=True)]
        )
    if plan["cut"]:
        tokenizer.enable_truncation(4)
    if plan["padded"]:
        tokenizer.enable_padding(pad_id=1, pad_token="</s>", length=40)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": None,
        "pad_token": None,
        **dict.fromkeys(plan["named"], "<|eot|>"),
    }
    named: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": plan["tidied"],
        **names,
    }
    if plan["says_start"] is not None:
        named["add_bos_token"] = plan["says_start"]
    if plan["says_end"]:
        named["add_eos_token"] = True
    if plan["added_beside"]:
        token = {
            "content": "<beside>",
            "special": True,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "single_word": False,
        }
        named["added_tokens_decoder"] = {str(tokenizer.get_vocab_size()): token}
    if plan["special_map"]:
        beside = {
            name: {"content": text, "lstrip": False, "normalized": False}
            for name, text in names.items()
            if text
        }
        (folder / "special_tokens_map.json").write_text(json.dumps(beside))
    if plan["template_in"] == "file":
        (folder / "chat_template.jinja").write_text(plan["template"])
    elif plan["template_in"] == "settings":
        named["chat_template"] = plan["template"]
    elif plan["template_in"] == "list":
        named["chat_template"] = [
            {"name": "other", "template": "x"},
            {"name": "default", "template": plan["template"]},
        ]
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return int(tokenizer.get_vocab_size()) + plan["added_beside"]


def write_model(plan: dict[str, Any], vocab_size: int, folder: Path) -> None:
    """The files of a model, as transformers writes them, and then as others do."""
    heads, kv_heads = plan["heads"]
    fields = {
        "vocab_size": vocab_size + plan["more_rows"],
        "hidden_size": plan["width"],
        "intermediate_size": 40,
        "num_hidden_layers": plan["layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 96,
        "tie_word_embeddings": plan["tied"],
        "rope_parameters": ROTARY[plan["rotary"]],
    }
    if plan["head_dim"] is not None and plan["kind"] != "Qwen2":
        fields["head_dim"] = plan["head_dim"]
    if plan["kind"] in ("Mistral", "Qwen2"):
        fields["sliding_window"] = plan["window"]
    if plan["kind"] == "Llama" and plan["biases"]:
        fields["attention_bias"] = True
    model = source_models.make_model(plan["kind"], **fields).to(plan["dtype"])
    model.generation_config.eos_token_id = plan["stops"]
    model.save_pretrained(folder, max_shard_size="40KB" if plan["shards"] else "1GB")
    config = json.loads((folder / "config.json").read_text())
    if plan["old_rotary"]:
        rotary = config.pop("rope_parameters")
        config["rope_theta"] = rotary.pop("rope_theta")
        config["rope_scaling"] = None if plan["rotary"] == "plain" else rotary
    (folder / "config.json").write_text(json.dumps(config))
    weights = folder / "model.safetensors"
    if weights.exists() and (plan["buffers"] or (plan["head_though_tied"] and plan["tied"])):
        tensors = load_file(weights)
        if plan["buffers"]:
            tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        if plan["head_though_tied"] and plan["tied"]:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, weights, metadata={"format": "pt"})


def greedy(logits: Any, ids: list[int], num_tokens: int = 8) -> list[int]:
    """The whole text anew for each token."""
    said = list(ids)
    with torch.no_grad():
        for _ in range(num_tokens):
            said.append(int(logits(torch.tensor([said]))[0, -1].argmax()))
    return said[len(ids) :]


def or_none(render: Any) -> str | None:
    """What a template gives; None where it refuses, in whatever way."""
    try:
        return str(render())
    except Exception:
        return None


def check(checkpoint: Checkpoint, folder: Path) -> None:
    """One import against transformers on the same directory."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    known = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer = checkpoint.tokenizer
    text_format = checkpoint.text_format
    template = None
    if (source := text_format.chat_template) is not None:
        template = ChatTemplate(source, **text_format.special_tokens)
    engine = TextEngine(
        MockStack(vocab_size=512), tokenizer, start_id=text_format.start_id, template=template
    )
    for text in TEXTS:
        assert engine.encode(text) == known(text, truncation=False, padding=False).input_ids, text
    for chat in CHATS:
        expected = or_none(
            lambda chat=chat: known.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        )
        assert or_none(lambda chat=chat: template and template.render(chat)) == expected or (
            template is None and expected is None
        )
        if expected is not None:
            assert (
                engine.encode_chat(chat)
                == known(expected, add_special_tokens=False, truncation=False, padding=False).input_ids
            )
    ids = torch.arange(2, 50).reshape(2, 24) * 5 % len(known)
    with torch.no_grad():
        expected = theirs(ids).logits
        assert ((checkpoint.model(ids) - expected).abs().max() / expected.abs().max()).item() <= TOLERANCE
    prompt = known(TEXTS[0], truncation=False, padding=False).input_ids
    said = greedy(checkpoint.model, prompt)
    assert said == greedy(lambda ids: theirs(ids).logits, prompt)
    detokenizer = Detokenizer(tokenizer, prompt)
    pieces = [*(detokenizer.step(token) for token in said), detokenizer.flush()]
    before, whole = (known.decode(ids, skip_special_tokens=True) for ids in (prompt, prompt + said))
    assert before + "".join(pieces) == whole


def imported(folder: Path) -> str | None:
    """Write the folder's checkpoint into it; why it cannot be, else."""
    try:
        save_checkpoint(import_model(str(folder)), folder / "checkpoint")
    except TrainError as error:
        return str(error)
    return None


@settings(max_examples=NUM_DIRECTORIES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(plan=DIRECTORIES)
def test_any_directory_is_read_as_transformers_reads_it_or_refused(plan: dict[str, Any]) -> None:
    folder = Path(tempfile.mkdtemp(prefix="ease-import-"))
    try:
        write_model(plan, write_tokenizer(plan, folder), folder)
        refusal = imported(folder)
        if refusal is None:
            check(load_checkpoint(folder / "checkpoint"), folder)
        else:
            assert len(refusal.splitlines()) == 1
            assert (
                plan["rotary"] == "yarn" or plan["biases"] or plan["start"] == "both ends" or plan["says_end"]
            ), refusal
    finally:
        shutil.rmtree(folder)
