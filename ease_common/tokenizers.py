"""Tokenizers as both training and the runtime want them."""

from tokenizers import Tokenizer


def whole_texts(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer without what a training script left in it: truncation, padding, BPE dropout."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None) is not None:
        tokenizer.model.dropout = None
    return tokenizer
