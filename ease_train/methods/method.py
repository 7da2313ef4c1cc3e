"""How the exits are trained together (the `[method]` table of a recipe, a table of its own for each idea),
and how gates are.

The formulas are in schedules.py, losses.py and gates.py.
"""

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from ease_common.errors import ConfigError, SettingWarning
from ease_common.settings import ABOVE_0, AT_LEAST_0, AT_LEAST_1, SEEDS, SHARE, Bounds, Section, setting
from ease_train.training.renames import regrouped


@dataclass(frozen=True)
class Part(Section, table=""):
    """One idea of a method, which is on when one of its `switches` is set.

    Its other settings need the first of them.

    `for_early_exits`: it means nothing without one.
    """

    switches: ClassVar[tuple[str, ...]]
    for_early_exits: ClassVar[bool]

    def __init_subclass__(cls, table: str, switches: tuple[str, ...], for_early_exits: bool = True) -> None:
        super().__init_subclass__(table)
        cls.switches = switches
        cls.for_early_exits = for_early_exits

    def __post_init__(self) -> None:
        super().__post_init__()
        needed = self.switches[0]
        for f in dataclasses.fields(self):
            if f.name not in self.switches and self._set(f.name) and not self._set(needed):
                message = f"{self.table}: {f.name} = {getattr(self, f.name)!r} has no effect without {needed}"
                warnings.warn(message, SettingWarning, stacklevel=2)

    @property
    def on(self) -> bool:
        """Whether it is asked for."""
        return any(self._set(name) for name in self.switches)

    def _set(self, name: str) -> bool:
        return bool(getattr(self, name) != type(self).__dataclass_fields__[name].default)


@dataclass(frozen=True)
class Weight(Part, table="method.weight", switches=("rule",)):
    """The weights of the exits."""

    rule: str = setting(
        "given",
        "exit weights: 'given' (layer_weights), 'uniform', 'depth' (CALM) or 'layerskip'",
        ("given", "uniform", "depth", "layerskip"),
    )
    scale: float = setting(1.0, "LayerSkip's e_scale, on the early exits' weights", AT_LEAST_0)


