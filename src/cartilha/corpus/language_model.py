"""Importing this module loads the model of `language`, once for all workers that are forked afterwards."""

from cartilha.corpus.language import load_identifier

load_identifier()
