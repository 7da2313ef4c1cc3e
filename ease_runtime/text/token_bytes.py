"""The bytes of each token by itself: a token may be a part of a character, which has no text of its own.

token_bytes = TokenBytes(tokenizer)
b"".join(map(token_bytes, ids)).decode()
token_name(token_bytes(243))                 # "bytes:\\x8d" for a part, the text for whole characters
"""

from typing import Any

from tokenizers import Tokenizer

from ease_runtime.text.streaming import BYTE_TOKEN, decoder_steps

PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves in ByteLevel
OTHERS = [byte for byte in range(256) if byte not in PLAIN]
BYTE_OF = {chr(byte): byte for byte in PLAIN} | {chr(256 + i): byte for i, byte in enumerate(OTHERS)}
DROPPED = frozenset({"ByteFallback", "Fuse", "Strip"})  # steps about several tokens or a text's ends
KNOWN = DROPPED | {"Replace", "Metaspace", "ByteLevel"}


class TokenBytes:
    """What each token of a tokenizer adds to a text, in bytes, where that can be told from the token alone.

    Other decoders (WordPiece's, say) are asked for a text of that one token.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.added = tokenizer.get_added_tokens_decoder()
        self.steps = list(decoder_steps(tokenizer))
        self.kinds = {step["type"] for step in self.steps}
        plain = all("String" in step["pattern"] for step in self.steps if step["type"] == "Replace")
        self.by_piece = bool(self.kinds) and self.kinds <= KNOWN and plain

    def __call__(self, token: int) -> bytes:
        """The bytes of a token; none for an id that the tokenizer does not know."""
        if token in self.added:
            return str(self.added[token].content).encode()
        piece = self.tokenizer.id_to_token(token)
        if piece is None:
            return b""
        if "ByteFallback" in self.kinds and BYTE_TOKEN.fullmatch(piece):
            return bytes([int(piece[3:5], 16)])
        if not self.by_piece:
            return str(self.tokenizer.decode([token], skip_special_tokens=False)).encode()
        for step in self.steps:
            piece = _apply(step, piece)
        if "ByteLevel" in self.kinds and all(character in BYTE_OF for character in piece):
            return bytes(BYTE_OF[character] for character in piece)
        return piece.encode()


def _apply(step: dict[str, Any], piece: str) -> str:
    """What a step of a decoder makes of a token."""
    if step["type"] == "Metaspace":
        return piece.replace(step["replacement"], " ")
    if step["type"] == "Replace":
        return piece.replace(step["pattern"]["String"], step["content"])
    return piece


def token_name(content: bytes) -> str:
    """A token's text; where its bytes are no whole characters these, as OpenAI writes them."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
