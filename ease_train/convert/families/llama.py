"""Llama 2 and 3, SmolLM2, and whatever else computes as they do."""

from ease_train.convert.family import Family

FAMILY = Family(
    architecture="LlamaForCausalLM", refused=("attention_bias", "mlp_bias"), gguf="llama", paired=True
)
