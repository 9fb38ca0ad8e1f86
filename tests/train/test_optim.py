"""Number of steps, optimiser and schedule of a config."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from occfeat_train.config import OptimConfig
from occfeat_train.training.optim import build_optimizer


def test_steps_are_counted_in_one_stream_of_samples():
    assert OptimConfig(epochs=50, batch=16).num_steps(28_130) == 50 * 28_130 // 16
    assert OptimConfig(epochs=30, batch=8, accumulation=5).num_steps(28_130) == 30 * 28_130 // 40
    assert OptimConfig(epochs=2, batch=16).num_steps(12) == 1  # more than one epoch per step
    assert OptimConfig(epochs=1, batch=16).num_steps(3) == 1  # at least one
    assert OptimConfig(epochs=0.5, batch=2).num_steps(10) == 2
    assert OptimConfig(batch=8, accumulation=5).samples_per_step == 40


def parameter() -> nn.Parameter:
    value = nn.Parameter(torch.ones(3))
    value.grad = torch.zeros(3)
    return value


def learning_rates(config: OptimConfig, num_steps: int) -> list[float]:
    """The learning rate of each step, with the loop's order of calls."""
    optimizer, schedule = build_optimizer([parameter()], config, num_steps)
    rates = []
    for _ in range(num_steps):
        optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
        assert schedule.get_last_lr() == [rates[-1]]
        schedule.step()
    return rates


def test_a_constant_schedule_is_constant():
    assert learning_rates(OptimConfig(), 30) == [1e-3] * 30


def test_one_cycle_rises_for_a_twentieth_of_the_steps_and_then_falls():
    lr, steps = 3e-4, 999  # the schedule's 1000th value is not used
    rates = learning_rates(OptimConfig("adamw", "onecycle", lr=lr), steps)
    peak, last = 49, 999
    for step, rate in enumerate(rates):
        up, down = step / peak, (step - peak) / (last - peak)
        expected = lr / 25 + up * (lr - lr / 25) if step <= peak else lr + down * (lr / 250_000 - lr)
        assert rate == pytest.approx(expected, rel=1e-9), step
    assert rates[0] == pytest.approx(lr / 25)
    assert max(rates) == rates[peak] == pytest.approx(lr)
    assert rates[-1] < 1.1 * lr / (last - peak)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60))
def test_one_cycle_of_any_length_starts_low_and_peaks_once(steps):
    rates = learning_rates(OptimConfig("adamw", "onecycle", lr=1.0), steps)
    assert rates[0] == pytest.approx(1 / 25)
    top = rates.index(max(rates))
    assert rates == sorted(rates[: top + 1]) + sorted(rates[top + 1 :], reverse=True)
    assert all(0 < rate <= 1 for rate in rates)


def test_one_cycle_of_19_steps_works():
    """A twentieth of 19 + 1 is the first step. torch would divide by zero."""
    rates = learning_rates(OptimConfig("adamw", "onecycle", lr=1.0), 19)
    assert rates[:2] == pytest.approx([1 / 25, 1])


@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_the_optimiser_has_the_configs_values(name, kind):
    optimizer, _ = build_optimizer([parameter()], OptimConfig(name, weight_decay=1e-3), 10)
    assert type(optimizer) is kind
    assert optimizer.defaults["weight_decay"] == 1e-3
    assert optimizer.defaults["betas"] == (0.9, 0.999)  # torch's defaults, as in Simple-BEV
    assert optimizer.defaults["eps"] == 1e-8


def test_one_cycle_does_not_change_the_momentum():
    optimizer, schedule = build_optimizer([parameter()], OptimConfig("adamw", "onecycle"), 10)
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    assert math.isclose(optimizer.param_groups[0]["eps"], 1e-8)
