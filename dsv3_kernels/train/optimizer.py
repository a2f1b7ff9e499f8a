"""AdamW over FP32 master weights, with the moments kept in BF16 (section 3.3.3 of the DeepSeek-V3 report)."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

CHUNK = 1 << 17
"""Parameters updated at a time: few enough for the temporaries to stay in a CPU's cache."""


class AdamW:
    """Updates masters in FP32 and writes them, rounded, into the model's own weights.

    Master weights, gradients and moments of all parameters lie each in one flat buffer, so that the number of
    kernels of a step does not grow with that of the parameters. Vectors (norms) are not decayed: matrices
    come first.

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
    ) -> None:
        named = sorted(named_parameters, key=lambda item: item[1].dim() < 2)
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self.weight_decay, self.betas, self.eps = weight_decay, betas, eps
        self.steps = 0
        self._decayed = sum(p.numel() for p in self.parameters if p.dim() >= 2)
        self.master = torch.cat([p.detach().float().flatten() for p in self.parameters])
        self.exp_avg = torch.zeros_like(self.master, dtype=torch.bfloat16)
        self.exp_avg_sq = torch.zeros_like(self.exp_avg)
        self._grad = torch.zeros_like(self.master)
        self._masters, self._grads = self._views(self.master), self._views(self._grad)
        for parameter in self.parameters:
            # Weight gradients come out of the FP8 GEMMs in FP32 and stay so (torch 2.10 and later).
            parameter.grad_dtype = torch.float32

    def _views(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split([p.numel() for p in self.parameters])
        return [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]

    @torch.no_grad()
    def write_parameters(self) -> None:
        torch._foreach_copy_(list[Tensor](self.parameters), self._masters)

    @torch.no_grad()
    def gather_gradients(self) -> Tensor:
        """Moves the parameters' gradients into the flat FP32 buffer and returns their norm."""
        for view, parameter in zip(self._grads, self.parameters, strict=True):
            if parameter.grad is None:
                view.zero_()
            else:
                view.copy_(parameter.grad)
                parameter.grad = None
        return torch.linalg.vector_norm(self._grad)

    @torch.no_grad()
    def step(self, lr: float, gradient_scale: float = 1.0) -> None:
        """One update from the gathered gradients times gradient_scale."""
        self.steps += 1
        flats = (self.master, self._grad, self.exp_avg, self.exp_avg_sq)
        for part in (slice(0, self._decayed), slice(self._decayed, None)):
            decay = lr * self.weight_decay if part.start == 0 else 0.0
            for master, grad, exp_avg, exp_avg_sq in zip(*(f[part].split(CHUNK) for f in flats), strict=True):
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

    def tensors(self) -> dict[str, Tensor]:
        """Views of masters and moments by parameter, for a checkpoint; writing to them changes the state."""
        flats = {"master": self.master, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        return {
            f"{kind}/{name}": view
            for kind, flat in flats.items()
            for name, view in zip(self.names, self._views(flat), strict=True)
        }
