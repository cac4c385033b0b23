"""bench/gpu_check.sh, which runs where there is a GPU: what can be tried where there is none."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))
import gpu_report  # noqa: E402


def gpu_check(*arguments):
    return subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu_check.sh"), *map(str, arguments)],
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_and_does_nothing(tmp_path):
    out = tmp_path / "results"
    result = gpu_check("--out", out)
    assert result.returncode == 2 and "no GPU" in result.stderr
    assert not out.exists()


@pytest.mark.slow
def test_a_rehearsal_goes_through_every_section(tmp_path):
    before = sorted((ROOT / "bench" / "results").iterdir())
    result = gpu_check("--rehearse", tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rehearsal.json", "rehearsal.md"]
    assert sorted((ROOT / "bench" / "results").iterdir()) == before
    report = json.loads((tmp_path / "rehearsal.json").read_text())
    assert report["rehearsal"]
    sections = {section["name"]: section for section in report["sections"]}
    checks = {f"compute-sanitizer {tool}" for tool in gpu_report.SANITIZERS}
    assert {"build", "tests", *checks, *gpu_report.BENCHES} <= set(sections)
    assert {section["status"] for section in sections.values()} == {"passed"}
    for name in gpu_report.BENCHES:
        assert sections[name]["rows"], name
    written = {row["op"] for row in sections["ops"]["rows"] if "op" in row}
    written |= {row["op"] for row in sections["panels"]["rows"] if "op" in row}
    assert {"ascent_", "recenter_", "descend_", "panel_ascent_", "gram", "difference_"} <= written
    text = (tmp_path / "rehearsal.md").read_text()
    assert text.startswith("# REHEARSAL") and "Nothing here was measured" in text
    assert re.search(r"Tests: .*\d+ passed", text)


def test_a_rehearsal_is_never_written_beside_the_measurements():
    result = gpu_check("--rehearse", ROOT / "bench" / "results", "--only", "device")
    assert result.returncode != 0 and "doesn't belong" in result.stderr


def section(code, seconds=30.0, check=True):
    return gpu_report.Section("a", [sys.executable, "-c", code], seconds, check)


def run(*sections, seconds=60.0):
    gpu_report.run_together(list(sections), time.monotonic() + seconds)


def test_sections_end_by_themselves_or_are_ended():
    good, bad = section("print('fine')"), section("import sys; print('why'); sys.exit(3)")
    slow = section("import time; time.sleep(60)", seconds=1.0)
    start = time.monotonic()
    run(good, bad, slow)
    assert time.monotonic() - start < 30
    assert good.status == "passed" and not good.failed and "fine" in good.tail
    assert bad.status == "failed: exit status 3" and bad.failed and "why" in bad.tail
    assert slow.status.startswith("out of time") and slow.failed


def test_a_bench_that_runs_out_of_time_is_no_failure_but_one_that_breaks_is():
    slow = section("import time; time.sleep(60)", seconds=1.0, check=False)
    broken = section("raise ValueError", check=False)
    run(slow, broken)
    assert not slow.failed and broken.failed


def test_what_no_time_is_left_for_is_left_out_and_said():
    late = section("print('fine')")
    run(late, seconds=1.0)
    assert late.status == "left out: no time" and not late.failed
    assert "left out: no time" in gpu_report.markdown([late], "title", False)


def test_a_failed_check_shows_what_it_printed():
    bad = section("import sys; print('this is why'); sys.exit(1)")
    run(bad)
    assert "this is why" in gpu_report.markdown([bad], "title", False)


def test_processes_that_a_section_started_end_with_it(tmp_path):
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(tmp_path / 'late')!r}).touch()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    run(section(code, seconds=1.5))
    time.sleep(4)
    assert not (tmp_path / "late").exists()


def test_the_plan_on_a_gpu_checks_first_and_stays_within_nine_minutes(tmp_path):
    groups = gpu_report.plan(tmp_path, False, {})
    names = [section.name for group in groups for section in group]
    assert names[:3] == ["build", "emulated library for the tests", "tests"]
    assert names[-len(gpu_report.BENCHES) :] == list(gpu_report.BENCHES)
    build = groups[0][0]
    assert build.environment["LYAPCUDA_CUDA"] == "1" and "--inplace" in build.command
    assert all(len(group) == 1 for group in groups[3:])  # benches run alone
    for found in groups[2][1:]:
        assert "bench/gpu_kernels.py" in found.command and found.check
    assert sum(gpu_report.BENCHES.values()) < 300
