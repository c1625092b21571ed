"""What cards compute by their makers' data sheets."""

from __future__ import annotations

import re

# Dense matrix products per second, with float32 sums, in float16 and, where the card has it, in bfloat16: the data
# sheets of V100, T4, A10, A100, L4, L40S, H100, H200; NVIDIA's papers on the architectures Ampere GA102 and Ada.
_SHEETS = {
    r"H[12]00 NVL": 835e12,
    r"H100 PCIe": 756e12,
    r"G?H[12]00": 989e12,
    r"A100": 312e12,
    r"L40S": 362e12,
    r"L4": 121e12,
    r"A10": 125e12,
    r"T4": 65e12,
    r"V100S": 130e12,
    r"V100-PCIE": 112e12,
    r"V100": 125e12,
    r"RTX 3090(?! Ti)": 71e12,
    r"RTX 4090(?! D| Laptop)": 165e12,
}


def data_sheet_flops(device_name: str, dtype_name: str) -> float | None:
    """Operations per second of dense products in half precision, by the name that CUDA gives a card.

    None for cards that are not listed, for a part of a card (MIG), and in float32.
    """
    if dtype_name not in ("bfloat16", "float16") or "MIG" in device_name:
        return None
    return next((flops for name, flops in _SHEETS.items() if re.search(rf"\b{name}\b", device_name)), None)
