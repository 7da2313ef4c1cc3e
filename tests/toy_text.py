"""Tokenizers without training, for tests of whatever turns tokens into text."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

END = "<|end|>"
REPLACE = decoders.Replace("▁", " ")
WORDS = "▁the ▁king ▁a ▁good ▁ ing a b . n't ##ing ##s abc</w> x</w> é 日 👍 | <pad> Ġa âĤ ¬!"
DECODERS = {
    "llama 2": decoders.Sequence(
        [REPLACE, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    ),
    "gemma": decoders.Sequence([REPLACE, decoders.ByteFallback(), decoders.Fuse()]),
    "byte fallback": decoders.ByteFallback(),
    "byte fallback, then words": decoders.Sequence([decoders.ByteFallback(), decoders.WordPiece()]),
    "byte level": decoders.ByteLevel(),
    "metaspace": decoders.Metaspace(),
    "metaspace, never first": decoders.Metaspace(prepend_scheme="never"),
    "wordpiece": decoders.WordPiece(),
    "wordpiece, untidied": decoders.WordPiece(cleanup=False),
    "end of word": decoders.BPEDecoder(),
    "ctc": decoders.CTC(),
    "char": decoders.Fuse(),
    "strip two": decoders.Sequence([REPLACE, decoders.Fuse(), decoders.Strip(" ", 2, 0)]),
    "strip each": decoders.Strip("a", 1, 0),
    "rewritten": decoders.Sequence([decoders.Fuse(), decoders.Replace("a b", "c")]),
    "bytes rewritten": decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " ")]),
    "none": None,
}
MERGES = [
    ("t", "h"),
    ("th", "e"),
    ("Ġ", "a"),
    ("â", "Ĥ"),
    ("¬", "!"),
]  # the last two hold parts of a euro sign, "â Ĥ ¬"


def byte_tokenizer() -> Tokenizer:
    """Byte-level BPE: 0 ends a text, 1..256 are the bytes in the order of ByteLevel's alphabet, then the
    merges.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [END, *alphabet, *(left + right for left, right in MERGES)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    return tokenizer


def letter_tokenizer(letters: str) -> Tokenizer:
    """One token a letter; 0 ends a text."""
    tokenizer = Tokenizer(
        models.WordLevel({END: 0, **{letter: i for i, letter in enumerate(letters, 1)}}, unk_token=END)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([END])
    return tokenizer


def piece_tokenizer() -> Tokenizer:
    """As SentencePiece has it: '▁' begins a word, whose space is dropped at the start of a text, and bytes
    stand in for what is missing.
    """
    words = ["<s>", "</s>", "<unk>", "▁the", "▁a", "ing", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>")
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in words[:3]])
    return tokenizer


def decoder_tokenizer(kind: str) -> Tokenizer:
    """One of DECODERS over a vocabulary for all of them: 0..2 are special, 3..258 the bytes, then WORDS and
    ByteLevel's alphabet.
    """
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        " ",
        "\ufffd",
        *WORDS.split(),
    ]
    words += [letter for letter in sorted(pre_tokenizers.ByteLevel.alphabet()) if letter not in words]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    if (decoder := DECODERS[kind]) is not None:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in words[:3]])
    tokenizer.add_tokens(["<|user|>"])
    return tokenizer
