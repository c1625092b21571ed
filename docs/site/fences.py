"""`make docs-test`: every block of commands in the documentation is run, and what it prints is compared with the page.

    python docs/site/fences.py [PAGE...]

The blocks of a page run in order, in one folder that holds what pages speak of (`workspace.py`: texts, stores, a run, a
small model under the names that pages use). A comment on the line above a block marks it:

    <!-- not run: why -->   what is not here is needed: a hub, a GPU, a cluster, minutes of work
    <!-- varies -->         above an output: its numbers differ from machine to machine
"""

from __future__ import annotations

import argparse
import json
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
    return re.sub(r"[-+]?\d[\d.,:]*", "#", re.sub(r"[─━]+", "─", text)) if varies else text


def run(page: Page, folder: Path) -> list[str]:
    """Run the blocks of a page in order, its Python in one interpreter; returns what went wrong."""
    to_run = [pair for pair in blocks(page) if not pair[0].mark.startswith("not run: ")]
    faults = []
    with Interpreter(folder) as interpreter:
        for fence, output in to_run:
            begin = time.perf_counter()
            failed, printed = interpreter.run(fence.text) if fence.kind == "python" else shell(fence.text, folder)
            place = f"{page.path}:{page.text[: fence.start].count(chr(10)) + 1}"
            fault = "failed" if failed else ""
            if output and not failed and not same(printed, output.text, output.mark == "varies"):
                fault = "printed something else than the page shows"
            print(f"{place}: {fault or 'done'}, {time.perf_counter() - begin:.0f} s", flush=True)
            if fault:
                faults.append(place)
                print(printed[-3000:], file=sys.stderr, flush=True)
    return faults


def shell(commands: str, folder: Path) -> tuple[bool, str]:
    """Whether commands failed, and what they printed."""
    bash = ["nice", "bash", "-e", "-c", commands]
    try:
        done = subprocess.run(
            bash,
            cwd=folder,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=LONGEST_SECONDS,
        )
    except subprocess.TimeoutExpired as late:
        return True, (late.stdout or b"").decode(errors="replace") + "\nIt took too long."
    return done.returncode != 0, done.stdout.decode(errors="replace")


def environment() -> dict[str, str]:
    """This checkout's package, and no hub."""
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "src"),
        "PYTHONUTF8": "1",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "120",
    }


class Interpreter:
    """A Python process that runs one block after another with the same names, as a notebook does."""

    _LOOP = """
import contextlib, io, json, sys, traceback
answers, names = sys.stdout, {"__name__": "__main__"}
for line in sys.stdin:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            exec(compile(json.loads(line), "block", "exec"), names)
            failed = False
        except BaseException:
            traceback.print_exc()
            failed = True
    print(json.dumps([failed, printed.getvalue()]), file=answers, flush=True)
"""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Interpreter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process and self._process.stdin:
            self._process.stdin.close()
            self._process.wait()

    def run(self, code: str) -> tuple[bool, str]:
        """Whether a block failed, and what it printed."""
        if self._process is None:
            command, pipe = ["nice", sys.executable, "-c", self._LOOP], subprocess.PIPE
            self._process = subprocess.Popen(
                command, cwd=self._folder, env=environment(), stdin=pipe, stdout=pipe, text=True, encoding="utf-8"
            )
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(code) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        failed, printed = json.loads(answer) if answer else (True, "The interpreter ended.")
        return failed, printed


def main() -> int:
    """Run the pages that were named, or all."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("page", nargs="*", help="README.md, docs/data.md, ...; default all")
    wanted = [os.path.relpath(path, ROOT) if os.path.exists(path) else path for path in parser.parse_args().page]
    faults, num_blocks, num_marked = [], 0, 0
    all_pages = {page.path: page for page in pages()}
    if unknown := set(wanted) - set(all_pages):
        parser.error(f"there is no page {unknown.pop()}; choose from {', '.join(all_pages)}")
    with tempfile.TemporaryDirectory() as scratch:
        workspace = Path(scratch, "workspace")
        workspace.mkdir()
        failed, printed = shell(f"python {WORKSPACE}", workspace)
        if failed:
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
    wrong = f"{len(faults)} wrong: {', '.join(faults)}" if faults else "none wrong"
    print(f"{num_blocks - num_marked} blocks run, {num_marked} marked as not run, {wrong}.")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
