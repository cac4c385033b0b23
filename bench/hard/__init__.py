"""The problems of bench/hard_truth.py, a module a kind of difficulty."""
