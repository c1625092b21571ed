"""From inputs to a store: what was asked, the work on one shard, who does it, and the pass that puts it together."""
