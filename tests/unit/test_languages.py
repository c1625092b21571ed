"""Languages of text: each built-in one is whole, a user's file is enough for a job, and its mistakes are sentences."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from cartilha.config import GenerateConfig, PrepareConfig, RunConfig, TrainConfig
from cartilha.corpus.cleaning import Cleaner, Rejected
from cartilha.corpus.document import Document
from cartilha.corpus.primer import primer_languages, primer_texts
from cartilha.errors import UserError
from cartilha.languages import DEFAULT, find_language, language_codes
from cartilha.pipeline.job import run
from cartilha.pipeline.prepare import prepare
from cartilha.reporting.wording import LANGUAGES

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "cartilha"
ALIKE = {"dup_line_frac": 0.3, "line_punct_thr": 0.1, "new_line_ratio": 0.3, "max_non_alpha_words_ratio": 0.8}
FICTIVE = {
    "code": "qaa",  # ISO 639-2 keeps qaa to qtz for languages without a code
    "names": {"en": "Farlish", "pt": "farlês"},
    "prompts": ["Wen dal"],
    "boilerplate": {"biskit": ["nus usa biskit"]},
    "fineweb_2": {
        **ALIKE,
        "min_avg_word_length": 2,
        "max_avg_word_length": 9,
        "stopwords": ["dal", "wen"],
        "top_n_grams": [[2, 0.5]],
        "dup_n_grams": [[5, 0.5]],
    },
}


def fictive_text(number: int) -> str:
    words = ["wen", "dal", "fari", "toma", "lusu", "neka", "piro", "sadu", "mika", "relo"]
    return (
        " ".join(words[(number * number + i * i + number * i) % 10] + ("" if i % 7 else ".") for i in range(80)) + "."
    )


@pytest.fixture()
def fictive(tmp_path: Path) -> Path:
    path = tmp_path / "farlish.yaml"
    path.write_text(yaml.safe_dump(FICTIVE, allow_unicode=True), encoding="utf-8")
    return path


@pytest.mark.parametrize("code", language_codes())
def test_a_built_in_language_is_whole(code):
    language = find_language(code)
    assert language.code == code and language.prompts and set(language.names) == set(LANGUAGES)
    for anchor, phrases in language.boilerplate.items():
        assert anchor == anchor.lower() and all(anchor in phrase.lower() for phrase in phrases), anchor
    if code in primer_languages():
        texts = [Document(text.text, text.id, "primer", text.genre) for text in primer_texts(code)]
        assert len({text.id for text in texts}) == len(texts) >= 20
        kept = Cleaner(("control", "nfc", "boilerplate", "lines"), language)(texts)
        assert [found for found in kept if isinstance(found, Rejected)] == [] and kept == texts


def test_a_language_by_configuration_alone(fictive, tmp_path, capsys):
    text = tmp_path / "textos.txt"
    poor = "Mika relo 101 102 103 104 105 106 107. " * 8
    lines = [fictive_text(number) for number in range(12)]
    text.write_text("\n".join([*lines[:-1], poor, lines[-1] + " " * 260, "nus usa biskit"]), encoding="utf-8")
    config = RunConfig(
        model="random:tiny",
        output=str(tmp_path / "job"),
        prepare=PrepareConfig(
            input=(str(text),), language=str(fictive), clean=("boilerplate", "words"), validation_documents=2
        ),
        train=TrainConfig(block_size=64, batch_tokens=128, max_steps=2, skip_checks=True, skip_english=True),
        generate=GenerateConfig(max_new_tokens=2),
    )
    done = run(config)
    assert done.prepared.dropped.items() >= {"boilerplate": 1, "words:no letters": 1}.items()
    assert {row["prompt"] for row in done.samples} == {"Wen dal"}
    assert done.trained.results["corpus"]["language"] == "qaa"
    assert "qaa" in Path(done.report).read_text(encoding="utf-8")
    card = (tmp_path / "job" / "run" / "model" / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(card.split("---\n")[1])["language"] == ["qaa"]
    assert "text in Farlish" in card and "texto em farlês" in card and "Portuguese" not in card
    (snippet, _) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(snippet.replace("NAME", str(tmp_path / "job" / "run" / "model")), {})
    assert capsys.readouterr().out.count("Wen dal") == 1

    again = replace(config.prepare, model="random:tiny", output=done.prepared.store)
    assert prepare(again).was_ready
    fictive.write_text(yaml.safe_dump({**FICTIVE, "prompts": ["Dal"]}), encoding="utf-8")
    with pytest.raises(UserError, match="with another language"):
        prepare(again)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"code": "Farlish"}, "two or three small letters"),
        ({"code": None}, "two or three small letters"),
        ({"stopwords": []}, "there is no entry 'stopwords'"),
        ({"fineweb_2": {**FICTIVE["fineweb_2"], "stopwords": [False]}}, "quote the stopwords"),
        ({"fineweb_2": ALIKE}, "lacks 'stopwords'"),
        ({"boilerplate": {"a": ["("]}}, "not as it should be"),
        ({"names": ["x"]}, "not as it should be"),
    ],
)
def test_what_is_wrong_with_a_language_file_is_a_sentence(tmp_path, change, said):
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump({**FICTIVE, **change}), encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(said)):
        find_language(str(path))
    path.write_text("- pt\n", encoding="utf-8")
    with pytest.raises(UserError, match="entries such as `code: gl`"):
        find_language(str(path))


def test_a_name_that_is_no_language(tmp_path):
    for name in ("portuguese", "pt-BR", ""):
        with pytest.raises(UserError, match="no language"):
            find_language(name)
    with pytest.raises(UserError, match="cannot be read"):
        find_language(str(tmp_path / "no.yaml"))
    assert find_language("ca").thresholds is None  # a code without a file
    with pytest.raises(UserError, match=r"primers that ship are in pt, gl"):
        prepare(PrepareConfig(input=("primer:ca",), model="random:tiny", output=str(tmp_path / "store")))


def test_no_module_names_a_language_of_text():
    """Stop words, codes and names of languages are in `languages` alone; the pages' own languages are another thing."""
    faults = []
    for path in sorted(PACKAGE.rglob("*.py")):
        folder = path.relative_to(PACKAGE).parts[0]
        if folder in ("languages", "reporting", "explorer"):
            continue
        for line in path.read_text(encoding="utf-8").split("\n"):
            others = r'Language = .*|(framework=|return_tensors=|"format": )"pt"'  # pages, and PyTorch
            if re.search(r"""["'](pt|gl)["']""", re.sub(others, "", line.split("#")[0])):
                faults.append(f"{path.name}: {line.strip()}")
    assert faults == []
    assert DEFAULT in language_codes()
