"""Which float32 products CUDA may compute in TF32, as far as autograd's graph shows it.

TF32 rounds the factors to 10 bits of mantissa; their products are added in float32. Convolutions
and cuDNN's RNNs take it by default, matrix products where the user allows it.
"""

from __future__ import annotations

import os
from typing import Any

import torch

__all__ = ["EMPTY", "EPSILON", "has_tf32", "is_allowed", "node_epsilon"]

#: Machine epsilon of 10 bits.
EPSILON = 2.0**-10

# autograd's functions by the setting that they follow. Not among them: products of a matrix and a
# vector, for which torch turns TF32 off, and fused attention, which makes three TF32 products of
# one, for float32's precision.
_PRODUCTS = {
    **dict.fromkeys(("Convolution", "CudnnConvolution", "CudnnConvolutionTranspose"), "conv"),
    **dict.fromkeys(("Mm", "Addmm", "Bmm", "Baddbmm", "Addbmm", "Matmul", "Linear"), "matmul"),
    **dict.fromkeys(("ForeachMm", "GroupedMm", "ConvTbc", "Cdist", "EuclideanDist"), "matmul"),
    **dict.fromkeys(("SlowConv2D", "SlowConv3D", "SlowConvDilated2D"), "matmul"),
    **dict.fromkeys(("SlowConvDilated3D", "SlowConvTranspose2D", "SlowConvTranspose3D"), "matmul"),
    "CudnnRnn": "rnn",
}
#: Functions of DDP's and FSDP2's in which nothing is computed.
EMPTY = ("_DDPSink", "RegisterPostBackwardFunction")


def node_epsilon(node: Any) -> float:
    """TF32's ε where a node of autograd's graph is a float32 product that takes it, or hides what
    may be one; else 0.0.
    """
    results = getattr(node, "_input_metadata", ())
    devices = {made.device for made in results if made.dtype == torch.float32}
    # The device is asked last: no others than those of the loss, and only about products.
    takes = any(map(is_allowed, _kinds(node))) and any(map(has_tf32, devices))
    return EPSILON if takes else 0.0


def is_allowed(kind: str) -> bool:
    """Whether products of a kind ("conv", "rnn", "matmul") may take TF32, by torch's settings as
    they are now.
    """
    if os.environ.get("NVIDIA_TF32_OVERRIDE") == "0":
        return False
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    # Without cuDNN, both are matrix products.
    settings = {"conv": cudnn.conv, "rnn": cudnn.rnn} if cudnn.enabled else {}
    # `allow_tf32` and `get_float32_matmul_precision` say the same, but raise where these were set.
    return settings.get(kind, matmul).fp32_precision == "tf32"


def has_tf32(device: torch.device) -> bool:
    """Whether a device has TF32: CUDA's, from compute capability 8.0 on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _kinds(node: Any) -> set[str]:
    """The kinds of products that a node is, or may hide."""
    name = node.name().partition("Backward")[0]
    if name in _PRODUCTS:
        return {_PRODUCTS[name]}
    custom = isinstance(node, torch.autograd.function.BackwardCFunction)
    if not custom or node.name().startswith(EMPTY):
        return set()
    # Compiled parts and most custom functions take their weights as arguments, checkpoints don't.
    weights = [n.variable for n, _ in node.next_functions if hasattr(n, "variable")]
    flat = bool(weights) and all(weight.dim() < 3 for weight in weights)
    return {"matmul"} if flat else {"conv", "rnn", "matmul"}
