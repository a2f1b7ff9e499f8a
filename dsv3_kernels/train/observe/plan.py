"""python -m dsv3_kernels.train --plan: what each rank of a run would hold, by arithmetic, at any size.

Parameters are counted on the meta device; states as the optimizer lays them out; activations as
`--recompute` leaves them, for as many micro-batches as the schedule has under way. The tests hold all of it
against what is measured.
"""

import argparse
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from dsv3_kernels.model import PRESETS, DeepSeekV3, ModelConfig
from dsv3_kernels.nn.experts import Experts
from dsv3_kernels.quantized import TILE
from dsv3_kernels.train.config import ParallelConfig, PipelineSchedule
from dsv3_kernels.train.errors import TrainError
from dsv3_kernels.train.parallel.groups import Layout
from dsv3_kernels.train.pipeline.actions import Schedule, one_f_one_b, works
from dsv3_kernels.train.pipeline.schedules import SCHEDULES
from dsv3_kernels.train.pipeline.stages import Stage, layers_of, split
from dsv3_kernels.train.state.optimizer import share_of

FP8 = 1 + 4 / TILE
"""Bytes a value: a code, and its share of a scale."""
Sizes = dict[str, tuple[int, bool]]
"""Of each parameter by name: elements, and whether it is of the routed experts."""
ROUTED = 48
"""Bytes a (token, expert): indices, weights, its place in the order."""


@dataclass(frozen=True)
class RankPlan:
    """One rank of a pipeline; those of the other directions hold as much. Bytes, but for `parameters`.

    weights: BF16. masters: this rank's share, FP32; moments: BF16. gradients: FP32, and this rank's
    share of their sum. activations: kept for the backwards under way. logits: of one micro-batch, and their
    gradient, while the head's backward runs.
    """

    parameters: int
    weights: int
    masters: int
    moments: int
    gradients: int
    activations: int
    logits: int

    @property
    def states(self) -> int:
        """What is there at all times."""
        return self.weights + self.masters + self.moments

    @property
    def total(self) -> int:
        return self.states + self.gradients + self.activations + self.logits


def plan(
    config: ModelConfig,
    layout: Layout,
    schedule: PipelineSchedule,
    micro_batches: int,
    sequences: int,
    seq_len: int,
) -> list[RankPlan]:
    """Of each pipeline rank. sequences: of one micro-batch.

    Raises ValueError where the schedule or the split does not exist, TrainError where experts do not divide.
    """
    layout.check(config, layout.shares * micro_batches, micro_batches)
    actions = (
        one_f_one_b(1, micro_batches) if layout.pp == 1 else SCHEDULES[schedule](layout.pp, micro_batches)
    )
    stages = split(config, actions.stages)
    sizes = _sizes(config)
    kept = [kept_by(config, stage, sequences * seq_len, layout.ep > 1) for stage in stages]
    plans = []
    for rank in range(layout.pp):
        held = actions.stages_of(rank)
        mirrored = set(actions.stages_of(layout.pp - 1 - rank)) if 2 * rank + 1 != layout.pp else set()
        mine = _of(sizes, config, [stages[i] for i in held])
        twice = mine.keys() & _of(sizes, config, [stages[i] for i in mirrored]).keys()
        groups = _groups(mine, twice, layout)
        count = sum(elements for elements, _ in groups)
        lines = sum(share_of(elements, ranks) * ranks for elements, ranks in groups)
        share = sum(share_of(elements, ranks) for elements, ranks in groups)
        summed = sum(share_of(elements, ranks) for elements, ranks in groups if ranks > 1)
        last = stages[-1].index in held
        plans.append(
            RankPlan(
                parameters=count,
                weights=2 * count,
                masters=4 * share,
                moments=4 * share,
                gradients=4 * (lines + summed),
                activations=_most_kept(actions, rank, kept),
                logits=8 * config.vocab_size * sequences * seq_len if last else 0,
            )
        )
    return plans


def _sizes(config: ModelConfig) -> Sizes:
    with torch.device("meta"):
        model = DeepSeekV3(config)
    routed = {p for m in model.modules() if isinstance(m, Experts) for p in m.parameters()}
    return {name: (p.numel(), p in routed) for name, p in model.named_parameters()}


def _of(sizes: Sizes, config: ModelConfig, stages: Sequence[Stage]) -> Sizes:
    """Those that a rank with these stages holds, of experts all ranks' together."""
    layers = tuple(f"{layer}." for layer in layers_of(config, stages))
    return {name: size for name, size in sizes.items() if name.startswith(layers)}


