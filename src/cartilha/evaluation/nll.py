"""The nll of documents under a model: windows packed into rows, scored in one pass, summed in float64."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from cartilha.blocks.packing import IGNORE_INDEX, Batch
from cartilha.errors import UserError
from cartilha.evaluation.documents import ScoredDocuments
from cartilha.evaluation.scorer import Scorer
from cartilha.evaluation.windows import Window, document_windows
from cartilha.machine.processes import gather_objects
from cartilha.model.forward import scored_tokens
from cartilha.model.loss import TokenScores, Wanted
from cartilha.model.sharding import is_sharded

TOKENS_PER_FORWARD = {"cpu": 1024, "cuda": 32_768, "mps": 8192}
POSITION_EDGES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)


@dataclass(frozen=True)
class TokenRows:
    """The `TokenScores` of one forward pass as arrays, with the tokens that they belong to.

    `document` is the index of a token's document, and `position` the token's place in it, from 0.
    """

    document: np.ndarray
    position: np.ndarray
    token_id: np.ndarray
    nll: np.ndarray
    entropy: np.ndarray
    rank: np.ndarray
    likeliest_ids: np.ndarray | None = None
    likeliest: np.ndarray | None = None


@dataclass
class DocumentScores:
    """What scoring found; positions are in bins [edge, next edge) of `POSITION_EDGES`, the last one open.

    Attributes:
        nll: Nats of each document, float64, shape (num_documents,).
        unused_mass: Sum over all tokens of the probability of rows that no token uses; None where it was not measured.
        position_nll: Nats of the tokens in each bin of positions; `position_tokens` counts them.
    """

    nll: np.ndarray
    unused_mass: float | None = None
    position_nll: np.ndarray = field(default_factory=lambda: np.zeros(len(POSITION_EDGES)))
    position_tokens: np.ndarray = field(default_factory=lambda: np.zeros(len(POSITION_EDGES), np.int64))

    def add(self, owner: np.ndarray, position: np.ndarray, nll: np.ndarray) -> None:
        """Add tokens: the document and position of each, and its nll in float64."""
        np.add.at(self.nll, owner, nll)
        position_bin = np.searchsorted(POSITION_EDGES, position, side="right") - 1
        np.add.at(self.position_nll, position_bin, nll)
        np.add.at(self.position_tokens, position_bin, 1)


def join_scores(parts: Sequence[DocumentScores], order: np.ndarray) -> DocumentScores:
    """Scores of documents that were scored part by part, as those of one corpus; `order` sorts the parts' documents."""
    masses = [part.unused_mass for part in parts if part.unused_mass is not None]
    return DocumentScores(
        np.concatenate([part.nll for part in parts])[order],
        sum(masses) if masses else None,
        np.sum([part.position_nll for part in parts], axis=0),
        np.sum([part.position_tokens for part in parts], axis=0),
    )


def score_documents(
    scorer: Scorer,
    documents: ScoredDocuments,
    *,
    advance: Callable[[float], None] = lambda amount: None,
    take_rows: Callable[[TokenRows], None] | None = None,
    num_likeliest: int = 0,
    measure_unused: bool = False,
) -> DocumentScores:
    """Minus the sum of ln p(token | context) over the tokens of each document, every token scored exactly once.

    The scorer's model computes attention within documents. After each forward pass `advance` is told the number of
    tokens scored, and `take_rows` is given their scores, in no particular order, with the `num_likeliest` likeliest
    tokens of each. `measure_unused` sums the probability of rows that no token uses, which costs a little. A document
    with a token whose nll is not finite is named by a UserError, never dropped. Of a sharded model, all processes call
    this, with any documents.
    """
    model, protocol = scorer.loaded.model, scorer.protocol
    windows = [
        window
        for document, ids in enumerate(documents.ids)
        for window in document_windows(len(ids), protocol.window, protocol.stride, document)
    ]
    scores = DocumentScores(np.zeros(len(documents.ids)), 0.0 if measure_unused else None)
    num_scored = np.zeros(len(documents.ids), np.int64)
    wanted = Wanted(scorer.unused_ids if measure_unused else None, take_rows is not None, num_likeliest)
    was_training = model.training
    model.eval()  # without dropout
    try:
        batches = list(_batches(windows, TOKENS_PER_FORWARD.get(model.device.type, 4096)))
        num_passes = max(gather_objects(len(batches))) if is_sharded(model) else len(batches)
        for rows in batches:
            batch = _batch(rows, documents.ids, protocol.prefix_id)
            found = scored_tokens(model, batch, scorer.dtype, wanted=wanted)
            nll = found.nll.double().cpu().numpy()
            scored = [window for row in rows for window in row]
            owner = np.repeat([window.document for window in scored], [window.num_scored for window in scored])
            position = np.concatenate([np.arange(window.first_target, window.past) for window in scored])
            _check_finite(nll, owner, documents.doc_ids)
            scores.add(owner, position, nll)
            if scores.unused_mass is not None:
                scores.unused_mass += float(found.unused_mass.double().sum())
            np.add.at(num_scored, owner, 1)
            if take_rows is not None:
                token_ids = batch.targets[batch.targets != IGNORE_INDEX]
                take_rows(_token_rows(found, owner, position, token_ids))
            advance(len(nll))
        for _ in range(num_passes - len(batches)):  # each pass needs all processes
            scored_tokens(model, Batch.unscored(np.zeros(1, np.int64)), scorer.dtype, wanted=wanted)
    finally:
        model.train(was_training)
    assert (num_scored == documents.num_tokens).all(), "every token is scored exactly once"
    return scores


