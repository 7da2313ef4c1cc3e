"""Tiny random models of the families that can be imported, as transformers writes them."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import tiny_model

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": 1,
    "bos_token_id": 0,
}
ROPE3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
OF_PHI4 = {"hidden_size": 96, "original_max_position_embeddings": 64}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.2, 1.5, 2.0, 3.0],
    "long_factor": [4.0] * 6,
}
ALL_ROTATED = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
GEMMA_LAYERS = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("Llama", {"num_key_value_heads": 6}),
    "llama3": ("Llama", {"rope_parameters": {**ROPE3, "original_max_position_embeddings": 32}}),
    "linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "smollm2": (
        "Llama",
        {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}},
    ),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 12}),
    "qwen2": ("Qwen2", {"rms_norm_eps": 1e-5}),
    "qwen2.5": ("Qwen2", {"tie_word_embeddings": True, "sliding_window": 16, "use_sliding_window": False}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "windowed mistral": ("Mistral", {"sliding_window": 10, "head_dim": 12}),
    "windowed qwen2": ("Qwen2", {"sliding_window": 10, "use_sliding_window": True, "max_window_layers": 2}),
    "smollm3": ("SmolLM3", {"pad_token_id": 1}),
    "uneven smollm3": ("SmolLM3", {"pad_token_id": 1, "no_rope_layers": [0, 1, 1, 0]}),
    "phi3": ("Phi3", {"pad_token_id": 1, "sliding_window": 10}),
    "phi4": (
        "Phi3",
        {"pad_token_id": 1, "tie_word_embeddings": True, "rope_parameters": LONGROPE, **OF_PHI4},
    ),
    "pythia": ("GPTNeoX", {"num_key_value_heads": None, "head_dim": None, "hidden_size": 96}),
    "serial neox": ("GPTNeoX", {"use_parallel_residual": False, "rope_parameters": ALL_ROTATED}),
    "gemma3": (
        "Gemma3Text",
        {"sliding_window": 10, "head_dim": 16, "query_pre_attn_scalar": 20, "layer_types": GEMMA_LAYERS},
    ),
}
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{{ eos_token "
    "}}{% endfor %}"
)


def make_tokenizer(start: bool) -> Tokenizer:
    """Byte-level BPE of 320 words; `start`: it puts <s> before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|eot|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [tiny_model.corpus()],
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    if start:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def make_model(family: str, **changes: Any) -> Any:
    """A random model of a family, or of a class by its name, whose every weight matters: norms and biases are
    not what they start as.
    """
    kind, fields = FAMILIES.get(family, (family, {}))
    torch.manual_seed(3)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **fields, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(0.5, 1.5) if parameter.ndim == 1 else parameter.mul_(8.0)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.sub_(1.0)
    return model


def write_model(model: Any, folder: Path, start: bool = True, shard_size: str = "1GB") -> Path:
    """The directory that transformers would write, with a tokenizer, a template and generation defaults."""
    model.generation_config.update(temperature=0.6, top_p=0.9, do_sample=True, eos_token_id=[1, 2])
    model.save_pretrained(folder, max_shard_size=shard_size)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer(start), bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )
    fast.save_pretrained(folder)
    return folder
