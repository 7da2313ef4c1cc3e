"""Chat templates read as transformers reads them; one that cannot be read costs chat, and nothing else."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from click.testing import CliRunner

import source_models
from ease_common.chat import ChatTemplate
from ease_common.errors import SettingWarning
from ease_export.cli import main as ease_export
from ease_runtime.cli.main import main as ease_run
from ease_runtime.llm import LLM
from ease_train.cli import main as ease_train
from ease_train.convert.huggingface import export_model, import_model

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
NAMES = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello"}],
    [
        {"role": "system", "content": "S"},
        {"role": "user", "content": 'Hé <b>"x"</b>\nnext', "name": None},
        {"role": "assistant", "content": "A", "reasoning": "because", "tool_calls": None},
        {"role": "user", "content": "U2 "},
    ],
]
TURNS = (
    "{%- for m in messages %}{% if m.role == 'assistant' %}BODY{% else %}<u>{{ m.content }}</u>\n{% endif "
    "%}{% endfor %}"
)
SOURCES = [
    "{% if tools is not none %}TOOLS{{ tools|length }}{% endif %}x",
    "{% if tools is none %}plain{% else %}TOOLS{% endif %}",
    "{% if documents is none %}none{% else %}{{ documents[0] }}{% endif %}",
    "{{ tools|length if tools else 0 }}{{ documents is defined }}{{ tools is defined }}",
    "{{ messages[-1]|tojson(ensure_ascii=True) }}{{ messages[0]|tojson(False) }}",
    "{{ messages[-1]|tojson(separators=(',', ':')) }}{{ messages|tojson(sort_keys=True, indent=2) }}",
    "[{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ pad_token }}{{ mask_token }}{{ cls_token }}{{ "
    "sep_token }}]",
    "{{ cls_token is defined }}{{ bos_token + eos_token }}{{ additional_special_tokens }}",
    "{{ cls_token + bos_token }}",
    TURNS.replace("BODY", "{% generation %}{{ m.content }}{% endgeneration %}\n"),
    TURNS.replace(
        "BODY", "{%- set x = 1 -%}{%- generation -%}{% set x = 2 %}{{ x }}{%- endgeneration -%}{{ x }}"
    ),
    TURNS.replace(
        "BODY",
        "{% generation %}{% for c in m.content %}{{ c }}{{ loop.index }}{% endfor %}{% endgeneration %}",
    ),
    "{% for m in messages %}{{ m.name is defined }}{{ m.tool_calls is defined }}{{ m.reasoning_content "
    "}}{{ m.thinking }}{% endfor %}",
    "{% for m in messages[::-1] %}{% if m.role == 'assistant' %}{% break %}{% endif %}{{ m.role }}{% "
    "endfor %}",
    "  {% if true %}\n    a\n  {% endif %}\nb\n",
    "{% set ns = namespace(a=1) %}{% macro f(x) %}<{{ x }}>{% endmacro %}{% set ns.a = 2 %}{{ f(ns.a) "
    "}}{{ dict(a=1) }}",
    "{{ messages[0].content.split('l')[-1].strip().upper() }}{{ messages[0].get('name') }}{{ "
    "add_generation_prompt }}",
    "{{ messages|selectattr('role', 'equalto', 'user')|map(attribute='content')|join('|') }}{{ "
    "continue_final_message is defined }}",
    "{% if messages|length > 1 %}{{ raise_exception('one at a time') }}{% endif %}{{ strftime_now('%Y') }}",
    "{{ foo.bar }}",
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.PreTrainedTokenizerFast(tokenizer_object=source_models.make_tokenizer(True), **NAMES)


def rendered(render: Any) -> str | None:
    """None where it is refused, in whatever way."""
    try:
        return str(render())
    except Exception:
        return None


@pytest.mark.parametrize("source", SOURCES)
def test_templates_say_what_transformers_makes_them_say(tokenizer: Any, source: str) -> None:
    for chat in CHATS:
        theirs = rendered(
            lambda chat=chat: tokenizer.apply_chat_template(
                chat, chat_template=source, add_generation_prompt=True, tokenize=False
            )
        )
        assert rendered(lambda chat=chat: ChatTemplate(source, **NAMES).render(chat)) == theirs


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = source_models.make_model("llama2", num_hidden_layers=1, max_position_embeddings=32)
    return source_models.write_model(model, tmp_path_factory.mktemp("llama") / "hf")


def with_template(llama: Path, folder: Path, template: Any, **settings: Any) -> Path:
    shutil.copytree(llama, folder)
    path = folder / "tokenizer_config.json"
    if isinstance(template, bytes):
        (folder / "chat_template.jinja").write_bytes(template)
    else:
        (folder / "chat_template.jinja").unlink()
        settings["chat_template"] = template
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


def test_a_template_that_cannot_be_read_costs_chat_only(llama: Path, tmp_path: Path) -> None:
    """Said at import, at build and when chat is asked; a text goes on."""
    run = CliRunner().invoke
    said = "the chat template cannot be read (Encountered unknown tag 'blink'."
    source = with_template(
        llama, tmp_path / "hf", b"{% for m in messages %}{{ m.content }}{% endfor %}\n{% blink %}"
    )
    checkpoint = str(tmp_path / "checkpoint")
    bundle = str(tmp_path / "bundle")
    for command, arguments in (
        (ease_train, ["import", str(source), "--out", checkpoint]),
        (ease_export, ["build", checkpoint, bundle]),
    ):
        result = run(command, arguments)
        assert result.exit_code == 0, result.output
        assert len(result.stderr.splitlines()) == 1
        assert f"warning: {said}" in result.stderr
        assert "line 2); chat is refused, all else works" in result.stderr
    result = run(ease_run, ["generate", bundle, "--prompt", "And", "--max-tokens", "2"])
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    result = run(ease_run, ["chat", bundle], input="Hello\n")
    assert result.exit_code == 1
    assert f"error: {said}" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("template", "kept", "message"),
    [
        (b"{{ messages|nonsense }}", True, "cannot be read .No filter named 'nonsense'., line 1"),
        (b"\xff\xfe{", False, "cannot be read .'utf-8' codec"),
        (
            [{"name": "rag", "template": "x"}, {"name": "tool_use", "template": "y"}],
            True,
            "named 'default' .there are: rag, tool_use.; 'rag' is taken",
        ),
    ],
)
def test_what_else_is_no_template(
    llama: Path, tmp_path: Path, template: Any, kept: bool, message: str
) -> None:
    folder = with_template(llama, tmp_path / "hf", template)
    with pytest.warns(SettingWarning, match=message):
        found = import_model(str(folder)).text_format
    assert (found.chat_template is not None) == kept


def test_a_processors_template_is_taken_before_the_tokenizers(llama: Path, tmp_path: Path) -> None:
    """chat_template.json, as transformers' processors write it."""
    folder = with_template(llama, tmp_path / "hf", "of the tokenizer")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "of the processor"}))
    assert import_model(str(folder)).text_format.chat_template == "of the processor"


