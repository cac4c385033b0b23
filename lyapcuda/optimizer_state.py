"""An optimizer that saves more than torch.optim's state, all of it in the precision it has."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lyapcuda.params.saved_state import require_entries

__all__ = ["WholeStateOptimizer"]


class WholeStateOptimizer(Optimizer):
    """torch.optim.Optimizer with entries of its own in the state_dict, which hooks see as well.

    Tensors of the state are saved as copies and come back in their own dtype, where torch.optim
    casts them to the parameters'. A load that fails changes nothing. Copies and pickles keep every
    attribute.
    """

    #: The entries beside "state" and "param_groups".
    _OWN_STATE: tuple[str, ...] = ()

    def _own_state(self) -> dict[str, Any]:
        raise NotImplementedError

    def _take_own_state(self, saved: dict[str, Any]) -> None:
        """After the groups and the state were loaded; raises before it changes anything."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        # torch.optim's own keeps only what it knows.
        return {**self.__dict__, **super().__getstate__()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                if name != "differentiable":  # torch.optim's own addition
                    group.setdefault(name, value)  # saved by a version that had no such setting

    def state_dict(self) -> dict[str, Any]:
        """torch.optim's, with more beside it; tensors are copies."""
        _after(self._optimizer_state_dict_pre_hooks, self)
        saved = self._plain_state()
        # Each by itself, not as a view of a buffer that several share.
        saved["state"] = {
            i: {name: v.clone() if isinstance(v, Tensor) else v for name, v in entry.items()}
            for i, entry in saved["state"].items()
        }
        saved |= self._own_state()
        return _after(self._optimizer_state_dict_post_hooks, self, saved)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where the saved optimizer was; a mismatch is a ValueError, and changes
        nothing. State stays in the precision it was saved in.
        """
        state_dict = _after(self._optimizer_load_state_dict_pre_hooks, self, dict(state_dict))
        require_entries(state_dict, *self._OWN_STATE, of=f"a {type(self).__name__}")
        before = self._plain_state()
        before["state"] = {i: dict(entry) for i, entry in before["state"].items()}
        try:
            self._load_groups(state_dict)
            self._take_own_state(state_dict)
        except BaseException:
            self._load_groups(before)
            raise
        _after(self._optimizer_load_state_dict_post_hooks, self)

    def _plain_state(self) -> dict[str, Any]:
        with self._without_hooks():
            return super().state_dict()

    def _load_groups(self, saved: dict[str, Any]) -> None:
        own = {name: saved[name] for name in ("state", "param_groups")}
        with self._without_hooks():
            super().load_state_dict(own)
        # torch.optim cast the state to the parameters' dtype.
        indices = [i for group in own["param_groups"] for i in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(indices, parameters, strict=True):
            for name, value in own["state"].get(i, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][name] = value.to(p.device, copy=True)

    @contextmanager
    def _without_hooks(self) -> Iterator[None]:
        """torch.optim would run them on a part of the state."""
        names = [name for name in vars(self) if name.endswith("state_dict_pre_hooks")]
        names += [name for name in vars(self) if name.endswith("state_dict_post_hooks")]
        hooks = {name: getattr(self, name) for name in names}
        vars(self).update({name: OrderedDict() for name in names})
        try:
            yield
        finally:
            vars(self).update(hooks)


def _after(hooks: dict[int, Callable[..., Any]], *arguments: Any) -> Any:
    """Runs hooks as torch.optim does: what one returns replaces the last argument."""
    for hook in hooks.values():
        result = hook(*arguments)
        if result is not None:
            arguments = (*arguments[:-1], result)
    return arguments[-1]
