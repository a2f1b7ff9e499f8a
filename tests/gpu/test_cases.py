"""Every registered kernel on the GPU: bit for bit what the reference computes, and what the emulator does.

The emulator runs the PTX from which the driver's machine code was assembled, with as many SMs as the GPU has,
so that both take the same configuration.
"""

import secrets

import pytest
import torch

from bench import cases
from dsv3_kernels import emulator

ROUNDS = 8
every_case = pytest.mark.parametrize("case", list(cases.cases()), ids=str)


def on_gpu(case, inputs):
    result = case.run(*(cases.to_device(tensor, "cuda") for tensor in inputs))
    torch.cuda.synchronize()
    return result


def fresh(case):
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    return seed, case.inputs(torch.Generator().manual_seed(seed))


def poison():
    """What the allocator hands out next, small or large, holds NaN, so that an element nobody wrote shows."""
    for size in (*[2**19] * 64, 2**26, 2**26):
        _held.append(torch.full((size // 4,), float("nan"), device="cuda"))
    _held.clear()


_held: list[torch.Tensor] = []


@every_case
def test_bit_equal_to_the_reference(case):
    for _ in range(ROUNDS):
        _, inputs = fresh(case)
        poison()
        problems = cases.differences(on_gpu(case, inputs), case.reference(*inputs))
        assert not problems, problems


@every_case
def test_bit_equal_to_the_emulator(case):
    seed, inputs = fresh(case)
    sms = torch.cuda.get_device_properties().multi_processor_count
    with emulator.virtual_gpu(num_sms=sms, seed=seed) as gpu:
        emulated = case.run(*inputs)
    assert gpu.counters["launches"] > 0 or all(tensor.numel() == 0 for tensor in emulated)
    problems = cases.differences(on_gpu(case, inputs), emulated)
    assert not problems, problems


@every_case
def test_the_same_twice(case):
    _, inputs = fresh(case)
    tensors = [cases.to_device(tensor, "cuda") for tensor in inputs]
    first = case.run(*tensors)
    for _ in range(20):
        assert not cases.differences(case.run(*tensors), first)
