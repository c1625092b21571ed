"""Documents that are split by the hashes of their texts, and the same in plain Python."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cartilha.corpus.splits import Clusters, SplitResult, SplitRule, split_documents, split_position


def hash_pairs(hashes: Sequence[str]) -> np.ndarray:
    """Hexadecimal hashes as `DocumentIndex` has them: uint64, shape (num_documents, 2)."""
    return np.array([[int(one[:16], 16), int(one[16:], 16)] for one in hashes], np.uint64).reshape(-1, 2)


def clusters_of(hashes: Sequence[str], numbers: Sequence[int]) -> Clusters:
    """Clusters, given by any number that near-duplicates share."""
    _, firsts, places = np.unique(numbers, return_index=True, return_inverse=True)
    return Clusters(firsts[places], hash_pairs(hashes))


def split(
    hashes: Sequence[str], rule: SplitRule, numbers: Sequence[int] | None = None, given: np.ndarray | None = None
) -> SplitResult:
    """Split documents by their hashes, all of which stay."""
    positions = np.array([split_position(one, rule.seed) for one in hashes])
    clusters = None if numbers is None else clusters_of(hashes, numbers)
    return split_documents(positions, np.ones(len(hashes), bool), rule, given, clusters)


def split_plainly(positions: list[float], hashes: list[str], numbers: list[int], rule: SplitRule) -> set[int]:
    """Which documents `split_documents` holds out by fraction or number, one cluster after the other."""
    members: dict[int, list[int]] = {}
    for document, number in enumerate(numbers):
        members.setdefault(number, []).append(document)
    groups = [[document] for document in range(len(numbers))] if len(members) == 1 else list(members.values())
    place = {id(group): positions[min(group, key=hashes.__getitem__)] for group in groups}
    groups.sort(key=lambda group: place[id(group)])
    smallest = min(groups, key=len)
    chosen: list[list[int]] = []
    if rule.documents is not None:
        for group in groups:
            if len(group) <= rule.documents - sum(map(len, chosen)):
                chosen.append(group)
        chosen = chosen or [smallest]
    else:
        fit = [group for group in groups if len(group) == 1 or len(group) <= rule.fraction * len(numbers)]
        chosen = [group for group in fit if place[id(group)] < rule.fraction]
        if not fit:
            chosen = [smallest]
        elif not chosen:
            chosen = fit[:1]
        elif len(chosen) == len(groups):
            chosen = chosen[:-1]
    return {document for group in chosen for document in group}
