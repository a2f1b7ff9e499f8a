"""The executor of pipeline schedules over the ranks of a torch.distributed group.

One executor runs every schedule's action lists: DualPipe, DualPipeV, 1F1B and ZB1P differ in nothing else, so
that the same stages, messages and weight-gradient store are tested by all of them.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dsv3_kernels.model import DeepSeekV3, Losses
from dsv3_kernels.nn import WgradStore, constant_weights, deferred_wgrad
from dsv3_kernels.nn.interleave import filled, interleaved, observed
from dsv3_kernels.train.errors import TrainError
from dsv3_kernels.train.executor import check_windows
from dsv3_kernels.train.observe.trace import Clock, TraceEvent, write_trace
from dsv3_kernels.train.pipeline.actions import Action, Overlap, Schedule, Work, forward_only, label, works
from dsv3_kernels.train.pipeline.link import Link, posts
from dsv3_kernels.train.pipeline.schedules import SCHEDULES
from dsv3_kernels.train.pipeline.stages import Stage, StageRunner, cut, layers_of, split

Both = Callable[[Callable[[], None], Callable[[], None]], object]


class PipelineExecutor:
    """The layers of one rank of a pipeline, and the schedule that runs them.

    model: the whole; what other ranks hold is removed from it. Its parameters keep their names.
    schedule: "1f1b", "zb1p", "dualpipe" or "dualpipev". group: the pipeline's ranks in order; None is one
        rank alone. overlap: whether forward and backward of an F&B take turns around dispatch and combine,
        or run one after the other; the result is the same, bit for bit.
    Parameters that several ranks hold (all, in DualPipe; the embedding where MTP needs it on the last rank)
    get a part of their gradient on each: the gradient is the sum.
    Weight gradients of linear layers do not pass autograd's hooks.
    trace: a list to which the timeline of every step is added, in seconds of the host's clock; None for none.
        Lanes: "actions"; and where the host waits, as on CPUs, "under way", a dispatch or combine with
        something else beside it, and "waits".
    Raises ValueError where the schedule or the split does not exist.
    """

    def __init__(
        self,
        model: DeepSeekV3,
        schedule: str,
        group: "dist.ProcessGroup | None" = None,
        *,
        overlap: bool = True,
    ) -> None:
        if schedule not in SCHEDULES:
            raise ValueError(f"PipelineExecutor: schedule is {schedule!r}, expected one of {list(SCHEDULES)}")
        self._make = SCHEDULES[schedule]
        self._group = group
        self._both: Both = interleaved if overlap else _one_after_the_other
        self._ranks = 1 if group is None else dist.get_world_size(group)
        self._rank = 0 if group is None else dist.get_rank(group)
        smallest = self._make(self._ranks, 2 * self._ranks)  # its stages lie where any other's do
        self._stages = split(model.config, smallest.stages)
        self.modules: list[nn.Module] = [
            cut(model, [self._stages[i] for i in smallest.stages_of(self._rank)])
        ]
        self._model = model
        self._first_rank = [smallest.places[stage.index, 0] for stage in self._stages]
        mirror, theirs = self._ranks - 1 - self._rank, set[str]()
        if mirror != self._rank:
            theirs = layers_of(model.config, [self._stages[i] for i in smallest.stages_of(mirror)])
        self.replicated = frozenset(
            name for name, _ in model.named_parameters() if any(name.startswith(f"{t}.") for t in theirs)
        )
        self._plan = functools.cache(self._uncached_plan)
        self._plan_forward = functools.cache(self._uncached_plan_forward)
        self._met = False
        self.trace: list[TraceEvent] | None = None

    def _uncached_plan(self, micro_batches: int) -> "tuple[Schedule, list]":
        schedule = self._make(self._ranks, micro_batches)
        return schedule, posts(schedule, self._rank)

    def _uncached_plan_forward(self, micro_batches: int) -> "tuple[Schedule, list]":
        schedule = forward_only(self._first_rank, micro_batches)
        return schedule, posts(schedule, self._rank)

    def forward_backward(self, windows: Tensor, mtp_weight: float, balance_weight: float) -> Losses:
        """As `Executor` says. Raises ValueError where the schedule needs more micro-batches, TrainError where
        a rank of the pipeline is gone.
        """
        check_windows(windows)
        schedule, plan = self._plan(len(windows))
        like = self._state_of(windows[0, :, 1 + self._model.config.num_nextn_predict_layers :])
        clock = Clock(windows.device) if self.trace is not None else None
        moments = []
        observer = self._waited if clock is not None else None
        with constant_weights(), deferred_wgrad() as store, observed(observer):
            link = self._link(schedule, like)
            runner = StageRunner(self._model, mtp_weight, balance_weight)
            step = _Step(windows, self._stages, runner, link, store, self._both)
            link.post(plan[0])
            for action, batches in zip(schedule.ranks[self._rank], plan[1:], strict=True):
                start = clock and clock.now()
                step.run(action, functools.partial(link.post, batches))
                moments.append((action, start, clock and clock.now()))
            link.finish()
        if clock is not None:
            if windows.is_cuda:
                torch.cuda.synchronize(windows.device)
            for action, start, end in moments:
                self._record("actions", label(action), clock.seconds(start), clock.seconds(end))
        return Losses(*(self._sum(step.losses) / len(windows)))

    @torch.no_grad()
    def window_losses(self, windows: Tensor) -> Tensor:
        """As `Executor` says. Windows pass in as many parts as there are ranks, where that divides them."""
        count = self._ranks if len(windows) % self._ranks == 0 else 1
        schedule, plan = self._plan_forward(count)
        parts = windows.unflatten(0, (count, -1))
        link = self._link(schedule, self._state_of(parts[0, :, 1:]))
        runner = StageRunner(self._model, 0.0, 0.0)
        losses = torch.zeros(parts.shape[:2], device=windows.device)
        link.post(plan[0])
        for action, batches in zip(schedule.ranks[self._rank], plan[1:], strict=True):
            _, index, part = works(action)[0]
            stage = self._stages[index]
            hidden = None if stage.first else link.take("F", index - 1, part)
            result = runner.evaluate(stage, parts[part], hidden)
            if stage.last:
                losses[part] = result
            else:
                link.give("F", index, part, result)
            link.post(batches)
        link.finish()
        return self._sum(losses).flatten()

    def _link(self, schedule: Schedule, like: Tensor) -> Link:
        if like.is_cuda and not self._met:
            self._sum(like.new_zeros(1))  # NCCL wants all ranks of a group at the first call on it
            self._met = True
        return Link(self._group, schedule, like, self._waited)

    def _state_of(self, tokens: Tensor) -> Tensor:
        """Shaped like the state of tokens [B, S]."""
        return next(self._model.parameters()).new_empty(*tokens.shape, self._model.config.hidden_size)

    def _sum(self, losses: Tensor) -> Tensor:
        """Over the ranks."""
        if self._group is not None:
            try:
                dist.all_reduce(losses, group=self._group)
            except RuntimeError as error:
                raise TrainError(
                    f"pipeline rank {self._rank}: a rank left before the losses were summed: {error}"
                ) from error
        return losses

    def write_trace(self, path: Path | None) -> None:
        """What `trace` holds on all ranks, by rank 0 into one file (None: nowhere); all call together."""
        events = self.trace or []
        if self._group is not None:
            every: list[Any] = [None] * self._ranks
            dist.all_gather_object(every, events, group=self._group)
            events = [event for of_rank in every for event in of_rank]
        if self._rank == 0 and path is not None:
            write_trace(path, events)

    def _waited(self, name: str, started: float, resumed: float, over: float) -> None:
        if started < resumed:
            self._record("under way", name, started, resumed)
        self._record("waits", name, resumed, over)

    def _record(self, lane: str, name: str, start: float, end: float) -> None:
        if self.trace is not None:
            self.trace.append(TraceEvent(self._rank, lane, name, start, end))


class _Graph(NamedTuple):
    """A forward that waits for its backward: the stage's input, where its output left the graph, its loss.

    Of the output only the place in the graph is kept: its values are the next stage's, and go once they are
    sent.
    """

    hidden: Tensor | None
    output: GradientEdge | None
    loss: Tensor | None


class _Step:
    """The micro-batches of one step on one rank."""

    def __init__(
        self,
        windows: Tensor,
        stages: list[Stage],
        runner: StageRunner,
        link: Link,
        store: WgradStore,
        both: Both,
    ) -> None:
        self._windows, self._stages, self._runner = windows, stages, runner
        self._link, self._store, self._both = link, store, both
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._put_off: dict[tuple[int, int], Callable[[], None]] = {}
        self.losses = torch.zeros(3, device=windows.device)

    def run(self, action: Action, post: Callable[[], None]) -> None:
        """post: what sends the action's results, called as soon as they are there."""
        if isinstance(action, Overlap):
            forward, backward = action
            self._both(lambda: self._forward(forward), lambda: self._backward(backward))
            post()
            self._store.run()
        elif action.kind == "F":
            self._forward(action)
            post()
        elif action.kind == "B":
            with filled(self._store.run):
                self._backward(action)
            post()
            self._store.run()
        elif action.kind == "I":
            self._backward(action)
            post()
            self._put_off[action.stage, action.micro_batch] = self._store.take()
        else:
            self._put_off.pop((action.stage, action.micro_batch))()
            post()

    def _forward(self, work: Work) -> None:
        stage = self._stages[work.stage]
        hidden = None
        if not stage.first:
            hidden = self._link.take("F", work.stage - 1, work.micro_batch).requires_grad_()
        output = self._runner.forward(stage, self._windows[work.micro_batch], hidden)
        edge = None if output.hidden is None else get_gradient_edge(output.hidden)
        self._graphs[work.stage, work.micro_batch] = _Graph(hidden, edge, output.loss)
        self.losses += output.losses
        if output.hidden is not None:
            self._link.give("F", work.stage, work.micro_batch, output.hidden.detach())

    def _backward(self, work: Work) -> None:
        hidden, edge, loss = self._graphs.pop((work.stage, work.micro_batch))
        roots: list[GradientEdge] = []
        gradients: list[Tensor] = []
        if edge is not None:
            roots.append(edge)
            gradients.append(self._link.take("B", work.stage + 1, work.micro_batch))
        if loss is not None:
            roots.append(get_gradient_edge(loss))
            gradients.append(torch.full_like(loss, 1 / len(self._windows)))
        torch.autograd.backward(roots, gradients)
        if hidden is not None and hidden.grad is not None:
            self._link.give("B", work.stage, work.micro_batch, hidden.grad)


def _one_after_the_other(first: Callable[[], None], second: Callable[[], None]) -> None:
    first()
    second()
