"""The command line: what every program does alike, and ``lyapcuda info``."""

import os
import re
import sys
from pathlib import Path

import pytest
import torch

from lyapcuda.__main__ import main


def test_info_tells_the_build_and_the_versions(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for words in (torch.__version__, "backend", "python", "torch threads"):
        assert words in printed


def run_into(output, monkeypatch, arguments):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", output)
        status = main(arguments)
    output.flush()  # as Python does at its end
    return status


@pytest.mark.parametrize("arguments", [["info"], ["--help"], ["eigs", "--help"]], ids=str)
def test_a_reader_that_goes_away_ends_it_quietly(monkeypatch, capsys, arguments):
    """``lyapcuda ... | head -1``"""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        assert run_into(pipe, monkeypatch, arguments) == 141
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_output_that_cannot_be_written_is_one_line(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        assert run_into(full, monkeypatch, ["info"]) == 2
    assert re.fullmatch(r"lyapcuda: error: .*No space left on device\n", capsys.readouterr().err)


@pytest.mark.parametrize("arguments", [[], ["train"], ["info", "--nonsense"]], ids=str)
def test_user_errors_are_one_line(capsys, arguments):
    assert main(arguments) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and error.startswith("lyapcuda: error: ")
