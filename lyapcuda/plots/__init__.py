"""Pictures: `figure` (colours, files), `run` (a training run), `spectrum` (what solvers find).

matplotlib is imported where one is drawn.
"""
