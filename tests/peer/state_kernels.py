"""Stand-ins in plain torch for the fast kernels of states, which transformers takes from packages that need a GPU.

They have the originals' arguments, so that transformers' own code decides what reaches them.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations import use_kernel_func_from_hub_with_fallback

from cartilha.model.head import body_of

# As transformers' modules call a kernel: its package, and its own name there.
KERNELS = {
    "causal_conv1d_fn": ("causal_conv1d", "causal_conv1d_fn"),
    "mamba2_chunk_scan": ("mamba_ssm", "mamba_chunk_scan_combined"),
    "mamba2_split_conv1d_scan_combined": ("mamba_ssm", "mamba_split_conv1d_scan_combined"),
    "torch_chunk_gated_delta_rule": ("fla", "chunk_gated_delta_rule"),
    "chunk_kimi_delta_attention": ("fla", "chunk_kda"),
}


def _pieces(total: int, seq_idx: Tensor | None, cu_seqlens: Tensor | None) -> list[slice]:
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
    elif seq_idx is not None:
        assert seq_idx.dtype == torch.int32 and seq_idx.shape == (1, total), "as the kernels take them"
        ends = [0, *((seq_idx[0].diff() != 0).nonzero()[:, 0] + 1).tolist(), total]
    else:
        ends = [0, total]
    return [slice(begin, end) for begin, end in itertools.pairwise(ends)]


def stand_ins(plain: dict[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Kernels that compute documents one by one with transformers' own functions."""

    def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, activation=None):
        pieces = _pieces(x.shape[2], seq_idx, None)
        done = [plain["causal_conv1d_fn"](x[:, :, piece], weight, bias, activation) for piece in pieces]
        return torch.cat(done, dim=2)

    def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None,
                                  seq_idx=None, dt_softplus=False, dt_limit=(0.0, float("inf")),
                                  return_final_states=False):  # fmt: skip
        scan, pieces = plain["mamba2_chunk_scan"], _pieces(x.shape[1], seq_idx, None)
        more = {"D": D, "dt_bias": dt_bias, "dt_softplus": dt_softplus, "dt_limit": dt_limit}
        return torch.cat([scan(x[:, p], dt[:, p], A, B[:, p], C[:, p], chunk_size, **more) for p in pieces], dim=1)

    def mamba_split_conv1d_scan_combined(zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size, seq_idx=None,
                                         dt_limit=(0.0, float("inf")), activation="silu", rmsnorm_weight=None,
                                         rmsnorm_eps=1e-6, outproj_weight=None, outproj_bias=None, headdim=None,
                                         ngroups=1, norm_before_gate=True):  # fmt: skip
        inner, states = len(A) * headdim, (len(conv1d_weight) - len(A) * headdim) // 2
        gate, mixed, dt = zxbcdt.split([inner, len(conv1d_weight), len(A)], dim=-1)
        mixed = causal_conv1d_fn(mixed.transpose(1, 2), conv1d_weight, conv1d_bias, seq_idx, activation).transpose(1, 2)
        x, b, c = mixed.split([inner, states, states], dim=-1)
        x = x.unflatten(-1, (len(A), headdim))
        b, c = (heads.unflatten(-1, (ngroups, -1)) for heads in (b, c))
        scanned = mamba_chunk_scan_combined(x, dt, A, b, c, chunk_size, D, None, dt_bias, None, seq_idx, True, dt_limit)
        assert not norm_before_gate
        out = scanned.flatten(2) * F.silu(gate)
        if rmsnorm_weight is not None:
            grouped = out.unflatten(-1, (ngroups, -1))
            out = (grouped * (grouped.square().mean(-1, keepdim=True) + rmsnorm_eps).rsqrt()).flatten(
                2
            ) * rmsnorm_weight
        return F.linear(out, outproj_weight, outproj_bias)

    def delta_rule(name: str) -> Callable[..., Any]:
        def chunk(q, k, v, g, beta, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
                  cu_seqlens=None):  # fmt: skip
            assert cu_seqlens is None or len(q) == 1, "as the kernels take them"
            more = {
                "initial_state": None,
                "output_final_state": False,
                "use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel,
            }
            pieces = [tuple(t[:, piece] for t in (q, k, v, g, beta)) for piece in _pieces(q.shape[1], None, cu_seqlens)]
            done = [plain[name](*one[:3], g=one[3], beta=one[4], **more)[0] for one in pieces]
            return torch.cat(done, dim=1), None

        return chunk

    return {
        "causal_conv1d_fn": causal_conv1d_fn,
        "mamba2_chunk_scan": mamba_chunk_scan_combined,
        "mamba2_split_conv1d_scan_combined": mamba_split_conv1d_scan_combined,
        "torch_chunk_gated_delta_rule": delta_rule("torch_chunk_gated_delta_rule"),
        "chunk_kimi_delta_attention": delta_rule("chunk_kimi_delta_attention"),
    }


def install(
    patch: pytest.MonkeyPatch, model: PreTrainedModel, change: Callable[[str, Callable[..., Any]], Any] | None = None
) -> None:
    """Have the code of a model's type find these packages, each kernel perhaps changed (its name here, the kernel)."""
    source = sys.modules[type(body_of(model)).__module__]
    plain = {name: getattr(source, name).__wrapped__ for name in KERNELS if hasattr(source, name)}
    kernels = {name: kernel for name, kernel in stand_ins(plain).items() if name in plain}
    for package in {package for package, _ in KERNELS.values()}:
        patch.setitem(sys.modules, package, ModuleType(package))
    for name, kernel in kernels.items():
        package, original = KERNELS[name]
        setattr(sys.modules[package], original, change(name, kernel) if change else kernel)
        decorate = use_kernel_func_from_hub_with_fallback(original, package)
        patch.setattr(source, name, decorate(plain[name]))
