"""Everything that can be scored without weights of others, on one page."""
