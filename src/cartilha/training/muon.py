"""Muon, which can leave a step out without having the host wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor

WAITS_FOR_NOTHING = ("cpu",)  # devices whose tensors the host reads at once


class Muon(torch.optim.Muon):
    """torch's Muon (arXiv:2502.16982) that reads `found_inf`, as torch's fused optimizers do: with 1 nothing changes.

    Its states are allocated before the first step. The copy of one matrix and of its momentum is there at a time.
    """

    found_inf: Tensor | None = None  # scalar float32: 1 to leave the step out, else 0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step all matrices that have a gradient."""
        left_out = self.found_inf
        if left_out is None or left_out.device.type in WAITS_FOR_NOTHING:
            if not left_out:
                super().step()
            return
        groups = self.param_groups
        for group in groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    kept = [matrix, self.state[matrix]["momentum_buffer"]]
                    before = [tensor.clone() for tensor in kept]
                    self.param_groups = [{**group, "params": [matrix]}]
                    super().step()
                    for tensor, old in zip(kept, before, strict=True):
                        tensor.copy_(torch.where(left_out > 0, old, tensor))
        self.param_groups = groups
