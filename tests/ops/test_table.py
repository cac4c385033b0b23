"""Every row of the table of ops (tests/support/op_table.py) on every backend.

What an op leaves is its oracle's to the last bit where whole numbers leave nothing to round, and
its arithmetic's for random ones; nothing else in memory changes. Emulated backends, and those under
sanitizers, take a sample of what the CPU takes, in which every tail is, every type, and every
number of rows with every form.
"""

import itertools
import os
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import simt_library
from lyapcuda import ops
from op_inputs import (
    FEW_DTYPES,
    LARGE,
    LONG_TAILS,
    SEGMENTS,
    TAILS,
    assert_same_bits,
    bits,
    cloned,
    tensors_of,
    threads,
    whole,
)
from op_table import ROWS, check

#: Whether to take little of everything, as under sanitizers.
SAMPLE = "LYAPCUDA_TEST_SAMPLE" in os.environ
PAIRS = [(row, dtypes) for row in ROWS for dtypes in row.dtypes]
if SAMPLE:
    PAIRS = [(row, dtypes) for row, dtypes in PAIRS if row.scalars or dtypes in FEW_DTYPES]
IDS = ["-".join([row.name, *(str(d)[6:] for d in dtypes)]) for row, dtypes in PAIRS]
BUFFERED = [(pair, name) for pair, name in zip(PAIRS, IDS, strict=True) if not pair[0].scalars]
#: Rows with buffers, by themselves and with every pair of dtypes.
of_buffers = pytest.mark.parametrize(
    ("row", "dtypes"), [pair for pair, _ in BUFFERED], ids=[name for _, name in BUFFERED]
)
#: Examples that hypothesis draws an op (bench/robustness.py: more than here).
EXAMPLES = int(os.environ.get("LYAPCUDA_EXAMPLES", "40"))


def turned(backend, cases):
    """The cases, numbered. On the emulator the orders of warps take turns."""
    for i, case in enumerate(cases):
        if backend == "simt":
            simt_library.simt(simt_library.ORDERS[i % 3])
        yield i, case


