"""A task of lm-evaluation-harness that the tests write themselves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path


def write_pairs_task(folder: Path, name: str, pairs: Sequence[tuple[str, str]]) -> Path:
    """A task of lm-evaluation-harness: the first text of each pair should be the likelier one."""
    rows, path = folder / "pairs.jsonl", folder / f"{name}.yaml"
    rows.write_text("".join(json.dumps({"good": good, "bad": bad}) + "\n" for good, bad in pairs), encoding="utf-8")
    path.write_text(
        f"""task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{rows}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: ""
doc_to_target: 0
doc_to_choice: "{{{{[good, bad]}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
""",
        encoding="utf-8",
    )
    return path
