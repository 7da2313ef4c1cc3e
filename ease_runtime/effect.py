"""Options that would have no effect, since what they need beside them is missing.

Of leaving early they are refused: a token that cannot leave makes a measurement of nothing look like a
result. Others change no figure, and clients send them with their defaults: they are told. An option at its
default counts as not given, and a threshold that is off is an answer: nothing shall leave, whatever else is
said.
"""

from collections.abc import Sequence

from ease_common.errors import RequestError
from ease_runtime.options import Options

OF_EXITS = ("policy", "catch_up", "min_exit", "patience", "decay")
OF_DRAWS = ("top_k", "top_p", "min_p")


def given(options: Options, names: Sequence[str]) -> list[str]:
    """Those of some options that are not at their defaults, with their values."""
    values = {name: getattr(options, name) for name in names}
    return [f"{name} {value}" for name, value in values.items() if value != getattr(Options, name)]


def check_effect(options: Options, exit_layers: Sequence[int]) -> None:
    """Raises RequestError for options about leaving early under which no token can leave, or that nothing
    looks at.
    """
    if options.threshold is not None and not options.threshold:
        return
    check_drafts(options)
    of_exits = [name for name in OF_EXITS if name != "catch_up" or not options.drafts_from_text]
    unused = given(options, of_exits)
    if unused and options.threshold is None and options.exit_layer is None and options.depth_budget is None:
        verb = "has" if len(unused) == 1 else "have"
        remedy = "give one (--threshold 0.7), or say that it is off (--threshold off)"
        raise RequestError(
            f"{', '.join(unused)} {verb} no effect without a threshold: no token leaves early; {remedy}"
        )
    if options.patience is not None and options.policy != "patience":
        raise RequestError(
            f"patience {options.patience} has no effect with policy '{options.policy}'; add --policy patience"
        )
    if options.min_exit is not None and options.policy == "fixed":
        raise RequestError(
            f"min_exit {options.min_exit} has no effect with policy 'fixed', whose exit is "
            f"{options.exit_layer}"
        )
    if (
        options.min_exit is not None
        and len(exit_layers) > 1
        and exit_layers[-2] < options.min_exit <= exit_layers[-1]
    ):
        raise RequestError(
            f"min_exit {options.min_exit} leaves no early exit: the last one is after layer {exit_layers[-2]}"
        )


def check_drafts(options: Options) -> None:
    """Raises RequestError for drafts from text alone, beside which exits are asked for: none would be."""
    asked = [
        name for name in ("threshold", "exit_layer", "depth_budget") if getattr(options, name) is not None
    ]
    if options.drafts_from_text and options.draft != "auto" and asked:
        what = f"{asked[0]} {getattr(options, asked[0])}"
        raise RequestError(
            f"{what} has no effect with draft '{options.draft}', which asks no exit; take both (--draft "
            "auto), or say that exits are off (--threshold off)"
        )


def effect_notes(options: Options) -> list[str]:
    """What to tell of options that change nothing in an answer."""
    if options.temperature:
        return []
    notes = [f"{one} has no effect at temperature 0, which is greedy" for one in given(options, OF_DRAWS)]
    return notes + [f"the {options.n} completions are the same at temperature 0, which is greedy"] * (
        options.n > 1
    )
