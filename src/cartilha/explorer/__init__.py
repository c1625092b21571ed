"""The explorer: a local page to look at what a model finds likely, token by token.

The computing (`reading`, `choices`, `writing`, `walking`) and the drawing (`parts`, `curve`) know nothing of gradio;
`page` wires them to its components, `app` serves the page on this machine only.
"""
