"""Importing this reads the model of `language`: a process that workers are forked from does so once for all of them."""

from cartilha.corpus.language import load_identifier

load_identifier()
