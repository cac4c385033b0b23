"""Settings for every test."""

import os

# The tests' tensors are small: a second thread would only be waited for. Processes that tests start
# see it too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

torch.set_num_threads(1)
