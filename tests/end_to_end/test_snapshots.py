"""What a run keeps beside each evaluation: samples, surprisal, and the comparison with the model before training."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from cartilha.config import GenerateConfig, PrepareConfig, TrainConfig
from cartilha.corpus.document import Document
from cartilha.evaluation.documents import encode_documents
from cartilha.evaluation.saved import load_evaluation
from cartilha.evaluation.surprisal import LEAST_TOKENS, MAX_TOKENS, NUM_DOCUMENTS, shown_documents, token_texts
from cartilha.pipeline.prepare import prepare
from cartilha.pipeline.train import train
from cartilha.runs.snapshots import take_snapshot
from cartilha.tokens.tokenizer import load_tokenizer
from cartilha.training.streams import random_state

TOKENIZER = load_tokenizer("random:tiny")
PROMPTS = GenerateConfig(prompt=("Era uma vez",), max_new_tokens=4)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs over three dozen texts of three domains; some are longer than what is shown."""
    folder = tmp_path_factory.mktemp("snapshots")
    rows = []
    for number in range(36):
        text = f"A lição {number} não é difícil. " * (1 + number % 9)
        rows.append({"text": text, "id": f"lição-{number}", "domain": f"livro-{number % 3}"})
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    prepare(PrepareConfig(input=(str(corpus),), model="random:tiny", output=str(folder / "store")))
    config = TrainConfig(
        model="random:tiny",
        store=folder / "store",
        output=folder / "run",
        block_size=64,
        epochs=2,
        batch_tokens=512,
        skip_checks=True,
    )
    train(config, prompts=PROMPTS)
    return folder / "run"


def results(run: Path) -> dict[str, Any]:
    values = json.loads((run / "results.json").read_text(encoding="utf-8"))
    assert isinstance(values, dict)
    return values


def test_surprisal_is_that_of_the_evaluation_with_the_likeliest_tokens(run):
    table = pq.read_table(run / "surprisal.parquet").to_pandas()
    steps = [row["step"] for row in results(run)["evaluations"]]
    assert len(steps) == 3 and sorted(table.step.unique()) == steps
    whole = 0
    for step, rows in table.groupby("step"):
        saved = load_evaluation(run / "evaluations" / f"step-{step:08d}.parquet")
        for doc_id, tokens in rows.groupby("doc_id"):
            place = saved.doc_ids.index(doc_id)
            text = "".join(tokens.text)
            assert list(tokens.position) == list(range(len(tokens)))
            if len(text.encode()) == saved.num_bytes[place]:  # shown whole: its tokens add up to the document's figure
                whole += 1
                assert tokens.nll.sum() == pytest.approx(saved.nll[place], rel=1e-5)
            else:
                assert len(tokens) == MAX_TOKENS and tokens.nll.sum() < saved.nll[place]
        likeliest = np.array(rows.likeliest_probabilities.tolist())
        assert likeliest.shape == (len(rows), 5) and (np.diff(likeliest) <= 0).all() and (likeliest.sum(1) <= 1).all()
        ids = np.array(rows.likeliest_ids.tolist())
        hits = ids == rows.token_id.to_numpy()[:, None]
        # A rank among equal probabilities is somewhere among theirs; here they are equal up to float32's rounding.
        own, rank = np.exp(-rows.nll.to_numpy())[:, None], rows["rank"].to_numpy()
        least, most = 1 + (likeliest > own * 1.0001).sum(1), (likeliest >= own * 0.9999).sum(1)
        listed = most < 5  # the fifth is less likely, so that no equal one can have been left out
        assert (least <= rank).all() and (rank[listed] <= most[listed]).all()
        assert hits.any(1)[listed].all() and not hits.any(1)[least > 5].any()
        assert likeliest[hits] == pytest.approx(np.exp(-rows.nll.to_numpy()[hits.any(1)]), rel=1e-4)
        assert (rows.entropy > 0).all()
    assert whole  # the test has compared something


def test_the_comparison_is_of_the_last_evaluation_with_the_first(run):
    record = results(run)
    found, evaluations = record["comparison"], record["evaluations"]
    assert found["steps"] == [0, evaluations[-1]["step"]]
    assert found["bits_per_byte_first"] == pytest.approx(evaluations[0]["bits_per_byte"])
    assert found["bits_per_byte_second"] == pytest.approx(evaluations[-1]["bits_per_byte"])
    low, high = found["bits_per_byte_difference_interval"]
    assert low < found["bits_per_byte_difference"] < high < 0
    assert set(found["domains"]) == set(evaluations[0]["domains"])
    row = found["gained_most"][0]
    assert row["begins"].startswith("A lição ") and row["domain"].startswith("livro-")
    assert row["bits_per_byte_second"] < row["bits_per_byte_first"] and math.isfinite(row["bits_per_byte_first"])


