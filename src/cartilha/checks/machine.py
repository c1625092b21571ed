"""Does it fit: the plan against the device's memory, the files against the disk."""

from __future__ import annotations

import shutil

from cartilha.checks.outcome import CheckResult, Judgement, Subject
from cartilha.machine.memory import available_memory_bytes


def memory_and_disk(subject: Subject) -> CheckResult:
    """The planned step fits the device, the checkpoints and the model fit the disk.

    Catches the run that dies of memory at step 1, and the one that dies of a full disk at its first checkpoint.
    """
    words = Judgement(
        "less than what is free",
        "The run would end in an out-of-memory error or on a full disk.",
        "Use a smaller --block_size or --micro_batch_size or a smaller model (cartilha plan shows what fits), or free "
        "some disk space.",
    )
    need, free = subject.planned_bytes, available_memory_bytes(subject.device)
    disk_need, disk_free = subject.disk_bytes, shutil.disk_usage(subject.disk).free
    wanted = "not planned" if need is None else f"{need / 2**30:.1f} GiB"
    measured = (
        f"memory: {wanted} for micro-batches of {subject.micro_batch_size} x {subject.block_size}, "
        f"{free / 2**30:.1f} GiB available; disk: {disk_need / 2**30:.1f} GiB, {disk_free / 2**30:.1f} GiB free"
    )
    figures = {"memory_bytes": need, "free_memory_bytes": free, "disk_bytes": disk_need, "free_disk_bytes": disk_free}
    return words.judge((need or 0) <= free and disk_need <= disk_free, measured, **figures)
