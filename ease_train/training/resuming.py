"""What may be asked of a run that goes on: to train longer, and to find its text elsewhere.

All else is the run's own.

    trainer = Trainer.resume(out, asked=ResumeOptions(steps=2000, data="moved/corpus.jsonl"))

More steps are a longer schedule from the next step on: the learning rate (a cosine over all steps) goes up
again to where it is in a run of that many, and so do curricula. The result is not that of a run that began
with so many steps.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ease_common.errors import ConfigError, SettingWarning
from ease_train.training.checkpoint import Checkpoint
from ease_train.training.config import SECTIONS, Recipe
from ease_train.training.optimizer import learning_rate


@dataclass(frozen=True)
class ResumeOptions:
    """What a resumed run is asked for: fields of the recipe by name, its data, and the recipe that it
    follows.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    data: str | None = None
    recipe: Recipe | None = None

    def of(self, checkpoint: Checkpoint, path: Path) -> Checkpoint:
        """The checkpoint at `path` as it is to go on. Raises ConfigError for what cannot be had.

        Whether the text at `data` is the run's own shows when it is read.
        """
        self._check_recipe(checkpoint, path)
        self._check_options(checkpoint.recipe, path)
        step = (checkpoint.train_state or {}).get(
            "step", checkpoint.step
        )  # the run's own, where the model is an earlier one
        checkpoint = replace(checkpoint, recipe=self._longer(checkpoint.recipe, step, path))
        if self.data not in (None, checkpoint.data) and not checkpoint.data_sha256:
            said = (
                f"{path} does not know the sum of its text; {self.data} is taken for what it calls "
                f"{checkpoint.data}"
            )
            warnings.warn(said, SettingWarning, stacklevel=2)
        return replace(checkpoint, data=self.data or checkpoint.data)

    def _check_recipe(self, checkpoint: Checkpoint, path: Path) -> None:
        began = checkpoint.base or checkpoint.recipe
        named = self.recipe
        remedy = f"leave the recipe out to go on with the run as it is: ease-train fit --out {path} --resume"
        if named is not None and named.name != began.name:
            raise ConfigError(
                f"the run at {path} follows the recipe {began.name}, not {named.name}; {remedy}"
            )
        if named is not None and checkpoint.base is not None and (changed := differing(began, named)):
            raise ConfigError(
                f"the recipe {named.name} has changed since the run at {path} began ({changed}); {remedy}"
            )

    def _check_options(self, own: Recipe, path: Path) -> None:
        options = {name: value for name, value in self.options.items() if name != "steps"}
        if changed := differing(own, own.with_options(options)):
            raise ConfigError(
                f"--resume goes on with the settings in {path}/config.json, and only --steps may differ "
                f"({changed}); "
                "leave the option out, or begin a run of another --out"
            )

    def _longer(self, own: Recipe, step: int, path: Path) -> Recipe:
        steps = self.options.get("steps", own.train.steps)
        if steps == own.train.steps:
            return own
        if steps <= step:
            raise ConfigError(f"--steps {steps}: the run at {path} has {step} steps already; expected more")
        longer = own.with_options({"steps": steps})
        before = learning_rate(step - 1, own.train)
        after = learning_rate(step, longer.train)
        said = f"the schedules go on as those of {steps} steps, not {own.train.steps}"
        warnings.warn(
            f"{said}: the learning rate was {before:.3g}, and is {after:.3g} at step {step + 1}",
            SettingWarning,
            stacklevel=3,
        )
        return longer


def differing(one: Recipe, other: Recipe) -> str:
    """The fields in which two recipes differ, each with both values; "" where there are none.

    The vocabulary's size is left out: it is the tokenizer's where the recipe says 0.
    """
    tables = [(table, one.to_dict()[table], other.to_dict()[table]) for table in SECTIONS]
    return ", ".join(
        f"{table}: {name} = {after[name]}, was {before[name]}"
        for table, before, after in tables
        for name in before
        if before[name] != after[name] and name != "vocab_size"
    )