def test_texts_written_at_an_epochs_end_draw_none_of_the_trainings_random_numbers(run, tmp_path):
    store = run.parent / "store"
    config = TrainConfig(
        model="random:tiny-opt",
        store=str(store),
        block_size=64,
        epochs=2,
        batch_tokens=512,
        dropout=True,
        skip_checks=True,
    )
    losses = []
    for number, prompts in enumerate((PROMPTS, replace(PROMPTS, do_sample=True, seed=5, max_new_tokens=9))):
        path = tmp_path / str(number)
        train(replace(config, output=str(path)), prompts=prompts)
        lines = (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses.append([json.loads(line).get("loss") for line in lines])
    assert losses[0] == losses[1] and len(set(losses[0])) > 4


def test_a_snapshot_leaves_every_stream_of_random_numbers_where_it_was(run, tmp_path, monkeypatch):
    drawn = []

    def watched(*arguments):
        before = random_state()
        texts = take_snapshot(*arguments)
        drawn.append([name for name, state in random_state().items() if state != before[name]])
        return texts

    monkeypatch.setattr("cartilha.pipeline.train.take_snapshot", watched)
    config = TrainConfig(
        model="random:tiny",
        store=run.parent / "store",
        output=tmp_path / "run",
        block_size=64,
        batch_tokens=512,
        skip_checks=True,
    )
    train(config, prompts=replace(PROMPTS, do_sample=True, seed=5))
    assert drawn == [[], []]


def test_the_shown_documents_are_long_enough_and_of_different_domains():
    texts = [("a" * (4 + 40 * (i % 4)), f"domínio {i % 3}") for i in range(30)]
    documents = [Document(f"{i} {text}", f"doc-{i}", "x", domain) for i, (text, domain) in enumerate(texts)]
    chosen = shown_documents(encode_documents(documents, TOKENIZER))
    assert len(chosen.ids) == NUM_DOCUMENTS and len(set(chosen.domains)) == 3
    assert all(LEAST_TOKENS <= len(ids) <= MAX_TOKENS for ids in chosen.ids)
    again = shown_documents(encode_documents(documents[::-1], TOKENIZER))
    assert again.doc_ids == chosen.doc_ids  # by their texts, not by their places
    short = shown_documents(encode_documents([Document("oi", "curto", "x", "x")], TOKENIZER))
    assert short.doc_ids == ["curto"]


def test_a_character_of_several_tokens_belongs_to_the_last():
    text = "pão é \N{GRINNING FACE}!"
    (ids,) = TOKENIZER.encode([text])
    texts = token_texts(TOKENIZER, ids)
    assert len(texts) == len(text.encode()) and "".join(texts) == text
    assert texts[1:3] == ["", "ã"] and texts[-5:] == ["", "", "", "\N{GRINNING FACE}", "!"]
    assert token_texts(TOKENIZER, ids[:2])[-1] == "\ufffd"  # a text that is cut inside a character says so


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_on_a_terminal_a_panel_is_drawn_and_leaves_lines_whole(run, tmp_path):
    import pty

    arguments = ["--model", "random:tiny", "--store", run.parent / "store", "--output", tmp_path / "run", "--json"]
    arguments += [
        "--skip_checks",
        "--block_size",
        64,
        "--batch_tokens",
        512,
        "--max_steps",
        8,
        "--tracker",
        "tensorboard",
    ]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "cartilha", "train", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=theirs,
        stdin=theirs,
        env={**os.environ, "COLUMNS": "110", "LINES": "40", "TERM": "xterm-256color"},
    )
    os.close(theirs)
    seen = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux's way to say that the other side is closed
            break
        if not part:
            break
        seen += part
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, seen
    assert json.loads(out)["status"] == "finished"  # standard output has the result alone
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.decode("utf-8"))
    for part in ("step 8 of 8", "nats/token", "tokens/s", "time left", "GB", "Era uma vez"):
        assert part in text
    assert "Traceback" not in text and any((tmp_path / "run" / "tensorboard").iterdir())
