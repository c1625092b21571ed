"""Planted near-duplicates are found, other texts are not."""

import json
import random
import sys
import unicodedata

import numpy as np
import pytest

from cartilha.corpus.near_duplicates import cluster, has_near_duplicate
from cartilha.corpus.primer import primer_texts
from cartilha.corpus.signatures import save_signatures, signatures
from cartilha.errors import UserError

pytest.importorskip("rensa", reason="the extra `text` is not installed")
TEXTS = [text.text for text in primer_texts()]


def with_changes(text: str, share: float, generator: random.Random) -> str:
    """The text with this share of its words replaced."""
    words = text.split()
    for i in generator.sample(range(len(words)), round(share * len(words))):
        words[i] = f"palavra{generator.randrange(10**6)}"
    return " ".join(words)


@pytest.mark.parametrize("share", [0.05, 0.10, 0.15])
def test_planted_near_duplicates_are_found_and_nothing_else(share):
    generator = random.Random(0)
    changed = [with_changes(text, share, generator) for text in TEXTS[:75]]
    found = has_near_duplicate(changed + TEXTS[75:], TEXTS[:75])
    assert found[:75].mean() >= 0.95
    assert not found[75:].any()


def test_equal_texts_count_and_half_changed_ones_do_not():
    generator = random.Random(0)
    halves = [with_changes(text, 0.5, generator) for text in TEXTS[:20]]
    assert has_near_duplicate(TEXTS[:20], TEXTS[:10]).tolist() == [True] * 10 + [False] * 10
    assert not has_near_duplicate(halves, TEXTS[:20]).any()


def test_one_definition_for_clusters_and_contamination(tmp_path):
    """What is found near, is found near everywhere, however much was changed and however accents are written."""
    generator = random.Random(2)
    shares = [0.1 + 0.2 * i / len(TEXTS) for i in range(len(TEXTS))]  # from clearly near to clearly not
    changed = [with_changes(text, share, generator) for text, share in zip(TEXTS, shares, strict=True)]
    changed = [unicodedata.normalize("NFD", text) if i % 2 else text for i, text in enumerate(changed)]
    found = has_near_duplicate(changed, TEXTS)
    save_signatures(tmp_path / "all.npy", signatures(TEXTS + changed))
    clusters = cluster([tmp_path / "all.npy"])
    assert 0.2 < found.mean() < 0.9  # not vacuous
    assert (found == (clusters[len(TEXTS) :] < len(TEXTS))).all()


def test_accents_apart_are_the_same_text():
    text = "Só há pão, café, maçã, limão, melão e mamão; não há chá, pêra, açaí, romã, cajá, araçá nem maracujá."
    assert has_near_duplicate([unicodedata.normalize("NFD", text), TEXTS[0]], [text]).tolist() == [True, False]


def test_short_and_empty_texts():
    assert has_near_duplicate(["Bom dia!", "Boa noite", "", "..."], ["bom dia", "", "?"]).tolist() == [
        True,
        False,
        False,
        False,
    ]
    assert has_near_duplicate([], ["a"]).dtype == np.bool_


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(UserError, match="extra `text`"):
        has_near_duplicate(["a"], ["a"])


def test_the_share_is_printed_with_the_result(tmp_path, capsys):
    from cartilha.cli import main

    (tmp_path / "train.txt").write_text("\n".join(text.replace("\n", " ") for text in TEXTS[:40]), encoding="utf-8")
    near = [with_changes(text, 0.1, random.Random(1)) for text in TEXTS[:5]]
    other = [text.replace("\n", " ") for text in TEXTS[60:65]]
    (tmp_path / "held.txt").write_text("\n".join(near + other), encoding="utf-8")
    store = str(tmp_path / "store")
    assert main(["prepare", "--input", str(tmp_path / "train.txt"), "--model", "random:tiny", "--output", store]) == 0
    capsys.readouterr()
    asked = ["evaluate", "--model", "random:tiny", "--store", store, "--input", str(tmp_path / "held.txt")]
    assert main([*asked, "--near_duplicates", "--protocol", "first-16", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)["models"][0]
    in_training = sum(not line for line in _held_out_of(store, near))
    assert record["contamination"] == 0.0
    assert record["near_duplicates"] == pytest.approx(in_training / 10)
    assert main([*asked[:3], "--input", str(tmp_path / "held.txt"), "--near_duplicates"]) == 2


def _held_out_of(store, near):
    """For each of the first five texts, whether the split held it out of training."""
    from cartilha.tokens.store import TokenStore

    training = [document.text for document in TokenStore(store).read_documents("train")]
    return [TEXTS[i].replace("\n", " ") not in training for i in range(len(near))]
