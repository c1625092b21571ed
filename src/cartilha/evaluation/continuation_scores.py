"""How near a model's continuations come to the text that really follows: chrF, BLEU, ROUGE-L, and how varied they are.

Open continuation has many right answers, so the figures are low for every model. The floor beside them is what the real
text of *another* document scores in the same place.
"""

from __future__ import annotations

import math
import random
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from cartilha.corpus.document import Document
from cartilha.corpus.splits import split_position
from cartilha.errors import UserError, counted, import_extra

CUT_SEED = 20_04  # of the hash order in which documents are chosen for continuation; never changed
WORDS = 32  # of each prompt, and of each reference
ROUGE_L_SIGNATURE = "f:1|level:sentence|average:mean|case:fold|norm:NFC|tok:unicode-letters-marks-numbers|version:1"

# Soft hyphen, zero-width joiners, word joiner, byte order mark: they stand inside words and are not seen.
_INVISIBLE = dict.fromkeys(map(ord, "\u00ad\u200c\u200d\u2060\ufeff"))


@dataclass(frozen=True)
class Cut:
    """The beginning of a document, up to the end of a word, and the words that follow with the white space before them.

    `prompt + reference` is how the document begins.
    """

    doc_id: str
    prompt: str
    reference: str


@dataclass(frozen=True)
class TextScores:
    """What one set of texts scores against the references; sums over the corpus divided once, except ROUGE-L.

    Attributes:
        chrf: chrF2 by sacrebleu (Popović 2015), 0 to 100.
        bleu: BLEU by sacrebleu (Papineni et al. 2002, Post 2018 arXiv:1804.08771), 0 to 100.
        rouge_l: The mean over the continuations of `rouge_l`, 0 to 1.
        distinct_1: Different words per word written, over all texts together (Li et al. 2016, arXiv:1510.03055).
        distinct_2: Different pairs of words per word written (the paper divides by words, not by pairs). Both fall as
            more is written, so they compare only at similar lengths; None where no word was written.
        repeated_4grams: The share of 4-grams that already occurred in the same text; None where there is no 4-gram.
        mean_words: Words per text, split at white space; empty texts count as 0.
        num_empty: Texts of nothing but white space: they score 0 and stay in every mean.
    """

    chrf: float
    bleu: float
    rouge_l: float
    distinct_1: float | None
    distinct_2: float | None
    repeated_4grams: float | None
    mean_words: float
    num_empty: int


