"""How the exits are trained together (the `[method]` table of a recipe), and how gates are.

The formulas are in schedules.py, losses.py and gates.py.
"""

import warnings
from dataclasses import dataclass, field
from typing import ClassVar

from ease_train.errors import ConfigError, SettingWarning
from ease_train.sections import ABOVE_0, AT_LEAST_0, AT_LEAST_1, SEEDS, SHARE, Bounds, Section, one_of, setting

WEIGHT_RULES = ("given", "uniform", "depth", "layerskip")
ALPHAS = ("none", "constant", "linear", "cosine", "step")
WARMUPS = ("none", "linear", "cosine")
CURRICULA = ("none", "rotational", "gradual")
GRADIENTS = ("joint", "equilibrium", "detached")

NEEDS = {  # a setting -> the one without which it has no effect
    "exit_scale": "weight_rule",
    "alpha_start": "alpha_schedule",
    "alpha_end": "alpha_schedule",
    "alpha_steps": "alpha_schedule",
    "exit_warmup_steps": "exit_warmup",
    "exit_warmup_from": "exit_warmup",
    "rotate_every": "curriculum",
    "layer_dropout_time": "layer_dropout",
    "distill_temperature": "distill_weight",
    "routing_warmup_steps": "routing_threshold",
    "lora_alpha": "lora_rank",
}


