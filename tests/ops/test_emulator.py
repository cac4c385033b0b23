"""What only the emulator can show of the kernels: barriers left out, indices beyond 2³¹."""

import mmap

import pytest
import torch

import simt_library
from op_inputs import F32, F64, Inputs, assert_same_bits, bits, cloned, tensors_of
from op_table import TABLE, check

# --- a barrier that is missing -------------------------------------------------------------------

#: (op, rows, sizes, form, launch of the op, its barriers): where each counts. One processor, so
#: that blocks take several tiles.
BARRIERS = [
    ("ascent_", 1, [40, 20080], "plain", 0, [0]),  # sums of a block, then of all blocks
    ("ascent_", 1, [40, 20080], "plain", 1, [0]),
    ("ascent_", 14, [40, 2080], "plain", 0, range(6)),
    ("ascent_", 14, [1200], "heavy", 0, range(6)),
    ("ascent_", 32, [800], "realised, heavy", 0, range(6)),
    ("ascent_", 14, [1200], "heavy", 1, [0]),
    ("ascent_", 14, [1200], "realised, metric", 0, [0]),
    ("recenter_", 14, [40, 3300], "pending", 0, range(4)),
    # (Where nothing is pending a thread takes from a full tile what it put there.)
    ("recenter_", 14, [40, 1600], "not pending", 0, [0]),
    ("recenter_", 14, [40, 1600], "pending, heavy", 1, [0, 2]),
    ("recenter_", 14, [40, 1600], "not pending, metric", 0, [0]),
    ("displace_", 1, [40, 20080], "forward", 0, [0]),
    ("displace_", 1, [40, 20080], "forward", 1, [0]),
    ("directional_products", 1, [40, 20080], "plain", 0, [0]),
    ("directional_products", 1, [40, 20080], "plain", 1, [0]),
    ("slopes_", 5, [1600, 1028], "heavy", 0, range(3)),
    ("slopes_", 5, [1600, 1028], "heavy", 1, [0]),
    ("descend_, along vectors", 5, [1600, 1028], "heavy", 0, range(2)),
    # Before and after the products of every tile, then between warps that hand their sums over.
    ("gram", 28, [2048], "with itself", 0, [*range(5), *range(8, 8 + 4 * 7 - 1)]),
    ("gram", 28, [2048], "with itself", 1, [0]),
    ("gram", 28, [2048], "weights", 0, range(2)),
    ("gram", 128, [1024], "with itself", 0, range(4)),
    ("gram", 5, [2048], "with 96 rows", 0, range(4)),
    ("combine_", 5, [4800], "square", 0, range(3)),
    # In turn before and after some columns of the matrix are staged.
    ("combine_", 128, [800], "128 columns", 0, range(1, 6)),
    ("project_", 5, [3700], "plain", 0, range(4)),
    ("project_", 5, [3700], "plain", 1, [0]),
]


def sees(wrong, launch, barrier):
    """Whether ``wrong()`` raises in one order of the warps at least without that barrier, though it
    doesn't with it."""
    seen = False
    for order in simt_library.ORDERS:
        with simt_library.emulated(order, processors=1):
            wrong()
            with simt_library.without_barrier(launch, barrier):
                try:
                    wrong()
                except (AssertionError, RuntimeError):  # or the emulator reports the fault
                    seen = True
    return seen


@pytest.mark.parametrize(
    "at", BARRIERS, ids=lambda at: f"{at[0]}, {at[3]}, k = {at[1]}, launch {at[4]}"
)
def test_a_missing_barrier_is_seen(at):
    name, k, sizes, form, launch, barriers = at
    row = TABLE[name]

    def wrong():
        check(row, row.inputs(sizes, k, gap=16), form)

    missed = [barrier for barrier in barriers if not sees(wrong, launch, barrier)]
    assert not missed


def test_missing_barriers_of_a_step_are_seen():
    row = TABLE["benettin_"]
    arguments = row.arguments(row.inputs([], 14, F64, F64), "plain")
    expected = cloned(arguments)
    row.call(expected)

    def wrong():
        a = cloned(arguments)
        row.call(a)
        assert torch.equal(bits(a["state"]), bits(expected["state"]))

    tried = range(0, 40, 3)
    # A few guard what one warp does anyway, between phases of fewer than 32 entries.
    assert 2 * sum(sees(wrong, 0, barrier) for barrier in tried) > len(tried)


# --- indices of 64 bits --------------------------------------------------------------------------

PROCESSORS = 1024
#: A multiple of what so many processors of 1 to 5 blocks take at a time, in chunks of up to 2048
#: elements, less a few: the last block has the last chunk.
ROW = 18 * 60 * PROCESSORS * 2048 - 88
assert ROW > 2**31
#: Of each row's end: more than the last two chunks.
END = 8192
MAP_NORESERVE = 0x4000  # Linux's, which Python's mmap doesn't name


class Mapped(Inputs):
    """Rows of zeros, which take no memory until they are written, but for random numbers at the
    end of each."""

    def __init__(self, k):
        super().__init__([ROW], k, gap=0)

    def panel(self, rows=None, dtype=F32, span=1.0):
        rows = self.k if rows is None else rows
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        memory = mmap.mmap(-1, 4 * rows * ROW, flags=flags)
        out = torch.frombuffer(memory, dtype=F32).view(rows, ROW)
        self.random(out[:, -END:], span)
        return out

    def listed(self, span=1.0):
        return [self.panel(1)[0]]


def ends(value):
    """What lies at the ends of the rows, as arguments of their own."""
    if isinstance(value, list):
        return [ends(item) for item in value]
    if isinstance(value, torch.Tensor) and value.shape[-1:] == (ROW,):
        return value[..., -END:].clone()
    return value


#: Of others nothing can be told from the ends of the rows alone.
ELEMENTS = ("ascent_", "recenter_", "slopes_", "descend_", "displace_", "difference_", "combine_")
HUGE = [(name, k) for name in (*ELEMENTS, "project_") for k in (1, 2) if k in TABLE[name].counts]


@pytest.mark.parametrize(("name", "k"), HUGE)
def test_rows_of_more_than_2_31_elements(name, k):
    row = TABLE[name]
    arguments = row.arguments(Mapped(k), list(row.forms)[0])
    small = {name: ends(value) for name, value in arguments.items()}
    expected = row.arithmetic(small, row.inputs([END], k, gap=0))
    with simt_library.emulated(processors=PROCESSORS), simt_library.last_blocks(2):
        row.call(arguments)
    for name in set(row.written) & set(expected):
        actual, wanted = (next(tensors_of(x[name])) for x in (arguments, expected))
        assert_same_bits(actual[..., -100:].contiguous(), wanted[..., -100:].contiguous())
