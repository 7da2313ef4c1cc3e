"""Tokenizers without training, for tests of whatever turns tokens into text."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

END = "<|end|>"
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "a"), ("â", "Ĥ"), ("¬", "!")]  # the last two hold parts of a euro sign, "â Ĥ ¬"


def byte_tokenizer() -> Tokenizer:
    """Byte-level BPE: 0 ends a text, 1..256 are the bytes in the order of ByteLevel's alphabet, then the merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [END, *alphabet, *(left + right for left, right in MERGES)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    return tokenizer


def letter_tokenizer(letters: str) -> Tokenizer:
    """One token a letter; 0 ends a text."""
    tokenizer = Tokenizer(models.WordLevel({END: 0, **{letter: i for i, letter in enumerate(letters, 1)}}, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([END])
    return tokenizer


def piece_tokenizer() -> Tokenizer:
    """As SentencePiece has it: '▁' begins a word, whose space is dropped at the start of a text, and bytes stand in for what is missing."""
    words = ["<s>", "</s>", "<unk>", "▁the", "▁a", "ing", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in words[:3]])
    return tokenizer
