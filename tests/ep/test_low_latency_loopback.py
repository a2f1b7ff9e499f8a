"""Low latency among the virtual ranks of one GPU, two launches an op: the GPU report's cases, emulated."""

import pytest
import torch
from fp8_helpers import fresh_generator
from host_reads import HostRead, no_host_reads

from bench import cases
from bench.cases import low_latency
from dsv3_kernels import emulator, ep


@pytest.mark.parametrize("case", low_latency.CASES, ids=str)
def test_the_cases_of_the_gpu_report(case):
    generator = fresh_generator()
    inputs = case.inputs(generator)
    with emulator.virtual_gpu(num_sms=32, seed=generator.initial_seed()) as gpu:
        got = case.run(*inputs)
    assert gpu.counters["launches"] == 4
    assert not cases.differences(got, case.reference(*inputs))


def test_bad_experts_of_a_rank_and_the_next_call():
    x, good = torch.ones(2, 32).bfloat16(), torch.tensor([[0], [3]])
    with emulator.virtual_gpu(num_sms=4):
        buffer = ep.LoopbackBuffer(2, 4, 32, 4, 1, device="cpu")
        bad = torch.tensor([[9], [1]])
        for rank in (0, 1):
            both = [bad if r == rank else good for r in range(2)]
            with pytest.raises(ep.errors.Fault, match=rf"topk_idx\[0, 0\] of rank {rank} is 9, out of range"):
                buffer.low_latency_dispatch([x, x], both, 1)
        got = buffer.low_latency_dispatch([x, x], [good, good], 1)
        assert [part.tokens_per_expert.tolist() for part in got] == [[2, 0], [0, 2]]
        with pytest.raises(TypeError, match="expected a list with one for each of 2 ranks"):
            buffer.low_latency_dispatch([x], [good, good])
        with pytest.raises(ValueError, match="num_sms is 3, which is 6 SMs for 2 ranks"):
            buffer.low_latency_dispatch([x, x], [good, good], 3)
        with pytest.raises(ValueError, match=r"rank 1: low_latency_dispatch: topk_idx has shape"):
            buffer.low_latency_dispatch([x, x], [good, good[:1]], 1)


@pytest.mark.parametrize("fp8", [False, True])
def test_no_call_reads_on_the_host(fp8):
    """So a CUDA graph can hold them."""
    x, idx, weights = torch.ones(2, 32).bfloat16(), torch.tensor([[0], [3]]), torch.ones(2, 1)
    with emulator.virtual_gpu(num_sms=4):
        buffer = ep.LoopbackBuffer(2, 4, 32, 4, 1, device="cpu")
        buffer.low_latency_dispatch([x, x], [idx, idx], 1)  # sets up memory
        y = [torch.full((2, 8, 32), float(r)).bfloat16() for r in range(2)]
        with no_host_reads():
            got = buffer.low_latency_dispatch([x, x], [idx, idx], 1, fp8=fp8)
            home = buffer.low_latency_combine(y, [part.handle for part in got], [weights] * 2, 1)
            with pytest.raises(HostRead):
                got[0].tokens_per_expert.tolist()
        for part in home:
            assert part.x[:, 0].tolist() == [0.0, 1.0]
