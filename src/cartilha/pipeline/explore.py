"""`explore`: a local page to look at what models find likely, and to walk through a store."""

from __future__ import annotations

from dataclasses import dataclass

from cartilha.config import ExploreConfig
from cartilha.evaluation.scorer import load_scorer
from cartilha.explorer.port import listen
from cartilha.explorer.reading import Reader
from cartilha.explorer.session import Explorer
from cartilha.explorer.walking import Mixture, StoreWalk
from cartilha.machine.devices import choose_device
from cartilha.pipeline.preflight import preflight
from cartilha.pipeline.result import Result
from cartilha.reporting.wording import choose_language
from cartilha.runs.sources import Mix
from cartilha.tokens.store import TokenStore


@dataclass(frozen=True)
class ExploreResult(Result):
    """Where the page was, and with what."""

    address: str
    models: tuple[str, ...]
    store: str | None


def explore(config: ExploreConfig) -> ExploreResult:
    """Serve the page on this machine until it is interrupted."""
    preflight(config)
    from cartilha.explorer.app import serve

    with listen(config.port) as socket:
        explorer = open_explorer(config)
        language, opens = choose_language(config.language), not config.no_browser
        address = serve(explorer, socket, default=language, open_browser=opens, proxy=config.proxy)
    return ExploreResult(address, config.models, config.store)


def open_explorer(config: ExploreConfig) -> Explorer:
    """Load the models and open the store; a UserError says that one of them is not there, or damaged."""
    store = TokenStore(config.store) if config.store else None
    readers = {}
    if config.models:
        device = choose_device(config.device)
        for letter, ref in zip("AB", config.models, strict=False):
            # The text to read is typed and comes from no store; only a random: model may need the store's tokenizer.
            scorer = load_scorer(ref, store if ref.startswith("random:") else None, config, device)
            readers[letter] = Reader(scorer.loaded, scorer.tokenizer, scorer.protocol, letter)
    if store is None:
        return Explorer(readers)
    mixture = None
    if config.mix:
        mix = Mix.of(config.mix, store)
        mixture = Mixture(mix.documents, mix.label)
    return Explorer(readers, StoreWalk(store, mixture))
