"""AdamW over FP32 master weights, with the moments kept in BF16 (section 3.3.3 of the DeepSeek-V3 report).

ZeRO-1: ranks that hold the same parameters keep a share of the masters and moments each. A step adds the
ranks' gradients up where their share is (reduce-scatter), updates there, and hands all the new weights
(all-gather).
torch's ZeroRedundancyOptimizer shares out whole parameters, which leaves ranks uneven, and knows no masters.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsv3_kernels.train.parallel.groups import Placement, add_up, rank_in, size_of

# Its name since torch 2.13, before which it has another.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
CHUNK = 1 << 17
"""Parameters updated at a time: few enough for the temporaries to stay in a CPU's cache."""
EXCHANGED = 1 << 22
"""Gradients of a share that are exchanged at a time: bounds the memory that the exchange takes."""
ALIGNMENT = 64
"""Elements: every share begins at a multiple of it, so that vector instructions meet the same elements."""


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of a whole tensor: elements first to first + values.numel() - 1 of it, flattened."""

    values: Tensor
    first: int
    shape: torch.Size


def share_of(elements: int, ranks: int) -> int:
    """How many of them each rank keeps."""
    unit = ranks * ALIGNMENT if ranks > 1 else 1
    return -(-elements // unit) * unit // ranks


class _Bucket:
    """The parameters that one group of ranks holds alike, in one line of which each rank has a share."""

    def __init__(self, named: list[tuple[str, nn.Parameter]], places: Mapping[str, Placement]) -> None:
        # Vectors (norms) are not decayed: matrices come first. By name, since ranks may order modules
        # otherwise.
        named = sorted(named, key=lambda item: (item[1].dim() < 2, item[0]))
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self.places = [places[name] for name in self.names]
        self.group = self.places[0].group
        ranks = size_of(self.group)
        sizes = [parameter.numel() for parameter in self.parameters]
        share = share_of(sum(sizes), ranks)
        self.length = ranks * share
        self.low = rank_in(self.group) * share
        self.high = self.low + share
        decayed = sum(p.numel() for p in self.parameters if p.dim() >= 2)
        self.decayed = min(max(decayed - self.low, 0), share)
        self.starts = [0]
        for size in sizes:
            self.starts.append(self.starts[-1] + size)
        self.master = self.parameters[0].new_zeros(share, dtype=torch.float32)
        for parameter, start in zip(self.parameters, self.starts, strict=False):
            low, high = max(start, self.low), min(start + parameter.numel(), self.high)
            if low < high:
                mine = parameter.detach().flatten()[low - start : high - start]
                self.master[low - self.low : high - self.low] = mine
        self.exp_avg = torch.zeros_like(self.master, dtype=torch.bfloat16)
        self.exp_avg_sq = torch.zeros_like(self.exp_avg)
        self._flat_grad = self.master.new_zeros(self.length)
        self._grads = self._views(self._flat_grad)
        self.grad = self._flat_grad[self.low : self.high]

    def _views(self, flat: Tensor) -> list[Tensor]:
        parts = flat[: self.starts[-1]].split([p.numel() for p in self.parameters])
        return [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]

    def zero_gradients(self) -> None:
        self._flat_grad.zero_()
        for view, parameter in zip(self._grads, self.parameters, strict=True):
            parameter.grad = view

    def reduce(self, scale: float) -> None:
        """Takes the gradients; this rank's share becomes their sum over the group, times scale.

        The sum is taken in the order of the ranks, whatever the transport, and so is bit for bit that of one
        process which sees the ranks' sequences one after the other.
        """
        for view, parameter in zip(self._grads, self.parameters, strict=True):
            if parameter.grad is None:
                view.zero_()
            elif parameter.grad.data_ptr() != view.data_ptr():
                view.copy_(parameter.grad)
            parameter.grad = None
        if self.group is None:
            if scale != 1:
                self.grad.mul_(scale)
            return
        ranks, share = size_of(self.group), self.high - self.low
        self.grad = torch.empty_like(self.master)
        for low in range(0, share, EXCHANGED):
            high = min(low + EXCHANGED, share)
            outgoing = self._flat_grad.view(ranks, share)[:, low:high].contiguous()
            incoming = torch.empty_like(outgoing)
            dist.all_to_all_single(incoming, outgoing, group=self.group)
            total = incoming[0]
            for part in incoming[1:]:
                total += part
            torch.mul(total, scale, out=self.grad[low:high])

    def not_finite(self) -> list[str]:
        """Names of parameters whose gradients, as this rank itself computed them, have a NaN or Inf."""
        return [
            name
            for name, view in zip(self.names, self._grads, strict=True)
            if not bool(view.isfinite().all())
        ]

    def write_parameters(self) -> None:
        """The masters, rounded, into the parameters of every rank of the group."""
        if self.group is None:
            torch._foreach_copy_(list[Tensor](self.parameters), self._views(self.master))
            return
        mine = self.master.to(self.parameters[0].dtype)
        flat = mine.new_empty(self.length)
        _all_gather(flat.view(torch.uint8), mine.view(torch.uint8), group=self.group)
        torch._foreach_copy_(list[Tensor](self.parameters), self._views(flat))

    def pieces(self, flat: Tensor) -> dict[str, Piece]:
        """The parts of parameters that lie in this rank's share; flat: as long as it."""
        found = {}
        for name, place, start, end in zip(
            self.names, self.places, self.starts, self.starts[1:], strict=False
        ):
            low, high = max(start, self.low), min(end, self.high)
            if low < high or (start == end and rank_in(self.group) == 0):
                values = flat[low - self.low : high - self.low] if low < high else flat[:0]
                found[name] = Piece(values, place.first + low - start, place.shape)
        return found


