"""What was called otherwise before: the settings and weights of checkpoints of format 1, and the recipes of
that time.

The settings' old names are options of the command line still.
"""

import re
from collections.abc import Mapping
from typing import Any

METHOD = {  # a setting of [method] -> its table and its name there
    "weight_rule": ("weight", "rule"),
    "exit_scale": ("weight", "scale"),
    "alpha_schedule": ("alpha", "schedule"),
    "alpha_start": ("alpha", "start"),
    "alpha_end": ("alpha", "end"),
    "alpha_steps": ("alpha", "steps"),
    "exit_warmup": ("exit_warmup", "schedule"),
    "exit_warmup_steps": ("exit_warmup", "steps"),
    "exit_warmup_from": ("exit_warmup", "start"),
    "curriculum": ("curriculum", "kind"),
    "rotate_every": ("curriculum", "every"),
    "lora_rank": ("lora", "rank"),
    "lora_alpha": ("lora", "alpha"),
    "layer_dropout": ("layer_dropout", "rate"),
    "layer_dropout_time": ("layer_dropout", "schedule"),
    "labels": ("distill", "labels"),
    "distill_weight": ("distill", "weight"),
    "distill_temperature": ("distill", "temperature"),
    "distill_hidden_weight": ("distill", "hidden_weight"),
    "routing_threshold": ("routing", "threshold"),
    "routing_warmup_steps": ("routing", "warmup_steps"),
}
WEIGHTS = {
    r"exit_norms\.(\d+)\.": r"exits.\1.norm.",
    r"adapters\.(\d+)\.": r"exits.\1.adapter.",
    r"exit_heads\.(\d+)\.": r"exits.\1.head.",
    r"gates\.(\d+)\.": r"exits.\1.gate.",
    r"draft_head\.": "reduced_head.known.",
    r"draft_rest\.": "reduced_head.rest.",
    r"draft_ids$": "reduced_head.ids",
    r"draft_log_shares$": "reduced_head.log_shares",
    r"(.*)\.parametrizations\.weight\.original$": r"\1.weight",
    r"(.*)\.parametrizations\.weight\.0\.(down|up)$": r"\1.update.\2",
}


def regrouped(method: Mapping[str, Any]) -> dict[str, Any]:
    """A `[method]` table with the settings of format 1 in their tables; what is there already stays."""
    moved = {
        name: value for name, value in method.items() if name in METHOD and not isinstance(value, Mapping)
    }
    values = {name: value for name, value in method.items() if name not in moved}
    for name, value in moved.items():
        table, setting = METHOD[name]
        values[table] = {setting: value, **values.get(table, {})}
    return values


def renamed(weights: Mapping[str, Any]) -> dict[str, Any]:
    """A state dictionary by the names of today."""
    found = {}
    for name, value in weights.items():
        for old, new in WEIGHTS.items():
            name = re.sub(rf"^{old}", new, name)
        found[name] = value
    return found
