"""Arguments of the ops of hypothesis's choice, and how an op's result is held to its oracle's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from ops_cases import DTYPES, Case, assert_same_bits, bits, make_case, surroundings
from panel_cases import make_panel_case

#: Around vectors, tiles and a panel's blocks; up to three segments of these.
SIZES = st.one_of(
    st.integers(0, 40),
    st.sampled_from([255, 256, 257, 4095, 4097]),
    st.tuples(st.integers(0, 5), st.integers(1, 9)),
    st.just(()),
)


@dataclass
class Drawn:
    """What an example is made of."""

    sizes: list
    dtypes: tuple[torch.dtype, torch.dtype]
    gap: int
    shift: int
    seed: int
    k: int
    variant: int
    sign: int
    flags: tuple[bool, bool, bool]

    def case(self, **state: float) -> Case:
        options = dict(exact=True, gap=self.gap, shift=self.shift, seed=self.seed)
        return make_case(self.sizes, *self.dtypes, **options, **state)

    def panels(self, **state):
        options = dict(exact=True, gap=self.gap, shift=self.shift, seed=self.seed)
        return make_panel_case(self.k, self.sizes, *self.dtypes, **options, **state)


@st.composite
def drawn(draw) -> Drawn:
    return Drawn(
        sizes=draw(st.lists(SIZES, max_size=3)),
        dtypes=draw(st.sampled_from(DTYPES)),
        gap=draw(st.integers(0, 9)),
        shift=draw(st.integers(0, 9)),
        seed=draw(st.integers(0, 999)),
        k=draw(st.sampled_from([1, 2, 3, 5, 14, 32])),
        variant=draw(st.integers(0, 9)),
        sign=draw(st.sampled_from([1, -1])),
        flags=(draw(st.booleans()), draw(st.booleans()), draw(st.booleans())),
    )


def same(actual: torch.Tensor, exact: torch.Tensor) -> None:
    """The float64 values of an oracle (NaN: not an element of any segment), in the op's type."""
    exact = exact.reshape(actual.shape)
    asked = ~exact.isnan()
    assert_same_bits(actual[asked] + 0, exact[asked].to(actual.dtype) + 0)  # −0 is 0 here


class Untouched:
    """That nothing but the tensors written to changes, nor what surrounds any tensor."""

    def __init__(self, case) -> None:
        self._before = [(t, t.clone(), surroundings(t)) for t in case.tensors()]

    def check(self, *written: torch.Tensor) -> None:
        addresses = {t.data_ptr() for t in written if t.numel()}
        for tensor, value, around in self._before:
            if tensor.data_ptr() not in addresses:
                assert torch.equal(bits(tensor), bits(value))
            assert torch.equal(bits(surroundings(tensor)), bits(around))
