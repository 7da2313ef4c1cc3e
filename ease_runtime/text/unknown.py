"""Characters that a bundle's tokenizer does not know: they all become one token, and the model cannot tell
them apart.
"""

import functools
import json

from tokenizers import Tokenizer, models


@functools.lru_cache(maxsize=4)
def unknown_id(tokenizer: Tokenizer) -> int | None:
    """The token of every character that has none of its own; None where there is no such token."""
    if isinstance(tokenizer.model, models.Unigram):  # which tells it nowhere else
        found = json.loads(tokenizer.to_str())["model"]["unk_id"]
        return None if found is None else int(found)
    token = tokenizer.model.unk_token
    return None if token is None else tokenizer.token_to_id(token)
