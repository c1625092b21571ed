"""The report on fabricated run directories: every status, every gap, and nothing that compares what may not be."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from cartilha.errors import UserError, install_command
from cartilha.explorer.wording import PageWording
from cartilha.reporting import chart, html, surprisal, tables
from cartilha.reporting.html import render_report
from cartilha.reporting.images import write_figures
from cartilha.reporting.results import STATUSES, load_run
from cartilha.reporting.samples import sample_series
from cartilha.reporting.several import load_runs, overlaid_figures
from cartilha.reporting.tables import footnotes, results_table, to_csv, to_markdown
from cartilha.reporting.wording import LANGUAGES, Language, Wording, choose_language
from cartilha.terminal.results import show


def evaluation(
    step: int, perplexity: float = 89.02, bits: float = 2.31, hash: str = "ab12", **more: Any
) -> dict[str, Any]:
    protocol = {"name": "full", "window": 2048, "stride": 1024, "prefix_id": 0, "dtype": "bfloat16", "hash": hash}
    counts = {
        "num_tokens": 46_812,
        "num_bytes": 163_210,
        "num_chars": 158_200,
        "num_words": 26_011,
        "num_documents": 451,
    }
    return {
        "step": step,
        "epoch": 0,
        "model": "random:tiny",
        "protocol": protocol,
        "perplexity": perplexity,
        "bits_per_byte": bits,
        **counts,
        "baselines": {"uniform": {"perplexity": 49152.0}},
        **more,
    }


def make_run(path: Path, steps: int = 10, **results: Any) -> Path:
    """A whole run directory; keywords replace keys of results.json."""
    path.mkdir(parents=True)
    settings = {"model": "random:tiny", "block_size": 512, "epochs": 2, "max_steps": None, "num_steps": steps}
    settings |= {"batch_tokens": 4096, "blocks_per_step": 8, "lr": 3e-4, "device": "cpu"}
    record = {
        "format_version": 1,
        "name": path.name,
        "status": "finished",
        "error": None,
        "resumed_from_step": [],
        "settings": settings,
        "corpus": {"num_train_tokens": 187_012, "validation_hash": "cafe", "tokenizer_fingerprint": "gpt2"},
        "packing": {"num_blocks": 40, "padding_share": 0.001},
        "epochs": [
            {"epoch": 1, "train_loss": 4.0, "validation_loss": 3.6, "seconds": 610.0},
            {"epoch": 2, "train_loss": 3.5, "validation_loss": 3.4, "seconds": 630.0},
        ],
        "evaluations": [evaluation(0), evaluation(steps, 32.507, 1.7913)],
        "tokens_per_second": 304.2,
        "memory_bytes": 4_200_000_000,
        "seconds": 1240.0,
        "notices": ["No GPU was found."],
        "machine": {"device": "cpu", "device_name": "Xeon"},
        "versions": {"torch": "2.13.0"},
    } | results
    (path / "results.json").write_text(json.dumps(record), encoding="utf-8")
    lines = [
        {
            "step": step,
            "epoch": 1,
            "tokens": step * 4096,
            "loss": 4 - step / steps,
            "lr": 3e-4,
            "tokens_per_second": 300.0,
        }
        for step in range(1, steps + 1)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    samples = [(0, "Era uma vez the farm"), (steps, "Era uma vez uma menina")]
    texts = [{"step": step, "prompt": "Era uma vez ", "text": text, "mode": "greedy"} for step, text in samples]
    (path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in texts), encoding="utf-8")
    (path / "config.yaml").write_text("model: random:tiny\ntrain:\n  block_size: 512\n  epochs: 2\n", encoding="utf-8")
    plan = {"micro_batch_size": 4, "memory_bytes": 4_000_000_000, "available_bytes": None, "tokens_per_second": 310.5}
    (path / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    write_surprisal(path, (0, steps // 2, steps), ["Era", " uma", " vez"])
    return path


def write_surprisal(path: Path, steps: Sequence[int], texts: Sequence[str], num_documents: int = 2) -> None:
    """surprisal.parquet with the columns that the evaluation writes."""
    rows = [
        {
            "step": step,
            "document": document,
            "doc_id": f"lição-{document}",
            "position": position,
            "token_id": position,
            "text": text,
            "nll": 1.0 + position + 1 / (1 + step),
            "entropy": 1.5,
            "rank": 1 + position,
            "likeliest_ids": list(range(5)),
            "likeliest_texts": [text, " o", " a", "\n", "\ufffd"],
            "likeliest_probabilities": [0.3, 0.2, 0.1, 0.05, 0.04],
        }
        for step in steps
        for document in range(num_documents)
        for position, text in enumerate(texts)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path / "surprisal.parquet")


def page_of(*runs: Path, language: str = "en") -> str:
    output = runs[0].parent / "report.html"
    assert render_report(runs, output, language) == output
    return output.read_text(encoding="utf-8")


class Elements(HTMLParser):
    """Start tags with their attributes, and the text of each element that is not a script or a style."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.text += data


def markdown_cells(table: str) -> Iterator[list[str]]:
    """The cells of each line as GitHub reads them: a pipe after a backslash does not end a cell."""
    for line in table.splitlines():
        if line.startswith("|"):
            yield [cell.strip() for cell in re.split(r"(?<!\\)(?:\\\\)*\|", line)[1:-1]]


