"""Extension of Griffe: what docstrings name in single backticks becomes a link, where it is public.

Docstrings keep to what reads well in a terminal: `CurvatureTracker` in single backticks is another
name of the package, ``code`` in double ones isn't.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_NAMED = re.compile(r"(?<![`\w:])`([A-Za-z_][\w.]*)`(?!`)")


class Crossreferences(griffe.Extension):
    """Links names, and has every "Example:" read as a section of doctests."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        if pkg.name != "lyapcuda":
            return
        public = {
            name: f"lyapcuda.{name}"
            for name in map(str, pkg.exports or ())
            if name not in ("ops", "lyapunov")
        }
        for module in _modules(pkg):
            for member in module.members.values():
                if member.is_alias:
                    continue
                # Its own members come first, under the name that the reference shows it by.
                own = public.get(member.name, member.path)
                known = dict(public)
                if member.is_class:
                    shown = member.name in public
                    known |= {
                        name: f"{own}.{name}"
                        for name, inner in member.members.items()
                        if shown and not name.startswith("_") and inner.has_docstring
                    }
                _rewrite(member, known)
                if member.is_class:
                    for inner in member.members.values():
                        if not inner.is_alias:
                            _rewrite(inner, known)


def _modules(module: griffe.Module) -> list[griffe.Module]:
    inner = [m for m in module.members.values() if not m.is_alias and m.is_module]
    return [module, *(found for m in inner for found in _modules(m))]


def _rewrite(thing: griffe.Object, known: dict[str, str]) -> None:
    if thing.docstring is None:
        return
    text = re.sub(r"(?m)^Example:$", "Examples:", thing.docstring.value)

    def linked(match: re.Match[str]) -> str:
        name = match[1].removeprefix("lyapcuda.")
        first, _, rest = name.partition(".")
        if name in known:
            return f"[`{match[1]}`][{known[name]}]"
        if rest and first in known:
            return f"[`{match[1]}`][{known[first]}.{rest}]"
        return match[0]

    lines = text.split("\n")
    thing.docstring.value = "\n".join(
        line if line.lstrip().startswith((">>>", "...")) else _NAMED.sub(linked, line)
        for line in lines
    )