@dataclass(frozen=True)
class Alpha(Part, table="method.alpha", switches=("schedule",)):
    """The original EASE's weights over time."""

    schedule: str = setting(
        "none",
        "first exit's weight alpha, last one's 1 - alpha: 'constant', 'linear', 'cosine', 'step' or 'none'",
        ("none", "constant", "linear", "cosine", "step"),
    )
    start: float = setting(0.7, "alpha at the first step", SHARE)
    end: float = setting(0.7, "alpha at the last step", SHARE)
    steps: tuple[int, ...] = setting((), "steps at which alpha moves, for 'step'", AT_LEAST_0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule == "step" and not self.steps:
            raise ConfigError(
                "method.alpha: schedule = 'step' without steps; name those at which alpha moves"
            )


@dataclass(frozen=True)
class ExitWarmup(Part, table="method.exit_warmup", switches=("schedule",)):
    """EE-LLM's warm-up of the early exits' weights."""

    schedule: str = setting(
        "none",
        "warm-up of the early exits' weights (EE-LLM): 'linear', 'cosine' or 'none'",
        ("none", "linear", "cosine"),
    )
    steps: int = setting(0, "steps of that warm-up", AT_LEAST_0)
    start: float = setting(0.0, "early exits' weight at its first step", AT_LEAST_0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.on and self.steps < 1:
            raise ConfigError(
                f"method.exit_warmup: steps = {self.steps}, expected at least 1 with schedule = "
                f"'{self.schedule}'"
            )


@dataclass(frozen=True)
class Curriculum(Part, table="method.curriculum", switches=("kind",)):
    """LayerSkip's curricula."""

    kind: str = setting(
        "none",
        "which exits a step trains (LayerSkip): 'rotational', 'gradual' or 'none' (all)",
        ("none", "rotational", "gradual"),
    )
    every: int = setting(2, "N: a rotational curriculum trains every N-th early exit", AT_LEAST_1)


@dataclass(frozen=True)
class Lora(Part, table="method.lora", switches=("rank",), for_early_exits=False):
    """Low-rank updates of the layers."""

    rank: int = setting(
        0,
        "rank of updates that learn in the place of the layers' matrices (LoRA); 0: the matrices learn",
        AT_LEAST_0,
    )
    alpha: float = setting(16.0, "scale of those updates, times their rank", ABOVE_0)


@dataclass(frozen=True)
class LayerDropout(Part, table="method.layer_dropout", switches=("rate",), for_early_exits=False):
    """LayerSkip's layer dropout."""

    rate: float = setting(
        0.0,
        "LayerSkip's p_max: probability that a sequence skips the last layer; less for those before",
        SHARE,
    )
    schedule: str = setting(
        "constant",
        "over the run: 'constant', or 'exponential' (from 0, for training from scratch)",
        ("constant", "exponential"),
    )


@dataclass(frozen=True)
class Distill(Part, table="method.distill", switches=("weight", "hidden_weight", "labels")):
    """What the last exit teaches the early ones."""

    weight: float = setting(
        0.0,
        "weight of the divergence of an early exit from the last one, relative to its own loss",
        AT_LEAST_0,
    )
    temperature: float = setting(2.0, "temperature of that divergence", ABOVE_0)
    hidden_weight: float = setting(
        0.0,
        "weight of the squared distance to the last exit's hidden state, after the exits' norms",
        AT_LEAST_0,
    )
    labels: str = setting(
        "text",
        "early exits' cross-entropy is with the 'text', or with the 'last-exit's most likely token",
        ("text", "last-exit"),
    )


@dataclass(frozen=True)
class Routing(Part, table="method.routing", switches=("threshold",)):
    """Tokens that train one exit each."""

    threshold: float = setting(
        0.0,
        "a token trains only the first exit whose top probability reaches this; 0 trains all exits",
        SHARE,
    )
    warmup_steps: int = setting(0, "steps of joint training before tokens are routed", AT_LEAST_0)


@dataclass(frozen=True)
class MethodConfig(Section, table="method"):
    """What is asked of the exits: their weights over time, distillation, gradients, layer dropout,
    routing.
    """

    weight: Weight = field(default_factory=Weight)
    normalize_weights: bool = setting(False, "divide the exit weights of each step by their sum")
    alpha: Alpha = field(default_factory=Alpha)
    exit_warmup: ExitWarmup = field(default_factory=ExitWarmup)
    curriculum: Curriculum = field(default_factory=Curriculum)
    exit_gradient: str = setting(
        "joint",
        "into the layers from an exit: 'joint', 'equilibrium' (rescaled) or 'detached' (none from early "
        "exits)",
        ("joint", "equilibrium", "detached"),
    )
    trains: str = setting(
        "all",
        "'all' weights, those of the 'exits' alone: norms, adapters and heads of their own (EE-Tuning), "
        "or 'adapters' and norms alone",
        ("all", "exits", "adapters"),
    )
    lora: Lora = field(default_factory=Lora)
    layer_dropout: LayerDropout = field(default_factory=LayerDropout)
    distill: Distill = field(default_factory=Distill)
    routing: Routing = field(default_factory=Routing)
    predictor_weight: float = setting(
        1.0, "weight of the loss of Mixture-of-Depths predictors (it reaches nothing else)", AT_LEAST_0
    )
    layer_lr_scales: dict[int, float] = field(
        default_factory=dict,
        metadata={
            "help": "learning rate of a layer as a share of the others' (discriminative fine-tuning)",
            "allowed": AT_LEAST_0,
        },
    )
    objective: str = setting(
        "", "a method of your own, 'module:function': what a step minimises (docs/contributing/method.md)"
    )
    loss: str = setting(
        "", "a loss of your own, 'module:function', in the place of the exits' cross-entropies"
    )
    own: dict[str, float] = field(
        default_factory=dict,
        metadata={"help": "a setting of your own method, by the name it reads there", "allowed": Bounds()},
    )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> Self:
        """Build the section, its tables' settings also by their names of format 1. Raises ConfigError."""
        return super().from_dict(regrouped(values), where)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha.on and self.weight.on:
            rule = self.weight.rule
            raise ConfigError(
                f"method: alpha.schedule and weight.rule = '{rule}' both set the exit weights; leave one out"
            )
        if self.alpha.on and self.exit_warmup.on:
            raise ConfigError(
                "method: alpha and exit_warmup both move the early exits' weights; leave one out"
            )
        if self.lora.on and self.trains != "all":
            raise ConfigError(
                f"method: lora updates the layers, which trains = '{self.trains}' freezes; leave one out"
            )
        if self.routing.on and self.curriculum.on:
            raise ConfigError("method: routing and curriculum both choose the exits to train; leave one out")
        if self.routing.on and self.distill.on:
            raise ConfigError(
                "method: with routing a token has one exit and nothing to distil from; leave one out"
            )
        if self.own and not (self.objective or self.loss):
            message = f"method: own sets {', '.join(self.own)}, which has no effect without objective or loss"
            warnings.warn(message, SettingWarning, stacklevel=2)

    @property
    def for_early_exits(self) -> list[str]:
        """What is asked for and means nothing without an early exit."""
        parts = [
            part
            for part in vars(self).values()
            if isinstance(part, Part) and part.for_early_exits and part.on
        ]
        gradient = (
            [] if self.exit_gradient == "joint" else [f"method: exit_gradient = '{self.exit_gradient}'"]
        )
        return [*(part.table for part in parts), *gradient]


@dataclass(frozen=True)
class GateConfig(Section, table="gates"):
    """How gates are trained."""

    steps: int = setting(200, "optimizer steps", AT_LEAST_1)
    batch_size: int = setting(8, "sequences in a step", AT_LEAST_1)
    learning_rate: float = setting(
        3e-3, "peak learning rate of AdamW, falling linearly to 0", Bounds(0, 1, open_low=True)
    )
    gate_width: int = setting(0, "hidden width of a gate; 0 makes it linear", AT_LEAST_0)
    eval_tokens: int = setting(20000, "validation tokens for the calibration and its report", AT_LEAST_1)
    seed: int = setting(42, "seed of the gates and of the order of the data", SEEDS)