def _token_rows(found: TokenScores, owner: np.ndarray, position: np.ndarray, token_ids: np.ndarray) -> TokenRows:
    measured = {name: scores for name, scores in vars(found).items() if scores is not None and name != "unused_mass"}
    return TokenRows(owner, position, token_ids, **{name: scores.cpu().numpy() for name, scores in measured.items()})


def _check_finite(nll: np.ndarray, owner: np.ndarray, doc_ids: Sequence[str]) -> None:
    if not np.isfinite(nll).all():
        name = doc_ids[owner[~np.isfinite(nll)][0]]
        raise UserError(
            f"The model gives a token of the document {name} a probability that is not a number above zero; "
            "try --dtype float32, and check the model's weights."
        )


def _batches(windows: Sequence[Window], max_tokens: int) -> Iterator[list[list[Window]]]:
    """Rows of windows, longest windows first, each row filled up with shorter ones (best fit decreasing)."""
    order = sorted(windows, key=lambda window: -window.num_inputs)
    begin = 0
    while begin < len(order):
        # Rows are as long as the longest window left; a batch takes what fills its rows, from the long end on.
        row_length = order[begin].num_inputs
        rows: list[list[Window]] = [[] for _ in range(max(1, max_tokens // row_length))]
        room = [(row_length, row) for row in range(len(rows))]  # sorted
        while begin < len(order):
            length = order[begin].num_inputs
            place = bisect.bisect_left(room, (length, -1))
            if place == len(room):
                break
            left, row = room.pop(place)
            rows[row].append(order[begin])
            bisect.insort(room, (left - length, row))
            begin += 1
        yield [row for row in rows if row]


def _batch(rows: Sequence[Sequence[Window]], ids: Sequence[np.ndarray], prefix_id: int) -> Batch:
    """The rows as inputs and targets; the rest of a row is padding, a segment of its own without targets."""
    row_length = max(sum(window.num_inputs for window in row) for row in rows)
    shape = (len(rows), row_length)
    input_ids, position_ids = np.full(shape, prefix_id, np.int64), np.zeros(shape, np.int64)
    targets = np.full(shape, IGNORE_INDEX, np.int64)
    segments: list[int] = []
    for row, windows in enumerate(rows):
        at = 0
        for window in windows:
            document = ids[window.document]
            end = at + window.num_inputs
            first = at + (1 if window.first_input < 0 else 0)  # position 0 of a first window holds the prefix
            input_ids[row, first:end] = document[max(0, window.first_input) : window.past - 1]
            targets[row, end - window.num_scored : end] = document[window.first_target : window.past]
            position_ids[row, at:end] = np.arange(end - at)
            segments.append(end - at)
            at = end
        if at < row_length:
            position_ids[row, at:] = np.arange(row_length - at)
            segments.append(row_length - at)
    return Batch(input_ids, targets, position_ids, np.array(segments, np.int64))
