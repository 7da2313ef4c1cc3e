"""EASE's training package: language models whose tokens can leave early.

Names load on first use, so that `import ease_train.data.corpora` and `ease-train --help` need no torch.

    from ease_train import DEEDTransformer, UniversalConfig, UniversalTrainer
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ease_train.methods.method import MethodConfig
    from ease_train.methods.originals import (
        DEEDTransformer,
        MoDTransformer,
        StandardTransformer,
        TokenRoutedTransformer,
    )
    from ease_train.methods.schedules import AlphaSchedule
    from ease_train.methods.universal import PRESETS, UniversalConfig, UniversalTrainer
    from ease_train.model.decoder import Decoder
    from ease_train.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
    from ease_train.training.config import (
        ModelConfig,
        Recipe,
        TokenizerConfig,
        TrainConfig,
        load_recipe,
        recipe_names,
    )
    from ease_train.training.trainer import Trainer

_HOMES = {
    "training.checkpoint": ("Checkpoint", "load_checkpoint", "save_checkpoint"),
    "training.config": (
        "ModelConfig",
        "Recipe",
        "TokenizerConfig",
        "TrainConfig",
        "load_recipe",
        "recipe_names",
    ),
    "methods.method": ("MethodConfig",),
    "model.decoder": ("Decoder",),
    "methods.originals": (
        "DEEDTransformer",
        "MoDTransformer",
        "StandardTransformer",
        "TokenRoutedTransformer",
    ),
    "methods.schedules": ("AlphaSchedule",),
    "training.trainer": ("Trainer",),
    "methods.universal": ("PRESETS", "UniversalConfig", "UniversalTrainer"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "PRESETS",
    "AlphaSchedule",
    "Checkpoint",
    "DEEDTransformer",
    "Decoder",
    "MethodConfig",
    "MoDTransformer",
    "ModelConfig",
    "Recipe",
    "StandardTransformer",
    "TokenRoutedTransformer",
    "TokenizerConfig",
    "TrainConfig",
    "Trainer",
    "UniversalConfig",
    "UniversalTrainer",
    "load_checkpoint",
    "load_recipe",
    "recipe_names",
    "save_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'ease_train' has no attribute '{name}'")
    return getattr(import_module(f"ease_train.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
