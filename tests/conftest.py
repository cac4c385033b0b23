"""Settings for every test."""

import torch

# The tests' tensors are small: a second thread would only be waited for.
torch.set_num_threads(1)