class AdamW:
    """Updates masters in FP32 and writes them, rounded, into the model's own weights.

    Master weights, gradients and moments of all parameters that the same ranks hold lie each in one flat
    buffer, so that the number of kernels and messages of a step does not grow with that of the parameters.

    The parameters passed in are taken as the initial masters; convert the model to BF16 after, then call
    `write_parameters`.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        placements: Mapping[str, Placement] | None = None,
        world: "dist.ProcessGroup | None" = None,
        shares: int = 1,
    ) -> None:
        """placements: of each parameter by name, None where this process is alone.

        world: all ranks of the run. shares: the gradient of a step is the sum over replicas by this number.
        """
        named = list(named_parameters)
        if placements is None:
            placements = {name: Placement(None, parameter.shape, 0) for name, parameter in named}
        self.weight_decay, self.betas, self.eps = weight_decay, betas, eps
        self.steps = 0
        self._world, self._shares = world, shares
        groups: dict[object, list[tuple[str, nn.Parameter]]] = {}
        for item in named:
            groups.setdefault(placements[item[0]].group, []).append(item)
        self._buckets = [_Bucket(group, placements) for group in groups.values()]
        for _, parameter in named:
            # Weight gradients come out of the FP8 GEMMs in FP32 and stay so (torch 2.10 and later).
            parameter.grad_dtype = torch.float32

    @torch.no_grad()
    def write_parameters(self) -> None:
        for bucket in self._buckets:
            bucket.write_parameters()

    @torch.no_grad()
    def zero_gradients(self) -> None:
        """Before a backward: lets it add to the optimizer's own line of gradients, so that none are made
        beside. Without this call they are copied there.
        """
        for bucket in self._buckets:
            bucket.zero_gradients()

    @torch.no_grad()
    def gather_gradients(self) -> Tensor:
        """Takes the parameters' gradients, adds up those of replicas, and returns the norm of them all.

        The squares are added in FP64: the norm's FP32 then does not depend on who added which.
        """
        total = torch.zeros((), dtype=torch.float64, device=self._buckets[0].master.device)
        for bucket in self._buckets:
            bucket.reduce(1 / self._shares)
            total += torch.linalg.vector_norm(bucket.grad, dtype=torch.float64) ** 2
        return add_up(total, self._world).sqrt().float()

    def not_finite(self) -> list[str]:
        """Names of parameters whose gathered gradients on this rank have a NaN or Inf."""
        return [name for bucket in self._buckets for name in bucket.not_finite()]

    @torch.no_grad()
    def step(self, lr: float, gradient_scale: float = 1.0) -> None:
        """One update from the gathered gradients times gradient_scale."""
        self.steps += 1
        for bucket in self._buckets:
            flats = (bucket.master, bucket.grad, bucket.exp_avg, bucket.exp_avg_sq)
            for part in (slice(0, bucket.decayed), slice(bucket.decayed, None)):
                decay = lr * self.weight_decay if part.start == 0 else 0.0
                parts = (flat[part].split(CHUNK) for flat in flats)
                for master, grad, exp_avg, exp_avg_sq in zip(*parts, strict=True):
                    self._update(master, grad.mul_(gradient_scale), exp_avg, exp_avg_sq, lr, decay)
        self.write_parameters()

    def _update(
        self, master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, lr: float, decay: float
    ) -> None:
        beta1, beta2 = self.betas
        m = exp_avg.float().lerp_(grad, 1 - beta1)
        v = exp_avg_sq.float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        exp_avg.copy_(m)
        exp_avg_sq.copy_(v)
        v.div_(1 - beta2**self.steps).sqrt_().add_(self.eps)
        master.mul_(1 - decay).addcdiv_(m, v, value=-lr / (1 - beta1**self.steps))

    def masters(self) -> dict[str, Tensor]:
        """This rank's part of each master weight, flat; views."""
        return {name: piece.values for b in self._buckets for name, piece in b.pieces(b.master).items()}

    def gradients(self) -> dict[str, Piece]:
        """This rank's parts of the gathered gradients."""
        return {name: piece for b in self._buckets for name, piece in b.pieces(b.grad).items()}

    def pieces(self) -> dict[str, Piece]:
        """This rank's parts of masters and moments, for a checkpoint; writing to them changes the state."""
        return {
            f"{kind}/{name}": piece
            for kind in ("master", "exp_avg", "exp_avg_sq")
            for bucket in self._buckets
            for name, piece in bucket.pieces(getattr(bucket, kind)).items()
        }