@dataclass(frozen=True)
class ContinuationScores:
    """What a model's continuations score, and the floor beside them.

    Attributes:
        floor: Scores of the real continuation of another document in each one's place, the same for every model. Its
            distinct-n and repeated 4-grams are those of real text. None for a single cut.
        signatures: How `chrf`, `bleu` and `rouge_l` were computed; figures of other signatures are not comparable.
        num_too_short: Documents passed over for want of words.
        num_repeated: Documents passed over because their reference is that of an earlier cut: the floor would be given
            the right answer.
    """

    scores: TextScores
    floor: TextScores | None
    signatures: dict[str, str]
    num_continuations: int
    num_too_short: int = 0
    num_repeated: int = 0
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The record for `--json` and results.json: the scores, and `floor` with the same keys."""
        record = asdict(self)
        return {**record.pop("scores"), **record}


def continuation_measures(
    documents: Iterable[Document],
    continue_texts: Callable[[list[str]], list[str]],
    num: int,
    seed: int = 0,
    *,
    prompt_words: int = WORDS,
    reference_words: int = WORDS,
) -> ContinuationScores:
    """Cut held-out documents, have them continued, and score what was written.

    A continuation is scored up to as many words as its reference has. Otherwise the figures would follow the number of
    tokens that the model was allowed, which are more words in one tokenizer than in another. The caller should allow
    enough tokens (three or four per word).

    `continue_texts` takes the prompts and gives, in their order, what the model wrote after each, without the prompt.
    There are fewer than `num` continuations where fewer documents are long enough. The seed chooses the documents and
    the order of the floor.
    """
    _sacrebleu_metrics()  # before the slow part
    cuts, num_too_short, num_repeated = cut_documents(documents, num, seed, prompt_words, reference_words)
    prompts = [cut.prompt for cut in cuts]
    written = continue_texts(prompts)
    assert len(written) == len(prompts), "one continuation per prompt"
    assert not all(map(str.startswith, written, prompts)), "continuations come without their prompts"
    scores = score_continuations(cuts, [first_words(text, reference_words) for text in written], seed=seed)
    return replace(scores, num_too_short=num_too_short, num_repeated=num_repeated)


def cut_documents(
    documents: Iterable[Document], num: int, seed: int = 0, prompt_words: int = WORDS, reference_words: int = WORDS
) -> tuple[list[Cut], int, int]:
    """Choose documents by their hashes and cut each after its first words.

    The choice and the order depend on the texts and the seed alone, not on the order of the documents, and a smaller
    `num` chooses a beginning of the same list. Words are what white space (Unicode's) separates; text in scripts that
    put none between words counts as too short. Returns the cuts, and how many documents were too short and how many
    repeated. A UserError says that no document is long enough.
    """
    if min(num, prompt_words, reference_words) < 1:
        raise UserError("The numbers of continuations, prompt words and reference words must be 1 or more.")
    cuts: list[Cut] = []
    seen: set[str] = set()
    num_too_short = num_repeated = 0
    for document in sorted(documents, key=lambda document: split_position(document.text_hash, CUT_SEED + seed)):
        if len(cuts) == num:
            break
        prompt = first_words(document.text, prompt_words)
        reference = first_words(document.text[len(prompt) :], reference_words)
        if len(reference.split()) < reference_words or not tokenize_words(reference):
            num_too_short += 1
        elif reference.strip() in seen:
            num_repeated += 1
        else:
            seen.add(reference.strip())
            cuts.append(Cut(document.id, prompt, reference))
    if not cuts:
        raise UserError(
            f"None of the {counted(num_too_short, 'document')} has the {prompt_words + reference_words} words "
            "that a prompt and its reference need; give longer documents, or ask for no continuations."
        )
    return cuts, num_too_short, num_repeated


def first_words(text: str, num: int) -> str:
    """The text up to the end of its `num`-th word (of its last, where it has fewer), white space before it included."""
    end = 0
    for _, word in zip(range(num), re.finditer(r"\S+", text), strict=False):
        end = word.end()
    return text[:end]


def score_continuations(cuts: Sequence[Cut], hypotheses: Sequence[str], *, seed: int = 0) -> ContinuationScores:
    """Score what was written after each prompt, and in its place another document's reference, chosen by seed."""
    assert cuts and len(hypotheses) == len(cuts), "one hypothesis per cut, and at least one"
    metrics = _sacrebleu_metrics()
    # force: no warning about text that looks tokenized, which a model may well write.
    chrf, bleu = metrics.CHRF(), metrics.BLEU(force=True)
    references = [cut.reference for cut in cuts]

    def score(texts: Sequence[str]) -> TextScores:
        words = [tokenize_words(text) for text in texts]
        return TextScores(
            # sacrebleu's geometric mean of four times 1 is a hair above 1.
            chrf=min(100.0, chrf.corpus_score(texts, [references]).score),
            bleu=min(100.0, bleu.corpus_score(texts, [references]).score),
            rouge_l=math.fsum(map(rouge_l, texts, references)) / len(texts),
            distinct_1=distinct_ngrams(words, 1),
            distinct_2=distinct_ngrams(words, 2),
            repeated_4grams=repeated_ngrams(words, 4),
            mean_words=sum(len(text.split()) for text in texts) / len(texts),
            num_empty=sum(not text.strip() for text in texts),
        )

    scores = score(hypotheses)
    signatures = {"chrf": str(chrf.get_signature()), "bleu": str(bleu.get_signature()), "rouge_l": ROUGE_L_SIGNATURE}
    floor = score([references[i] for i in derangement(len(cuts), seed)]) if len(cuts) > 1 else None
    return ContinuationScores(scores, floor, signatures, num_continuations=len(cuts), seed=seed)


def tokenize_words(text: str) -> list[str]:
    """The words of a text for ROUGE-L and n-grams: letters and digits of any script with their marks, case folded.

    The tokenizer of the usual ROUGE packages keeps only a-z and 0-9, so that "educação" becomes "educa" and "o". On
    ASCII text the two agree. Hyphens and apostrophes separate, as they do there; nothing is stemmed; composed and
    decomposed accents are the same (NFC).
    """
    words: list[str] = []
    word = ""
    for character in unicodedata.normalize("NFC", text.translate(_INVISIBLE)).casefold():
        kind = unicodedata.category(character)[0]
        if kind in "LN" or (kind == "M" and word):
            word += character
        elif word:
            words.append(word)
            word = ""
    return [*words, word] if word else words


def rouge_l(hypothesis: str, reference: str) -> float:
    """ROUGE-L of one text, 0 to 1: the F-measure with beta = 1 of the longest common subsequence of words.

    Sentence level (Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", equations 2 to 4): each text is
    one sequence, however many sentences it holds; not the summary level, which joins subsequences over sentences. The
    paper leans on recall (a large beta); the F1 is what today's packages give.
    """
    written, right = tokenize_words(hypothesis), tokenize_words(reference)
    common = longest_common_subsequence(written, right)
    return 2 * common / (len(written) + len(right)) if common else 0.0


def longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest common subsequence, by one addition on integers of len(b) bits per word of `a`.

    Hyyrö 2004, "Bit-parallel LCS-length computation revisited": bit j of `unmatched` is 0 where the length grows with
    b[j].
    """
    positions: dict[str, int] = {}
    for j, word in enumerate(b):
        positions[word] = positions.get(word, 0) | 1 << j
    every = (1 << len(b)) - 1
    unmatched = every
    for word in a:
        matches = unmatched & positions.get(word, 0)
        unmatched = ((unmatched + matches) | (unmatched - matches)) & every
    return len(b) - unmatched.bit_count()


def distinct_ngrams(texts: Sequence[Sequence[str]], n: int) -> float | None:
    """Different n-grams per word, over all texts together (distinct-n of Li et al. 2016); None without words."""
    num_words = sum(map(len, texts))
    return len({ngram for words in texts for ngram in _ngrams(words, n)}) / num_words if num_words else None


def repeated_ngrams(texts: Sequence[Sequence[str]], n: int) -> float | None:
    """The share of all n-grams that already occurred earlier in the same text; None where there is no n-gram.

    This is seq-rep-n of Welleck et al. 2020 (arXiv:1908.04319), but counts are summed over the texts and divided once.
    """
    ngrams = [_ngrams(words, n) for words in texts]
    total = sum(map(len, ngrams))
    return sum(len(each) - len(set(each)) for each in ngrams) / total if total else None


def derangement(num: int, seed: int) -> list[int]:
    """A random cyclic permutation of 0 to num - 1, the same for the same seed: no element keeps its place."""
    assert num >= 2, "one element has no other place"
    order = list(range(num))
    random.Random(seed).shuffle(order)
    following = dict(zip(order, order[1:] + order[:1], strict=True))
    return [following[i] for i in range(num)]


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def _sacrebleu_metrics() -> Any:
    return import_extra("sacrebleu.metrics", "The measure chrF or BLEU (sacrebleu)", "eval")
