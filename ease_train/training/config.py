"""What a training run is made of: frozen dataclasses, plain dictionaries in and out.

A recipe is a TOML file with the tables `[model]`, `[tokenizer]`, `[train]` and `[method]`, one key a field of
the section of that name; `[method]` has tables of its own, like `[method.distill]`. Help texts live in the
fields, so that the command line, the TOML key and the JSON key of a setting cannot drift apart. An unknown
key is an error that names the nearest known one.

    recipe = load_recipe("demo").with_options({"dim": 128, "steps": 500})
"""

import dataclasses
import tomllib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Self

from ease_common.errors import ConfigError, SettingWarning, did_you_mean
from ease_common.settings import (
    ABOVE_0,
    AT_LEAST_0,
    AT_LEAST_1,
    SEEDS,
    SHARE,
    Bounds,
    Section,
    laid_over,
    setting,
)
from ease_train.methods.method import MethodConfig
from ease_train.training.renames import METHOD, regrouped

OF_THE_EXITS = (
    "exits",
    "exit_norm",
    "exit_adapter",
    "adapter_dim",
    "exit_head",
    "exit_vocab_size",
)  # of a model's settings


@dataclass(frozen=True)
class ModelConfig(Section, table="model"):
    """A decoder with exits (layers are numbered from 1; the last layer is always an exit)."""

    vocab_size: int = setting(0, "words in the vocabulary; 0 takes the tokenizer's size", AT_LEAST_0)
    dim: int = setting(256, "width of the hidden state", AT_LEAST_1)
    num_layers: int = setting(12, "transformer blocks", AT_LEAST_1)
    num_heads: int = setting(4, "query heads", AT_LEAST_1)
    num_kv_heads: int = setting(2, "key/value heads (grouped-query attention)", AT_LEAST_1)
    head_dim: int = setting(0, "width of an attention head; 0 takes dim / num_heads", AT_LEAST_0)
    ffn_dim: int = setting(
        0, "width of the gated linear unit; 0 takes 8/3 of dim, rounded up to a multiple of 64", AT_LEAST_0
    )
    max_positions: int = setting(1024, "longest sequence the model may see, in tokens", AT_LEAST_1)
    rope_theta: float = setting(10000.0, "base of the rotary position embedding", ABOVE_0)
    rope_scaling: tuple[float, ...] = setting(
        (), "stretch of that embedding: FACTOR, or Llama 3's FACTOR LOW HIGH POSITIONS; empty: none", ABOVE_0
    )
    rope_factors: tuple[float, ...] = setting(
        (), "stretch of each rotated pair by itself (Phi-3's longrope); empty: none", ABOVE_0
    )
    rope_gain: float = setting(1.0, "what rotated pairs are multiplied by (longrope)", ABOVE_0)
    rotary_dim: int = setting(0, "width of the rotated part of a head (GPT-NeoX); 0 takes all", AT_LEAST_0)
    unrotated_layers: tuple[int, ...] = setting((), "layers without that embedding (SmolLM3)", AT_LEAST_1)
    sliding_window: int = setting(
        0, "tokens that `windowed_layers` attend to, oneself included; 0: all", AT_LEAST_0
    )
    windowed_layers: tuple[int, ...] = setting((), "layers with a sliding window (Gemma 3)", AT_LEAST_1)
    local_rope_theta: float = setting(
        0.0, "base of the rotary embedding in `windowed_layers`, unscaled; 0: as in the others", AT_LEAST_0
    )
    embed_scale: float = setting(1.0, "what embedded tokens are multiplied by (Gemma)", ABOVE_0)
    query_scale: float = setting(
        0.0, "what attention scores are multiplied by; 0 takes head_dim ** -0.5", AT_LEAST_0
    )
    norm: str = setting("rms", "'rms', or 'layer' with a bias (GPT-NeoX)", ("rms", "layer"))
    norm_eps: float = setting(1e-5, "epsilon of every norm", SHARE)
    post_norms: bool = setting(False, "norms after attention and MLP, too (Gemma 3)")
    parallel_residual: bool = setting(False, "attention and MLP read the same state (GPT-NeoX)")
    activation: str = setting("silu", "'silu', 'gelu' or 'gelu-tanh'", ("silu", "gelu", "gelu-tanh"))
    gated: bool = setting(True, "the MLP is a gated linear unit")
    tie_embeddings: bool = setting(True, "one matrix for the embedding and the LM head")
    final_norm: bool = setting(True, "norm before the LM head (the original EASE has none)")
    attention_bias: bool = setting(False, "bias in the query, key and value projections (Qwen2)")
    output_bias: bool = setting(False, "bias in the projection behind attention (GPT-NeoX)")
    mlp_bias: bool = setting(False, "biases in the MLP (GPT-NeoX)")
    qk_norm: bool = setting(False, "norm on each query and key head (Qwen3)")
    exits: tuple[int, ...] = setting(
        (4, 8, 12), "layers after which a token may leave; the last is always one", AT_LEAST_1
    )
    exit_norm: str = setting(
        "own", "norm at an early exit: 'own' (one each) or 'shared' (the final norm)", ("shared", "own")
    )
    exit_adapter: str = setting(
        "none",
        "before an early exit's norm: 'none', 'low-rank', 'mlp' (EE-Tuning) or 'block' (a layer of its own)",
        ("none", "low-rank", "mlp", "block"),
    )
    adapter_dim: int = setting(
        0, "inner width of a low-rank or MLP adapter; 0 takes a quarter of dim", AT_LEAST_0
    )
    exit_head: str = setting(
        "tied",
        "LM head of an early exit: 'tied' (the model's), 'own', or 'reduced' (one for all, frequent "
        "tokens only)",
        ("tied", "own", "reduced"),
    )
    exit_vocab_size: int = setting(
        0, "tokens that a 'reduced' exit head knows: the most frequent of the training text", AT_LEAST_0
    )
    gates: tuple[int, ...] = setting((), "early exits with a gate; set by `ease-train gates`", AT_LEAST_1)
    gate_width: int = setting(0, "hidden width of a gate; 0 makes it linear", AT_LEAST_0)
    routed_layers: tuple[int, ...] = setting(
        (), "Mixture-of-Depths layers, which most tokens go around", AT_LEAST_1
    )
    capacity: float = setting(
        0.125,
        "share of a sequence that a Mixture-of-Depths layer takes in training",
        Bounds(0, 1, open_low=True),
    )
    routing_rule: str = setting(
        "predictor",
        "who goes into such a layer at inference: 'predictor' or 'threshold' (of the router's scores)",
        ("predictor", "threshold"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim == 0 and self.dim % self.num_heads == 0:
            object.__setattr__(self, "head_dim", self.dim // self.num_heads)
        if self.head_dim < 1 or self.head_dim % 2:
            raise ConfigError(
                f"model: dim = {self.dim} does not give {self.num_heads} heads of an even width "
                f"(head_dim = {self.head_dim})"
            )
        if len(self.rope_scaling) not in (0, 1, 4):
            raise ConfigError(
                f"model: rope_scaling = {list(self.rope_scaling)}, expected FACTOR or FACTOR LOW HIGH "
                "POSITIONS"
            )
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ConfigError(
                f"model: rotary_dim = {self.rotary_dim}, expected an even part of head_dim = {self.head_dim}"
            )
        if len(self.rope_factors) not in (0, (self.rotary_dim or self.head_dim) // 2):
            raise ConfigError(
                f"model: {len(self.rope_factors)} rope_factors, expected one for each of the "
                f"{(self.rotary_dim or self.head_dim) // 2} rotated pairs"
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model: num_heads = {self.num_heads} is no multiple of num_kv_heads = {self.num_kv_heads}"
            )
        self._check_exit_vocabulary()
        exits = tuple(sorted({*self.exits, self.num_layers}))
        if exits[-1] > self.num_layers:
            raise ConfigError(
                f"model: exits = {list(self.exits)}, expected layers from 1 to {self.num_layers}"
            )
        object.__setattr__(self, "exits", exits)
        self._check_layers()
        if self.ffn_dim == 0:
            object.__setattr__(self, "ffn_dim", -(-8 * self.dim // (3 * 64)) * 64)

    def _check_exit_vocabulary(self) -> None:
        size = self.exit_vocab_size
        reduced = self.exit_head == "reduced"
        if size and not reduced:
            raise ConfigError(
                f"model: exit_vocab_size = {size} needs exit_head = 'reduced', not '{self.exit_head}'; "
                "set both or neither"
            )
        if reduced and not 0 < size < (self.vocab_size or size + 1):
            known = self.vocab_size or "the tokenizer's size"
            raise ConfigError(
                f"model: exit_vocab_size = {size}, expected at least 1 and less than {known} with "
                "exit_head = 'reduced'"
            )

    def _check_layers(self) -> None:
        if strange := sorted({*self.gates} - {*self.exits[:-1]}):
            raise ConfigError(f"model: gates = {strange}, expected early exits: {list(self.exits[:-1])}")
        for name in ("routed_layers", "unrotated_layers", "windowed_layers"):
            if strange := sorted(n for n in {*getattr(self, name)} if not 1 <= n <= self.num_layers):
                raise ConfigError(f"model: {name} = {strange}, expected layers from 1 to {self.num_layers}")
        if bool(self.windowed_layers) != bool(self.sliding_window):
            raise ConfigError(
                f"model: sliding_window = {self.sliding_window} with windowed_layers = "
                f"{list(self.windowed_layers)}; set both or neither"
            )
        if both := sorted({*self.windowed_layers} & {*self.routed_layers}):
            raise ConfigError(
                f"model: layers {both} are both routed and windowed; a routed layer sees some tokens only"
            )

    @property
    def adapter_width(self) -> int:
        """Inner width of an exit's adapter."""
        return self.adapter_dim or max(1, self.dim // 4)

    @property
    def query_dim(self) -> int:
        """Width of one token's queries in one layer, all heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Width of one token's keys (and of its values) in one layer."""
        return self.num_kv_heads * self.head_dim

    @property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """First and last layer (from 1) of each segment: the layers between two exits."""
        return tuple(zip((1, *(e + 1 for e in self.exits[:-1])), self.exits, strict=True))


@dataclass(frozen=True)
class TokenizerConfig(Section, table="tokenizer"):
    """How text becomes tokens."""

    kind: str = setting("bpe", "'bpe' (byte-level, trained on the corpus) or 'char'", ("bpe", "char"))
    bpe_vocab_size: int = setting(
        4096, "words that byte-level BPE learns, with those of the 256 bytes and the end", Bounds(257)
    )


@dataclass(frozen=True)
class TrainConfig(Section, table="train"):
    """How the weights are found."""

    layer_weights: dict[int, float] = field(
        default_factory=lambda: {4: 0.2, 8: 0.3, 12: 1.0},
        metadata={"help": "weight of each exit's loss, by layer (from 1)", "allowed": AT_LEAST_0},
    )
    steps: int = setting(1000, "optimizer steps in all", AT_LEAST_1)
    batch_size: int = setting(8, "sequences in a step", AT_LEAST_1)
    sequence_length: int = setting(256, "tokens in a sequence", AT_LEAST_1)
    parse_special: bool = setting(
        False, "special tokens written in the text are real ones (chats); otherwise they are text"
    )
    learning_rate: float = setting(2e-3, "peak learning rate of AdamW", Bounds(0, 1, open_low=True))
    min_lr_ratio: float = setting(0.05, "learning rate at the end, as a share of the peak (cosine)", SHARE)
    warmup_steps: int = setting(100, "steps of linear warm-up", AT_LEAST_0)
    weight_decay: float = setting(0.1, "decoupled weight decay on matrices", SHARE)
    beta1: float = setting(0.9, "AdamW's first moment", Bounds(0, 1, open_high=True))
    beta2: float = setting(0.95, "AdamW's second moment", Bounds(0, 1, open_high=True))
    grad_clip: float = setting(1.0, "largest norm of the gradient", ABOVE_0)
    seed: int = setting(42, "seed of the weights and of the order of the data", SEEDS)
    log_every: int = setting(10, "steps between two lines of metrics.jsonl", AT_LEAST_1)
    eval_every: int = setting(200, "steps between two looks at the validation perplexity", AT_LEAST_1)
    eval_tokens: int = setting(20000, "validation tokens in each look", AT_LEAST_1)
    save_every: int = setting(200, "steps between two checkpoints", AT_LEAST_1)
    accumulate: int = setting(1, "batches whose gradients are averaged before a step", AT_LEAST_1)
    precision: str = setting(
        "fp32",
        "of the matrix products: 'fp32', 'bf16' or 'fp16' (autocast; weights stay fp32)",
        ("fp32", "bf16", "fp16"),
    )
    recompute_activations: bool = setting(
        False, "in the backward pass, instead of keeping them: less memory, more time"
    )
    patience: int = setting(
        0,
        "stop after so many evaluations without a better perplexity at the last exit, keep the best "
        "model; 0 never stops",
        AT_LEAST_0,
    )
    sample_tokens: int = setting(0, "tokens of greedy sample text at each evaluation", AT_LEAST_0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not any(self.layer_weights.values()):
            raise ConfigError("train: layer_weights are all 0; nothing would be trained")


@dataclass(frozen=True)
class Recipe:
    """A named way to train: the paper it follows, the model, the tokenizer and the training settings."""

    name: str
    description: str
    paper: str
    model: ModelConfig
    tokenizer: TokenizerConfig
    train: TrainConfig
    method: MethodConfig = field(default_factory=MethodConfig)

    def __post_init__(self) -> None:
        exits = list(self.model.exits)
        for layer in self.train.layer_weights if self.method.weight.rule == "given" else ():
            if layer not in exits:
                raise ConfigError(
                    f"train: layer_weights names layer {layer}, which is no exit; exits = {exits}"
                )
        if idle := self.method.for_early_exits if len(exits) == 1 else ():
            raise ConfigError(f"{idle[0]} needs an early exit; exits = {exits}")
        if self.method.weight.rule == "layerskip" and exits[0] == 1:
            message = (
                "method.weight: rule = 'layerskip' gives the exit after layer 1 the weight 0; it is not "
                "trained"
            )
            warnings.warn(message, SettingWarning, stacklevel=2)
        if strange := sorted({*self.method.layer_lr_scales} - {*range(1, self.model.num_layers + 1)}):
            raise ConfigError(
                f"method: layer_lr_scales names {strange}, expected layers from 1 to {self.model.num_layers}"
            )
        if self.train.sequence_length > self.model.max_positions:
            limit = self.model.max_positions
            raise ConfigError(
                f"train: sequence_length = {self.train.sequence_length} is more than max_positions = {limit}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> Self:
        """Build a recipe from the tables of a TOML file or of a checkpoint's config.json."""
        known = {f.name for f in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise ConfigError(f"{where}: unknown field '{name}'; {did_you_mean(name, known)}")
        return cls(
            name=str(values.get("name", where)),
            description=str(values.get("description", "")),
            paper=str(values.get("paper", "")),
            model=ModelConfig.from_dict(values.get("model", {}), f"{where}, [model]"),
            tokenizer=TokenizerConfig.from_dict(values.get("tokenizer", {}), f"{where}, [tokenizer]"),
            train=TrainConfig.from_dict(values.get("train", {}), f"{where}, [train]"),
            method=MethodConfig.from_dict(values.get("method", {}), f"{where}, [method]"),
        )

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON-ready values; `from_dict` reads them back."""
        return {
            "name": self.name,
            "description": self.description,
            "paper": self.paper,
            "model": self.model.to_dict(),
            "tokenizer": self.tokenizer.to_dict(),
            "train": self.train.to_dict(),
            "method": self.method.to_dict(),
        }

    def with_options(self, options: Mapping[str, Any]) -> Self:
        """The recipe with some fields replaced, each named as the option of the command line.

        Raises ConfigError.
        """
        values = self.to_dict()
        for name, value in options.items():
            set_option(values, name, value)
            if name == "dim" and "ffn_dim" not in options:
                values["model"]["ffn_dim"] = 0  # follows the width unless it was asked for
            if name in ("dim", "num_heads") and "head_dim" not in options:
                values["model"]["head_dim"] = 0
        cut_warmup(values, options)
        return type(self).from_dict(values, self.name)


SECTIONS: Mapping[str, type[Section]] = {
    "model": ModelConfig,
    "tokenizer": TokenizerConfig,
    "train": TrainConfig,
    "method": MethodConfig,
}
OPTIONS: Mapping[str, tuple[str, ...]] = {  # an option's name -> where its setting is in a recipe
    **{name: ("method", *path) for name, path in METHOD.items()},
    **{
        "_".join(path): (table, *path)
        for table, section in SECTIONS.items()
        for path, _, _ in section.settings()
    },
}


def set_option(values: dict[str, Any], name: str, value: Any) -> None:
    """Set one setting of a recipe's dictionary, by the name of its option. Raises ConfigError."""
    if name not in OPTIONS:
        raise ConfigError(f"unknown field '{name}'; {did_you_mean(name, OPTIONS)}")
    *tables, last = OPTIONS[name]
    for table in tables:
        values = values[table]
    values[last] = {**values[last], **value} if name == "own" else value


def cut_warmup(values: dict[str, Any], options: Mapping[str, Any]) -> None:
    """Let a recipe's own warm-up be no longer than the steps that were asked for, and say so."""
    steps = options.get("steps")
    warmup = values["train"]["warmup_steps"]
    if type(steps) is int and 0 < steps < warmup and "warmup_steps" not in options:
        message = f"--steps {steps} cuts the recipe's warm-up of {warmup} steps to {steps}"
        warnings.warn(message, SettingWarning, stacklevel=3)
        values["train"]["warmup_steps"] = steps


def recipe_names() -> list[str]:
    """The recipes that ship with the package."""
    folder = resources.files("ease_train") / "recipes"
    return sorted(
        entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")
    )


def load_recipe(name: str) -> Recipe:
    """Read a recipe by its name, or from a path that ends in .toml.

    `extends = "NAME"` takes everything that the file does not set from another recipe, key by key in each
    table. Raises ConfigError when there is none, or when it does not hold.
    """
    values = _read_recipe(name)
    seen = [name]
    while base := values.pop("extends", None):
        if base in seen:
            raise ConfigError(
                f"recipe {name}: extends = '{base}' goes in a circle: {' -> '.join([*seen, base])}"
            )
        seen.append(base)
        values = _laid_over(values, _read_recipe(base))
    return Recipe.from_dict({"name": Path(name).stem, **values}, f"recipe {Path(name).stem}")


def _laid_over(values: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**base, **values}
    tables = {
        table: laid_over(section, values.get(table, {}), base.get(table, {}))
        for table, section in SECTIONS.items()
        if table in merged
    }
    return {**merged, **tables}


def _read_recipe(name: str) -> dict[str, Any]:
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise ConfigError(f"no recipe file at {name}")
        text = path.read_text(encoding="utf-8")
    elif name in recipe_names():
        text = (resources.files("ease_train") / "recipes" / f"{name}.toml").read_text(encoding="utf-8")
    else:
        raise ConfigError(
            f"unknown recipe '{name}'; {did_you_mean(name, recipe_names())} (list them: ease-train recipes)"
        )
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"recipe {name} is not valid TOML: {error}") from None
    return {**values, "method": regrouped(values["method"])} if "method" in values else values
