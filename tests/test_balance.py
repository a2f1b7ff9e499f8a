"""A skewed load is evened out by the bias alone."""

import copy

import pytest
import torch

from bench.plot_balance import loads
from dsv3_kernels.nn import BF16, set_recipe


def test_a_trained_gate_that_is_skewed_recovers(trained_tiny):
    """The weights rest; each batch of text moves the bias only."""
    model, corpus = trained_tiny
    model = copy.deepcopy(model).train().requires_grad_(False)
    set_recipe(model, BF16)
    gates = list(model.gates())
    for gate in gates:
        gate.bias += torch.linspace(0.2, -0.2, gate.bias.numel())
        gate.load.zero_()
    generator = torch.Generator().manual_seed(0)
    shares = []
    for speed in [0.01] * 50 + [0.002] * 15:
        starts = torch.randint(len(corpus.validation) - 128, (8, 1), generator=generator)
        model(corpus.validation[starts + torch.arange(128)].long())
        trunk = [gate for gate in gates if gate.load.any()]  # the MTP module's gate is not asked
        shares.append(torch.stack([gate.load / gate.load.mean() for gate in trunk]))
        for gate in trunk:
            gate.balance(speed)
    first, last = shares[0], torch.stack(shares[-10:]).mean(0)
    print(f"first {first.min():.2f} to {first.max():.2f}, last {last.min():.2f} to {last.max():.2f}")
    assert len(first) == 2
    assert (first.max(1).values > 2).all() and (first.min(1).values < 0.1).all()
    assert last.min() > 0.8 and last.max() < 1.2


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2))
def test_the_tiny_run_ends_even_from_a_skewed_start(seed):
    """While it trains: the drawn run of bench/plot_balance.py, and another seed."""
    shares = loads(160, speed=5e-3, seed=seed)
    first, last = shares[0], shares[-20:].mean(0)
    print(f"first {first.min():.2f} to {first.max():.2f}, last {last.min():.2f} to {last.max():.2f}")
    assert first.max() > 2
    assert last.min() > 0.8 and last.max() < 1.2
