"""The machine and its disk: no emulated dtype, clear refusals, and writes that a reader never sees half done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cartilha.errors import UserError, install_command
from cartilha.machine import cpu, memory
from cartilha.machine import devices as machine_devices
from cartilha.machine.cpu import cpu_has_bfloat16, fastest_cpu_dtype
from cartilha.machine.devices import (
    choose_device,
    choose_dtype,
    dtype_name,
    hardware_dtypes,
    has_cxx_compiler,
    seed_everything,
)
from cartilha.machine.memory import peak_memory_bytes
from cartilha.machine.peaks import data_sheet_flops
from cartilha.machine.versions import TEXT_PACKAGES, versions
from cartilha.model import products
from cartilha.training.device_facts import KNOWN_DEVICES


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"), True),  # pinned memory
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("the store says: CUDA error: out of memory"), False),
    ],
)
def test_memory_that_runs_out_outside_of_torchs_allocator_is_recognised(error, expected):
    assert memory.is_out_of_memory(error) is expected


# Read when torch is loaded


@pytest.mark.parametrize("begin", ["import cartilha; cartilha.train", "from cartilha.__main__ import main; main()"])
@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_threads_spin_briefly_unless_the_user_says_otherwise(begin, given, expected):
    """A process that says how it is set as soon as it looks for torch, and ends there."""
    program = f"""
