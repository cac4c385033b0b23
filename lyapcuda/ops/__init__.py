"""The compiled ops, `torch.ops.lyapcuda.*`.

`state` has the numbers that a step decides, `step` the ops of a step of k separations, `newton`
those of a quasi-Newton step, `products` those of H·v, `panel` matrices of vectors. `library` looks
them up. `reference` has an fp64 oracle of each, by the same name.
"""

from lyapcuda.ops.library import build_info, register_fakes
from lyapcuda.ops.newton import descend_, slopes_
from lyapcuda.ops.panel import combine_, gram, project_
from lyapcuda.ops.products import difference_, displace_
from lyapcuda.ops.state import (
    ESTIMATES,
    MAX_K,
    OF_QUOTIENTS,
    new_state,
    state_field,
    state_fields,
)
from lyapcuda.ops.step import ascent_, benettin_, benettin_refine_, recenter_, reseed_

__all__ = [
    "ESTIMATES",
    "MAX_K",
    "OF_QUOTIENTS",
    "ascent_",
    "benettin_",
    "benettin_refine_",
    "build_info",
    "combine_",
    "descend_",
    "difference_",
    "displace_",
    "gram",
    "new_state",
    "project_",
    "recenter_",
    "register_fakes",
    "reseed_",
    "slopes_",
    "state_field",
    "state_fields",
]

register_fakes("lyapcuda")
