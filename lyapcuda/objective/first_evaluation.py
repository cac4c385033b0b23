"""What a closure touches beside the parameters, seen in its first evaluation.

Modules are seen as they run, other leaves in autograd's graph, plain attributes by comparing them.
What can't be put back is refused by name, before it changes where that is possible.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lyapcuda.arguments import users_level
from lyapcuda.objective.attributes import AllAttributes, AttributeValues, Place, plain_names
from lyapcuda.objective.backward_passes import Outermost, listening
from lyapcuda.objective.counters import Held, held_in
from lyapcuda.objective.isolation import LooseBuffers, LooseParameters, ParameterValues, Snapshot
from lyapcuda.objective.loss_graph import leaves_of, loss_epsilon, precomputed
from lyapcuda.objective.reachable import instances_in, named_objects
from lyapcuda.objective.running_modules import RunningModules, is_compiled
from lyapcuda.params.flat import squared_norm
from lyapcuda.params.ranks import is_wrapper
from lyapcuda.params.shards import any_sharded

__all__ = ["PRECOMPUTED", "FirstEvaluation", "Manner", "Touched"]

#: What is said where a closure's loss isn't made anew by each call.
PRECOMPUTED = (
    "closure: its loss, or a part of it, was computed before it was called (or is one tensor for "
    "several calls), so it isn't the loss at θ + q:\nrun the forward pass inside the closure "
    "(retain_graph=True won't help)"
)

#: Of parameters that aren't tracked, at most so many bytes are copied to see whether they are
#: written to.
_MOST_BYTES = 2**28


@dataclass(frozen=True)
class Manner:
    """How a closure goes about its evaluation.

    Attributes:
        calls_backward: it calls ``backward()`` itself.
        changes_gradients: it writes to ``.grad`` after that (clipping).
        writes_parameters: its forward pass writes to the parameters (max-norm layers).
        returns_share: it calls that on a multiple of the loss that it returns.
        epsilon: machine epsilon of the coarsest type that its loss was computed in.
    """

    calls_backward: bool = False
    changes_gradients: bool = False
    writes_parameters: bool = False
    returns_share: bool = False
    epsilon: float = 0.0


class Living:
    """Objects in order, each once, as long as somebody else holds them: modules and tensors may be
    made anew at each step.
    """

    def __init__(self) -> None:
        self._references: dict[int, weakref.ref[Any]] = {}

    def add(self, members: Iterable[Any]) -> None:
        """Takes on those that aren't there."""
        for member in members:
            if member not in self:
                self._references[id(member)] = weakref.ref(member)

    def __contains__(self, member: Any) -> bool:
        reference = self._references.get(id(member))
        return reference is not None and reference() is member

    def __iter__(self) -> Iterator[Any]:
        members = [reference() for reference in self._references.values()]
        return iter([member for member in members if member is not None])


@dataclass
class Touched:
    """What closures were seen to touch beside the parameters.

    Attributes:
        modules: that ran, or that a closure refers to, with their children.
        foreign: tensors that were put in the place of buffers.
        leaves: tensors of modules that get a gradient though they were frozen outside.
        places: plain attributes of objects of which an evaluation changes some.
        written: parameters that aren't tracked, but written to (a momentum encoder's).
        compiled: some of it is torch.compile's.
        named: what a warning has named.
        floats: of the user's own, that the first evaluation has written.
    """

    modules: Living = field(default_factory=Living)
    foreign: Living = field(default_factory=Living)
    leaves: Living = field(default_factory=Living)
    places: list[Place] = field(default_factory=list)
    written: Living = field(default_factory=Living)
    compiled: bool = False
    named: set[str] = field(default_factory=set)
    floats: list[Held] = field(default_factory=list)

    def warn(self, names: Iterable[str]) -> None:
        """Says once what of the user's own is changed by each evaluation and isn't put back."""
        new = [name for name in dict.fromkeys(names) if name not in self.named]
        self.named.update(new)
        if new:
            warnings.warn(
                f"closure: it changes {', '.join(new[:3])}, also when it is evaluated at θ + q, "
                "which isn't put back: work on a copy, or where lyapcuda.at_a_copy() is false",
                stacklevel=users_level(),
            )


