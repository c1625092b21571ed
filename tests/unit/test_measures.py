"""The measures by hand: what is summed, what it is divided by, and what is left out, refused or noted."""

from __future__ import annotations

import itertools
import json
import math
import unicodedata
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers

from cartilha.corpus.document import Document
from cartilha.errors import UserError
from cartilha.evaluation.documents import ScoredDocuments, encode_documents, validation_subset
from cartilha.evaluation.measures import Evaluation, make_evaluation
from cartilha.evaluation.nll import DocumentScores
from cartilha.evaluation.sums import Sums
from cartilha.evaluation.windows import Protocol
from cartilha.storage import to_json
from cartilha.tokens.byte_level import token_bytes
from cartilha.tokens.tokenizer import TextTokenizer, load_tokenizer

BYTES = load_tokenizer("random:tiny")
PROTOCOL = Protocol("full", 512, 256, 256, "float32")
VOCABULARY = 259


def merging_tokenizer(*merges: tuple[str, str]) -> TextTokenizer:
    """The byte tokenizer with a few merges: fewer tokens for the same text."""
    settings = json.loads(BYTES.backend.to_str())
    vocabulary = dict(settings["model"]["vocab"])
    for left, right in merges:
        vocabulary[left + right] = VOCABULARY + len(vocabulary)
    backend = Tokenizer.from_str(BYTES.backend.to_str())
    backend.model = models.BPE(vocab=vocabulary, merges=list(merges))
    backend.encode_special_tokens = True
    return replace(BYTES, backend=backend)


def lossy_tokenizer() -> TextTokenizer:
    """Composes characters (NFC), as some tokenizers do: decomposed text does not come back as it was."""
    backend = Tokenizer.from_str(BYTES.backend.to_str())
    backend.normalizer = normalizers.NFC()
    return replace(BYTES, backend=backend)


def documents(*texts: str) -> list[Document]:
    return [Document(text, f"texto-{i}", "here", "test") for i, text in enumerate(texts)]


def evaluate(scored: ScoredDocuments, nll: list[float]) -> Evaluation:
    scorer = SimpleNamespace(loaded=SimpleNamespace(reference="modelo"), protocol=PROTOCOL, vocabulary_size=VOCABULARY)
    return make_evaluation(scorer, scored, DocumentScores(np.array(nll)), seconds=2.0)


def decomposed(text: str) -> str:
    return unicodedata.normalize("NFD", text)


# Figures by hand


def test_figures_by_hand():
    sums = Sums(nll=12.0, num_tokens=4, num_bytes=10, num_chars=8, num_words=3, num_documents=1)
    assert sums.perplexity == pytest.approx(math.exp(3))
    assert sums.word_perplexity == pytest.approx(math.exp(4))
    assert sums.bits_per_byte == pytest.approx(1.2 / math.log(2))
    assert sums.bits_per_char == pytest.approx(1.5 / math.log(2))


def test_nothing_to_divide_by_is_not_a_number():
    sums = Sums(nll=0.0, num_tokens=0, num_bytes=0, num_chars=0, num_words=0, num_documents=0)
    for figure in (sums.perplexity, sums.word_perplexity, sums.bits_per_byte, sums.bits_per_char):
        assert math.isnan(figure)


def test_an_enormous_nll_is_infinite_not_an_error():
    sums = Sums(nll=1e6, num_tokens=1, num_bytes=1, num_chars=1, num_words=1, num_documents=1)
    assert sums.perplexity == sums.word_perplexity == math.inf


def test_sums_are_divided_once():
    # One token at 8 nats, four bytes at 1 nat each: the corpus has 12 nats over 5 tokens.
    scored = encode_documents(documents("a", "b c "), BYTES)
    evaluation = evaluate(scored, [8.0, 4.0])
    record = evaluation.to_dict()
    assert record["loss"] == pytest.approx(12 / 5)
    assert record["perplexity"] == evaluation.perplexity == pytest.approx(math.exp(12 / 5))
    assert record["word_perplexity"] == pytest.approx(math.exp(12 / 3))
    assert record["bits_per_byte"] == evaluation.bits_per_byte == pytest.approx(12 / 5 / math.log(2))
    mean_of_perplexities = (math.exp(8) + math.exp(1)) / 2
    exp_of_mean_of_means = math.exp((8 + 1) / 2)
    for wrong in (mean_of_perplexities, exp_of_mean_of_means):
        assert abs(record["perplexity"] - wrong) > 10


