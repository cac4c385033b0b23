"""The compiled ops, `torch.ops.lyapcuda.*`.

`state` has the numbers that a step decides, `step` the ops of a step of k separations, `newton`
those of a quasi-Newton step, `products` those of H·v, `panel` matrices of vectors. `library` looks
them up. `reference` has an fp64 oracle of each, by the same name.
"""

from lyapcuda.ops import newton, panel, products, state, step
from lyapcuda.ops.library import build_info, register_fakes
from lyapcuda.ops.newton import *  # noqa: F403
from lyapcuda.ops.panel import *  # noqa: F403
from lyapcuda.ops.products import *  # noqa: F403
from lyapcuda.ops.state import *  # noqa: F403
from lyapcuda.ops.step import *  # noqa: F403

__all__ = ["build_info", "register_fakes"]
for _module in (newton, panel, products, state, step):
    __all__ += _module.__all__

register_fakes("lyapcuda")
