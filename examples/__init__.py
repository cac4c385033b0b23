"""Examples that can be run as they are, and the paper's experiments."""
