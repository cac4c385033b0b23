"""Trackers in other people's training loops and loggers: a module a package, imported by its name.

`lightning`, `transformers`, `accelerate`: trainers. `wandb`, `mlflow`: writers of a `CurvatureLog`.
"""