RUN_FILES = ("results.json", "metrics.jsonl", "samples.jsonl", "config.yaml", "plan.json", "surprisal.parquet")


def cells_of(row: tables.Row) -> dict[str, str]:
    """The texts of a table of this row alone."""
    return {column.key: column.text(row, Wording("en")) for column in tables.columns([row])}


# Reading


def test_a_whole_run_is_read(tmp_path: Path) -> None:
    run = load_run(make_run(tmp_path / "run"))
    assert run.missing == []
    assert (run.status, run.batch, run.device_name) == ("finished", 8, "Xeon")
    assert run.before is not None and run.before.perplexity == 89.02
    assert run.after is not None and run.after.bits_per_byte == 1.7913
    assert [step.step for step in run.steps] == list(range(1, 11))


@pytest.mark.parametrize("name", RUN_FILES)
def test_any_file_may_be_missing_and_is_named(tmp_path: Path, name: str) -> None:
    path = make_run(tmp_path / "run")
    (path / name).unlink()
    assert load_run(path).missing == [name]
    assert name in Elements(page_of(path)).text


def test_a_run_without_results_is_read_from_what_is_there(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    (path / "results.json").unlink()
    with (path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        for step in (0, 5):
            file.write(json.dumps({"step": step, "epoch": 1, "evaluation": evaluation(99, 40.0)}) + "\n")
    run = load_run(path)
    assert (run.status, run.name, run.settings.block_size) == ("unknown", "run", 512)
    assert [one.step for one in run.evaluations] == [0, 5]  # where the line says, not where the evaluation does
    assert "status not recorded" in page_of(path)


@pytest.mark.parametrize("config", ["a: [", "day: 2026-13-45", "just text", ""])
def test_a_config_that_cannot_be_read_gives_no_settings(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.yaml").write_text(config, encoding="utf-8")
    assert set(vars(load_run(tmp_path).settings).values()) == {None}


def test_empty_results_name_what_they_lack(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    (path / "results.json").write_text("{}", encoding="utf-8")
    run = load_run(path)
    assert "results.json: evaluations" in run.missing and run.after is None
    page_of(path)


def test_values_of_a_wrong_type_count_as_absent(tmp_path: Path) -> None:
    odd = [{"step": 0}, evaluation(10, math.nan), "no evaluation"]
    path = make_run(
        tmp_path / "run", evaluations=odd, settings=[1], epochs={"a": 1}, notices=None, machine="x", seconds=True
    )
    run = load_run(path)
    assert (run.epochs, run.notices, run.seconds, run.settings.lr) == ((), (), None, None)
    assert run.after is not None and run.after.perplexity is None
    page_of(path)


def test_torn_lines_are_left_out_and_counted(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    metrics = path / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes() + '{"step": 11, "note": "não'.encode()[:-2])
    run = load_run(path)
    assert len(run.steps) == 10
    assert run.missing == ["metrics.jsonl: 1 unreadable line"]


def test_a_step_that_a_resume_repeated_counts_once(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    with (path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 9, "loss": 1.5}\n')
    run = load_run(path)
    assert [step.step for step in run.steps] == list(range(1, 11))
    assert run.steps[8].loss == 1.5


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run directory"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not a run directory"):
        load_run(tmp_path)
    with pytest.raises(UserError, match="newer cartilha"):
        load_run(make_run(tmp_path / "future", format_version=2))
    with pytest.raises(UserError, match="nothing to report"):
        render_report([], tmp_path / "report.html")


def test_the_headline_pairs_what_may_be_compared(tmp_path: Path) -> None:
    whole = evaluation(10, 30.0, num_documents=4510, num_bytes=1_632_100)
    run = load_run(make_run(tmp_path / "a", evaluations=[evaluation(0), evaluation(10, 33.0), whole]))
    assert run.after is not None and run.after.perplexity == 33.0
    path = make_run(tmp_path / "b", evaluations=[evaluation(0), whole])
    assert "were done differently, so the change is not shown" in page_of(path)
    assert "−66.3%" not in page_of(path)


# The table


@pytest.mark.parametrize("status", STATUSES)
def test_every_status_is_a_row(tmp_path: Path, status: str) -> None:
    path = make_run(tmp_path / "run", status=status, error="It broke.", evaluations=[evaluation(0)], epochs=[])
    (row,) = results_table([load_run(path)])
    (fields,) = csv.DictReader(io.StringIO(to_csv([row])))
    assert fields["status"] == status  # and no figures of before training
    empty = ("val_perplexity", "val_bits_per_byte", "seconds_per_epoch", "step")
    assert [fields[name] for name in empty] == [""] * 4
    cells = cells_of(row)
    assert list(markdown_cells(to_markdown([row], "en")))[2] == list(cells.values())
    assert cells["status"] == status.replace("_", " ")
    assert cells["val_perplexity"] == cells["val_bits_per_byte"] == cells["seconds_per_epoch"] == "-"
    assert (cells["seq_length"], cells["epochs"], cells["batch"], cells["device"]) == ("512", "2", "8", "Xeon")
    assert "It broke." in page_of(path)


def test_the_figures_of_a_finished_run(tmp_path: Path) -> None:
    rows = results_table([load_run(make_run(tmp_path / "run"))])
    english = list(markdown_cells(to_markdown(rows, "en")))
    assert english[0][5:8] == ["time/epoch", "val perplexity", "val bits per byte"]
    assert english[2] == ["run", "512", "2", "8", "Xeon", "10 min 20 s", "32.51", "1.791", "finished"]
    assert list(markdown_cells(to_markdown(rows, "pt")))[2][6:] == ["32,51", "1,791", "concluído"]
    assert footnotes(rows, Wording("en")) == []
    (fields,) = csv.DictReader(io.StringIO(to_csv(rows)))
    assert (fields["val_perplexity"], fields["val_bits_per_byte"], fields["seconds_per_epoch"]) == (
        "32.51",
        "1.791",
        "620.0",
    )


def test_a_figure_from_before_the_end_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", status="interrupted", evaluations=[evaluation(0), evaluation(5, 50.0)])
    (row,) = results_table([load_run(run)])
    assert cells_of(row)["status"] == "interrupted (figures of step 5)"
    assert "step 5 of 10" in page_of(run)


def test_a_part_of_an_epoch_gives_no_time_per_epoch(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    record = json.loads((path / "results.json").read_text(encoding="utf-8"))
    record["settings"]["max_steps"] = 8  # 64 blocks, and an epoch has 40
    record["settings"]["num_steps"] = 8
    (path / "results.json").write_text(json.dumps(record), encoding="utf-8")
    (row,) = results_table([load_run(path)])
    assert ",610.0," in to_csv([row])
    assert cells_of(row)["epochs"] == "8 steps"


def test_a_column_from_outside_is_in_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    headings: dict[Language, str] = {"en": "word perplexity", "pt": "perplexidade por palavra"}
    column = tables.Column("word_perplexity", lambda run: tables.last(run).word_perplexity, headings)
    column = replace(column, write=Wording.perplexity, plain=round, alike=lambda run: None)
    monkeypatch.setattr(tables, "COLUMNS", [*tables.COLUMNS, column])
    last = evaluation(10, 33.0, word_perplexity=1234.567)
    paths = [make_run(tmp_path / "a", evaluations=[evaluation(0), last]), make_run(tmp_path / "b")]
    rows = results_table(load_runs(paths))
    english = list(markdown_cells(to_markdown(rows, "en")))
    assert [line[-1] for line in english] == ["word perplexity", "---:", "1,235", "-"]
    fields = list(csv.DictReader(io.StringIO(to_csv(rows))))
    assert [row["word_perplexity"] for row in fields] == ["1235", ""]
    page = page_of(*paths)
    assert "word perplexity</th>" in page and "<span>1,235</span>" in page and "<span>1.235</span>" in page
    show("report", {"table": to_markdown(rows, "en"), "report": "r.html", "figures": []})
    assert "1,235" in capsys.readouterr().out
    other = make_run(tmp_path / "c", evaluations=[evaluation(0, hash="ffff"), evaluation(10, hash="ffff")])
    assert "perplexidade por palavra (a)" in to_markdown(results_table(load_runs([*paths, other])), "pt")


MISMATCHES = {
    "protocol": {"evaluations": [evaluation(0, hash="ffff"), evaluation(10, 29.1, 1.7, hash="ffff")]},
    "validation text": {"corpus": {"validation_hash": "beef", "tokenizer_fingerprint": "gpt2"}},
    "part of the text": {"evaluations": [evaluation(0, num_bytes=99), evaluation(10, num_bytes=99)]},
    "unrecorded text": {"corpus": {"tokenizer_fingerprint": "gpt2"}},
}


@pytest.mark.parametrize("what", MISMATCHES)
def test_what_was_measured_differently_is_marked(tmp_path: Path, what: str) -> None:
    paths = [make_run(tmp_path / "a"), make_run(tmp_path / "b", **MISMATCHES[what]), make_run(tmp_path / "c")]
    rows = results_table([load_run(path) for path in paths])
    assert [row.mark for row in rows] == ["a", "b", "a"]
    markdown = to_markdown(rows, "en")
    assert "cannot be compared" in markdown
    headings, _, *lines = markdown_cells(markdown)
    columns = {heading: [cells[i] != "" for cells in lines] for i, heading in enumerate(headings) if "(" in heading}
    assert columns == {  # no column holds figures of both
        "val perplexity (a)": [True, False, True],
        "val perplexity (b)": [False, True, False],
        "val bits per byte (a)": [True, False, True],
        "val bits per byte (b)": [False, True, False],
    }
    fields = list(csv.DictReader(io.StringIO(to_csv(rows))))
    assert [row["comparable_group"] for row in fields] == ["a", "b", "a"] and "val_perplexity" not in fields[0]
    assert [row["val_perplexity_a"] != "" for row in fields] == [True, False, True]
    assert [row["val_bits_per_byte_b"] != "" for row in fields] == [False, True, False]
    page = page_of(*paths)
    assert "val perplexity (a)</th>" in page and "val perplexity (b)</th>" in page
    assert "cannot be compared" in page and "não podem ser comparados" in page


def test_two_runs_that_record_nothing_are_not_taken_as_alike(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / name, corpus={"tokenizer_fingerprint": "gpt2"}) for name in "ab"]
    rows = results_table([load_run(path) for path in paths])
    assert [row.mark for row in rows] == ["a", "b"]
    assert "validation text not recorded" in to_markdown(rows, "en")


def test_what_was_measured_alike_is_not_marked(tmp_path: Path) -> None:
    failed = make_run(tmp_path / "c", status="failed", evaluations=[], corpus={})  # no figure, so nothing to compare
    paths = [make_run(tmp_path / "a"), make_run(tmp_path / "b"), failed]
    assert "cannot be compared" not in page_of(*paths)
    assert "val perplexity</th>" in page_of(*paths)


def test_other_tokenizers_part_the_perplexities_alone(tmp_path: Path) -> None:
    other = make_run(tmp_path / "b", corpus={"validation_hash": "cafe", "tokenizer_fingerprint": "llama"})
    rows = results_table([load_run(make_run(tmp_path / "a")), load_run(other)])
    titles = [column.title(Wording("en")) for column in tables.columns(rows)[6:]]
    assert titles == ["val perplexity (a)", "val perplexity (b)", "val bits per byte", "status"]
    assert [mark for mark, _ in footnotes(rows, Wording("en"))] == ["", "", "a", "b"]
    assert "only bits per byte can" in to_markdown(rows, "en") and "tokenizer llama" in to_markdown(rows, "en")


def test_bits_of_two_tokenizers_share_a_column_that_a_third_run_may_not(tmp_path: Path) -> None:
    other = {"validation_hash": "cafe", "tokenizer_fingerprint": "llama"}
    third = {"evaluations": [evaluation(0, hash="ffff"), evaluation(10, hash="ffff")]}
    paths = [make_run(tmp_path / "a"), make_run(tmp_path / "b", corpus=other), make_run(tmp_path / "c", **third)]
    rows = results_table([load_run(path) for path in paths])
    titles = [column.title(Wording("en")) for column in tables.columns(rows)[9:11]]
    assert titles == ["val bits per byte (a, b)", "val bits per byte (c)"]


@pytest.mark.parametrize("name", ["a|b", "a\\|b", "a\nb | c", "<b>x</b>", "`|`"])
def test_a_name_cannot_break_the_table(tmp_path: Path, name: str) -> None:
    markdown = to_markdown(results_table([load_run(make_run(tmp_path / "run", name=name))]), "en")
    lines = list(markdown_cells(markdown))
    assert [len(cells) for cells in lines] == [9, 9, 9]
    assert lines[2][1] == "512"
    assert not re.search(r"(?<!\\)<", markdown)


# The page


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run"))
    assert not re.search(r"https?://|//[a-z]|url\(|@import|@font-face", page.replace("xmlns", ""), re.IGNORECASE)
    tags = Elements(page).tags
    assert not {tag for tag, _ in tags} & {"link", "img", "iframe", "object", "embed", "base", "audio", "video", "form"}
    assert not {name for _, attributes in tags for name in attributes} & {"src", "href", "srcset", "action", "style"}
    assert "default-src 'none'" in page


def test_what_a_run_says_stays_text(tmp_path: Path) -> None:
    evil = "</pre><script>alert('x')</script><img src=x onerror=alert(1)>\" onclick=\"a"
    fields = {"name": evil, "error": evil, "notices": [evil], "status": "failed"}
    fields |= {"machine": {"device_name": evil, evil: evil}, "versions": {evil: evil}}
    first, last = evaluation(0), evaluation(10, 30.0)
    first["protocol"] = last["protocol"] = {**first["protocol"], "name": evil, "hash": evil}
    plain = Elements(page_of(make_run(tmp_path / "plain")))
    first["domains"] = last["domains"] = {evil: {"bits_per_byte": 2.0}}
    change = {"doc_id": evil, "domain": evil, "begins": evil, "num_bytes": 3}
    fields["comparison"] = {"steps": [0, 10], "gained_most": [change], "lost_most": [change]}
    path = make_run(tmp_path / "run", evaluations=[first, last], **fields)
    (path / "config.yaml").write_text(evil, encoding="utf-8")
    write_surprisal(path, (0, 10), [evil])
    samples = [{"step": step, "prompt": evil, "text": evil + evil, "mode": evil} for step in (0, 10)]
    (path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples), encoding="utf-8")
    elements = Elements(page_of(path))
    assert elements.text.count(evil) > 20  # the test does not pass for want of the text
    scripts = [attributes.get("type") for tag, attributes in elements.tags if tag == "script"]
    assert scripts == ["application/json", None]
    assert {tag for tag, _ in elements.tags} <= {tag for tag, _ in plain.tags} | {"p"}
    assert not [name for _, attributes in elements.tags for name in attributes if name.startswith("on")]


@pytest.mark.parametrize(("language", "hidden"), [("en", "pt-BR"), ("pt", "en")])
def test_both_languages_are_there_and_one_is_shown(tmp_path: Path, language: str, hidden: str) -> None:
    page = page_of(make_run(tmp_path / "run"), language=language)
    mains = [attributes for tag, attributes in Elements(page).tags if tag == "main"]
    assert [main["lang"] for main in mains] == ["en", "pt-BR"]
    assert [main["lang"] for main in mains if "hidden" in main] == [hidden]
    parts = re.findall("<main.*?</main>", page, re.DOTALL)
    english, portuguese = (re.sub('<pre hidden id="csv.*?</pre>', "", part, flags=re.DOTALL) for part in parts)
    for text in ("89.02", "32.51", "−63.5%", "2.310", "1.791", "Training report", "window 2048", "Generated text"):
        assert text in english and text not in portuguese
    for text in ("89,02", "32,51", "−63,5%", "1,791", "Relatório de treino", "janela 2048", "Texto gerado"):
        assert text in portuguese and text not in english
    assert f"<title>{'Training report' if language == 'en' else 'Relatório de treino'}: run</title>" in page


def test_the_language_follows_the_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("LC_ALL", "LC_MESSAGES"):
        monkeypatch.delenv(variable, raising=False)
    for value, language in (
        ("pt_BR.UTF-8", "pt"),
        ("pt_PT", "pt"),
        ("en_US.UTF-8", "en"),
        ("de_DE", "en"),
        ("C", "en"),
    ):
        monkeypatch.setenv("LANG", value)
        assert choose_language("auto") == language
    assert choose_language("pt") == "pt"


def test_every_text_is_there_in_both_languages() -> None:
    path = Path(html.__file__).parent / "templates" / "strings.yaml"
    for key, texts in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        assert set(texts) == set(LANGUAGES), key
        slots = [sorted(re.findall(r"\{\w+\}", texts[language])) for language in LANGUAGES]
        assert slots[0] == slots[1], key


OTHER_WORDS = "treinamento execução custo reservado tokenizer batch micro-lote repositório diretório cabeça store"


def test_portuguese_has_one_term_for_each_thing() -> None:
    """Code, commands and the English term that stands once in brackets are no Portuguese."""
    root = Path(html.__file__).parents[1]
    texts = {
        f"{path.parts[-3]}: {key}": re.sub(r"\{\w+\}", "", words["pt"])
        for path in root.glob("*/templates/strings.yaml")
        for key, words in yaml.safe_load(path.read_text(encoding="utf-8")).items()
    }
    texts |= {column.key: column.heading["pt"] for column in tables.COLUMNS if column.heading}
    pages = (Path(__file__).parents[2] / "docs" / "pt").glob("*.md")
    for page in (page for page in pages if page.name != "glossario.md"):  # which has the English words beside ours
        texts[page.name] = re.sub(
            r"(?s)```.*?```|`[^`]*`|\(\*store\*\)|\]\([^)]*\)|[\w./]+\.json", "", page.read_text("utf-8")
        )
    assert len(texts) > 9
    for name, text in texts.items():
        found = re.search(rf"\b({'|'.join(OTHER_WORDS.split())})s?\b", text, re.IGNORECASE)
        assert not found, (name, found)


def test_samples_stand_side_by_side(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    with (path / "samples.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 5, "prompt": "Só", "text": "Só depois", "mode": "greedy"}\n')
        file.write('{"step": 5, "prompt": "Só", "text": "Só \\ud800 meio", "mode": "sample"}\n')
    first, second, third = sample_series(load_run(path).samples)
    assert first.before is not None and first.after is not None
    assert (first.before.prompt, first.before.rest, first.after.rest) == ("Era uma vez", " the farm", " uma menina")
    assert second.before is None and second.after is not None  # the first of two later texts is not one from before
    assert [text.step for text in first.texts] == [0, 10] and third.mode == "sample"
    page = page_of(path)
    assert 'Só</mark><span class="rest"> ? meio' in page
    found = script_data(page)["runs"][0]["samples"]
    assert found["steps"] == [0, 5, 10]
    assert found["texts"][0] == [["Era uma vez", " the farm"], None, ["Era uma vez", " uma menina"]]


def script_data(page: str) -> Any:
    """What the page's script draws."""
    (found,) = re.findall('<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(found)


def test_a_long_run_gives_a_small_page(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run", steps=50_000))
    assert len(page.encode()) < 300_000
    assert 500 < max(path.count("L") for path in re.findall(r'class="curve train" d="([^"]+)"', page)) < 1000


def test_a_run_that_goes_on_and_one_with_nothing(tmp_path: Path) -> None:
    going = make_run(tmp_path / "going", status="running", evaluations=[evaluation(0)])
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "metrics.jsonl").write_text("", encoding="utf-8")
    text = Elements(page_of(going, empty)).text
    for part in (
        "running",
        "No evaluation is recorded",
        "No training step",
        "No generated text",
        "No epoch is recorded",
    ):
        assert part in text
    (empty / "metrics.jsonl").write_text('{"step": 1, "loss": 4.5, "lr": 0.0}\n', encoding="utf-8")
    assert "<circle" in page_of(empty)  # a curve of one step is a point


def test_the_figures_of_the_result_stand_with_their_intervals(tmp_path: Path) -> None:
    last = evaluation(10, 32.5, 1.7913, bits_per_byte_interval=[1.71, 1.87])
    comparison = {
        "steps": [0, 10],
        "bits_per_byte_difference": -0.519,
        "bits_per_byte_difference_interval": [-0.6, -0.44],
        "p_value": 0.0002,
        "share_improved": 0.93,
        "num_documents": 451,
        "gained_most": [
            {"doc_id": "d-7", "begins": "Naquele tempo", "bits_per_byte_first": 3.0, "bits_per_byte_second": 1.5}
        ],
        "lost_most": [],
    }
    path = make_run(tmp_path / "run", evaluations=[evaluation(0), last], comparison=comparison)
    text = Elements(page_of(path)).text
    assert "95% interval: 1.710 to 1.870" in text and "intervalo de 95%: 1,710 a 1,870" in text
    assert "−0.519 bits per byte (95% interval −0.600 to −0.440), p = 0.0002; 93% of 451 documents improved" in text
    assert "Naquele tempo" in text and "None lost." in text and "intervals are rough" not in text
    stale = make_run(tmp_path / "stale", evaluations=[evaluation(0), last], comparison={**comparison, "steps": [0, 5]})
    assert "documents improved" not in page_of(stale)  # it is of another step than the figures beside it
    alone = {"num_documents": 1, "bits_per_byte_interval": None}
    one = make_run(tmp_path / "one", evaluations=[evaluation(0, **alone), evaluation(10, 32.5, 1.79, **alone)])
    shown = Elements(page_of(one)).text
    assert "With one document there is no interval." in shown and "95% interval" not in shown


def test_domains_positions_plan_and_epochs_are_shown(tmp_path: Path) -> None:
    more = {"domains": {"conto": {"perplexity": 40.0, "bits_per_byte": 2.5, "num_documents": 3, "num_bytes": 999}}}
    more |= {"positions": [{"from": 0, "loss": 6.0, "num_tokens": 3}, {"from": 1, "loss": 4.0, "num_tokens": 3}]}
    after = {**more, "domains": {"conto": {**more["domains"]["conto"], "bits_per_byte": 2.0}}}
    used = {"mfu": 0.421, "mfu_without_attention": 0.367, "peak_flops": 989e12, "peak": "data sheet"}
    path = make_run(
        tmp_path / "run",
        evaluations=[evaluation(0, **more), evaluation(10, 32.5, **after)],
        tokens_per_second_after_first_step=317.2,
        utilization=used,
        energy={"joules": 7.2e6, "seconds": 10.0, "source": "RAPL"},
    )
    plan = json.loads((path / "plan.json").read_text(encoding="utf-8"))
    (path / "plan.json").write_text(json.dumps({**plan, "utilization": {**used, "mfu": 0.5}}), encoding="utf-8")
    page = page_of(path)
    text = Elements(page).text
    for part in (
        "conto",
        "−20.0%",
        "By domain",
        "4.0 GB",
        "4.2 GB",
        "310",
        "planned",
        "317",
        "50.0%",
        "42.1%",
        "36.7%",
        "989.0",
        "The processors and their memory counted 2.0000 kWh",
        "Loss by position",
        "Loss by epoch",
        "1 or more tokens before it: 4.000",
    ):
        assert part in text, part
    titles = re.findall('aria-label="([^"]*)"', page)
    assert {"Loss by step", "Loss by epoch", "Loss by position in the document", "Throughput"} <= set(titles)
    for unit in ("loss (nats per token)", "tokens/s", "perplexity (per token, logarithmic)", "×10⁻⁴"):
        assert unit in text
    other = evaluation(0, hash="ffff", **more)
    page = page_of(make_run(tmp_path / "b", evaluations=[other, evaluation(10, 32.5, **after)]))
    assert "−20.0%" not in page  # domains of another protocol are not set against each other


@pytest.mark.parametrize(("source", "what"), [("NVML", "GPU"), ("RAPL", "processors")])
def test_a_terminal_has_the_speed_without_the_first_step_the_share_of_the_peak_and_watt_hours(
    source: str, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_run(
        tmp_path / "run",
        tokens=3100,
        tokens_per_second_after_first_step=317.2,
        utilization={"mfu": 0.421, "mfu_without_attention": 0.367, "peak_flops": 989e12, "peak": "data sheet"},
        energy={"joules": 45_000.0, "seconds": 10.0, "source": source},
    )
    show("train", {"run": str(path), "steps": 10, **json.loads((path / "results.json").read_text(encoding="utf-8"))})
    shown = capsys.readouterr().out
    assert "(317 tokens/s, 304 with the first step)" in shown
    assert "42% of the device's 989 TFLOP/s (data sheet; MFU), 37% by 6N alone." in shown
    assert f"The {what} counted 12.50 Wh." in shown


def test_a_section_says_which_file_it_lacks(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    for name in ("samples.jsonl", "surprisal.parquet", "plan.json", "metrics.jsonl"):
        (path / name).unlink()
    text = Elements(page_of(path)).text
    assert "No generated text is recorded. (samples.jsonl is not there.)" in text
    assert "No token's surprisal is recorded. (surprisal.parquet is not there.)" in text
    assert "No plan is recorded. (plan.json is not there.)" in text and "(Não há plan.json.)" in text
    (path / "surprisal.parquet").write_bytes(b"PAR1 not at all")
    assert "surprisal.parquet (not readable)" in load_run(path).missing


def test_surprisal_is_in_bits_with_every_alternative(tmp_path: Path) -> None:
    found = script_data(page_of(make_run(tmp_path / "run")))["runs"][0]["surprisal"]
    assert found["steps"] == [0, 5, 10] and [one["id"] for one in found["documents"]] == ["lição-0", "lição-1"]
    document = found["documents"][0]
    assert [found["texts"][i] for i in document["tokens"]] == ["Era", " uma", " vez"]
    assert len(document["scores"]) == 3 and len(document["scores"][0]) == 3
    bits, rank, *likeliest = document["scores"][0][1]
    assert bits == round(1000 * 3.0 / math.log(2)) and rank == 2
    assert [found["texts"][i] for i in likeliest[::2]] == [" uma", " o", " a", "\n", "\ufffd"]
    assert likeliest[1::2] == [3000, 2000, 1000, 500, 400]


def test_ten_long_runs_stay_below_five_megabytes(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / f"run-{i}", steps=3000) for i in range(10)]
    write_surprisal(paths[0], range(0, 3001, 200), [f" palavra{i}" for i in range(160)], 4)
    lines = [{"step": 200 * step, "prompt": f"p{p}", "text": "a" * 4000} for step in range(16) for p in range(5)]
    (paths[0] / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    for path in paths[1:]:
        for name in ("surprisal.parquet", "samples.jsonl"):
            shutil.copy(paths[0] / name, path / name)
    page = page_of(*paths)
    assert len(page.encode()) < 5_000_000
    for run in script_data(page)["runs"]:
        assert run["surprisal"]["steps"][0] == 0 and run["surprisal"]["steps"][-1] == 3000


def test_steps_are_thinned_evenly_with_both_ends() -> None:
    assert surprisal._spread(3, 12) == [0, 1, 2]
    found = surprisal._spread(100, 12)
    assert len(found) == 12 and (found[0], found[-1]) == (0, 99)


# Numbers and curves


def test_numbers() -> None:
    english, portuguese = Wording("en"), Wording("pt")
    shown = [english.perplexity(value) for value in (9.67, 9.9996, 10.96, 31.666, 1423.4, 49152.0, None)]
    assert shown == ["9.670", "10.00", "10.96", "31.67", "1,423", "49,150", "-"]
    assert english.perplexity(math.inf) == "∞"
    assert portuguese.perplexity(1423.4) == "1.423" and portuguese.perplexity(9.67) == "9,670"
    assert english.bits(2.0516) == "2.052" and portuguese.bits(2.0516) == "2,052"
    assert (english.change(2.0, 1.5), portuguese.change(2.0, 2.5), english.change(0, 1)) == ("−25.0%", "+25,0%", "-")
    shown = [english.duration(value) for value in (4.26, 59.7, 617, 7384, None)]
    assert shown == ["4.3 s", "1 min 0 s", "10 min 17 s", "2 h 3 min", "-"]
    assert (english.size(4.2e9), english.size(999)) == ("4.2 GB", "999 B")


def test_smoothing_and_thinning_keep_the_level() -> None:
    values = np.random.default_rng(0).normal(3.0, 0.1, 1000)
    assert chart.smooth(np.full(1000, 3.0)) == pytest.approx(3.0)
    assert chart.smooth(values).std() < 0.4 * values.std()
    line = np.arange(1000.0)
    assert chart.smooth(line)[100:900] == pytest.approx(line[100:900])  # no lag
    assert len(chart.thin(values)) == 600 and chart.thin(values).mean() == pytest.approx(values.mean(), abs=0.01)


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (3.02, 4.9), (2.5, 2.5), (0, 0), (1, 50_000), (-3, -2), (1e-9, 3e-9)]
)
def test_ticks_cover_the_values(low: float, high: float) -> None:
    values, decimals = chart.ticks(low, high)
    assert values[0] <= low + 1e-12 and values[-1] >= high - 1e-12
    assert 2 <= len(values) <= 8
    assert len({f"{value:.{decimals}f}" for value in values}) == len(values)


# Figures for slides


def test_figures_are_written_as_svg_and_png(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    pytest.importorskip("vl_convert", reason="needs vl-convert-python (extra report)")
    runs = [load_run(make_run(tmp_path / "a", name="../a b<script>")), load_run(make_run(tmp_path / "b"))]
    files = write_figures(runs, tmp_path / "figuras", Wording("pt"))
    assert {path.name for path in (tmp_path / "figuras").iterdir()} == {path.name for path in files}
    names = {path.stem for path in files}
    assert names >= {"1-a_b_script-loss", "2-b-loss", "2-b-learning-rate", "2-b-speed", "2-b-loss-by-epoch"}
    assert {path.suffix for path in files} == {".svg", ".png"} and len(files) == 2 * len(names)
    for path in files:
        content = path.read_bytes()
        if path.suffix == ".svg":
            text = "".join(ElementTree.fromstring(content).itertext())
            assert "passo" in text or "época" in text
        else:
            assert content.startswith(b"\x89PNG") and int.from_bytes(content[16:20], "big") >= 1380
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with caplog.at_level("WARNING", logger="cartilha"):
        files = write_figures(runs[:1], tmp_path / "svg", Wording("en"))
    assert {path.suffix for path in files} == {".svg"} and install_command("report") in caplog.text


# Several runs


def drawn_runs(figure: Any) -> list[str]:
    """The runs of an overlaid figure: those of its legend, each with a curve of its class."""
    for kind, _ in figure.legend:
        assert re.search(rf'<path class="curve {kind}"|<circle class="{kind}"', figure.drawing)
    return [text for _, text in figure.legend]


def test_runs_of_one_name_are_called_by_their_directories(tmp_path: Path) -> None:
    places = ("um/run", "dois/run", "outro", "x/dois/run")
    runs = load_runs([make_run(tmp_path / place) for place in places])
    assert [run.name for run in runs] == ["um/run", f"{tmp_path.name}/dois/run", "outro", "x/dois/run"]
    (tmp_path / "link").symlink_to(tmp_path / "um/run")
    assert len(load_runs([tmp_path / "um/run", tmp_path / "link"])) == 1


def test_the_curves_of_comparable_runs_share_a_drawing(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / name / "run") for name in ("um", "dois")]
    losses, bits = overlaid_figures(load_runs(paths), Wording("pt"))
    assert drawn_runs(losses) == drawn_runs(bits) == ["um/run", "dois/run"]
    assert losses.y.other is not None and bits.y.other is None
    assert "um/run, passo 10: 1,791 bits por byte" in bits.drawing
    page = page_of(*paths)
    assert page.count("<h2>The runs together</h2>") == 1 and page.count("Validation in bits per byte</figcaption>") == 1
    assert "The runs together" not in page_of(paths[0])


def test_runs_that_cannot_be_compared_share_no_drawing(tmp_path: Path) -> None:
    corpus = {"validation_hash": "cafe", "tokenizer_fingerprint": "opt"}
    other_text = [evaluation(0, hash="other"), evaluation(10, hash="other")]
    paths = [
        make_run(tmp_path / "a"),
        make_run(tmp_path / "b", corpus=corpus),
        make_run(tmp_path / "c", corpus=corpus, evaluations=other_text),
    ]
    losses, bits = overlaid_figures(load_runs(paths), Wording("en"))
    assert (drawn_runs(losses), drawn_runs(bits)) == (["b", "c"], ["a", "b"])  # tokens alike, and text alike
    assert overlaid_figures(load_runs(paths[::2]), Wording("en")) == []


def test_steps_of_different_sizes_are_drawn_by_their_tokens(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / "a"), make_run(tmp_path / "b", settings={"block_size": 512, "blocks_per_step": 2})]
    losses, _ = overlaid_figures(load_runs(paths), Wording("en"))
    assert "tokens trained" in losses.drawing and ">40,000</text>" in losses.drawing  # 10 steps of 8 x 512
    ends = re.findall(r'class="curve run\d" d="M[^"]*L([\d.]+) [\d.]+"', losses.drawing)
    assert [round((float(end) - 62) / 560, 2) for end in ends] == [1.0, 0.25]


def test_the_ninth_run_is_told_from_the_first(tmp_path: Path) -> None:
    styles = chart.run_styles(9).splitlines()
    assert (
        len(set(styles)) == 9 and styles[8].replace("run8", "run0").replace("stroke-dasharray: 6 4; ", "") == styles[0]
    )


@pytest.mark.parametrize("language", ["en", "pt"])
def test_a_text_agrees_with_the_count_in_it(language):
    say, one, page = Wording(language), {}, PageWording(language)
    values = {"difference": "", "low": "", "high": "", "p": "", "share": "9%"}
    for count in ("1", "2"):
        one[count] = [
            say("num_steps", steps=count),
            say("scored", documents=count, tokens=count, bytes=count),
            say("paired", documents=count, **values).split("; ")[-1],
            say("more_samples", count=count),
            page("padding", count=count),
        ]
    expected = {
        "en": ["1 step", "1 document, 1 token, 1 byte", "9% of 1 document improved.",
               "1 more prompt is in samples.jsonl.", "padding, 1 position"],
        "pt": ["1 passo", "1 documento, 1 token, 1 byte", "9% de 1 documento melhorou.",
               "Há mais 1 prompt em samples.jsonl.", "preenchimento, 1 posição"],
    }  # fmt: skip
    assert one["1"] == expected[language]
    assert not [text for text in one["2"] if "[" in text or "|" in text or "2" not in text]
    assert one["2"][1].startswith({"en": "2 documents, 2 tokens, 2 bytes", "pt": "2 documentos, 2 tokens"}[language])


@pytest.mark.parametrize(
    ("language", "shown"), [("en", "float32 99.8, bfloat16 213.0"), ("pt", "float32 99,8, bfloat16 213,0")]
)
def test_rates_by_dtype_are_shown_in_words(language, shown):
    assert html._value_text("matmul_gflops", {"float32": 99.81, "bfloat16": 213.0}, Wording(language)) == shown
