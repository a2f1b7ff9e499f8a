"""Chunk and depth of the rings between nodes: what they follow, what is refused, and their bench."""

import argparse
import dataclasses
import re
from pathlib import Path

import pytest
import torch
from cases import Case, bits, draw

from bench import all2all_copies, bench_chunks
from dsv3_kernels import emulator, ep
from dsv3_kernels.ep import Network, Topology, Tuning, reference
from dsv3_kernels.ep.transport import Shape
from dsv3_kernels.ep.tuning import rings_of

SHAPE = Shape(256, 7168, 4096, 8, Topology(4, 8))


def chosen(shape=SHAPE, network=None, **options):
    return rings_of(shape, Tuning(**options, network=Network(**(network or {}))))


def test_a_chunk_grows_with_what_it_costs_and_shrinks_with_what_it_delays():
    plain = chosen()
    assert plain.chunk > 1 and plain.depth > 1
    costly, cheap = ([chosen(network={"posting": p}).chunk for p in pair] for pair in ((5, 20), (0.7, 0)))
    assert plain.chunk < costly[0] < costly[1] and cheap[0] >= cheap[1]
    assert chosen(network={"bandwidth": 2}).chunk < plain.chunk
    assert chosen(dataclasses.replace(SHAPE, hidden=1024)).chunk > plain.chunk
    assert chosen(dataclasses.replace(SHAPE, max_tokens_per_rank=64)).chunk < plain.chunk
    assert chosen(dataclasses.replace(SHAPE, max_tokens_per_rank=0)).chunk == 1
    # Fewer messages a channel: more channels, or more nodes than a token goes to.
    assert chosen(channels=32).chunk < plain.chunk
    assert chosen(dataclasses.replace(SHAPE, topology=Topology(16, 8))).chunk < plain.chunk


def test_a_ring_holds_what_the_network_carries_until_a_credit_is_back():
    """Of one channel that may have the whole network: as much as half of a block's warps can fill."""
    for latency in (0, 2, 50, 400):
        rings = chosen(channels=8, network={"latency": latency, "bandwidth": 40})
        on_the_way = 2 * latency * 40 / 8 * 1e3
        assert rings.depth * rings.chunk * rings.message_bytes >= on_the_way
        assert rings.depth >= 7
    assert chosen(network={"latency": 400}).depth > chosen().depth


def test_no_more_memory_than_allowed():
    for memory in (10**8, 10**9):
        rings = chosen(network={"latency": 1e4}, memory=memory)
        assert 0.5 * memory < 2 * rings.size <= memory
    needed = 2 * chosen(depth=2).size
    with pytest.raises(ValueError, match=r"memory is 1000, expected at least \d+ bytes: 12 channels"):
        chosen(memory=1000)
    assert chosen(memory=needed).depth == 2
    with pytest.raises(ValueError, match="memory"):
        chosen(memory=needed - 1)
    assert chosen(memory=1000, depth=3).depth == 3  # given, it is the caller's business


def test_what_is_given_is_taken():
    rings = chosen(chunk=3, depth=5, channels=7)
    assert (rings.chunk, rings.depth, rings.channels) == (3, 5, 7)
    assert chosen(chunk=64).depth <= chosen(chunk=1).depth


@pytest.mark.parametrize(
    "make, error, match",
    [
        (lambda: Tuning(channels=33), ValueError, "channels is 33, expected 1 to 32"),
        (lambda: Tuning(channels=0), ValueError, "channels is 0"),
        (lambda: Tuning(channels=None), TypeError, "channels is None"),
        (lambda: Tuning(chunk=0), ValueError, "chunk is 0, expected 1 to 1024"),
        (lambda: Tuning(depth=2.0), TypeError, "depth is 2.0 of type float, expected an int"),
        (lambda: Tuning(memory=True), TypeError, "memory is True of type bool"),
        (lambda: Tuning(network=50.0), TypeError, "network is float, expected an ep.Network"),
        (lambda: Network(bandwidth=0), ValueError, "bandwidth is 0, expected"),
        (lambda: Network(latency=-1), ValueError, "latency is -1, expected"),
        (lambda: Network(posting=float("nan")), ValueError, "posting is nan, expected"),
        (lambda: ep.Buffer(None, 8, 32, 4, 2, tuning=12), TypeError, "tuning is int, expected an ep.Tuning"),
    ],
)
def test_bad_input(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_ranks_that_differ_are_told():
    def program(rank, group):
        options = {"tuning": Tuning(depth=2 + rank)}
        with pytest.raises(
            ValueError, match=r"tuning.depth is 2 on rank 0 and 3 on rank 1, expected the same"
        ):
            ep.Buffer(group, 4, 32, 4, 2, gpus_per_node=1, **options)

    emulator.VirtualCluster(2, 1).run(program)


def test_a_buffer_takes_them():
    case = Case(Topology(2, 1), local_experts=2, hidden=32, num_topk=2, tokens=9, seed=4)
    inputs = draw(case)

    def program(rank, group):
        sizes = case.num_experts, case.hidden, case.tokens, case.topk
        buffer = ep.Buffer(group, *sizes, gpus_per_node=1, tuning=Tuning(channels=2, chunk=2, depth=1))
        rings = buffer._transport.link.rings
        assert (rings.channels, rings.chunk, rings.depth) == (2, 2, 1)
        with pytest.raises(ValueError, match=r"num_sms is 6, expected at most 4: .*2 channels .*tuning="):
            buffer.dispatch(inputs.x[rank], inputs.topk_idx[rank], num_sms=6)
        return buffer.dispatch(inputs.x[rank], inputs.topk_idx[rank], num_sms=4)

    want = reference.dispatch(inputs.x, inputs.topk_idx, None, case.num_experts)
    for got, expected in zip(emulator.VirtualCluster(2, 1).run(program), want, strict=True):
        assert torch.equal(bits(got.x), bits(expected.x))


def test_the_bench(tmp_path):
    options = argparse.Namespace(
        chunks=[1], depths=[1], channels=1, hidden=256, experts=2, topk=2, nodes_per_token=4, draws=1
    )
    setting = bench_chunks.Setting(Topology(2, 1), 12, options, Network())
    chosen, report = setting.chosen(), bench_chunks.Report("chunks")
    assert setting.grid() == sorted({(1, 1), chosen})
    result = bench_chunks.sweep(setting, report, on_cluster=False)
    # A ring of one message is no match for anything.
    assert result.best == chosen and result.against_best((1, 1)) > 1.2
    assert f"chosen {chosen}, +0.0%" in bench_chunks.summary(result)
    assert [row["chosen"] for row in report.results] == [False, True]
    bench_chunks.plot([result], tmp_path / "chunks.png")
    assert (tmp_path / "chunks.png").stat().st_size > 1000


def test_the_table_of_copies_in_the_docs():
    text = (Path(__file__).parents[2] / "docs" / "all2all.md").read_text()
    rows = re.findall(r"^\| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE)
    assert [int(row[0]) for row in rows] == [2, 4, 8, 16]
    for nodes, *told in rows:
        counted = all2all_copies.copies(int(nodes), tokens=10_000, seed=1)
        assert counted == pytest.approx([float(value) for value in told], abs=0.06)