def samples(backend, row, *lists):
    """(entry of each list…, k, form). For the CPU all combinations but of forms, which take turns.
    Else each k with each form, and the entries of the lists beside them in turn."""
    forms = list(row.forms)
    if backend == "cpu" and not SAMPLE:
        whole = enumerate(itertools.product(*lists, row.counts))
        return [(*x, forms[(i + i // len(row.counts)) % len(forms)]) for i, x in whole]
    pairs = list(itertools.product(row.counts, forms))
    count = max(len(pairs), *map(len, lists))
    return [(*(x[i % len(x)] for x in lists), *pairs[i % len(pairs)]) for i in range(count)]


def chance(i):
    """Kind of numbers, gap and shift of case i: by chance, so that none goes with a k or form."""
    draw = random.Random(i)
    return {
        "exact": draw.random() < 0.5,
        "gap": draw.choice((0, 5)),
        "shift": draw.randrange(3),
        "seed": i,
    }


def few(counts):
    return [k for k in counts if k in (0, 1, 3, 5)]


@of_buffers
def test_every_tail(backend, row, dtypes):
    for i, (size, k, form) in turned(backend, samples(backend, row, TAILS)):
        sizes = random.Random(-i).choice(([size], [3, 0, size]))
        check(row, row.inputs(sizes, k, *dtypes, **chance(i)), form)


@of_buffers
def test_long_tails(backend, row, dtypes):
    tails = LONG_TAILS if row.segments else LONG_TAILS[:-1]
    cases = itertools.product(tails, few(row.counts)[-2:])
    for i, (size, k) in turned(backend, cases):
        form = list(row.forms)[i % len(row.forms)]
        check(row, row.inputs([size], k, *dtypes, **chance(i)), form)


@of_buffers
def test_segments_of_every_kind_and_alignment(backend, row, dtypes):
    layouts = list(itertools.product((0, 1, 3), (0, 1, 5, 16)))
    for i, (shift, gap) in turned(backend, layouts):
        k, form = row.counts[i % len(row.counts)], list(row.forms)[i % len(row.forms)]
        options = chance(i) | {"gap": gap, "shift": shift}
        check(row, row.inputs(SEGMENTS, k, *dtypes, **options), form)


@of_buffers
def test_more_tensors_than_a_launch_takes(backend, row, dtypes):
    cases = [(0, True), (1, False), (simt_library.SEGMENTS + 3, True)]
    cases = cases[-1:] if backend == "cpu" else cases  # which has no launches
    for _, (more, exact) in turned(backend, cases):
        sizes = [1030, 0, *(i * 37 % 101 + 1 for i in range(simt_library.SEGMENTS + more - 1))]
        k = row.counts[more % len(row.counts)]
        form = list(row.forms)[-1 if exact else 0]
        check(row, row.inputs(sizes, k, *dtypes, exact=exact, shift=more % 2), form)


@of_buffers
def test_nothing_at_all(backend, row, dtypes):
    cases = list(itertools.product(([], [0]), few(row.counts), row.forms))
    cases.append(([0] * (simt_library.SEGMENTS + 9), few(row.counts)[-1], list(row.forms)[-1]))
    for _, (sizes, k, form) in turned(backend, cases):
        result = check(row, row.inputs(sizes, k, *dtypes, exact=True), form)
        if result is not None and not row.op.startswith("descend"):
            assert not result.any()


WRITTEN_OVER = [(pair, over) for pair, _ in BUFFERED for over in pair[0].over]


@pytest.mark.parametrize(
    ("pair", "over"), WRITTEN_OVER, ids=[f"{p[0].name}-{over}-{p[1]}" for p, over in WRITTEN_OVER]
)
def test_what_is_written_may_lie_where_it_says(backend, pair, over):
    row, dtypes = pair
    for i, (sizes, k, form) in turned(backend, samples(backend, row, [SEGMENTS, [257]])):
        check(row, row.inputs(sizes, k, *dtypes, **chance(i)), form, over)


@pytest.mark.parametrize("row", [row for row in ROWS if row.scalars], ids=lambda row: row.name)
def test_scalars_of_a_step(backend, row):
    cases = itertools.product(range(3), row.counts, row.forms)
    for _, (seed, k, form) in turned(backend, cases):
        inputs = row.inputs([], k, *row.dtypes[0], seed=seed)
        check(row, inputs, form)
        if backend.startswith("simt"):  # a block gets the bits that one thread gets
            arguments = row.arguments(inputs, form)
            emulated = outcome(row, arguments)
            with simt_library.cpu():
                for a, b in zip(emulated, outcome(row, arguments), strict=True):
                    assert_same_bits(a, b)


# --- what the CPU backend alone promises ---------------------------------------------------------


def outcome(row, arguments):
    """All that a call leaves and returns."""
    arguments = cloned(arguments)
    return list(tensors_of([row.call(arguments), arguments]))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_any_number_of_threads_gives_the_same_bits(row):
    for sizes, k in (([70001, 16385], row.counts[0]), ([20000], few(row.counts)[-1])):
        for form in (list(row.forms)[0], list(row.forms)[-1]):
            arguments, runs = row.arguments(row.inputs(sizes, k, *row.dtypes[-1]), form), []
            for count in (1, 2, 2):
                with threads(count):
                    runs.append(outcome(row, arguments))
            for a, b, c in zip(*runs, strict=True):
                assert_same_bits(b, a)
                assert_same_bits(c, a)


@of_buffers
def test_outputs_beyond_the_cache(row, dtypes):
    if row.op == "reseed_" or not row.segments:
        pytest.skip("it has no output that is large and not read")
    first = dtypes == row.dtypes[0]
    for shift, form in ((0, 0), (1, -1)) if first else ((0, -1),):
        # gap 16 keeps the second segment aligned too; shift 1 puts everything off it.
        options = {"exact": shift == 0, "gap": 16, "shift": shift}
        with threads(1 + shift):
            inputs = row.inputs([LARGE - 16384, 16384], 1, *dtypes, **options)
            check(row, inputs, list(row.forms)[form])


# --- what a CUDA backend promises ----------------------------------------------------------------

cuda_backends = pytest.mark.parametrize("backend", simt_library.HERE, indirect=True)


@cuda_backends
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_reruns_give_the_same_bits(backend, row):
    inputs = row.inputs([5001, 333], few(row.counts)[-1], *row.dtypes[0])
    arguments = row.arguments(inputs, list(row.forms)[0])
    for a, b in zip(outcome(row, arguments), outcome(row, arguments), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_any_number_of_processors_is_right(row):
    for processors in (1, 7):
        with simt_library.emulated(processors=processors):
            for form in (list(row.forms)[0], list(row.forms)[-1]):
                check(row, row.inputs([20011, 7, 33], few(row.counts)[-1], *row.dtypes[0]), form)


# --- anything, of hypothesis's choice ------------------------------------------------------------

#: Around vectors, tiles and a panel's blocks; up to three segments of these.
SIZES = st.one_of(
    st.integers(0, 40),
    st.sampled_from([255, 256, 257, 4095, 4097]),
    st.tuples(st.integers(0, 5), st.integers(1, 9)),
    st.just(()),
)


def anything(row, examples=EXAMPLES):
    """Holds as many calls of hypothesis's choice against oracle and arithmetic."""
    count = 0

    @given(
        sizes=st.lists(SIZES, max_size=3),
        k=st.sampled_from(row.counts),
        dtypes=st.sampled_from(row.dtypes),
        form=st.sampled_from(list(row.forms)),
        options=st.fixed_dictionaries(
            {
                "exact": st.booleans(),
                "gap": st.integers(0, 9),
                "shift": st.integers(0, 9),
                "seed": st.integers(0, 999),
            }
        ),
    )
    @settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize="LYAPCUDA_EXAMPLES" not in os.environ,
    )
    def run(sizes, k, dtypes, form, options):
        nonlocal count
        count += 1
        check(row, row.inputs(sizes, k, *dtypes, **options), form)

    run()
    assert count >= min(examples, 20)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_anything(backend, row):
    anything(row)


# --- whether the checks see anything -------------------------------------------------------------


def spoiled(op, name, fault, seen):
    """An op with a fault in the last element of an argument that it writes."""

    def faulty(**arguments):
        written = list(tensors_of(arguments[name]))[-1].view(-1)
        before = written.clone()
        result = op(**arguments)
        changed = (bits(written) != bits(before)).nonzero()
        if len(changed):
            seen.add(name)
            last = int(changed[-1])
            if fault == "another last digit":
                bits(written)[last] += 1
            elif fault == "one element too few":
                written[last] = before[last]
            else:
                whole(written)[written.storage_offset() + last + 1] = 1.0
        return result

    return faulty


@pytest.mark.parametrize(
    "fault", ["another last digit", "one element too few", "one element too many"]
)
@pytest.mark.parametrize("row", [row for row in ROWS if not row.scalars], ids=lambda row: row.name)
def test_the_checks_see_a_fault_of_what_is_written(monkeypatch, row, fault):
    op, seen = getattr(ops, row.op), set()
    for form, exact, name in itertools.product(row.forms, (True, False), row.written):
        # With eigenvectors the last digits are their weights', where these aren't exact.
        if fault == "another last digit" and not exact and "along" in row.name:
            continue
        inputs = row.inputs([300, 34], row.counts[min(1, len(row.counts) - 1)], exact=exact)
        if name in row.arguments(inputs, form):
            reached = set()
            monkeypatch.setattr(ops, row.op, spoiled(op, name, fault, reached))
            try:
                check(row, inputs, form)
                assert not reached, "nothing was seen"
            except AssertionError as error:
                assert f"{name}" in str(error), error
            seen |= reached
    assert seen == set(row.written) - ({"buffer"} if "along" in row.name else set())


@pytest.mark.parametrize("row", [r for r in ROWS if "result" in r.gives], ids=lambda r: r.name)
def test_the_checks_see_a_fault_of_what_is_returned(monkeypatch, row):
    op = getattr(ops, row.op)

    def faulty(**arguments):
        result = op(**arguments)
        result.view(-1)[-1] *= 1 + 1e-10
        return result

    monkeypatch.setattr(ops, row.op, faulty)
    for exact in (True, False):
        with pytest.raises(AssertionError):
            check(row, row.inputs([300, 33], row.counts[0] or 1, exact=exact), list(row.forms)[0])