def _groups(mine: Sizes, twice: Collection[str], layout: Layout) -> list[tuple[int, int]]:
    """Elements that this rank holds, and how many ranks hold the same, as `parallel.groups.Groups` has them.

    twice: on two ranks of the pipeline.
    """
    groups = []
    for routed in (False, True):
        for copies in (1, 2):
            elements = sum(
                size for name, (size, of) in mine.items() if of == routed and (name in twice) == (copies == 2)
            )
            spread = layout.ep if routed else 1
            groups.append((elements // spread, layout.shares // spread * copies))
    return groups


def _most_kept(schedule: Schedule, rank: int, kept: Sequence[int]) -> int:
    """The most bytes of activations under way; what an I leaves for its W counts whole until then."""
    now = most = 0
    for action in schedule.ranks[rank]:
        for work in works(action):
            now += kept[work.stage] * ((work.kind == "F") - (work.kind in "BW"))
            most = max(most, now)
    return most


def kept_by(config: ModelConfig, stage: Stage, tokens: int, spread: bool) -> int:
    """Bytes that the stage keeps for the backward of one micro-batch, all recomputed that can be.

    spread: whether experts are on several ranks, each of which then gets as many rows as it sends.
    """
    state = 2 * config.hidden_size
    rope = 4 * config.qk_rope_head_dim
    dense = sum(i < config.first_k_dense_replace for i in stage.blocks)
    a_token = rope + dense * _block(config, True, spread)
    a_token += (len(stage.blocks) - dense) * _block(config, False, spread)
    if stage.last:
        a_token += 2 * state  # before and after the final norm
        # An MTP module: the next token's embedding, its block, and the state before and after its norm.
        a_token += config.num_nextn_predict_layers * (3 * state + _block(config, False, spread))
    return round(tokens * a_token)


def _block(c: ModelConfig, dense: bool, spread: bool) -> float:
    """Bytes a token: the states before attention and after it, the latents, what attention returned with the
    logarithms of its sums; SwiGLU's input in FP8; and of an MoE layer scores, routes, and rows that came.
    """
    heads = c.num_attention_heads * (2 * c.v_head_dim + 4)
    kept: float = 2 * (2 * c.hidden_size + c.q_lora_rank + c.kv_lora_rank + c.qk_rope_head_dim) + heads
    if dense:
        return kept + FP8 * 2 * c.intermediate_size
    kept += 4 * c.n_routed_experts + FP8 * 2 * c.n_shared_experts * c.moe_intermediate_size
    row = ROUTED + FP8 * 2 * c.moe_intermediate_size + (FP8 * c.hidden_size if spread else 0)
    return kept + c.num_experts_per_tok * row


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_kernels.train --plan",
        description="Prints what each rank of a run would hold, with --recompute. Allocates nothing.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    run = ParallelConfig()
    parser.add_argument("--preset", choices=sorted(PRESETS), default="v3", help="the model's sizes")
    for name, default, text in (
        ("--pp", 16, "pipeline ranks"),
        ("--ep", 64, "ranks that the experts are spread over"),
        ("--dp", 1, "data-parallel ranks beside these"),
        ("--micro-batches", 32, "of a step"),
        ("--sequences", 1, "of a micro-batch"),
        ("--seq-len", 4096, "tokens a sequence"),
    ):
        parser.add_argument(name, type=int, default=default, help=text)
    parser.add_argument(
        "--pp-schedule", choices=list(SCHEDULES), default=run.pp_schedule, help="order of a pipeline's work"
    )
    return parser


def show(plans: Sequence[RankPlan], title: str, console: Console) -> None:
    """Ranks that hold as much share a row."""
    console.print(title, highlight=False, soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    for name in ("rank", "params", "weights", "masters", "moments", "grads", "kept", "logits", "all"):
        table.add_column(name, justify="left" if name == "rank" else "right", no_wrap=True)
    alike: dict[RankPlan, list[int]] = {}
    for rank, row in enumerate(plans):
        alike.setdefault(row, []).append(rank)
    for row, ranks in alike.items():
        sizes = (row.weights, row.masters, row.moments, row.gradients, row.activations, row.logits, row.total)
        name = ", ".join(map(str, ranks)) if len(ranks) < 3 else f"{ranks[0]} .. {ranks[-1]}"
        table.add_row(name, f"{row.parameters / 1e6:,.0f}M", *(f"{size / 2**30:.1f}" for size in sizes))
    console.print(table)


def main(arguments: Sequence[str]) -> int:
    given = build_parser().parse_args(arguments)
    try:
        for name in ("pp", "ep", "dp", "micro_batches", "sequences", "seq_len"):
            if getattr(given, name) < 1:
                option = "--" + name.replace("_", "-")
                raise ValueError(f"{option} is {getattr(given, name)}, expected at least 1")
        layout = Layout(given.pp, given.ep, given.dp)
        sizes = given.micro_batches, given.sequences, given.seq_len
        plans = plan(PRESETS[given.preset], layout, given.pp_schedule, *sizes)
    except (TrainError, ValueError) as error:
        print(f"dsv3_kernels.train: {error}", file=sys.stderr)
        return 1
    tokens = f"{given.micro_batches} micro-batches of {given.sequences} x {given.seq_len} tokens"
    title = f"{given.preset} on {layout.world} ranks, {given.pp_schedule}, {tokens}; GiB:"
    show(plans, title, Console())
    return 0
