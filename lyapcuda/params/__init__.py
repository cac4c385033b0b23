"""Parameters: which take part, where they lie in flat buffers, how ranks share them."""