class FirstEvaluation(Outermost):
    """A context around one evaluation of a closure, which sees what that touches.

    Args:
        closure: the user's.
        parameters, modules: the tracked ones, and those that are known.
        before: what is put back after the evaluation; takes on what is found.
        touched: takes on what is found.
        values: see by their values, too, whether parameters were written to (through ``.data`` no
            version tells); waits for the device.

    Raises:
        RuntimeError: an optimizer's step inside the closure, parameters that it updates, a loss
            computed before, attributes that can't be put back.
    """

    def __init__(
        self,
        closure: Callable[..., Any],
        parameters: Sequence[Tensor],
        modules: Sequence[nn.Module],
        before: Snapshot,
        touched: Touched,
        *,
        values: bool = True,
    ) -> None:
        super().__init__()
        self._closure, self._parameters, self._before = closure, parameters, before
        self._tracked = {id(p) for p in parameters}
        self._running = RunningModules(modules, before, self._hold, compiled=touched.compiled)
        self._known, self._foreign = self._running.known, self._running.foreign
        self._touched = touched
        self._attributes: list[AllAttributes] = []
        self._leaves: dict[int, Tensor] = {}
        self._reached: dict[int, Tensor | Optimizer] = {}  # from the closure, by id
        self._passes, self._epsilon = 0, 0.0
        self._frozen: list[ParameterValues] = []
        self._room = _MOST_BYTES
        self._left: list[tuple[Tensor, int]] = []  # gradients after a pass, and their versions
        self._forward_writes = False
        self._sharded, self._values = any_sharded(parameters), values
        self.manner = Manner()

    # --- around the evaluation -------------------------------------------------------------------

    def __enter__(self) -> FirstEvaluation:
        self._stack = ExitStack()
        self._hold(list(self._known.values()))
        self._plain: list[Held] = []
        for name, value in named_objects(self._closure):
            for _, found in instances_in(name, value, nn.Module | Tensor | Optimizer):
                if isinstance(found, nn.Module):
                    self._running.add(found)
                else:
                    self._reached[id(found)] = found
            self._plain += held_in(name, value)
            self._running.compiled |= is_compiled(value)
        self._start = torch.autograd._get_sequence_nr()
        self._lie = self._where()
        self._before_it = self._earlier()
        self._stack.enter_context(self._running)
        self._stack.callback(register_optimizer_step_pre_hook(self._steps).remove)
        self._stack.enter_context(listening(self))
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._stack.close()
        try:
            self._end(kind)
        finally:  # nothing large outlives this
            self._attributes, self._frozen, self._left, self._leaves = [], [], [], {}
            self._reached, self._before_it = {}, None

    def _end(self, kind: type[BaseException] | None) -> None:
        changes = [change for values in self._attributes for change in values.changed()]
        self._before.notice_attributes(AttributeValues.before(changes))
        written = [p for values in self._frozen for p in values.changed()]
        for values in self._frozen if written else ():
            self._before.notice_values(values.only(written))
        lost = [place for place, value in changes if value is not None and value.is_lost]
        if kind is not None:
            return
        if lost:
            raise RuntimeError(
                f"closure: it writes to {lost[0].called}, too large a tensor to keep a copy of in "
                "a plain attribute:\nregister it as a buffer, or don't write it where "
                "lyapcuda.at_a_copy() is true"
            )
        if not self._sharded and self._passes and self._where() != self._lie:
            raise RuntimeError(
                "closure: it changes the parameters after backward() (an update, weights clipped), "
                "so each evaluation would train:\nreturn the loss, and do that after the "
                "measurement"
            )
        if not self._passes:  # gradients by torch.autograd.grad
            self._forward_writes = self._where() != self._lie
        self._learn([place for place, _ in changes], written)

    def _learn(self, changed: list[Place], written: list[Tensor]) -> None:
        touched = self._touched
        touched.compiled = self._running.compiled
        touched.modules.add(self._running.new)
        touched.foreign.add(self._foreign.values())
        touched.written.add(written)
        held = self._held()
        # (Inputs and codes, of no module, may be others at each step, which looks for them.)
        touched.leaves.add(leaf for i, leaf in self._leaves.items() if i in held)
        touched.places = [p for p in touched.places if p.holder is not None]
        there = {(id(p.holder), p.name) for p in touched.places}
        # Others of the same object may change at a later evaluation.
        holders = {id(p.holder): (p.holder, p.called.rpartition(".")[0]) for p in changed}
        places = changed + [
            Place(holder, name, f"{called}.{name}")
            for holder, called in holders.values()
            for name in plain_names(holder)
        ]
        for place in places:
            if (id(place.holder), place.name) not in there:
                there.add((id(place.holder), place.name))
                touched.places.append(place)
        self.manner = Manner(
            changes_gradients=self._passes > 0 and not _same(self._left, self._gradients()),
            writes_parameters=self._forward_writes,
            epsilon=self._epsilon,
        )
        counted = [held for held in self._plain if held.is_changed()]
        touched.warn(held.name for held in counted if not held.may_be_overwritten)
        # (Sums, and values that are only the last: the check tells.)
        touched.floats = [held for held in counted if held.may_be_overwritten]

    def _gradients(self) -> list[tuple[Tensor, int]]:
        return [(p.grad, p.grad._version) for p in self._parameters if p.grad is not None]

    # --- what it sees ----------------------------------------------------------------------------

    def _hold(self, modules: list[nn.Module]) -> None:
        """Takes down the plain attributes of modules, and of their parameters."""
        holders: list[tuple[str, Any]] = []
        for module in modules:
            if _has_own_ways(module):
                continue
            called = type(module).__name__
            holders.append((called, module))
            own = ((f"{called}.{name}", p) for name, p in module._parameters.items())
            holders += [(name, p) for name, p in own if p is not None]
        self._attributes.append(AllAttributes(holders))
        if self._values:
            self._keep(modules)

    def _keep(self, modules: list[nn.Module]) -> None:
        """Takes down the values of parameters that aren't tracked, as far as there is room."""
        others = {id(p): p for m in modules for p in m._parameters.values() if p is not None}
        kept = []
        for p in sorted(others.values(), key=lambda p: p.numel()):
            size = p.numel() * p.element_size()
            plain = type(p) is nn.Parameter and p.layout is torch.strided and not p.is_meta
            if id(p) in self._tracked or not plain or p.is_quantized or size > self._room:
                continue
            self._room -= size
            kept.append(p)
        self._frozen.append(ParameterValues(kept))

    def _steps(self, optimizer: Optimizer, *_: Any) -> None:
        theirs = {id(p) for group in optimizer.param_groups for p in group["params"]}
        elsewhere = threading.get_ident() != self._thread or self._made_here(optimizer, theirs)
        if elsewhere and theirs.isdisjoint(self._tracked):
            return
        where = "in a hook of its backward() (post-accumulate-grad)" if self.is_inside else "in it"
        raise RuntimeError(
            f"closure: {type(optimizer).__name__}.step() is called {where}, so each evaluation "
            "would train:\nreturn the loss from the closure, and step after the measurement; "
            "an optimizer in hooks can't be measured beside"
        )

    def _made_here(self, optimizer: Optimizer, theirs: set[int]) -> bool:
        """Whether the closure has made an optimizer, and what it steps, itself (an adversarial
        perturbation): nothing of them outlives the evaluation.
        """
        known = self._held() | self._reached.keys()
        return id(optimizer) not in self._reached and theirs.isdisjoint(known)

    def _held(self) -> set[int]:
        """Ids of the parameters of all modules that are known."""
        return {id(p) for m in self._known.values() for p in m._parameters.values()}

    def _earlier(self) -> list[Tensor] | None:
        """What to judge by whether a part of the loss is from before; None: sequence numbers."""
        parallel = any(isinstance(m, DataParallel) for m in self._known.values())
        if not parallel and all(p.is_cpu for p in self._parameters):
            return None
        held = [value for m in self._known.values() for value in vars(m).values()]
        return [t for t in (*self._reached.values(), *held) if isinstance(t, Tensor)]

    def begins(self, roots: Sequence[Any]) -> None:
        if not self._passes:
            now = self._where()
            self._forward_writes, self._lie = now != self._lie, now
        self.see(roots)

    def see(self, roots: Sequence[Any]) -> None:
        """Looks at the graphs of losses that are about to be differentiated."""
        for root in roots:
            if precomputed(root, self._parameters, self._start, self._before_it):
                raise RuntimeError(PRECOMPUTED)
            self._epsilon = max(self._epsilon, loss_epsilon(root))
            for leaf in leaves_of(root):
                if id(leaf) not in self._tracked:
                    self._before.notice(leaf)
                    self._leaves[id(leaf)] = leaf

    def ended(self) -> None:
        self._passes += 1
        self._left = self._gradients()

    @torch.no_grad()
    def _where(self) -> list[tuple[Any, ...]]:
        """Where the parameters lie, at which version, and what tells of their values."""
        if self._sharded:
            return []
        if not self._values:
            return [(p.data_ptr(), p._version) for p in self._parameters]
        # (As text: NaN is itself.)
        return [
            (p.data_ptr(), p._version, float(p.sum(dtype=torch.float64)).hex(), norm.hex())
            for p, norm in ((p.detach(), squared_norm(p.detach())) for p in self._parameters)
        ]


_OUR_OWN = LooseBuffers | LooseParameters


def _has_own_ways(module: nn.Module) -> bool:
    """Whether a module keeps state in attributes that aren't to be touched."""
    return (
        is_wrapper(module)
        or isinstance(module, torch.jit.ScriptModule | DataParallel | _OUR_OWN)
        or type(module).__module__.startswith(("torch._dynamo", "torch.distributed", "torch.fx"))
    )


def _same(some: list[tuple[Tensor, int]], others: list[tuple[Tensor, int]]) -> bool:
    """Whether they are the same tensors at the same versions."""
    return len(some) == len(others) and all(
        a is b and v == w for (a, v), (b, w) in zip(some, others, strict=True)
    )