def test_special_tokens_reach_the_template_and_go_back(llama: Path, tmp_path: Path) -> None:
    """Through checkpoint, bundle and `export-hf`, named by their text or by an object that holds it."""
    template = (
        "{{ bos_token }}{{ unk_token }}{{ pad_token }}{{ messages[0].content }}{{ cls_token is defined }}"
    )
    names = {
        "unk_token": "<|eot|>",
        "pad_token": {"__type": "AddedToken", "content": "</s>", "special": True},
    }
    folder = with_template(llama, tmp_path / "hf", template, **names)
    chat = [{"role": "user", "content": "Hello"}]
    expected = transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(chat, tokenize=False)
    assert expected == "<s><|eot|></s>HelloFalse"
    run = CliRunner().invoke
    assert run(ease_train, ["import", str(folder), "--out", str(tmp_path / "checkpoint")]).exit_code == 0
    built = run(ease_export, ["build", str(tmp_path / "checkpoint"), str(tmp_path / "bundle")])
    assert built.exit_code == 0, built.output
    template = LLM(tmp_path / "bundle").template
    assert template is not None
    assert template.render(chat) == expected
    export_model(import_model(str(folder)), tmp_path / "back")
    assert (
        transformers.AutoTokenizer.from_pretrained(tmp_path / "back").apply_chat_template(
            chat, tokenize=False
        )
        == expected
    )
