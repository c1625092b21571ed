"""`inspect`: what a store, or the primer, holds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cartilha.config import InspectConfig
from cartilha.corpus.primer import PrimerCount, primer_table
from cartilha.corpus.splits import SPLITS
from cartilha.tokens.store import TokenStore


@dataclass(frozen=True)
class InspectResult:
    """What there is: the facts of a store, or the primer's texts by genre and variety (one of the two)."""

    store: dict[str, Any] | None
    primer: tuple[PrimerCount, ...] | None
    first_documents: tuple[dict[str, Any], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        if self.primer is not None:
            return {"primer": [asdict(count) for count in self.primer]}
        return {"store": self.store, "first_documents": list(self.first_documents)}


def inspect(config: InspectConfig) -> InspectResult:
    """Look at a store or at the primer.

    Raises:
        UserError: The directory is no store.
    """
    if config.what == "primer" and not Path("primer").is_dir():
        return InspectResult(None, tuple(primer_table()))
    store = TokenStore(config.what)
    facts = {key: value for key, value in store.info.items() if key != "files"}
    return InspectResult(facts, None, tuple(_first_documents(store)))


def _first_documents(store: TokenStore, num_documents: int = 3, num_tokens: int = 24) -> list[dict[str, Any]]:
    """The beginnings of each side's first documents, as the model will read them."""
    tokenizer = store.tokenizer()
    rows = []
    for split in SPLITS:
        tokens, documents, labels = store.tokens(split), store.documents(split), store.labels(split)
        for i in range(min(num_documents, len(documents.start))):
            begin = int(documents.start[i])
            ids = tokens[begin : begin + min(num_tokens, int(documents.num_tokens[i]))]
            rows.append(
                {
                    "split": split,
                    "doc_id": labels["doc_id"][i],
                    "num_tokens": int(documents.num_tokens[i]),
                    "ids": ids.tolist(),
                    "begins": tokenizer.decode(ids),
                }
            )
    return rows
