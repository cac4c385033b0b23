"""docs/command.md: its files and commands, run as a reader would, do what the page says."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from lyapcuda.__main__ import main
from lyapcuda.command.eigs import add_arguments
from lyapcuda.command.program import Parser

pytest.importorskip("matplotlib")

PAGE = (Path(__file__).parents[2] / "docs/command.md").read_text("utf-8")
FILES = dict(re.findall(r'^```python title="(.*?)"\n(.*?)^```$', PAGE, re.S | re.M))
COMMANDS = "".join(re.findall(r"^```bash\n(.*?)^```$", PAGE, re.S | re.M)).splitlines()
(PRINTS,) = re.findall(r'^```text title="prints"\n(.*?)^```$', PAGE, re.S | re.M)
ERROR = next(line for line in PAGE.splitlines() if line.startswith("lyapcuda: error:"))
EIGS = ["eigs", "--model", "nets:make", "--data", "data:batches"]


def eigenvalues(table: str) -> list[float]:
    return [float(value) for value in re.findall(r"^\d+ +(\S+) +\[", table, re.M)]


def test_its_commands_run_and_print_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in FILES:  # another test's module of this name
        sys.modules.pop(name.removesuffix(".py"), None)
    for name, text in FILES.items():
        Path(name).write_text(text)
    try:
        runpy.run_path("train.py", run_name="__main__")
        printed = {}
        for command in COMMANDS:
            program, *arguments = shlex.split(command)
            assert program == "lyapcuda" and main(arguments) == 0, command
            printed[command], err = capsys.readouterr()
            assert err == "", command
        misfit = [*EIGS, "--model-args", '{"width": 8}', "--weights", "trained.ckpt"]
        assert main(misfit) == 2
    finally:
        for name in FILES:
            sys.modules.pop(name.removesuffix(".py"), None)
    assert capsys.readouterr().err.strip() == ERROR

    first = printed[COMMANDS[0]]
    assert eigenvalues(first) == pytest.approx(eigenvalues(PRINTS), rel=1e-3)
    assert re.sub(r"[\d.]+|\s+", "", first) == re.sub(r"[\d.]+|\s+", "", PRINTS)
    for command, text in printed.items():
        assert "--json" not in command or json.loads(text)
    there = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")}
    assert {"run.png", "run.pdf", "found/eigs.json", "found/eigs.png"} <= there


def test_it_has_every_argument_of_eigs():
    parser = Parser()
    add_arguments(parser)
    options = {name for action in parser._actions for name in action.option_strings[-1:]}
    assert {name for name in options - {"--help"} if f"`{name}" not in PAGE} == set()
