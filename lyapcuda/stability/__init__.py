"""How near the edge of stability: what an optimizer does to a gradient, and from where it grows."""