def test_the_record_holds_the_counts_and_is_json():
    scored = encode_documents(documents("São José", "", "dois\tversos\nem três  linhas"), BYTES)
    record = json.loads(to_json(evaluate(scored, [1.0, 2.0]).to_dict()))
    assert record["num_documents"] == 2
    assert record["num_documents_empty"] == 1
    assert (record["num_chars"], record["num_words"]) == (8 + 27, 2 + 5)
    assert record["num_bytes"] == record["num_tokens"] == 10 + 28
    assert record["protocol"] == {
        "name": "full",
        "window": 512,
        "stride": 256,
        "prefix_id": 256,
        "dtype": "float32",
        "hash": PROTOCOL.hash,
    }
    assert record["tokens_per_second"] == 19
    assert record["baselines"]["uniform"] == pytest.approx({"perplexity": 259, "bits_per_byte": math.log2(259)})


def test_one_document_has_no_interval_and_it_says_why():
    found = evaluate(encode_documents(documents("São José"), BYTES), [1.0]).to_dict()
    assert found["bits_per_byte_interval"] is None
    assert [note for note in found["notes"] if "interval" in note] == [
        "There is no interval: it takes at least two documents with bytes that are scored."
    ]


# What is counted


def test_special_tokens_written_out_are_text():
    scored = encode_documents(documents("</s>", "<s>a<pad>"), BYTES)
    assert [ids.tolist() for ids in scored.ids] == [list(b"</s>"), list(b"<s>a<pad>")]
    assert scored.num_bytes.tolist() == scored.num_tokens.tolist() == [4, 9]
    assert scored.round_trips.all()


def test_composed_and_decomposed_text_are_different_bytes():
    word = "coração"
    scored = encode_documents(documents(word, decomposed(word)), BYTES)
    assert scored.num_bytes.tolist() == [9, 11]
    assert scored.num_chars.tolist() == [7, 9]
    assert scored.num_words.tolist() == [1, 1]
    assert scored.round_trips.all()
    assert scored.text_hashes[0] != scored.text_hashes[1]


TEXTS = ["O rato roeu a roupa", "do rei de Roma.", "Água mole em pedra dura tanto bate até que fura", "  \n x"]


def test_byte_totals_do_not_depend_on_the_tokenizer():
    other = merging_tokenizer(("r", "o"), ("Ġ", "a"), ("d", "e"), ("Ã", "©"))
    ours, theirs = (encode_documents(documents(*TEXTS), tokenizer) for tokenizer in (BYTES, other))
    assert theirs.num_tokens.sum() < ours.num_tokens.sum(), "the same tokens would prove nothing"
    for name in ("num_bytes", "num_chars", "num_words"):
        assert getattr(ours, name).tolist() == getattr(theirs, name).tolist()
    assert ours.corpus_hash == theirs.corpus_hash
    same_nats = [evaluate(scored, [5.0, 6.0, 7.0, 8.0]) for scored in (ours, theirs)]
    assert same_nats[0].bits_per_byte == same_nats[1].bits_per_byte
    assert same_nats[0].perplexity < same_nats[1].perplexity


def test_opts_tokenizer_counts_the_same_bytes(opt_tokenizer: Path):
    texts = [*TEXTS, "</s> e <pad>", decomposed("coração"), "😀 e €", "a\u00a0b\u2028c"]
    ours = encode_documents(documents(*texts), BYTES)
    theirs = encode_documents(documents(*texts), load_tokenizer(str(opt_tokenizer)))
    assert theirs.round_trips.all()
    assert theirs.num_bytes.tolist() == ours.num_bytes.tolist() == ours.num_tokens.tolist()
    assert theirs.num_tokens.sum() < ours.num_tokens.sum()


def test_the_corpus_hash_tells_corpora_apart():
    one, other, swapped = (
        encode_documents(documents(*texts), BYTES).corpus_hash for texts in (("a", "b"), ("a", "c"), ("b", "a"))
    )
    assert len({one, other, swapped}) == 3


def test_empty_documents_are_skipped_and_counted():
    scored = encode_documents(documents("", "a", ""), BYTES)
    assert scored.doc_ids == ["texto-1"] and scored.num_empty == 2


@pytest.mark.parametrize("texts", [(), ("",), ("", "")])
def test_nothing_to_score_is_refused(texts):
    with pytest.raises(UserError, match="no documents to score"):
        encode_documents(documents(*texts), BYTES)


# first-N


def test_first_n_counts_what_is_scored():
    scored = encode_documents(documents("um dois três", "ab", "abc"), BYTES, first_tokens=3)
    assert [bytes(ids.tolist()) for ids in scored.ids] == [b"um ", b"ab", b"abc"]
    assert scored.num_tokens.tolist() == scored.num_bytes.tolist() == scored.num_chars.tolist() == [3, 2, 3]
    assert scored.num_words.tolist() == [1, 1, 1]
    assert scored.round_trips.all()
    whole = encode_documents(documents("um dois três", "ab", "abc"), BYTES)
    assert whole.num_bytes.tolist() == [13, 2, 3]
    assert whole.corpus_hash == scored.corpus_hash, "the corpus is the same; the protocol says what is scored of it"


