"""`make docs-test`: every block of commands in the documentation is run, and what it prints is compared with the page.

    python docs/site/fences.py [PAGE...]

The blocks of a page run in order, in one folder that holds what pages speak of (`workspace.py`: texts, stores, a run, a
small model under the names that pages use). A comment on the line above a block marks it:

    <!-- not run: why -->   what is not here is needed: a hub, a GPU, a cluster, minutes of work
    <!-- varies -->         above an output: its numbers differ from machine to machine
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from pages import ROOT, Fence, Page, pages

OUTPUT_KINDS = ("", "text")
LONGEST_SECONDS = 900
WORKSPACE = Path(__file__).with_name("workspace.py")
RECORDS = {"CHANGELOG.md", "docs/log.md"}  # what was run at the time, and where


def blocks(page: Page) -> list[tuple[Fence, Fence | None]]:
    """The page's commands, each with the output below it."""
    fences = page.fences
    found = []
    for fence, after in pairwise([*fences, None]):
        if fence and fence.kind in ("sh", "python"):
            follows = after is not None and after.kind in OUTPUT_KINDS and _nothing_between(page, fence, after)
            found.append((fence, after if follows else None))
    return found


def _nothing_between(page: Page, fence: Fence, after: Fence) -> bool:
    return not re.sub(r"^```$", "", page.text[fence.start : after.start].partition(fence.text)[2], flags=re.M).strip()


def same(printed: str, shown: str, varies: bool) -> bool:
    """Whether each line that the page shows was printed, in this order; `...` stands for anything."""
    rest = _plain(printed, varies)
    for line in _plain(shown, varies).splitlines():
        if line.strip(" .") == "":
            continue
        _, found, rest = rest.partition(line.strip())
        if not found:
            return False
    return True


def _plain(text: str, varies: bool) -> str:
    text = re.sub(r"[ \t]+", " ", text)
    return re.sub(r"[-+]?\d[\d.,:]*", "#", text) if varies else text


def run(page: Page, folder: Path) -> list[str]:
    """Run the blocks of a page, its Python as one script after them; returns what went wrong."""
    to_run = [pair for pair in blocks(page) if not pair[0].mark.startswith("not run: ")]
    jobs = [(fence.text, fence, output) for fence, output in to_run if fence.kind == "sh"]
    script = [fence for fence, _ in to_run if fence.kind == "python"]
    if script:
        text = "\n".join(fence.text for fence in script)
        jobs.append((f"python - <<'END_OF_PYTHON'\n{text}\nEND_OF_PYTHON", script[0], None))
    faults = []
    for commands, fence, output in jobs:
        place = f"{page.path}:{page.text[: fence.start].count(chr(10)) + 1}"
        begin = time.perf_counter()
        code, printed = shell(commands, folder)
        print(f"{place}: {code} after {time.perf_counter() - begin:.0f} s", flush=True)
        if code:
            faults.append(f"{place} ended with {code}:\n{printed[-1500:]}")
        elif output and not same(printed, output.text, output.mark == "varies"):
            faults.append(f"{place} printed something else than the page shows:\n{printed[-3000:]}")
    return faults


def shell(commands: str, folder: Path) -> tuple[int, str]:
    """Exit code and output of commands, with this checkout's package and without a hub."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "src"),
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "120",
        "LANG": "C.UTF-8",
    }
    bash = ["nice", "bash", "-e", "-c", commands]
    try:
        done = subprocess.run(
            bash, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=LONGEST_SECONDS
        )
    except subprocess.TimeoutExpired as late:
        return 124, (late.stdout or b"").decode(errors="replace")
    return done.returncode, done.stdout.decode(errors="replace")


def main() -> int:
    """Run the pages that were named, or all."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("page", nargs="*", help="README.md, docs/data.md, ...; default all")
    wanted = parser.parse_args().page
    faults, num_blocks, num_marked = [], 0, 0
    all_pages = {page.path: page for page in pages()}
    with tempfile.TemporaryDirectory() as scratch:
        workspace = Path(scratch, "workspace")
        workspace.mkdir()
        code, printed = shell(f"python {WORKSPACE}", workspace)
        if code:
            print(printed, file=sys.stderr)
            return 1
        for number, page in enumerate(all_pages.values()):
            if page.path not in (wanted or set(all_pages) - RECORDS) or not blocks(page):
                continue
            folder = Path(scratch, str(number))
            shutil.copytree(workspace, folder)
            faults += run(page, folder)
            num_blocks += len(blocks(page))
            num_marked += sum(fence.mark.startswith("not run: ") for fence, _ in blocks(page))
            shutil.rmtree(folder)
    print(*faults, sep="\n\n", file=sys.stderr)
    print(f"{num_blocks - num_marked} blocks run, {num_marked} marked as not run, {len(faults)} wrong.")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
