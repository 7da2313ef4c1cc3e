"""Is a generated text's answer the right one? As the task gsm8k of lm_eval 0.4.13 (version 3) extracts and
compares it.

strict-match        the number behind "#### "
flexible-extract    the text's last number, whatever stands around it: of 3/4 it is 4, of 1e5 it is 5
first-line          the first line, for answers that are no numbers

Both sides are compared as exact_match does there: without commas, dollar signs, what stands before "#### ", a
last full stop, and the case of letters. So 72.00 is not 72.
"""

import re

MARK = "#### "
INVALID = "[invalid]"
IGNORED = (",", r"\$", rf"(?s).*{MARK}", r"\.$")
STRICT = "strict-match"
FLEXIBLE = "flexible-extract"
FIRST_LINE = "first-line"
FILTERS = {
    STRICT: (r"#### (\-?[0-9\.\,]+)", 0),
    FLEXIBLE: (r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1),
}  # a pattern, and which match


def filter_of(answer: str) -> str:
    """The filter that finds what is to equal this answer."""
    bare = answer.strip()
    number = re.fullmatch(FILTERS[FLEXIBLE][0], bare) and any(character.isdigit() for character in bare)
    return FLEXIBLE if MARK in answer or number else FIRST_LINE


def is_right(said: str, answer: str, name: str) -> bool:
    """Whether what a filter finds in a text is the answer."""
    return comparable(extract(said, name)) == comparable(answer.strip() if name == FIRST_LINE else answer)


def extract(text: str, name: str) -> str:
    """What a filter finds in a text."""
    if name == FIRST_LINE:
        return text.strip().split("\n")[0].strip()
    pattern, which = FILTERS[name]
    found = list(re.finditer(pattern, text))
    if not found:
        return INVALID
    return next(group for group in found[which].groups() if group).strip()


def comparable(text: str) -> str:
    """A text without what makes no difference."""
    for pattern in IGNORED:
        text = re.sub(pattern, "", text)
    return text.lower()
