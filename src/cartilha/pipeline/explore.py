"""`explore`: a local page to look at what models find likely, and to walk through a store."""

from __future__ import annotations

from dataclasses import dataclass

from cartilha.config import EvaluateConfig, ExploreConfig
from cartilha.explorer.port import listen
from cartilha.explorer.reading import Reader
from cartilha.explorer.session import Explorer
from cartilha.explorer.walking import StoreWalk
from cartilha.pipeline.evaluate import scorer_for
from cartilha.pipeline.held_out import HeldOut
from cartilha.pipeline.preflight import preflight
from cartilha.pipeline.result import Result
from cartilha.reporting.wording import choose_language
from cartilha.tokens.store import TokenStore


@dataclass(frozen=True)
class ExploreResult(Result):
    """Where the page was, and with what."""

    address: str
    models: tuple[str, ...]
    store: str | None


def explore(config: ExploreConfig) -> ExploreResult:
    """Serve the page on this machine until it is interrupted.

    Raises:
        UserError: Nothing to explore, a model or store that cannot be opened, a port that is taken, or the extra
            `explorer` is missing.
    """
    preflight(config)
    from cartilha.explorer.app import serve

    with listen(config.port) as socket:
        explorer = open_explorer(config)
        address = serve(explorer, socket, default=choose_language(config.language), open_browser=not config.no_browser)
    return ExploreResult(address, config.models, config.store)


def open_explorer(config: ExploreConfig) -> Explorer:
    """Load the models and open the store.

    Raises:
        UserError: One of them is not there, or damaged.
    """
    store = TokenStore(config.store) if config.store else None
    readers = {letter: _reader(ref, store, config) for letter, ref in zip("AB", config.models, strict=False)}
    return Explorer(readers, StoreWalk(config.store) if config.store else None)


def _reader(ref: str, store: TokenStore | None, config: ExploreConfig) -> Reader:
    # As `cartilha evaluate` gets a model ready, so that the figures are the same.
    settings = EvaluateConfig(dtype=config.dtype, device=config.device)
    # What is typed is nobody's store: that is asked only for the tokenizer that a random: model may lack.
    scorer = scorer_for(ref, HeldOut(settings, store if ref.startswith("random:") else None, None), settings)
    return Reader(scorer.loaded, scorer.tokenizer, scorer.protocol)
