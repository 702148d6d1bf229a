"""Muon (arXiv 2502.16982) for machines that only emulate bfloat16, in which torch's own always computes."""

import torch
from torch import Tensor


class FloatMuon(torch.optim.Muon):
    """``torch.optim.Muon`` with `adjust_lr_fn="match_rms_adamw"`, computed in float32."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """See ``torch.optim.Muon.step``."""
        for group in self.param_groups:
            params, grads, buffers = [], [], []
            self._init_group(group, params, grads, buffers)
            for param, grad, buffer in zip(params, grads, buffers, strict=True):
                buffer.lerp_(grad, 1 - group["momentum"])
                update = orthogonal(
                    grad.lerp(buffer, group["momentum"]), group["ns_coefficients"], group["ns_steps"], group["eps"]
                )
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.add_(update, alpha=-0.2 * max(param.shape) ** 0.5 * group["lr"])


def orthogonal(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """[n, m] -> the same with all singular values near 1, by Newton and Schulz's iteration."""
    a, b, c = coefficients
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x
