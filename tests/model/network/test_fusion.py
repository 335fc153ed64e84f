from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from model.network.fusion import FUSIONS, FastFusion, Fusion, SoftmaxFusion


def with_weights(kind: str, weights: list[float]) -> Fusion:
    fusion = FUSIONS[kind](len(weights))
    assert isinstance(fusion, Fusion)
    with torch.no_grad():
        fusion.weights.copy_(torch.tensor(weights))
    return fusion


def constant(value: float) -> Tensor:
    return torch.full((1, 2, 3, 3), value)


@pytest.mark.parametrize(
    ("kind", "weights", "inputs", "expected"),
    [
        ("fast", [1.0, 1.0], [1.0, 3.0], 4 / 2.0001),
        ("fast", [3.0, 1.0], [2.0, 10.0], 16 / 4.0001),
        ("fast", [-1.0, 2.0], [100.0, 3.0], 6 / 2.0001),
        ("fast", [-1.0, -2.0], [100.0, 3.0], 0.0),
        ("softmax", [0.0, math.log(3.0)], [4.0, 8.0], 1.0 + 6.0),
        ("softmax", [5.0, 5.0, 5.0], [1.0, 2.0, 6.0], 3.0),
        ("unbounded", [0.5, -2.0, 3.0], [2.0, 1.0, 4.0], 1.0 - 2.0 + 12.0),
    ],
)
def test_values_by_hand(
    kind: str, weights: list[float], inputs: list[float], expected: float
) -> None:
    fused = with_weights(kind, weights)([constant(value) for value in inputs])
    torch.testing.assert_close(fused, constant(expected))


@pytest.mark.parametrize("num_inputs", [2, 3])
def test_unbounded_equals_sum_at_the_start(num_inputs: int) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 4, 5, 5) for _ in range(num_inputs)]
    fused = FUSIONS["unbounded"](num_inputs)(inputs)
    torch.testing.assert_close(fused, FUSIONS["sum"](num_inputs)(inputs), rtol=0, atol=0)
    torch.testing.assert_close(fused, torch.stack(inputs).sum(0))
    assert not list(FUSIONS["sum"](num_inputs).parameters())


@pytest.mark.parametrize("dead", [-0.5, 0.0])
def test_a_fast_weight_that_fell_gets_no_gradient(dead: float) -> None:
    fusion = with_weights("fast", [dead, 1.0, 2.0])
    fusion([constant(1.0), constant(2.0), constant(3.0)]).sum().backward()
    assert fusion.weights.grad is not None
    assert fusion.weights.grad[0] == 0
    assert (fusion.weights.grad[1:] != 0).all()


def test_softmax_revives_a_small_weight() -> None:
    fusion = with_weights("softmax", [-4.0, 1.0])
    fusion([constant(5.0), constant(1.0)]).sum().backward()
    assert fusion.weights.grad is not None
    assert fusion.weights.grad[0] > 0


def test_weights_are_normalised_in_float32_under_autocast() -> None:
    """In bfloat16 2 + 1e-4 is 2, and 1.001 is 1: the epsilon and slow learning would be lost."""
    fusion = with_weights("fast", [1.001, 0.999])
    fast = FastFusion(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        factors = fast.normalise(fast.weights.float())
        moved = fusion.normalise(fusion.weights.float())
        fused = fusion([constant(1.0).bfloat16(), constant(1.0).bfloat16()])
    assert fusion.weights.dtype == factors.dtype == torch.float32
    assert factors[0] == torch.tensor(1.0) / torch.tensor(2.0 + 1e-4)
    assert factors[0] < 0.5
    assert moved[0] > moved[1]
    assert fused.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["fast", "unbounded"])
def test_bfloat16_features_get_float32_factors(kind: str) -> None:
    """256 / 257 is 1 where the sum of the weights is rounded to bfloat16."""
    fusion = with_weights(kind, [256.0, 1.0])
    fused = fusion([constant(1.0).bfloat16(), constant(0.0).bfloat16()])
    expected = {"fast": 255 / 256, "unbounded": 256.0}[kind]
    assert (fused == expected).all()


def test_weights_stay_float32_when_features_are_bfloat16() -> None:
    fusion = SoftmaxFusion(2)
    fusion([constant(1.0).bfloat16(), constant(2.0).bfloat16()]).float().sum().backward()
    assert fusion.weights.dtype == torch.float32
    assert fusion.weights.grad is not None
    assert fusion.weights.grad.dtype == torch.float32
