"""How a model directory writes text: its tokenizer, its chat template, where texts begin and end."""

import logging
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models

from ease_common.chat import SPECIAL_TOKENS, ChatTemplate
from ease_common.errors import ModelImportError, SettingWarning, without_panics
from ease_common.tokenizers import whole_texts
from ease_train.convert.files import read_json
from ease_train.convert.text_format import TextFormat

GENERATION = (
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
TOKENIZER_FILES = (".json", ".model", ".txt", ".tiktoken")
WITH_TRANSFORMERS = "needs transformers: pip install 'ease-lm[hf]'"


def read_named_tokenizer(folder: Path) -> tuple[Tokenizer, dict[str, str | None]]:
    """The tokenizer of a model directory, and the texts of its special tokens by their names.

    Raises ModelImportError.

    It is as transformers reads it, where that is installed: what else the directory says may add tokens, or
    change how texts are cut.
    """
    described = tokenizer_settings(folder)
    if described.get("split_special_tokens"):
        raise ModelImportError(
            f"{folder} has split_special_tokens = true: its chat template would be read as plain text; "
            "set it to false"
        )
    try:
        import transformers
    except ImportError:
        tokenizer = _tokenizer_alone(folder, described)
        names = described
    else:
        unigram = _is_unigram(folder)
        verbosity = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity(logging.ERROR)
        try:
            known = _known_to_transformers(folder, transformers.AutoTokenizer)
            if unigram and not isinstance(known.backend_tokenizer.model, models.Unigram):
                known = _known_to_transformers(folder, transformers.PreTrainedTokenizerFast)
            tokenizer = known.backend_tokenizer
            names = {name: getattr(known, name) for name in SPECIAL_TOKENS}
        except Exception as error:  # whatever its many tokenizers raise
            raise ModelImportError(
                f"{folder} has no tokenizer that can be read: {str(error).strip().splitlines()[0]}"
            ) from None
        finally:
            transformers.logging.set_verbosity(verbosity)
    return whole_texts(tokenizer), {name: _text_of(names.get(name)) for name in SPECIAL_TOKENS}


def _known_to_transformers(folder: Path, kind: Any) -> Any:
    """transformers' tokenizer of a directory, of a class of its own.

    It sees no chat template, for want of which it would refuse the rest.
    """
    with tempfile.TemporaryDirectory() as aside:
        for path in folder.iterdir():
            if path.suffix in TOKENIZER_FILES and path.is_file():
                shutil.copy(path, aside)
        return kind.from_pretrained(aside, local_files_only=True, trust_remote_code=False)


def tokenizer_settings(folder: Path) -> dict[str, Any]:
    """What stands beside a tokenizer, of which tokenizer.json knows nothing. Raises ModelImportError."""
    return {
        **(read_json(folder / "special_tokens_map.json") or {}),
        **(read_json(folder / "tokenizer_config.json") or {}),
    }


def _tokenizer_alone(folder: Path, described: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer.json by itself, where it is all there is to know. Raises ModelImportError."""
    if not (folder / "tokenizer.json").is_file():
        raise ModelImportError(
            f"{folder} has no tokenizer.json, and converting another form {WITH_TRANSFORMERS}"
        )
    try:
        with without_panics():
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises nothing more special
        raise ModelImportError(f"{folder / 'tokenizer.json'} cannot be read: {error}") from None
    named = [value for name, value in described.items() if name.endswith("_token")]
    texts = [_text_of(token) for token in (*named, *described.get("added_tokens_decoder", {}).values())]
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    if more := sorted({text for text in texts if text is not None} - added):
        raise ModelImportError(
            f"{folder} names tokens that tokenizer.json has not ({more[0]}); adding them {WITH_TRANSFORMERS}"
        )
    return tokenizer


def _text_of(token: Any) -> str | None:
    """The text of a special token, which is named by it or by an object that holds it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _is_unigram(folder: Path) -> bool:
    """Whether a directory's vocabulary is a unigram model, which transformers' classes for BPE (Llama's among
    them) read as BPE. Raises ModelImportError for a vocabulary of SentencePiece's that is neither.
    """
    if (folder / "tokenizer.json").is_file():
        model = (read_json(folder / "tokenizer.json") or {}).get("model")
        return isinstance(model, dict) and model.get("type") == "Unigram"
    path = folder / "tokenizer.model"
    if not path.is_file():
        return False
    try:
        from google.protobuf.message import DecodeError

        proto = import_module("sentencepiece.sentencepiece_model_pb2")
    except ImportError:
        raise ModelImportError(f"{path} needs sentencepiece to be read: pip install 'ease-lm[hf]'") from None
    model = proto.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError:
        return False  # tiktoken's, which has the same name
    kind = model.trainer_spec.model_type
    if kind not in (proto.TrainerSpec.BPE, proto.TrainerSpec.UNIGRAM):
        name = proto.TrainerSpec.ModelType.Name(kind).lower()
        raise ModelImportError(
            f"{path} is a vocabulary by {name}, expected bpe or unigram; a tokenizer.json is read instead"
        )
    return bool(kind == proto.TrainerSpec.UNIGRAM)


def read_text_format(
    folder: Path,
    config: Mapping[str, Any],
    tokenizer: Tokenizer,
    names: Mapping[str, str | None] | None = None,
) -> TextFormat:
    """How the model's texts begin and end, and its template: from the files beside its weights.

    Raises ModelImportError.

    `names`: the texts of its special tokens by their names, where they are known already.
    """
    described = tokenizer_settings(folder)
    generation = read_json(folder / "generation_config.json") or {}
    names = names or {name: _text_of(described.get(name)) for name in SPECIAL_TOKENS}
    special_tokens = {name: text for name, text in names.items() if text is not None}
    begin, end = (tokenizer.token_to_id(special_tokens.get(name, "")) for name in ("bos_token", "eos_token"))
    stops = [end, *_ids(generation.get("eos_token_id")), *_ids(config.get("eos_token_id"))]
    stop_ids = tuple(dict.fromkeys(token for token in stops if token is not None and token >= 0))
    kept = {name: generation[name] for name in GENERATION if generation.get(name) is not None}
    # the tokenizer's, for templates and likelihoods: generation_config.json may name another
    kept["bos_token_id"] = begin
    return TextFormat(start_id(tokenizer), stop_ids, _template(folder, described), kept, special_tokens)


def _ids(value: Any) -> list[int]:
    return [token for token in (value if isinstance(value, list) else [value]) if type(token) is int]


def start_id(tokenizer: Tokenizer) -> int | None:
    """The token that the tokenizer puts before every text, whatever its configuration says of it.

    Raises ModelImportError.
    """
    plain, whole = (tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
    if whole.ids == plain.ids:
        return None
    if whole.ids[1:] != plain.ids:
        expected = (
            "expected nothing more than one token before the text: change post_processor in tokenizer.json"
        )
        raise ModelImportError(f"the tokenizer makes {' '.join(whole.tokens)} of the text 'a'; {expected}")
    first: int = whole.ids[0]
    return first


def _template(folder: Path, named: Mapping[str, Any]) -> str | None:
    """The chat template: a file of its own, that of a processor, or in the tokenizer's configuration, alone
    or as the one named 'default', or else the first. Raises ModelImportError.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        return read_template(path.read_bytes())
    of_processor = read_json(folder / "chat_template.json") or {}
    template = of_processor.get("chat_template", named.get("chat_template"))
    if isinstance(template, list):
        named_so = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        chosen = "default" if "default" in named_so else next(iter(named_so), None)
        if chosen not in ("default", None):
            names = ", ".join(map(str, named_so))
            warn(f"no chat template is named 'default' (there are: {names}); {chosen!r} is taken")
        template = named_so.get(chosen)
    return read_template(template) if isinstance(template, str) else None


def read_template(source: str | bytes) -> str | None:
    """A template's text; None where it has none. One that cannot be read is warned of: it costs chat only."""
    if (problem := ChatTemplate(source).problem) is not None:
        warn(problem)
    try:
        return source if isinstance(source, str) else source.decode()
    except UnicodeDecodeError:
        return None


def warn(message: str) -> None:
    warnings.warn(message, SettingWarning, stacklevel=2)