@dataclass(frozen=True)
class MethodConfig(Section):
    """What is asked of the exits: their weights over time, distillation, gradients, layer dropout, routing."""

    table: ClassVar[str] = "method"

    weight_rule: str = setting("given", "exit weights: 'given' (layer_weights), 'uniform', 'depth' (CALM) or 'layerskip'")
    exit_scale: float = setting(1.0, "LayerSkip's e_scale, on the early exits' weights", AT_LEAST_0)
    normalize_weights: bool = setting(False, "divide the exit weights of each step by their sum")
    alpha_schedule: str = setting(
        "none", "first exit's weight alpha, last one's 1 - alpha: 'constant', 'linear', 'cosine', 'step' or 'none'"
    )
    alpha_start: float = setting(0.7, "alpha at the first step", SHARE)
    alpha_end: float = setting(0.7, "alpha at the last step", SHARE)
    alpha_steps: tuple[int, ...] = setting((), "steps at which alpha moves, for 'step'", AT_LEAST_0)
    exit_warmup: str = setting("none", "warm-up of the early exits' weights (EE-LLM): 'linear', 'cosine' or 'none'")
    exit_warmup_steps: int = setting(0, "steps of that warm-up", AT_LEAST_0)
    exit_warmup_from: float = setting(0.0, "early exits' weight at its first step", AT_LEAST_0)
    curriculum: str = setting("none", "which exits a step trains (LayerSkip): 'rotational', 'gradual' or 'none' (all)")
    rotate_every: int = setting(2, "N: a rotational curriculum trains every N-th early exit", AT_LEAST_1)
    exit_gradient: str = setting(
        "joint", "into the layers from an exit: 'joint', 'equilibrium' (rescaled) or 'detached' (none from early exits)"
    )
    trains: str = setting(
        "all",
        "'all' weights, those of the 'exits' alone: norms, adapters and heads of their own (EE-Tuning), or 'adapters' and norms alone",
    )
    lora_rank: int = setting(0, "rank of updates that learn in the place of the layers' matrices (LoRA); 0: the matrices learn", AT_LEAST_0)
    lora_alpha: float = setting(16.0, "scale of those updates, times their rank", ABOVE_0)
    layer_dropout: float = setting(0.0, "LayerSkip's p_max: probability that a sequence skips the last layer; less for those before", SHARE)
    layer_dropout_time: str = setting("constant", "over the run: 'constant', or 'exponential' (from 0, for training from scratch)")
    labels: str = setting("text", "early exits' cross-entropy is with the 'text', or with the 'last-exit's most likely token")
    distill_weight: float = setting(
        0.0, "weight of the divergence of an early exit from the last one, relative to its own loss", AT_LEAST_0
    )
    distill_temperature: float = setting(2.0, "temperature of that divergence", ABOVE_0)
    distill_hidden_weight: float = setting(
        0.0, "weight of the squared distance to the last exit's hidden state, after the exits' norms", AT_LEAST_0
    )
    routing_threshold: float = setting(
        0.0, "a token trains only the first exit whose top probability reaches this; 0 trains all exits", SHARE
    )
    routing_warmup_steps: int = setting(0, "steps of joint training before tokens are routed", AT_LEAST_0)
    predictor_weight: float = setting(1.0, "weight of the loss of Mixture-of-Depths predictors (it reaches nothing else)", AT_LEAST_0)
    layer_lr_scales: dict[int, float] = field(
        default_factory=dict,
        metadata={
            "help": "learning rate of a layer as a share of the others' (discriminative fine-tuning)",
            "bounds": AT_LEAST_0,
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("method: weight_rule", self.weight_rule, WEIGHT_RULES)
        one_of("method: alpha_schedule", self.alpha_schedule, ALPHAS)
        one_of("method: exit_warmup", self.exit_warmup, WARMUPS)
        one_of("method: curriculum", self.curriculum, CURRICULA)
        one_of("method: exit_gradient", self.exit_gradient, GRADIENTS)
        one_of("method: labels", self.labels, ("text", "last-exit"))
        one_of("method: trains", self.trains, ("all", "exits", "adapters"))
        one_of("method: layer_dropout_time", self.layer_dropout_time, ("constant", "exponential"))
        self._check_contradictions()
        for name, needed in NEEDS.items():
            if self._set(name) and not self._set(needed):
                warnings.warn(f"method: {name} = {getattr(self, name)!r} has no effect without {needed}", SettingWarning, stacklevel=2)

    def _set(self, name: str) -> bool:
        return bool(getattr(self, name) != type(self).__dataclass_fields__[name].default)

    @property
    def for_early_exits(self) -> tuple[str, ...]:
        """The settings that differ from their defaults and mean nothing without an early exit."""
        names = (
            "weight_rule",
            "alpha_schedule",
            "exit_warmup",
            "curriculum",
            "exit_gradient",
            "labels",
            "distill_weight",
            "distill_hidden_weight",
            "routing_threshold",
        )
        return tuple(name for name in names if self._set(name))

    def _check_contradictions(self) -> None:
        if self.alpha_schedule != "none" and self.weight_rule != "given":
            raise ConfigError(f"method: alpha_schedule and weight_rule = '{self.weight_rule}' both set the exit weights; leave one out")
        if self.alpha_schedule != "none" and self.exit_warmup != "none":
            raise ConfigError("method: alpha_schedule and exit_warmup both move the early exits' weights; leave one out")
        if self.alpha_schedule == "step" and not self.alpha_steps:
            raise ConfigError("method: alpha_schedule = 'step' without alpha_steps; name the steps at which alpha moves")
        if self.exit_warmup != "none" and self.exit_warmup_steps < 1:
            raise ConfigError(
                f"method: exit_warmup_steps = {self.exit_warmup_steps}, expected at least 1 with exit_warmup = '{self.exit_warmup}'"
            )
        if self.lora_rank and self.trains != "all":
            raise ConfigError(f"method: lora_rank updates the layers, which trains = '{self.trains}' freezes; leave one out")
        if self.routing_threshold and self.curriculum != "none":
            raise ConfigError("method: routing_threshold and curriculum both choose the exits to train; leave one out")
        if self.routing_threshold and (self.distill_weight or self.distill_hidden_weight or self.labels != "text"):
            raise ConfigError("method: with routing_threshold a token has one exit and nothing to distil from; leave one out")


@dataclass(frozen=True)
class GateConfig(Section):
    """How gates are trained."""

    table: ClassVar[str] = "gates"

    steps: int = setting(200, "optimizer steps", AT_LEAST_1)
    batch_size: int = setting(8, "sequences in a step", AT_LEAST_1)
    learning_rate: float = setting(3e-3, "peak learning rate of AdamW, falling linearly to 0", Bounds(0, 1, open_low=True))
    gate_width: int = setting(0, "hidden width of a gate; 0 makes it linear", AT_LEAST_0)
    eval_tokens: int = setting(20000, "validation tokens for the calibration and its report", AT_LEAST_1)
    seed: int = setting(42, "seed of the gates and of the order of the data", SEEDS)
