"""The parts of bench/tracking_accuracy.py, a module a kind of training."""
