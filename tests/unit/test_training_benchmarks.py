"""The training benchmarks run and can fail: the one for GPUs has to be right at its first run on one."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def importable() -> Iterator[None]:
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def tiny(**more: Any) -> dict[str, Any]:
    from training_speed.setup import Shape

    return dataclasses.asdict(Shape(model="tiny-opt", block_size=32, micro_batch=2, windows=1, **more))


@pytest.mark.parametrize("variant", ["ours", "hf_users", "hf_packed", "hf_tuned"])
def test_every_way_to_train_is_timed(variant):
    from training_speed.sections import compute

    found = compute("train", {"shape": tiny(longest=20), "variant": variant, "dtype": "float32", "compiled": False})
    assert len(found["tokens_per_second"]) == 1 and found["tokens_per_second"][0] > 0
    assert 0.5 < found["text_share"] <= 1 and (found["text_share"] < 1) == (variant in ("hf_users", "ours"))
    assert found["losses"] and all(5 < loss < 6 for loss in found["losses"])  # ln 259 = 5.56
    assert found["peak_bytes"] > 0


def test_padding_is_not_counted_as_text():
    from training_speed.setup import PAD_ID, Shape, padded_rows

    rows, share = padded_rows(Shape(**tiny(longest=20)))
    kept = sum(int(row["attention_mask"].sum()) for row in rows)
    assert share == kept / (32 * len(rows)) and share < 0.7
    for row in rows:
        padding = row["attention_mask"] == 0
        assert (row["labels"][padding] == -100).all() and (row["input_ids"][padding] == PAD_ID).all()


def test_numerics_agree():
    from training_speed.sections import compute

    found = compute("numerics", {"shape": tiny(), "dtype": "bfloat16"})
    assert "failed" not in found and len(found["checks"]) == 6


@pytest.mark.parametrize("fault", ["the future is seen", "a gradient twice as large"])
def test_numerics_find_a_fault(fault, monkeypatch):
    from training_speed.sections import compute

    if fault == "the future is seen":
        monkeypatch.setattr(
            "cartilha.model.attention.causal_mask", lambda length, window, device: torch.ones(length, length).bool()
        )
    else:
        from cartilha.model.loss import nll_and_gradient

        def doubled(*arguments):
            nll, gradient = nll_and_gradient(*arguments)
            return nll, gradient * 2

        monkeypatch.setattr("cartilha.model.loss.chunk_kernel", lambda device: doubled)
    assert compute("numerics", {"shape": tiny(), "dtype": "bfloat16"})["failed"].startswith("numerics: ")


def test_memory_kernels_and_noise_are_measured():
    from training_speed.sections import compute

    memory = compute("memory", {"shape": tiny(), "dtype": "float32", "kernel": "segments", "limit_gib": None})
    assert memory["fits"] and memory["planned_bytes"] > 0 and memory["peak_bytes"] > 0
    gemm = compute("gemm", {"shape": tiny(), "dtype": "float32"})
    assert gemm["gemm_flops"] > 1e6 and gemm["known_peak"] is None
    loss = compute("loss_kernel", {"shape": tiny(), "dtype": "float32", "chunks": [16, 64]})
    assert [row["chunk_tokens"] for row in loss["rows"]] == [16, 64] and loss["rows"][0]["seconds"] > 0
    attention = compute(
        "attention_kernel", {"shape": tiny(), "dtype": "float32", "kernels": ["segments", "mask, boolean"]}
    )
    assert [row["kernel"] for row in attention["rows"]] == ["segments", "mask, boolean"] and attention["floor_s"] > 0
    score = compute("score", {"shape": tiny(longest=20), "dtype": "float32", "tokens": 100})
    assert score["scored_per_second"] > 0 and 5 < score["nats_per_token"] < 6 and 100 <= score["num_tokens"] < 120
    noise = compute("noise", {"shape": tiny(), "dtype": "float32", "compiled": False})
    assert noise == {"largest_difference": 0.0, "equal_steps": 2, "steps": 2}


def test_the_cost_of_a_token():
    from training_speed.flops import flops_per_token
    from training_speed.setup import Shape, model_config

    config = model_config(Shape())
    products, with_attention = flops_per_token(config, 512)
    assert products == 6 * (12 * (4 * 768**2 + 2 * 768 * 3072) + 50272 * 768)
    assert with_attention - products == 6 * 12 * 768 * 512


def test_a_section_that_fails_or_takes_too_long_is_recorded():
    from training_speed.sections import run

    assert "KeyError" in run("nothing of the kind", {"shape": tiny()}, 60)["failed"]
    assert run("gemm", {"shape": tiny(), "dtype": "float32"}, 0.01)["failed"] == "more than 0 s"


WORKER_WITH_A_CHILD = """
import os, subprocess, sys, time
print("getting on", file=sys.stderr, flush=True)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
name, gpus = sys.argv[1], os.environ["CUDA_VISIBLE_DEVICES"]
print("" if name == "slow" else f'RESULT{{"child": {child.pid}, "gpus": "{gpus}"}}', flush=True)
time.sleep(600 if name == "slow" else 0)
"""


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs groups of processes")
def test_a_process_that_outlives_its_section_is_ended(tmp_path, monkeypatch):
    """A compiler's helper holds the pipes: waiting for their end would never end."""
    from training_speed import sections

    worker = tmp_path / "worker.py"
    worker.write_text(WORKER_WITH_A_CHILD, encoding="utf-8")
    monkeypatch.setattr(sections, "WORKER", worker)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    slow = sections.run("slow", {}, 3)
    assert slow["failed"] == "more than 3 s" and slow["last_line"] == "getting on" and slow["seconds"] < 300
    done = sections.run("quick", {}, 3)
    assert done["gpus"] == "3" and done["seconds"] < 300  # a result that was printed counts
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.kill(done["child"], 0)
            time.sleep(0.05)


