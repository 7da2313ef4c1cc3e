"""The decoder against a plain reference, written position by position with numpy from the papers'
formulas.
"""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ease_train.model.decoder import Decoder
from ease_train.training.config import ModelConfig

Array = NDArray[np.float64]


class Reference:
    """The same function as Decoder, with loops over positions and heads, in float64."""

    def __init__(self, model: Decoder) -> None:
        self.config = model.config
        self.weights = {name: value.double().numpy() for name, value in model.state_dict().items()}

    def norm(self, x: Array, name: str) -> Array:
        return (
            x
            / np.sqrt((x * x).mean(-1, keepdims=True) + self.config.norm_eps)
            * self.weights[f"{name}.weight"]
        )

    def linear(self, x: Array, name: str) -> Array:
        out = x @ self.weights[f"{name}.weight"].T
        return out + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else out

    def rotated(self, vector: Array, position: int) -> Array:
        half = len(vector) // 2
        out = np.empty_like(vector)
        for i in range(half):
            angle = position * self.config.rope_theta ** (-2 * i / len(vector))
            out[i] = vector[i] * np.cos(angle) - vector[i + half] * np.sin(angle)
            out[i + half] = vector[i + half] * np.cos(angle) + vector[i] * np.sin(angle)
        return out

    def heads(self, x: Array, name: str, count: int, rotate: bool) -> Array:
        out = self.linear(x, f"{name}_proj").reshape(len(x), count, -1)
        if rotate and self.config.qk_norm:
            out = self.norm(out, f"{name}_norm")
        if rotate:
            for position in range(len(x)):
                for head in range(count):
                    out[position, head] = self.rotated(out[position, head], position)
        return out

    def attention(self, x: Array, name: str) -> Array:
        config = self.config
        groups = self.config.num_heads // self.config.num_kv_heads
        q = self.heads(x, f"{name}.q", config.num_heads, True)
        k = self.heads(x, f"{name}.k", config.num_kv_heads, True)
        v = self.heads(x, f"{name}.v", config.num_kv_heads, False)
        out = np.zeros_like(q)
        for position in range(len(x)):
            for head in range(config.num_heads):
                scores = k[: position + 1, head // groups] @ q[position, head] / np.sqrt(config.head_dim)
                probabilities = np.exp(scores - scores.max())
                out[position, head] = probabilities / probabilities.sum() @ v[: position + 1, head // groups]
        return self.linear(out.reshape(len(x), -1), f"{name}.o_proj")

    def mlp(self, x: Array, name: str) -> Array:
        gate = self.linear(x, f"{name}.gate_proj")
        return self.linear(
            gate / (1 + np.exp(-gate)) * self.linear(x, f"{name}.up_proj"), f"{name}.down_proj"
        )

    def hidden(self, ids: list[int], num_layers: int) -> Array:
        x = self.weights["embed.weight"][ids]
        for layer in range(num_layers):
            x = x + self.attention(
                self.norm(x, f"layers.{layer}.attention_norm"), f"layers.{layer}.attention"
            )
            x = x + self.mlp(self.norm(x, f"layers.{layer}.mlp_norm"), f"layers.{layer}.mlp")
        return x


def lively(config: ModelConfig) -> Decoder:
    """A model whose weights are large enough that every part of it matters."""
    model = Decoder(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn_like(parameter) * (0.3 if parameter.ndim == 2 else 0.5)
                + (0.0 if parameter.ndim == 2 else 0.8)
            )
    return model


VARIANTS = {
    "grouped heads": {},
    "one head a key": {"num_kv_heads": 4},
    "biases (Qwen2)": {"attention_bias": True},
    "norms on queries and keys (Qwen3)": {"qk_norm": True, "tie_embeddings": False},
    "another base of the rotation": {"rope_theta": 100.0},
}


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_equal_the_reference(fields: dict[str, object]) -> None:
    config = ModelConfig.from_dict(
        {
            "vocab_size": 13,
            "dim": 32,
            "num_layers": 3,
            "num_heads": 4,
            "num_kv_heads": 2,
            "exits": [1, 3],
            **fields,
        },
        "t",
    )
    model = lively(config)
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    reference = Reference(model)
    expected = reference.linear(reference.norm(reference.hidden(ids, 3), "norm"), "lm_head")
    with torch.no_grad():
        found = model(torch.tensor([ids, ids[::-1]]))[0].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(("exit_norm", "name"), [("own", "exits.1.norm"), ("shared", "norm")])
def test_an_exit_has_its_norm(exit_norm: str, name: str) -> None:
    model = lively(ModelConfig(vocab_size=13, dim=32, num_layers=3, exits=(1, 3), exit_norm=exit_norm))
    reference = Reference(model)
    ids = [3, 1, 4, 1, 5]
    expected = reference.norm(reference.hidden(ids, 1), name)
    with torch.no_grad():
        states = dict(model.exit_states(torch.tensor([ids])))
        np.testing.assert_allclose(model.exit_hidden(states[1], 1)[0].numpy(), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.lm_head(model.exit_hidden(states[3], 3)), model(torch.tensor([ids])))


def test_without_a_final_norm_the_hidden_state_goes_to_the_head() -> None:
    model = lively(ModelConfig(vocab_size=13, dim=32, num_layers=2, exits=(1, 2), final_norm=False))
    ids = torch.tensor([[3, 1, 4]])
    states = dict(model.exit_states(ids))
    assert model.exit_hidden(states[1], 1) is states[1]
    torch.testing.assert_close(model(ids), model.lm_head(states[2]))
    assert not [name for name in model.state_dict() if "norm" in name and "layers" not in name]


def test_a_token_sees_only_what_came_before() -> None:
    model = lively(ModelConfig(vocab_size=13, dim=32, num_layers=2, exits=(2,)))
    one = torch.tensor([[1, 2, 3, 4]])
    other = torch.tensor([[1, 2, 3, 9]])
    with torch.no_grad():
        torch.testing.assert_close(model(one)[:, :3], model(other)[:, :3], rtol=0, atol=0)
        assert not torch.equal(model(one)[:, 3], model(other)[:, 3])


def test_a_frozen_token_passes_through_and_lends_its_state_to_the_others() -> None:
    model = lively(ModelConfig(vocab_size=13, dim=32, num_layers=2, exits=(2,)))
    hidden = torch.randn(1, 4, 32)
    active = torch.tensor([[True, False, True, True]])
    with torch.no_grad():
        found = model.run_layers(hidden, 1, 2, active)
        torch.testing.assert_close(found[:, 1], hidden[:, 1], rtol=0, atol=0)
        middle = torch.where(active[..., None], model.run_layers(hidden, 1, 1), hidden)
        torch.testing.assert_close(found[:, 2:], model.run_layers(middle, 2, 2)[:, 2:], rtol=0, atol=0)
        assert not torch.allclose(found[:, 2:], model.run_layers(hidden, 1, 2)[:, 2:])


def test_tied_weights_are_one_matrix() -> None:
    tied = Decoder(ModelConfig(vocab_size=13))
    untied = Decoder(ModelConfig(vocab_size=13, tie_embeddings=False))
    assert tied.lm_head.weight is tied.embed.weight
    assert untied.lm_head.weight is not untied.embed.weight
