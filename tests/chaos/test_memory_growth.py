"""Memory that does not come back: what a run writes at every evaluation must not make it grow."""

from __future__ import annotations

import subprocess
import sys

import pytest

ROUNDS = """
import sys
from pathlib import Path

import numpy as np
import psutil

import cartilha  # before pyarrow, as in every command
import pyarrow as pa
import pyarrow.parquet as pq

from cartilha.storage import new_file

path, rows = Path(sys.argv[1]), 640
kept = None  # as surprisal.parquet, which grows, and the evaluations beside it
process, sizes = psutil.Process(), []
for number in range(31):
    values = np.random.default_rng(number).random(rows)
    new = pa.table({"step": np.full(rows, number), "nll": values, "text": [f"texto {i}" for i in range(rows)]})
    kept = new if number == 0 else pa.concat_tables([pq.read_table(path), new])
    with new_file(path) as temporary:
        pq.write_table(kept, temporary, compression="zstd")
    for _ in range(6):
        with new_file(path.with_name("part")) as temporary:
            pq.write_table(kept.slice(0, 500), temporary, compression="zstd")
        pq.read_table(path.with_name("part")).to_pydict()
    sizes.append(process.memory_info().rss)
print(pa.default_memory_pool().backend_name, (sizes[-1] - sizes[1]) / 2**20)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the system's allocator is another one there")
def test_tables_written_and_read_over_and_over_leave_nothing_in_memory(tmp_path):
    """With arrow's own allocator this grows by 40 MiB and more; half a MiB is the table itself."""
    arguments = [sys.executable, "-c", ROUNDS, str(tmp_path / "table.parquet")]
    done = subprocess.run(arguments, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    allocator, grown_mib = done.stdout.split()
    assert allocator == "system" and float(grown_mib) < 15, done.stdout
