"""The compiled ops, `torch.ops.lyapcuda.*`.

`flat` has those over flat buffers, `panel` those over k of them at once. `fakes` has
their shapes for tracing, `reference` and `panel_reference` an fp64 oracle for each.
"""

from lyapcuda.ops.fakes import register_fakes
from lyapcuda.ops.flat import (
    ESTIMATES,
    OF_QUOTIENTS,
    STATE_FIELDS,
    SUM_FIELDS,
    ascent_,
    build_info,
    descend_,
    difference_,
    displace_,
    exponent_,
    new_state,
    recenter_,
    reseed_,
    secant_,
    stream_copy_,
)
from lyapcuda.ops.panel import (
    MAX_PANEL,
    benettin_,
    benettin_refine_,
    combine_,
    gram,
    new_panel_state,
    panel_ascent_,
    panel_descend_,
    panel_field,
    panel_fields,
    panel_recenter_,
    panel_slopes_,
    project_,
)

__all__ = [
    "ESTIMATES",
    "MAX_PANEL",
    "OF_QUOTIENTS",
    "STATE_FIELDS",
    "SUM_FIELDS",
    "ascent_",
    "benettin_",
    "benettin_refine_",
    "build_info",
    "combine_",
    "descend_",
    "difference_",
    "displace_",
    "exponent_",
    "gram",
    "new_panel_state",
    "new_state",
    "panel_ascent_",
    "panel_descend_",
    "panel_field",
    "panel_fields",
    "panel_recenter_",
    "panel_slopes_",
    "project_",
    "recenter_",
    "register_fakes",
    "reseed_",
    "secant_",
    "stream_copy_",
]

register_fakes("lyapcuda")