import os, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Finder())
sys.argv = ["cartilha", "evaluate", "--model", "random:tiny", "--input", "primer"]
{begin}
"""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    found = subprocess.run(
        [sys.executable, "-c", program], env={**environment, **given}, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == [str(expected)], found.stderr


# Device and dtype


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_the_rate_of_each_dtype_is_measured_in_turn_and_in_that_dtype_under_autocast_too(has_bfloat16, monkeypatch):
    monkeypatch.setattr(cpu, "cpu_has_bfloat16", lambda: has_bfloat16)
    monkeypatch.setattr(cpu, "PRODUCT_SIZE", 32)
    dtypes = []

    class Note(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket is torch.ops.aten.mm:
                dtypes.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    with torch.autocast("cpu", torch.bfloat16), Note():  # not through the cache, which must not keep these figures
        rates = cpu.cpu_matmul_rates.__wrapped__()
    real = [torch.float32, torch.bfloat16] if has_bfloat16 else [torch.float32]
    assert list(rates) == [dtype_name(dtype) for dtype in real] and min(rates.values()) > 0
    assert cpu.MIN_ROUNDS <= len(dtypes) // len(real) <= cpu.MAX_ROUNDS and dtypes == real * (len(dtypes) // len(real))


def test_the_fastest_product_of_each_dtype_counts(monkeypatch):
    seconds = iter([5, 4, 2, 9, 3, 17])  # float32 and bfloat16 in turn
    monkeypatch.setattr(cpu, "cpu_has_bfloat16", lambda: True)
    monkeypatch.setattr(cpu, "PRODUCT_SIZE", 32)
    monkeypatch.setattr(cpu, "ENOUGH_S", 0.0)
    monkeypatch.setattr(cpu.timeit, "timeit", lambda product, number: next(seconds))
    rates = cpu.cpu_matmul_rates.__wrapped__()
    assert rates == pytest.approx({"float32": 2 * 32**3 / 2e9, "bfloat16": 2 * 32**3 / 4e9})


@pytest.mark.parametrize(
    ("half", "full", "expected"), [(100, 119, torch.bfloat16), (100, 120, torch.float32), (None, 1, torch.float32)]
)
def test_products_are_computed_in_float32_where_that_is_faster(half, full, expected, monkeypatch):
    rates = {"float32": full} | ({"bfloat16": half} if half else {})
    monkeypatch.setattr(products, "cpu_matmul_rates", lambda: rates)
    products.cpu_product_dtype.cache_clear()
    try:
        assert products.cpu_product_dtype(torch.bfloat16) == expected
        assert products.cpu_product_dtype(torch.float32) == torch.float32
    finally:
        products.cpu_product_dtype.cache_clear()


@pytest.mark.parametrize(
    ("device", "capability", "bf16_cpu", "expected"),
    [
        ("cuda", (7, 5), False, ("float16", "float32")),  # T4: bf16 is emulated there, although torch says yes
        ("cuda", (7, 5), True, ("float16", "float32")),  # the CPU beside it does not matter
        ("cuda", (8, 0), False, ("bfloat16", "float16", "float32")),
        ("cuda", (9, 0), False, ("bfloat16", "float16", "float32")),
        ("cuda", (12, 0), False, ("bfloat16", "float16", "float32")),
        ("mps", None, False, ("float32",)),
        ("mps", None, True, ("float32",)),
        ("cpu", None, True, ("bfloat16", "float32")),
        ("cpu", None, False, ("float32",)),
    ],
)
def test_only_dtypes_that_the_hardware_has(device, capability, bf16_cpu, expected):
    assert hardware_dtypes(device, capability, bf16_cpu) == expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu avx512f avx512_bf16", True),
        ("fpu avx512f amx_bf16", True),
        ("asimd fphp bf16", True),  # ARM
        ("fpu avx2 avx512f avx512_vnni", False),
        ("", False),
    ],
)
def test_bfloat16_of_a_cpu_by_its_flags(flags, expected, monkeypatch):
    monkeypatch.setattr(cpu, "_cpuinfo", lambda *names: flags)
    monkeypatch.setattr(cpu, "_flags_from_torch", frozenset)
    assert cpu_has_bfloat16() is expected


@pytest.fixture
def devices(monkeypatch):
    """Pretend that these kinds of devices are there."""

    def pretend(*kinds: str) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in kinds)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in kinds)

    return pretend


def test_auto_takes_the_best_device_and_says_when_it_is_the_cpu(devices, caplog):
    caplog.set_level("INFO", logger="cartilha")
    for kinds, expected in ((("cuda", "mps"), "cuda"), (("cuda",), "cuda"), (("mps",), "mps")):
        devices(*kinds)
        assert choose_device("auto").type == expected
        assert choose_device("cpu").type == "cpu"
    assert caplog.text == ""
    devices()
    machine_devices._announce_cpu.cache_clear()
    assert [choose_device("auto").type for _ in range(2)] == ["cpu"] * 2
    assert caplog.text.count("No GPU was found") == 1  # commands ask more than once


def test_a_device_that_is_not_there_is_refused_with_those_that_are(devices):
    devices("mps")
    with pytest.raises(UserError, match=r"device cuda is not available .* one of: cpu, mps\."):
        choose_device("cuda")
    devices()
    with pytest.raises(UserError, match=r"device mps is not available .* one of: cpu\."):
        choose_device("mps")


def test_more_processes_than_gpus_are_refused_with_the_number_that_fits(devices, monkeypatch):
    devices("cuda")
    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "3"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert choose_device("auto") == torch.device("cuda", 1) and taken == [1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match=r"more processes here than there are GPUs \(2\); use --nproc-per-node 2\.$"):
        choose_device("cuda")


def test_a_t4_is_given_float16_and_refused_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    device = torch.device("cuda")
    for capability, best in (((7, 5), torch.float16), ((8, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, found=capability: found)
        assert choose_dtype("auto", device) == best
        assert choose_dtype("float32", device) == torch.float32
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    with pytest.raises(UserError, match=r"no bfloat16 in hardware; use --dtype auto or one of: float16, float32\."):
        choose_dtype("bfloat16", device)


@pytest.mark.parametrize("bf16", [True, False])
def test_dtypes_of_a_cpu(monkeypatch, bf16):
    monkeypatch.setattr(machine_devices, "cpu_has_bfloat16", lambda: bf16)
    cpu = torch.device("cpu")
    assert dtype_name(choose_dtype("auto", cpu)) in hardware_dtypes("cpu", None, bf16)
    assert choose_dtype("float32", cpu) == torch.float32
    with pytest.raises(UserError, match="no float16 in hardware"):
        choose_dtype("float16", cpu)
    if bf16:
        assert choose_dtype("bfloat16", cpu) == torch.bfloat16
    else:
        with pytest.raises(UserError, match="no bfloat16 in hardware"):
            choose_dtype("bfloat16", cpu)


def test_processes_compute_in_the_dtype_of_the_first(monkeypatch):
    monkeypatch.setattr(machine_devices, "fastest_cpu_dtype", lambda real: "bfloat16")  # what this process would choose
    monkeypatch.setattr("cartilha.machine.processes.gather_objects", lambda mine: [torch.float32, mine])
    assert choose_dtype("auto", torch.device("cpu")) == torch.float32


@pytest.mark.skipif(sys.platform == "win32", reason="executables are found by their ending there")
@pytest.mark.parametrize(
    ("platform", "there", "cxx", "expected"),
    [
        ("linux", ["g++"], None, True),
        ("linux", ["c++", "clang++"], None, False),  # torch looks for g++ alone
        ("linux", ["clang++"], "clang++", True),
        ("linux", ["g++"], "icpx", False),  # and for $CXX alone where it is set
        ("linux", [], None, False),
        ("darwin", ["clang++"], None, True),
        ("darwin", ["g++"], None, False),
        ("win32", ["cl"], None, True),
        ("win32", ["g++"], None, False),
    ],
)
def test_a_compiler_counts_where_torch_finds_it(monkeypatch, tmp_path, platform, there, cxx, expected):
    for name in there:
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    if cxx:
        monkeypatch.setenv("CXX", cxx)
    # shutil.which would look for Windows's endings, too: the platform is changed for our module alone.
    monkeypatch.setattr(machine_devices, "sys", type("sys", (), {"platform": platform}))
    assert has_cxx_compiler() is expected


def test_tests_take_one_thread():
    assert torch.get_num_threads() == 1


def test_the_seed_decides_what_torch_draws():
    seed_everything(7)
    drawn = torch.rand(3)
    assert not torch.equal(drawn, torch.rand(3))
    seed_everything(7)
    assert torch.equal(drawn, torch.rand(3))


def test_peak_memory_is_in_bytes_and_does_not_fall():
    before = peak_memory_bytes("cpu")
    block = np.ones(200_000_000, np.uint8)
    grown = peak_memory_bytes("cpu")
    del block
    assert 20_000_000 < before <= grown < psutil.virtual_memory().total
    assert peak_memory_bytes("cpu") >= grown >= 200_000_000


def test_versions_name_what_a_number_depends_on():
    found = versions()
    assert found["torch"] == torch.__version__ and found["numpy"] == np.__version__
    assert "not installed" not in found.values()
    # torch's differs with what was imported before, and so would the bytes of a store.
    assert "torch" not in versions(TEXT_PACKAGES) and versions(TEXT_PACKAGES).items() <= found.items()


CLONE = {"dir_info": {"editable": True}, "url": "file:///home/ana/meu%20clone"}
WHEEL = {"archive_info": {}, "url": "https://example.org/cartilha-0.1.0-py3-none-any.whl"}
GIT = {"vcs_info": {"vcs": "git", "commit_id": "0a1b"}, "url": "https://example.org/cartilha.git"}


@pytest.mark.parametrize(
    ("record", "what"),
    [
        (CLONE, '-e "/home/ana/meu clone[text]"'),
        (WHEEL, f'"cartilha[text] @ {WHEEL["url"]}"'),
        (GIT, '"cartilha[text] @ git+https://example.org/cartilha.git@0a1b"'),
        ({"dir_info": {}, "url": "file:///home/ana/clone"}, '"cartilha[text] @ file:///home/ana/clone"'),
        (None, '"cartilha[text]"'),
    ],
)
def test_an_extra_is_installed_from_where_the_package_was(monkeypatch, record, what):
    class Installed:
        def read_text(self, name: str) -> str | None:
            return json.dumps(record) if record and name == "direct_url.json" else None

    monkeypatch.setattr("cartilha.errors.distribution", lambda name: Installed())
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    assert install_command("text") == f"pip install {what}"
    monkeypatch.setattr(sys, "prefix", "/home/ana/clone/.venv")
    monkeypatch.setattr(sys, "executable", "/home/ana/clone/.venv/bin/python")
    assert install_command("text") == f"/home/ana/clone/.venv/bin/pip install {what}"


def test_a_clones_own_command_is_short_inside_it(monkeypatch, tmp_path):
    record = json.dumps({"dir_info": {"editable": True}, "url": tmp_path.as_uri()})
    monkeypatch.setattr("cartilha.errors.distribution", lambda name: SimpleNamespace(read_text=lambda name: record))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    monkeypatch.chdir(tmp_path)
    assert install_command("text") == f'{Path(".venv", "bin", "pip")} install -e ".[text]"'


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),  # a part of a card
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", None),  # another card, of half the rate
        ("Tesla T4", 65),
        ("Tesla V100-SXM2-16GB", 125),
        ("Tesla V100-PCIE-16GB", 112),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("a card of tomorrow", None),
    ],
)
def test_what_a_card_computes_by_its_data_sheet(name, teraflops):
    found = data_sheet_flops(name, "float16")
    assert found == (None if teraflops is None else teraflops * 1e12)
    assert data_sheet_flops(name, "float32") is None


def test_what_is_planned_and_what_is_on_the_data_sheet_agree():
    known = {"t4": "Tesla T4", "l4": "NVIDIA L4", "a100-40gb": "NVIDIA A100-SXM4-40GB", "h100": "NVIDIA H100 80GB HBM3"}
    for name, card in known.items():
        assert KNOWN_DEVICES[name].peak_flops == data_sheet_flops(card, "float16")


@pytest.mark.parametrize(("half", "expected"), [(50.0, "float32"), (129.0, "float32"), (130.0, "bfloat16")])
def test_how_fast_this_cpu_multiplies_decides_and_is_said_once(half, expected, monkeypatch, caplog):
    monkeypatch.setattr(cpu, "cpu_matmul_rates", lambda: {"float32": 100.0, "bfloat16": half})
    fastest_cpu_dtype.cache_clear()
    caplog.set_level("INFO")
    assert [fastest_cpu_dtype(("bfloat16", "float32")) for _ in range(2)] == [expected] * 2
    said = (
        f"{half:.0f} GFLOP/s in bfloat16 and 100 in float32: computing in {expected} (bfloat16 is taken from 1.3 times"
    )
    assert caplog.text.count(said) == 1
    fastest_cpu_dtype.cache_clear()
