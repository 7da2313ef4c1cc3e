"""GGUF files, llama.cpp's format, read through transformers: it dequantises them, and turns their names into Hugging Face's."""

import tempfile
from pathlib import Path

import torch

from ease_train.errors import ForeignError
from ease_train.foreign import ARCHITECTURES, Foreign
from ease_train.huggingface import WITH_TRANSFORMERS, read_conventions, read_tokenizer


def read_gguf(path: Path) -> Foreign:
    """The model of a .gguf file, its weights as fp32. Raises ForeignError."""
    if not path.is_file():
        raise ForeignError(f"no file at {path}")
    try:
        import gguf  # noqa: F401 - which transformers reads them with
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise ForeignError(f"reading {path.name} {WITH_TRANSFORMERS}") from None
    kind = architecture(path)
    if kind not in ARCHITECTURES:
        raise ForeignError(f"{path} holds a model of the type '{kind}'; expected one of: {', '.join(ARCHITECTURES)}")
    try:
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # transformers, gguf and the file's own oddities
        raise ForeignError(f"{path} cannot be read by transformers: {str(error).strip().splitlines()[0]}") from None
    config = {name: value for name, value in model.config.to_dict().items() if name != "quantization_config"}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        read = read_tokenizer(Path(folder))
        conventions = read_conventions(Path(folder), config, read)
    return Foreign(config, model.state_dict(), read, conventions)


def architecture(path: Path) -> str:
    """What a .gguf file says it holds. Raises ForeignError when it is none."""
    from gguf import GGUFReader

    try:
        field = GGUFReader(path).get_field("general.architecture")
        return str(field.contents()) if field else "unknown"
    except Exception as error:  # a damaged file: anything from numpy's or gguf's own checks
        raise ForeignError(f"{path} is no GGUF file that can be read: {error}") from None
