"""A section in a process of its own: `python worker.py SECTION SETTINGS`, both from `sections.run`; prints a result."""

from __future__ import annotations

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from training_speed.sections import MARK, compute

    print(MARK + json.dumps(compute(sys.argv[1], json.loads(sys.argv[2]))))
