"""The runs of bench/tracking_accuracy.py, a module a kind."""
