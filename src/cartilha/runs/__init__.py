"""What a run is: its set-up, its plan, its files and what is shown and written while it trains."""
