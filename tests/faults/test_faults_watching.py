"""Closures that do more than compute a loss: training goes on bitwise as without a tracker, or an
error says why not, before anything has changed.
"""

import copy
import gc
import math
import sys
import threading
import types
import warnings
import weakref
from itertools import chain

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import lyapcuda
from lyapcuda.objective.attributes import Value
from lyapcuda.objective.isolation import Snapshot
from lyapcuda.objective.loss_graph import precomputed
from lyapcuda.objective.own_gradient import check_own_gradient

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 3


def net(seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def loss_of(model: nn.Module) -> torch.Tensor:
    return cross_entropy(model(X), Y)


def bits(*modules: nn.Module) -> list[torch.Tensor | None]:
    found: list[torch.Tensor | None] = []
    for module in modules:
        found += [t.detach().clone() for t in chain(module.parameters(), module.buffers())]
        found += [None if p.grad is None else p.grad.clone() for p in module.parameters()]
    return found


def same(some: list, others: list) -> bool:
    return all(
        a is b if a is None or b is None else torch.equal(a, b)
        for a, b in zip(some, others, strict=True)
    )


def curvature(model: nn.Module) -> float:
    return float(lyapcuda.eigsh(lambda: loss_of(model), model.parameters()).eigenvalues[0])


def followed(model: nn.Module, closure, steps: int = 40, **options) -> lyapcuda.CurvatureTracker:
    tracker = lyapcuda.CurvatureTracker(model.parameters(), **options)
    for _ in range(steps):
        tracker.step(closure)
    return tracker


# --- the loss's own gradient ---------------------------------------------------------------------


def target(model):
    out = model(X)
    return (out - 0.9 * out.roll(1, 0).detach()).square().mean()


def straight_through(model):
    out = model(X)
    return cross_entropy(out + (out.round() - out).detach(), Y)


def regularised(model):
    loss = loss_of(model)
    (loss + 0.1 * sum(p.square().sum() for p in model.parameters())).backward()
    return loss.item()


def hooked(model):
    handles = [p.register_hook(lambda g: 0.5 * g) for p in model.parameters()]
    loss = loss_of(model)
    loss.backward()
    for handle in handles:
        handle.remove()
    return loss


def constant(model):
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    return 1.0


@pytest.mark.parametrize("mistake", [target, straight_through, regularised, hooked, constant])
def test_a_gradient_of_another_function_is_an_error_that_says_so(mistake):
    model = net()
    before, random = bits(model), torch.get_rng_state()
    closure = lambda: mistake(model)  # noqa: E731
    tracker = lyapcuda.CurvatureTracker(model.parameters())
    with pytest.raises(RuntimeError, match="as much as its gradient says") as error:
        tracker.step(closure, leave_grad=True)
    lines = str(error.value).splitlines()
    assert len(lines) <= 3 and "debug=False" in lines[-1]
    assert same(before, bits(model)) and torch.equal(random, torch.get_rng_state())
    assert int(tracker.steps) == 0
    followed(model, closure, 2, debug=False)


@pytest.mark.parametrize("act", [nn.ReLU(), nn.GELU()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_loss_with_its_own_gradient_passes(act, dtype):
    """At any size: along the gradient a trained net bends by far more than its gradient is."""
    model = net()
    model[1] = act
    model.to(dtype)
    x = X.to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for steps in (0, 300):
        for _ in range(steps):
            optimizer.zero_grad()
            cross_entropy(model(x), Y).backward()
            optimizer.step()
        for factor in (1e-6, 1.0, 1e6):
            closure = lambda f=factor: f * cross_entropy(model(x), Y)  # noqa: E731
            followed(model, closure, 2, debug=True)


@pytest.mark.parametrize("frequency", [11500.0, 12000.0, 12500.0, 22500.0, 23000.0])
def test_a_loss_that_bends_within_its_noise_passes(frequency):
    """Under autocast a net with BatchNorm of few samples bends within every distance asked."""
    theta = torch.tensor([10.0])

    def loss_at(copies):
        return 5.0 + 0.5 * math.sin(frequency * (float(copies[0]) - 10.0))

    check_own_gradient(loss_at, 5.0, [theta], [torch.tensor([0.5 * frequency])], 2.0**-7)
    with pytest.raises(RuntimeError, match="0 times as much as its gradient says"):
        check_own_gradient(lambda _: 5.0, 5.0, [theta], [torch.tensor([frequency])], 2.0**-7)


def test_debug_looks_each_time():
    model = net()
    held = []
    closure = lambda: loss_of(model) if not held else target(model)  # noqa: E731
    tracker = followed(model, closure, 3, debug=True)
    unaware = followed(model, closure, 3)
    held.append(True)
    with pytest.raises(RuntimeError, match="as much as its gradient says"):
        tracker.step(closure)
    unaware.step(closure)


@pytest.mark.parametrize("factor", [0.25, 2.0**16])
@pytest.mark.parametrize("returned", ["graph", "number"])
def test_a_factor_in_the_loss_of_backward_is_taken_out(factor, returned):
    """1/n of accumulation, a GradScaler nobody told of: h is of the loss that is returned."""
    model = net()

    def closure():
        loss = loss_of(model)
        (loss * factor).backward()
        return loss if returned == "graph" else loss.item()

    tracker = followed(model, closure)
    assert float(tracker.h) == pytest.approx(curvature(model), rel=1e-2)
    tracker.step(closure, leave_grad=True)
    left = model[0].weight.grad.clone()
    model.zero_grad()
    closure()
    assert torch.equal(left, model[0].weight.grad)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("how", ["step", "backward", "attach"])
def test_training_under_a_grad_scaler_is_bitwise_what_it_is_without_a_tracker(own, how):
    runs = []
    for watched in (False, True):
        model, scaler = net(), torch.amp.GradScaler("cpu", init_scale=1000.0, growth_interval=2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        tracker = lyapcuda.CurvatureTracker(model.parameters())

        def closure(model=model, scaler=scaler, watched=watched):
            loss = loss_of(model)
            if own or not watched:
                scaler.scale(loss).backward()
            return loss

        for _ in range(6):
            optimizer.zero_grad()
            if not watched:
                closure()
            elif how == "step":
                tracker.step(closure, leave_grad=True, scaler=scaler)
            elif how == "backward":
                tracker.backward(closure, scaler=scaler)
            else:  # an optimizer that evaluates, and steps no further
                inner = torch.optim.SGD(model.parameters(), lr=0.0)
                handle = tracker.attach(inner, scaler=scaler)
                inner.step(closure)
                handle.remove()
            scaler.step(optimizer)
            scaler.update()
        runs.append(bits(model))
        if watched:
            assert 0.1 < float(tracker.h) < 10.0
    assert same(*runs)


def test_what_is_no_grad_scaler_is_named():
    model = net()
    tracker = lyapcuda.CurvatureTracker(model.parameters())
    with pytest.raises(TypeError, match=r"scaler: expected a torch\.amp\.GradScaler, got int"):
        tracker.step(lambda: loss_of(model), scaler=3)


# --- losses that are no functions of θ -----------------------------------------------------------


@pytest.mark.parametrize("how", ["kept graph", "freed graph", "a part", "eigsh"])
def test_a_loss_computed_before_the_closure_is_an_error_before_its_graph_is_freed(how):
    model = net()
    loss = loss_of(model)
    if how == "a part":
        features = model[:2](X)
        closure = lambda: cross_entropy(model[2](features), Y)  # noqa: E731
    elif how == "kept graph":

        def closure():
            loss.backward(retain_graph=True)
            return loss
    else:
        closure = lambda: loss  # noqa: E731
    with pytest.raises(RuntimeError, match="inside the closure"):
        if how == "eigsh":
            lyapcuda.eigsh(closure, model.parameters(), mode="difference")
        else:
            lyapcuda.CurvatureTracker(model.parameters()).step(closure)
    assert all(p.grad is None for p in model.parameters())
    loss.backward()  # it wasn't freed


def test_a_frozen_part_computed_before_is_fine():
    body, head = net(), nn.Linear(3, 3)
    features = body(X)
    tracker = lyapcuda.CurvatureTracker(head.parameters())

    def closure():
        loss = cross_entropy(head(features), Y)
        loss.backward(retain_graph=True)
        return loss

    tracker.step(closure)
    assert all(p.grad is None for p in body.parameters())


@pytest.mark.parametrize("kept", [False, True])
def test_a_graph_of_several_threads_is_judged_by_what_was_there_before(kept):
    """As on a GPU, where the graph of a gradient is made in the device's own thread."""
    model = net()
    for _ in range(20):
        loss_of(model)
    start = torch.autograd._get_sequence_nr()
    made = []
    thread = threading.Thread(target=lambda: made.append(model[:2](X)))
    thread.start()
    thread.join()
    loss = model[2](made[0]).sum()
    parameters = list(model.parameters())
    assert precomputed(loss, parameters, start)  # by the numbers alone
    assert precomputed(loss, parameters, start, made if kept else [X]) == kept


# --- closures that train -------------------------------------------------------------------------


def stepping(model, optimizer):
    loss = loss_of(model)
    loss.backward()
    optimizer.step()
    return loss


def updating(model, _):
    loss = loss_of(model)
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1 * p.grad
    return loss


def clamping(model, _):
    loss = loss_of(model)
    loss.backward()
    for p in model.parameters():
        p.data.clamp_(-0.1, 0.1)
    return loss


def adversarial(model):
    shift = torch.zeros_like(X).requires_grad_()
    inner = torch.optim.SGD([shift], lr=0.1, momentum=0.5, maximize=True)
    for _ in range(2):
        (shift.grad,) = torch.autograd.grad(cross_entropy(model(X + shift), Y), shift)
        inner.step()
    return cross_entropy(model(X + shift.detach()), Y)


def test_an_optimizer_that_the_closure_makes_for_its_own_tensors_may_step():
    model = net()
    before = bits(model)
    # (An adversarial example isn't differentiated through, so the loss changes otherwise.)
    tracker = followed(model, lambda: adversarial(model), steps=4, debug=False)
    assert torch.isfinite(tracker.h) and same(before, bits(model))


def test_a_step_on_tensors_of_the_closures_outside_is_an_error():
    model, shift = net(), torch.zeros_like(X).requires_grad_()

    def closure():
        torch.optim.SGD([shift], lr=0.1).step()
        return cross_entropy(model(X + shift), Y)

    with pytest.raises(RuntimeError, match=r"SGD\.step\(\) is called in it"):
        followed(model, closure, steps=1)


@pytest.mark.parametrize("how", [stepping, updating, clamping])
def test_a_closure_that_trains_is_an_error_before_it_has(how):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = bits(model)
    with pytest.raises(RuntimeError, match=r"step\(\)|changes the parameters"):
        lyapcuda.CurvatureTracker(model.parameters()).step(lambda: how(model, optimizer))
    assert same(before, bits(model)) and not optimizer.state


def test_optimizers_in_hooks_are_an_error_before_they_step():
    model = net()
    optimizers = {p: torch.optim.Adam([p]) for p in model.parameters()}
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
    before = bits(model)
    with pytest.raises(RuntimeError, match="in a hook"):
        lyapcuda.CurvatureTracker(model.parameters()).step(lambda: loss_of(model))
    assert same(before, bits(model)) and not any(o.state for o in optimizers.values())


class MaxNorm(nn.Linear):
    """Writes its own weight in its forward pass."""

    def forward(self, x):
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.3)
        return super().forward(x)


def test_weights_that_the_forward_pass_writes_are_put_back():
    torch.manual_seed(1)
    model = nn.Sequential(MaxNorm(6, 8), nn.Tanh(), nn.Linear(8, 3))
    before, place = bits(model), model[0].weight.data_ptr()
    followed(model, lambda: loss_of(model), 3)
    lyapcuda.eigsh(lambda: loss_of(model), model.parameters(), maxiter=5)
    assert same(before, bits(model)) and model[0].weight.data_ptr() == place


# --- everything that an evaluation touches -------------------------------------------------------


class Stateful(nn.Module):
    """Keeps state in plain attributes, of every kind that is put back."""

    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.LSTMCell(6, 4), nn.Linear(4, 3)
        self.hidden, self.calls, self.seen = None, 0, []
        self.bank, self.table = torch.zeros(4), {"last": None}

    def forward(self, x):
        h, c = self.cell(x, self.hidden)
        self.hidden = (h.detach(), c.detach())
        self.calls += 1
        self.seen.append(self.calls)
        self.bank.add_(h.detach().mean(0))
        self.table["last"] = h.detach()
        return self.out(h) + 0.1 * self.bank.sum()

    def state(self):
        kept = [*self.hidden, self.bank, self.table["last"]]
        return [t.clone() for t in kept], self.calls, list(self.seen)


def watched_run(how: str, model: nn.Module, closure, steps: int = 4, tracked=None, **options):
    """Trains with SGD: without a tracker, or with one in the way that ``how`` says."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    tracked = list((tracked or model).parameters())
    tracker = lyapcuda.CurvatureTracker(tracked, **options) if how != "plain" else None
    for _ in range(steps):
        optimizer.zero_grad()
        if how == "step":
            tracker.step(closure, leave_grad=True)
        elif how == "beside":
            tracker.step(closure)
            closure().backward()
        elif how == "backward":
            tracker.backward(closure)
        else:
            closure().backward()
        optimizer.step()


WAYS = ["step", "beside", "backward"]


@pytest.mark.parametrize("how", WAYS)
def test_state_in_plain_attributes_is_that_of_one_evaluation(how):
    runs = []
    for way in ("plain", how):
        torch.manual_seed(3)
        model = Stateful()
        watched_run(way, model, lambda m=model: cross_entropy(m(X), Y), k=2)
        runs.append((bits(model), model.state()))
    (plain, state), (other, state2) = runs
    assert same(plain, other) and state[1:] == state2[1:]
    assert all(map(torch.equal, state[0], state2[0]))


class Count(nn.Module):
    """A metric, updated by hand."""

    def __init__(self):
        super().__init__()
        self.total, self.rows = torch.zeros(()), []

    def update(self, out):
        self.total += out.detach().sum()
        self.rows.append(len(out))


@pytest.mark.parametrize("how", WAYS)
def test_a_metric_in_the_closure_counts_once(how):
    totals = []
    for way in ("plain", how):
        model, metric = net(), Count()

        def closure(model=model, metric=metric):
            out = model(X)
            metric.update(out)
            return cross_entropy(out, Y)

        watched_run(way, model, closure)
        totals.append((float(metric.total), metric.rows))
    assert totals[0] == totals[1]


@pytest.mark.parametrize("how", ["step", "backward"])
def test_what_lightning_logs_in_the_closure_is_logged_once(how, monkeypatch):
    """Its trainer adds it up where no module holds it."""
    logged = []

    class LightningModule(nn.Module):
        def log(self, name, value):
            logged.append((name, value))

        def log_dict(self, values):
            logged.extend(values.items())

    lightning = types.ModuleType("lightning.pytorch")
    lightning.LightningModule = LightningModule
    monkeypatch.setitem(sys.modules, "lightning.pytorch", lightning)
    runs = []
    for way in ("plain", how):
        logged.clear()
        model, module = net(), LightningModule()

        def closure(model=model, module=module):
            loss = cross_entropy(model(X), Y)
            module.log("loss", loss.item())
            module.log_dict({"rows": len(X)})
            return loss

        watched_run(way, model, closure)
        runs.append(list(logged))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("frozen", [False, True])
def test_modules_and_tensors_outside_are_left_alone(how, frozen):
    """An encoder with buffers of its own, a latent code, an input; one thawed inside the closure;
    and gc.freeze() has hidden the modules.
    """
    runs = []
    for way in ("plain", how):
        torch.manual_seed(5)
        parts = nn.ModuleList([nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)])
        encoder, norm, head = parts
        code, x = torch.zeros(6, requires_grad=True), X.clone().requires_grad_()
        encoder.requires_grad_(not frozen)
        gc.collect(), gc.freeze()

        def closure(encoder=encoder, norm=norm, head=head, code=code, x=x):
            encoder.requires_grad_(True)
            loss = cross_entropy(head(torch.tanh(norm(encoder(x)) + code)), Y)
            encoder.requires_grad_(not frozen)
            return loss

        try:
            watched_run(way, nn.ModuleList([norm, head]), closure, tracked=head, k=2)
        finally:
            gc.unfreeze()
        runs.append([*bits(parts), code.grad, x.grad])
    assert same(*runs)


def test_inputs_that_are_new_at_each_step_get_their_own_gradient():
    runs = []
    for watched in (False, True):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        tracker = lyapcuda.CurvatureTracker(model.parameters())
        for _ in range(3):
            x = X.clone().requires_grad_()

            def closure(model=model, x=x):  # adversarial examples
                cross_entropy(model(x), Y).backward()
                model.zero_grad()
                loss = cross_entropy(model((x + 2.0 * x.grad).detach()), Y)
                loss.backward()
                return loss

            tracker.step(closure, leave_grad=True) if watched else closure()
            optimizer.step()
            optimizer.zero_grad()
        runs.append(bits(model))
    assert same(*runs)


def test_model_takes_tensors_too():
    model, code = net(), torch.zeros(6, requires_grad=True)
    tracker = lyapcuda.CurvatureTracker(model.parameters(), model=[model, code])
    closure = lambda: cross_entropy(model(X + code), Y)  # noqa: E731
    tracker.step(closure)
    assert code.grad is None
    tracker.step(closure, leave_grad=True)
    assert torch.equal(code.grad, torch.autograd.grad(closure(), code)[0])
    with pytest.raises(TypeError, match="model=str: expected a torch.nn.Module, or a tensor"):
        lyapcuda.CurvatureTracker(model.parameters(), model=["x"])


def test_a_tensor_too_large_to_put_back_is_named(monkeypatch):
    monkeypatch.setattr(lyapcuda.objective.attributes, "_MOST_BYTES", 8)
    torch.manual_seed(3)
    model = Stateful()
    with pytest.raises(RuntimeError, match=r"Stateful\.bank, too large"):
        lyapcuda.CurvatureTracker(model.parameters()).step(lambda: cross_entropy(model(X), Y))


class Meter:
    def __init__(self):
        self.count = 0


@pytest.mark.parametrize("kind", ["list", "meter"])
def test_counters_of_the_users_own_are_named_unless_they_ask(kind):
    model, losses, meter = net(), [], Meter()

    def log(loss):
        if kind == "list":
            losses.append(loss.item())
        else:
            meter.count += 1

    def closure():
        loss = loss_of(model)
        log(loss)
        return loss

    def careful():
        loss = loss_of(model)
        if not lyapcuda.at_a_copy():
            log(loss)
        return loss

    with pytest.warns(UserWarning, match=r"losses|meter\.count"):
        followed(model, closure, 1)
    losses.clear()
    meter.count = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        followed(model, careful, 3, k=2)
    assert (len(losses), meter.count) == ((3, 0) if kind == "list" else (0, 3))


def test_dynamo_is_not_asked_to_compile_again():
    torch._dynamo.reset()
    model = net()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    tracker = lyapcuda.CurvatureTracker(model.parameters())
    counters = torch._dynamo.utils.counters
    before = counters["stats"]["unique_graphs"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            tracker.step(lambda: cross_entropy(compiled(X), Y), leave_grad=True)
    assert counters["stats"]["unique_graphs"] == before + 1


# --- gradients that are there already ------------------------------------------------------------


def accumulated_run(watched: str, inside: str, hook: bool = False):
    """Three micro-batches, the last in a closure, then a step of Adam; twice."""
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    # (A hook that changes gradients has them be another function's.)
    tracker = lyapcuda.CurvatureTracker(model.parameters(), debug=False if hook else None)
    norms = []
    if hook:
        model[0].weight.register_post_accumulate_grad_hook(
            lambda p: norms.append(float(p.grad.clamp_(-0.01, 0.01).norm()))
        )
    if watched == "attach":
        tracker.attach(optimizer)
    for _ in range(2):
        for part in (slice(0, 5), slice(5, 9)):
            (cross_entropy(model(X[part]), Y[part]) / 3).backward()

        def closure():
            if inside == "clears":
                optimizer.zero_grad()
            if inside == "zeroes":
                optimizer.zero_grad(set_to_none=False)
            loss = cross_entropy(model(X[9:]), Y[9:]) / 3
            loss.backward()
            if inside == "twice":
                (0.1 * model(X).square().mean()).backward()
            if inside == "clips":
                nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            return loss if inside != "twice" else loss + 0.1 * model(X).square().mean()

        if watched == "backward":
            tracker.backward(closure)
            optimizer.step()
        else:
            optimizer.step(closure)
        optimizer.zero_grad()
    assert watched == "plain" or float(tracker.h) > 0
    return bits(model), norms[-1:]


@pytest.mark.parametrize("watched", ["attach", "backward"])
@pytest.mark.parametrize("inside", ["adds", "clears", "zeroes", "twice", "clips"])
def test_gradients_that_are_there_become_what_the_closure_makes_of_them(watched, inside):
    plain, other = (accumulated_run(way, inside)[0] for way in ("plain", watched))
    assert same(plain, other)


@pytest.mark.parametrize("watched", ["attach", "backward"])
def test_hooks_see_the_gradients_they_would(watched):
    (plain, norms), (other, seen) = (
        accumulated_run(way, "adds", True) for way in ("plain", watched)
    )
    assert same(plain, other) and norms == seen


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_backward_adds_what_loss_backward_would(every, set_to_none):
    runs = []
    for watched in (False, True):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        tracker = lyapcuda.CurvatureTracker(model.parameters(), every=every)
        for step in range(8):
            part = slice(2 * step, 2 * step + 2)
            closure = lambda m=model, p=part: cross_entropy(m(X[p]), Y[p]) / 4  # noqa: E731
            tracker.backward(closure) if watched else closure().backward()
            if step % 4 == 3:
                optimizer.step()
                optimizer.zero_grad(set_to_none=set_to_none)
        runs.append(bits(model))
    assert same(*runs)


# --- what torch allows, and a watcher could stumble over -----------------------------------------


def from_an_edge(model):
    def closure():
        loss = loss_of(model)
        torch.autograd.backward(torch.autograd.graph.get_gradient_edge(loss), torch.ones(()))
        return loss.detach()

    return closure


def beside_offloaded(model):
    model[1].elsewhere = nn.Linear(3, 3, device="meta").requires_grad_(False)
    return lambda: loss_of(model)


def beside_eight_bits(model):
    model[1].scale = torch.ones(3).to(torch.float8_e4m3fn)
    model[1].table = nn.Parameter(torch.ones(3).to(torch.float8_e4m3fn), requires_grad=False)
    return lambda: loss_of(model)


@pytest.mark.parametrize("made", [from_an_edge, beside_offloaded, beside_eight_bits])
def test_edges_meta_tensors_and_types_without_a_comparison_are_no_obstacle(made):
    model = net()
    closure = made(model)
    tracked = [p for p in model.parameters() if p.requires_grad]
    tracker = lyapcuda.CurvatureTracker(tracked)
    for _ in range(3):
        tracker.step(closure)
    assert torch.isfinite(tracker.h)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_ensemble_under_vmap_trains_bitwise_as_without(device):
    def trained(watched):
        torch.manual_seed(0)
        models = [nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))] * 2
        p, b = torch.func.stack_module_state(models)
        base = copy.deepcopy(models[0]).to(device)
        optimizer = torch.optim.SGD(p.values(), 0.1)
        tracker = lyapcuda.CurvatureTracker(list(p.values()))

        def closure():
            def out(p, b):
                return torch.func.functional_call(base, (p, b), (X,))

            return torch.func.vmap(out)(p, b).square().mean()

        for _ in range(3):
            optimizer.zero_grad()
            if watched:
                tracker.backward(closure)
            else:
                closure().backward()
            optimizer.step()
        return [*p.values(), *b.values()]

    assert same(trained(True), trained(False))


def test_what_was_kept_is_let_go_of_without_the_garbage_collector(monkeypatch):
    kept = []

    class Noted(Snapshot):
        def __init__(self, *args, **options):
            kept.append(weakref.ref(self))
            super().__init__(*args, **options)

    monkeypatch.setattr("lyapcuda.objective.evaluator.Snapshot", Noted)
    model = net()
    tracker = lyapcuda.CurvatureTracker(model.parameters())
    gc.collect()
    gc.disable()
    try:
        for _ in range(4):
            tracker.step(lambda: loss_of(model))
        assert len(kept) >= 4 and not any(ref() is not None for ref in kept)
    finally:
        gc.enable()


def test_modules_and_buffers_made_at_each_step_are_not_kept():
    model, other = net(), net(2)
    other.calls = 0
    made = weakref.WeakSet()

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.ones(3))

        def forward(self, x):
            return x * self.scale

    scaled = Scaled()

    def closure():
        teacher, scale = copy.deepcopy(other), torch.ones(3)
        teacher.calls += 1
        if not lyapcuda.at_a_copy():
            made.add(teacher)
        out = torch.func.functional_call(scaled, {"scale": scale}, (model(X),))
        return (out - teacher(X)).square().mean()

    tracker = followed(model, closure, steps=5)
    gc.collect()
    assert not made and not list(tracker._touched.foreign)


def test_long_lists_beside_what_changes_are_put_back():
    model = net()
    model.seen, model.data = 0, [torch.zeros(2) for _ in range(1000)]
    first = list(model.data)

    def closure():
        model.seen += 1
        model.data.append(None)
        return loss_of(model)

    value = Value(model.data)
    model.data.reverse()
    assert value.differs(model.data) and value.put_back() is model.data
    assert all(a is b for a, b in zip(model.data, first, strict=True))
    followed(model, closure, steps=3)
    assert len(model.data) == 1000 and model.seen == 0


def test_closures_of_one_decorator_are_told_apart():
    model = net()

    def decorated(closure):
        def inner():
            return closure()

        return inner

    def plain():
        return loss_of(model)

    def own():
        loss = loss_of(model)
        (loss / 4).backward()
        return loss

    tracker = followed(model, decorated(plain), steps=20)
    h = float(tracker.h)
    for _ in range(5):
        tracker.step(decorated(own))
    assert float(tracker.h) == pytest.approx(h, rel=0.05)
