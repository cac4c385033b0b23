"""bench/gpu_check.sh, which runs where there is a GPU: what can be tried where there is none."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))
from gpu import building, check, counters, goals, ops_like_cpu, report, stages  # noqa: E402
from gpu.lines import Lines, end_last_line, read  # noqa: E402
from gpu.processes import Job, run  # noqa: E402
from gpu.stages import Step  # noqa: E402

SCRIPT = ["bash", str(ROOT / "bench" / "gpu_check.sh")]
ENVIRONMENT = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}


def gpu_check(*arguments):
    command = [*SCRIPT, *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)


def of_kind(lines, kind):
    return [line for line in lines if line["kind"] == kind]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_and_does_nothing(tmp_path):
    out = tmp_path / "results"
    result = gpu_check("--out", out)
    assert result.returncode == 2 and "no GPU" in result.stderr
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_rehearsal_goes_through_every_stage(tmp_path):
    before = sorted((ROOT / "bench" / "results").iterdir())
    # (CTest's nvcc_check compiles and links the same sources.)
    result = gpu_check("--rehearse", tmp_path, "--no-build", "--seconds", 3000)
    assert result.returncode == 0, result.stdout + result.stderr
    files = {path.name for path in tmp_path.iterdir()}
    ends = (".jsonl", ".log", ".md", "_counters.csv")
    assert files == {f"rehearsal{end}" for end in ends}
    assert sorted((ROOT / "bench" / "results").iterdir()) == before
    lines = read([tmp_path / "rehearsal.jsonl"])
    assert {line["outcome"] for line in of_kind(lines, "process")} == {"passed"}
    assert {line["process"] for line in of_kind(lines, "process")} >= set(stages.BENCHES)
    # Every op against the CPU, and every table of measurements.
    assert {line["op"] for line in of_kind(lines, "op")} == registered_ops()
    assert {row["table"] for row in of_kind(lines, "row")} == set(report.TABLES)
    counts = {line["process"]: line["counts"] for line in of_kind(lines, "tests")}
    assert counts["tests: against the CPU"]["passed"] >= 3
    text = (tmp_path / "rehearsal.md").read_text()
    assert text.startswith("# REHEARSAL") and "Nothing here was measured" in text
    assert "| yes |\n" not in text.split("## How it ended")[0]  # no goal is met by made-up times


def registered_ops():
    names = torch._C._dispatch_get_all_op_names()
    return {name[10:].split(".")[0] for name in names if name.startswith("lyapcuda::")}


def test_every_op_is_held_against_the_cpu():
    held = [name for module in stages.OP_MODULES for name in ops_like_cpu.ops_of(module)]
    assert sorted(held) == sorted(registered_ops())


def test_a_rehearsal_is_never_written_beside_the_measurements():
    result = gpu_check("--rehearse", ROOT / "bench" / "results", "--stage", "A")
    assert result.returncode == 1 and "doesn't belong" in result.stderr


def test_a_run_that_is_killed_has_its_lines_and_they_make_a_report(tmp_path):
    command = [*SCRIPT, "--rehearse", str(tmp_path), "--no-build", "--stage", "A"]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    path, end = tmp_path / "rehearsal.jsonl", time.monotonic() + 100
    while time.monotonic() < end and not (path.exists() and of_kind(read([path]), "op")):
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)  # bash has become the check itself
    process.wait()
    found = of_kind(read([path]), "op")
    assert found and not (tmp_path / "rehearsal.md").exists()
    result = gpu_check("--report", path)
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "rehearsal.md").read_text()
    row = f"| {found[0]['op']} | {found[0]['cases']} | yes |"
    assert "This run was cut off" in text and row in text


# --- processes -----------------------------------------------------------------------------------


def job(code, seconds=30.0, name="a", **options):
    return Job(name, [sys.executable, "-S", "-c", code], seconds, **options)


def ended(tmp_path, *jobs, seconds=60.0):
    with (tmp_path / "log").open("ab") as log:
        return list(run(jobs, len(jobs), time.monotonic() + seconds, Lines(), log))


def test_a_crash_or_a_hang_leaves_the_others_alone(tmp_path):
    found = ended(
        tmp_path,
        job("print('fine')", name="good"),
        job("import sys; print('why'); sys.exit(3)", name="bad"),
        job("import os; print('before', flush=True); os.abort()", name="crash"),
        job("import time; print('so far', flush=True); time.sleep(60)", 1.0, "hang"),
    )
    outcomes = {x.job.name: (x.outcome, x.status, x.tail) for x in found}
    assert outcomes["good"] == ("passed", "passed", "fine\n")
    assert outcomes["bad"] == ("failed", "failed: exit status 3", "why\n")
    assert outcomes["crash"] == ("failed", "failed: ended by signal 6", "before\n")
    assert outcomes["hang"][0] == "failed" and "out of time" in outcomes["hang"][1]
    log = (tmp_path / "log").read_text()
    assert "bad | why\n" in log and "hang | so far\n" in log


def test_what_running_out_of_time_means(tmp_path):
    wait = "import time; print('========= Invalid write', flush=True); time.sleep(60)"
    found = ended(
        tmp_path,
        job(wait, 1.0, "bench", late="enough"),
        job(wait, 1.0, "clean", late="unfinished", fault="^nothing like it"),
        job(wait, 1.0, "wrong", late="unfinished", fault=stages.SANITIZER_FAULT),
    )
    outcomes = {x.job.name: x.outcome for x in found}
    assert outcomes == {"bench": "enough", "clean": "unfinished", "wrong": "failed"}


def test_what_no_time_is_left_for_is_left_out(tmp_path):
    (late,) = ended(tmp_path, job("print('fine')"), seconds=1.0)
    assert (late.outcome, late.status) == ("unfinished", "left out: no time")


def test_processes_that_a_job_started_end_with_it(tmp_path):
    late = tmp_path / "late"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(late)!r}).touch()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {child!r}])"
    ended(tmp_path, job(code, seconds=1.0))
    time.sleep(3)
    assert not late.exists()


# --- stages --------------------------------------------------------------------------------------


@pytest.fixture
def planned(monkeypatch, tmp_path):
    """Runs made-up stages: `planned(a=[jobs])` → (exit status, lines, report)."""

    def go(*arguments, a=(), b=(), build=None):
        ready, made = Step([job("print('here')", name="device")]), job("", name="made")
        monkeypatch.setattr(stages, "about", lambda rehearse: ready)
        monkeypatch.setattr(stages, "stage_a", lambda rehearse: [Step(a or [made])])
        monkeypatch.setattr(stages, "stage_b", lambda rehearse: [Step(b or [made])])
        monkeypatch.setattr(stages, "stage_c", lambda *given: [Step([made])])
        if build is not None:
            command = [sys.executable, "-S", "-c", build]
            monkeypatch.setattr(building, "build_command", lambda *given: command)
            monkeypatch.setattr(building, "missing_for_build", lambda: None)
        else:
            arguments = ("--no-build", *arguments)
        before = signal.getsignal(signal.SIGTERM)
        try:
            status = check.main(["--rehearse", str(tmp_path), *arguments])
        finally:
            signal.signal(signal.SIGTERM, before)
        lines = read([tmp_path / "rehearsal.jsonl"])
        return status, lines, (tmp_path / "rehearsal.md").read_text()

    return go


def by_stage(lines):
    processes = of_kind(lines, "process")
    return {(line["stage"], line["process"]): line["outcome"] for line in processes}


def test_a_failed_stage_collects_everything_and_stops_the_measurements(planned):
    jobs = [
        job("import sys; print('this is why'); sys.exit(1)", name="bad"),
        job("import os; os.abort()", name="crash"),
        job("print('fine')", name="good"),
    ]
    status, lines, text = planned(a=jobs)
    assert status == 1
    found = by_stage(lines)
    assert found["A", "bad"] == found["A", "crash"] == "failed" and found["A", "good"] == "passed"
    assert ("B", "made") not in found and ("C", "made") in found
    assert "left out: stage A failed" in text and "this is why" in text
    assert "signal 6" in text


def test_a_failing_build_is_reported_and_nothing_is_measured(planned):
    status, lines, text = planned(build="import sys; sys.exit('no such architecture')")
    found = by_stage(lines)
    assert status == 1 and found["A", "build"] == "failed"
    assert "no such architecture" in text and ("B", "made") not in found


def test_a_build_that_ends_well_goes_on(planned):
    status, lines, _ = planned(build="print('built')")
    assert status == 0 and by_stage(lines)["A", "build"] == "passed"


def test_no_build_builds_nothing(planned):
    _, lines, _ = planned("--stage", "A")
    assert set(by_stage(lines)) == {("A", "device"), ("A", "made")}


def test_stages_are_chosen_and_measurements_need_the_checks(planned):
    status, lines, text = planned("--stage", "B")
    assert status == 1 and not by_stage(lines) and "stage A was not run" in text
    # Another run into the same folder adds its stages.
    status, lines, text = planned("--stage", "C")
    assert status == 0 and ("C", "made") in by_stage(lines)
    assert "stage A was not run" in text


def test_an_unfinished_check_is_no_success_but_measuring_goes_on(planned):
    slow = job("import time; time.sleep(60)", 0.15, "slow", late="unfinished")
    status, lines, _ = planned(a=[slow])  # (a rehearsal gives it ten times as long)
    found = by_stage(lines)
    assert status == 1 and found["A", "slow"] == "unfinished" and found["B", "made"] == "passed"


def test_without_nvcc_a_rehearsal_says_what_the_build_lacks(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert building.missing_for_build() == "no nvcc on PATH or in CUDA_HOME"


def test_the_plan_on_a_gpu_runs_its_library_alone_within_nine_minutes(tmp_path):
    plan = {"A": list(stages.stage_a(False)), "B": list(stages.stage_b(False))}
    plan["C"] = list(stages.stage_c(False, tmp_path / "counters.csv", True))
    assert sum(stages.SECONDS.values()) <= 540
    for jobs in (step.jobs for stage in plan.values() for step in stage):
        for one in jobs:
            assert "--rehearse" not in one.command
            if "pytest" in one.command:
                assert one.environment["LYAPCUDA_TEST_LIBRARIES"] == "cuda"
                assert "-x" not in one.command
                assert one.command[one.command.index("-k") + 1] == stages.ELSEWHERE
    assert all(len(step.jobs) == 1 for step in plan["B"])  # what is timed runs alone


# --- lines, tests, reports -----------------------------------------------------------------------


def test_a_line_that_was_cut_off_costs_itself_alone(tmp_path):
    path = tmp_path / "lines"
    Lines(str(path)).write("note", text="one")
    with path.open("a") as file:
        file.write('{"kind": "note", "te')
    end_last_line(path)
    Lines(str(path)).write("note", text="two")
    assert [line["text"] for line in read([path])] == ["one", "two"]


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "other.jsonl").write_text('{"kind": "row"}\n')
    result = gpu_check("--report", tmp_path / "other.jsonl")
    assert result.returncode == 1 and "no line begins a run" in result.stderr
    result = gpu_check("--report", tmp_path / "missing.jsonl")
    assert result.returncode == 1 and "missing.jsonl" in result.stderr
    assert not (tmp_path / "missing.md").exists()


def test_every_failing_test_is_a_line_a_crash_and_a_hang_among_them(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import os, time\n"
        "def test_right(): pass\n"
        "def test_wrong():\n    print('seen'); assert 1 == 2\n"
        "def test_crash(): os.abort()\n"
        "def test_hang(): time.sleep(60)\n"
    )
    path = tmp_path / "lines"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu.pytest_lines", "-n", "1"]
    command += ["-c", os.devnull, "--rootdir", str(tmp_path), "--timeout", "2"]
    command += ["--timeout-method", "thread"]
    environment = {**ENVIRONMENT, **Lines(str(path), "A", "tests").environment()}
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'bench'}"
    subprocess.run([*command, "test_it.py"], cwd=tmp_path, env=environment, capture_output=True)
    failing = {line["test"].split("::")[1]: line for line in of_kind(read([path]), "test")}
    assert set(failing) == {"test_wrong", "test_crash", "test_hang"}
    assert "seen" in failing["test_wrong"]["output"] and "1 == 2" in failing["test_wrong"]["output"]
    assert of_kind(read([path]), "tests")[-1]["counts"] == {"passed": 1, "failed": 3}


def test_goals_are_held_against_the_last_measurement():
    size = {"bytes": 1.6e9, "copy_bytes": 0.8e9}
    row = {"table": "vector work", "job": "update", "numel": 10**8, **size}
    row["seconds"] = {"ours": 1e-3, "copy": 0.48e-3, "tuned": 2.9e-3}
    table = goals.table([row])
    assert table[2].endswith("| 96% | yes |") and table[3].endswith("| 2.9× | no |")
    assert table[4].endswith("| not measured | - |")


def test_counters_are_read_from_a_table_with_messages_around_it():
    (row,) = counters.rows(counters.SAMPLE)
    assert row["kernel"] == "ascent" and row["µs"] == 1063.2 and row["dram %"] == 93.1
    assert row["registers"] == 40 and row["stalls"] == ["long_scoreboard 22.9", "barrier 0.8"]
    assert list(counters.rows("==PROF== nothing\n")) == []
    assert json.dumps(row)