def test_first_n_counts_the_bytes_of_an_incomplete_character():
    # é is two bytes: "caf" and its first byte are four, and the character is begun.
    scored = encode_documents(documents("cafés"), BYTES, first_tokens=4)
    assert [column.tolist() for column in (scored.num_tokens, scored.num_bytes, scored.num_chars)] == [[4], [4], [4]]
    # Nats and bytes are of the same three tokens: 3 log2(245.6) bits over 3 bytes, not over 2.
    scored = encode_documents(documents("éééé"), BYTES, first_tokens=3)
    found = evaluate(scored, [3 * math.log(245.6)]).to_dict()
    assert (found["num_bytes"], found["num_chars"], found["num_words"]) == (3, 2, 1)
    assert found["bits_per_byte"] == found["domains"]["test"]["bits_per_byte"] == pytest.approx(7.94, abs=0.01)
    assert found["macro"]["bits_per_byte"] == found["bits_per_byte"]


def byte_fallback_tokenizer() -> TextTokenizer:
    """As SentencePiece's: a few words, and bytes for all else; the decoder writes a U+FFFD for each incomplete byte."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a"]
    ids = {name: i for i, name in enumerate(names)}
    model = models.BPE(ids, [("▁", "a")], unk_token="<unk>", byte_fallback=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return replace(BYTES, backend=backend)


@pytest.mark.parametrize(
    "text", ["ab\ufffd\ufffdcdé", "a😀 a€\u0301 ção", "\ufffd", "日本 語a", "e\u0301\u0301 \ufeffa"]
)
@pytest.mark.parametrize("tokenizer", [BYTES, merging_tokenizer(("a", "Ł"), ("Ã", "§")), byte_fallback_tokenizer()])
def test_first_n_counts_exactly_the_bytes_of_its_tokens(text, tokenizer):
    ids = tokenizer.encode([text])[0]
    assert tokenizer.decode(ids) == text
    spelled = [tokenizer.backend.id_to_token(int(i)) for i in ids]
    sizes = [len(token_bytes(token) or token.replace("▁", " ").encode()) for token in spelled]
    for cut in range(1, len(ids) + 1):
        scored = encode_documents(documents(text), tokenizer, first_tokens=cut)
        num_bytes = sum(sizes[:cut])
        begun = next(n for n in range(len(text) + 1) if len(text[:n].encode()) >= num_bytes)
        assert (scored.num_bytes[0], scored.num_chars[0]) == (num_bytes, begun), cut
        assert scored.num_words[0] == len(text[:begun].split())


# Round trips


def lossy_corpus(lost_bytes: int, total_bytes: int) -> list[Document]:
    """A text that survives and, behind it, one that does not (an e with an acute accent of its own: 3 bytes)."""
    lost = decomposed("é") + "x" * (lost_bytes - 3)
    return documents("a" * (total_bytes - lost_bytes), lost)


def test_a_text_that_does_not_survive_is_left_out_of_byte_figures():
    scored = encode_documents(lossy_corpus(10, 1000), lossy_tokenizer())
    assert scored.round_trips.tolist() == [True, False]
    evaluation = evaluate(scored, [99.0, 1e4])
    record = evaluation.to_dict()
    # Bytes: without it. Tokens (990, and 9: two bytes for the composed é and seven x): with it.
    assert record["bits_per_byte"] == pytest.approx(99 / 990 / math.log(2))
    assert record["bits_per_char"] == pytest.approx(99 / 990 / math.log(2))
    assert record["word_perplexity"] == pytest.approx(math.exp(99))
    assert record["perplexity"] == pytest.approx(math.exp((99 + 1e4) / 999))
    assert record["baselines"]["uniform"]["bits_per_byte"] == pytest.approx(math.log2(259), rel=1e-6)
    assert (record["num_documents"], record["num_documents_lost"]) == (2, 1)
    assert record["documents_lost"] == ["texto-1"]
    assert any("1 document (1.00% of the bytes)" in note and "texto-1" in note for note in record["notes"])


def test_more_than_one_percent_lost_refuses_byte_figures():
    evaluation = evaluate(encode_documents(lossy_corpus(11, 1000), lossy_tokenizer()), [99.0, 10.0])
    record = evaluation.to_dict()
    for name in ("bits_per_byte", "bits_per_char", "word_perplexity"):
        assert record[name] is None
    assert record["baselines"]["uniform"] == {"perplexity": 259.0, "bits_per_byte": None}
    assert record["perplexity"] == pytest.approx(math.exp(109 / 999 * 999 / evaluation.total.num_tokens))
    assert any("no byte figures" in note for note in record["notes"])


def test_the_same_text_is_whole_to_a_tokenizer_that_keeps_it():
    evaluation = evaluate(encode_documents(lossy_corpus(500, 1000), BYTES), [1.0, 1.0])
    assert evaluation.bits_per_byte is not None and not evaluation.lost
    assert not any("survive" in note for note in evaluation.notes)


def test_many_lost_texts_are_counted_and_the_first_named():
    scored = encode_documents(documents("a" * 100_000, *[decomposed("é")] * 30), lossy_tokenizer())
    evaluation = evaluate(scored, [1.0] * 31)
    record = evaluation.to_dict()
    assert record["num_documents_lost"] == 30
    assert record["documents_lost"] == [f"texto-{i}" for i in range(1, 21)]
    assert any("texto-1, texto-2, texto-3, ..." in note for note in evaluation.notes)


def test_a_lost_text_of_which_no_whole_character_is_scored():
    scored = encode_documents(documents(decomposed("é")), lossy_tokenizer(), first_tokens=1)
    assert scored.num_bytes.tolist() == [1]
    evaluation = evaluate(scored, [1.0])
    assert evaluation.bits_per_byte is None and len(evaluation.lost) == 1
    assert any("survive" in note for note in evaluation.notes)


# Domains


def test_of_many_domains_the_largest_have_figures_and_the_others_are_counted():
    names = [f"{number} " + "um texto como domínio " * 50 for number in range(1000)]
    corpus = [Document("a" * (1 + number % 500), str(number), "x", name) for number, name in enumerate(names)]
    found = evaluate(encode_documents(corpus, BYTES), [1.0] * 1000).to_dict()
    assert found["num_domains"] == 1000 and len(found["domains"]) == 200
    assert [row["num_bytes"] for row in found["domains"].values()] == [500 - i // 2 for i in range(200)]
    assert len(to_json(found)) < 100_000


# The set-up's faults


@pytest.mark.parametrize(("factor", "noted"), [(1.99, False), (2.01, True)])
def test_worse_than_guessing_is_noted(factor, noted):
    nats = math.log(factor * VOCABULARY)
    evaluation = evaluate(encode_documents(documents("abcd"), BYTES), [4 * nats])
    assert any("twice the vocabulary size of 259" in note for note in evaluation.notes) == noted


def test_an_infinite_perplexity_is_noted():
    evaluation = evaluate(encode_documents(documents("abcd"), BYTES), [1e6])
    assert any("twice the vocabulary" in note for note in evaluation.notes)


# Validation subsets


def test_a_subset_is_chosen_by_the_texts_alone():
    corpus = documents(*(f"texto número {i}" for i in range(50)))
    sizes = [10] * 50
    chosen = validation_subset(corpus, sizes, 100)
    assert len(chosen) == 10
    assert chosen == [document for document in corpus if document in chosen], "their order is the corpus's"
    renamed = [replace(document, id=f"outro-{i}", source="there") for i, document in enumerate(corpus[::-1])]
    again = validation_subset(renamed, sizes, 100)
    assert {document.text for document in again} == {document.text for document in chosen}
    assert chosen != corpus[:10]


def test_subsets_are_nested():
    corpus = documents(*(f"texto número {i}" for i in range(50)))
    sizes = list(range(1, 51))
    subsets = [{d.id for d in validation_subset(corpus, sizes, limit)} for limit in (1, 50, 200, 800)]
    assert all(small <= large for small, large in itertools.pairwise(subsets))
    assert len(subsets[0]) == 1 < len(subsets[2]) < len(subsets[3])


def test_all_documents_where_they_are_few_and_one_where_it_is_long():
    corpus = documents("a", "b", "c")
    assert validation_subset(corpus, [5, 5, 5], 15) == corpus
    assert len(validation_subset(corpus, [5, 5, 5], 14)) == 2
    assert len(validation_subset(corpus, [500, 500, 500], 14)) == 1


def test_a_text_of_which_the_tokenizer_keeps_nothing_is_lost_not_empty():
    backend = Tokenizer.from_str(BYTES.backend.to_str())
    backend.normalizer = normalizers.Replace("ж", "")
    scored = encode_documents(documents("abc" * 100, "жж", ""), replace(BYTES, backend=backend))
    assert scored.num_tokens.tolist() == [300, 0] and scored.num_empty == 1
    result = evaluate(scored, [300.0, 0.0])
    assert result.lost == ("texto-1",)
    assert result.byte_total.num_bytes == 300 and result.macro["loss"] == 1.0