def test_memory_that_does_not_suffice_for_the_trainer_is_a_result(monkeypatch):
    from training_speed import variants
    from training_speed.sections import compute

    def full(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 6.13 GiB.\nand more")

    for name in ("_trainer", "_ours"):
        monkeypatch.setattr(variants, name, full)
    found = compute("train", {"shape": tiny(), "variant": "hf_users", "dtype": "float32"})
    assert found["out_of_memory"] == "CUDA out of memory. Tried to allocate 6.13 GiB"
    assert "tokens_per_second" not in found and found["peak_bytes"] > 0
    with pytest.raises(torch.OutOfMemoryError):  # ours is to fit
        compute("train", {"shape": tiny(), "variant": "ours", "dtype": "float32"})
    monkeypatch.setattr(variants, "_trainer", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compute("train", {"shape": tiny(), "variant": "hf_users", "dtype": "float32"})


def test_a_trainer_that_cannot_be_compiled_is_timed_plainly(monkeypatch):
    from training_speed import variants
    from training_speed.sections import compute

    def trainer(shape: Any, variant: str, dtype: str, compiled: bool) -> dict[str, Any]:
        if compiled:
            raise RuntimeError("PTXAS failed\nand a long trace")
        return {"positions_per_second": [5.0], "text_share": 1.0, "losses": [5.5], "compiled": False}

    monkeypatch.setattr(variants, "_trainer", trainer)
    found = compute("train", {"shape": tiny(), "variant": "hf_tuned", "dtype": "float32"})
    assert found["tokens_per_second"] == [5.0] and found["compile_error"] == "PTXAS failed"
    with pytest.raises(RuntimeError, match="PTXAS"):
        compute("train", {"shape": tiny(), "variant": "hf_users", "dtype": "float32"})


@pytest.mark.parametrize(("capability", "needed"), [((9, 0), True), ((8, 0), True), ((7, 5), False)])
def test_plain_code_is_a_fault_where_triton_works(capability, needed, monkeypatch):
    from training_speed.numerics import _was_compiled

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert _was_compiled("loss", print)["ok"] is not needed
    compiled = type("Compiled", (), {"is_compiled": True})()
    assert _was_compiled("loss", compiled)["ok"] is True


def test_what_no_time_is_left_for_is_left_out(monkeypatch):
    import train_gpu

    limits = []

    def slow(section: str, settings: dict[str, Any], limit_s: float) -> dict[str, Any]:
        limits.append(limit_s)
        return {"failed": f"more than {limit_s:.0f} s", "seconds": limit_s}

    monkeypatch.setattr(train_gpu, "run", slow)
    assert "failed" in train_gpu.in_time("train", {}, 60, time.monotonic() + 100)  # its own limit
    assert "left_out" in train_gpu.in_time("train", {}, 60, time.monotonic() + 30) and limits[0] == 60 > limits[1]
    assert "left_out" in train_gpu.in_time("train", {}, 60, time.monotonic() + 1) and len(limits) == 2
    monkeypatch.setattr(train_gpu, "run", lambda *arguments: {"failed": "it broke", "seconds": 1.0})
    assert "failed" in train_gpu.in_time("train", {}, 60, time.monotonic() + 30)


def test_what_is_measured_on_a_gpu():
    import train_gpu
    from training_speed.setup import Shape

    base = Shape(device="cuda", windows=3, window=10, warmup=3)
    sections = train_gpu.plan(base, "bfloat16", flash=True, quick=False)
    titles = [title for title, *_ in sections]
    shapes = ("512 x 16", "512 x 32", "1024 x 128")  # what a card of four minutes must tell
    first = [f"speed {shape} {variant}" for shape in shapes for variant in ("ours", "hf_tuned")]
    assert titles[:8] == [*first, "first step of a second process", "scoring"]
    assert {"numerics", "speed 512 x 32 hf_users", "speed 2048 x 8 ours"} <= set(titles)
    for row in ("512 x 4 in 15", "512 x 8 in 15", "1024 x 16 in 15", "2048 x 8 in 15", "1024 x 16 in 39"):
        assert f"memory {row} GiB, float16, mask" in titles and f"memory {row} GiB, bfloat16, varlen" in titles
    assert {"products", "loss alone", "attention alone", "two equal runs"} <= set(titles)
    off = ("late reading", "large chunks", "the factor in the kernel", "the clip in AdamW")
    assert titles[9:13] == [f"speed 512 x 16 ours without {name}" for name in off]
    assert len(titles) == len(set(titles)) == 32


def test_each_thing_that_makes_training_fast_can_be_turned_off(monkeypatch):
    import training_speed.switches as switches
    from training_speed.setup import Shape
    from training_speed.variants import measure

    monkeypatch.setattr(switches, "setattr", monkeypatch.setattr, raising=False)  # turned on again after this test
    for name in switches.SWITCHES:
        found = measure(
            Shape(model="tiny-opt", block_size=32, micro_batch=2, windows=1), "ours", "float32", without=name
        )
        assert found["tokens_per_second"][0] > 0
    assert importlib.import_module("cartilha.training.optimizer").CLIPS_IN_STEP == ()


@pytest.mark.parametrize("broken", ["numerics", "memory 64 x 4 in None GiB, float32, segments", None])
def test_a_failed_section_is_recorded_and_the_rest_goes_on(broken, tmp_path, monkeypatch, capsys):
    import train_gpu

    titles = []

    def fake(section: str, settings: dict[str, Any], limit_s: float) -> dict[str, Any]:
        if section == "machine":
            return {"available": True, "name": "a/card", "capability": None}
        titles.append(section)
        if broken and broken.startswith(section):
            return {"failed": "it broke"}
        if section == "train" and settings["variant"] == "hf_tuned":
            return {"out_of_memory": "CUDA out of memory"}
        if section == "train":
            return {"tokens_per_second": [50.0], "text_share": 0.5, "peak_bytes": 2**30}
        if section == "score":
            return {"scored_per_second": 7.0, "num_tokens": 9}
        return {"gemm_flops": 1e9, "known_peak": None} if section == "gemm" else {"checks": []}

    monkeypatch.setattr(train_gpu, "run", fake)
    monkeypatch.setattr(sys, "argv", ["train_gpu.py", "--device", "cpu", "--quick", "--output", str(tmp_path)])
    if broken:
        with pytest.raises(SystemExit, match="failed: "):
            train_gpu.main()
    else:
        train_gpu.main()
    (written,) = tmp_path.glob("train_cpu_*.json")
    sections = json.loads(written.read_text(encoding="utf-8"))["sections"]
    assert len(sections) == len(titles) == 15
    assert [s["title"] for s in sections if "failed" in s] == ([broken] if broken else [])
    printed = capsys.readouterr().out
    assert "tokens/s" in printed
    assert "hf_tuned: DID NOT FIT: CUDA out of memory" in printed
    assert "| 64 x 4 hf_tuned | did not fit |" in printed and "| 64 x 4 ours | 50 | 1.00x |" in printed


@pytest.mark.parametrize(
    ("machine", "sentence"),
    [
        ({"available": False, "name": "", "capability": None}, "There is no CUDA device here"),
        ({"failed": "driver too old"}, "could not be asked what it is: driver too old"),
    ],
)
def test_without_a_device_nothing_is_measured(machine, sentence, tmp_path, monkeypatch):
    import train_gpu

    monkeypatch.setattr(train_gpu, "run", lambda *arguments: machine)
    monkeypatch.setattr(sys, "argv", ["train_gpu.py", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match=sentence):
        train_gpu.main()
    assert not list(tmp_path.iterdir())
