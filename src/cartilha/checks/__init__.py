"""Is the set-up right? Each check is a small function that says what it would catch; `pipeline.check` runs them."""
