"""The ops of an extension built with sanitizers, called from Python as in their own tests.

    python tests/support/sanitized.py build/asan/_C.so address     # or: build/tsan/_C.so thread

CMake (-DLYAPCUDA_SANITIZE=...) builds such an extension and runs this. AddressSanitizer and
UndefinedBehaviorSanitizer: every op over all types, tails and views off alignment
(ops_cases.py, panel_cases.py), hypothesis's examples (test_ops_hypothesis.py) and other strides
(test_ops_strides.py).
ThreadSanitizer: the former with parallel_for on four threads of our own
(csrc/tests/thread_shim.cpp); and once with a race put in, which has to be reported. All outputs
must be the ordinary build's to the bit. torch itself is not instrumented.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).parent
MODULES = ("ops_cases.py", "panel_cases.py")
TEST_FILES = ("ops/test_ops_hypothesis.py", "ops/test_ops_strides.py")
EXTENSION = "LYAPCUDA_TEST_EXTENSION"
#: The word by which a sanitizer's report is known.
REPORTS = {"address": "ERROR: AddressSanitizer", "thread": "WARNING: ThreadSanitizer: data race"}


class _Finder:
    """Finds lyapcuda._C where EXTENSION says."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "lyapcuda._C":
            return None
        loader = importlib.machinery.ExtensionFileLoader(name, os.environ[EXTENSION])
        return importlib.util.spec_from_file_location(name, loader.path, loader=loader)


def use() -> None:
    """From here on `import lyapcuda` takes the sanitized extension (with -c, before any import)."""
    sys.meta_path.insert(0, _Finder)


def runtime(sanitizer: str) -> str:
    """What to load first: the sanitizer, before Python allocates; and the C++ library, whose
    __cxa_throw it looks for then.
    """
    names = {"address": "libasan.so", "thread": "libtsan.so"}[sanitizer], "libstdc++.so.6"
    compiler = os.environ.get("CXX", "c++")
    commands = ([compiler, f"-print-file-name={name}"] for name in names)
    found = (subprocess.run(c, capture_output=True, text=True, check=True) for c in commands)
    return ":".join(done.stdout.strip() for done in found)


def start(arguments: list[str], sanitizer: str | None, extension: str = "", **more: str):
    """Runs Python with the arguments; under the sanitizer, with its extension."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SUPPORT), *sys.path]), **more}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, *arguments]
    if sanitizer:
        environment |= {
            EXTENSION: str(Path(extension).resolve()),
            "LD_PRELOAD": runtime(sanitizer),
            # Python frees little at its end.
            "ASAN_OPTIONS": "detect_leaks=0",
            # torch's own threads and locks aren't instrumented: nothing can be said of them.
            "TSAN_OPTIONS": "ignore_noninstrumented_modules=1 halt_on_error=1 exitcode=66",
        }
        environment |= more
        if sanitizer == "thread":  # its shadow memory wants fixed addresses
            command = ["setarch", os.uname().machine, "-R", *command]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def digests(module: str, sanitizer: str | None, extension: str = "", **more: str):
    code = f"import sanitized; {'sanitized.use(); ' if sanitizer else ''}"
    code += f"import runpy; runpy.run_path({str(SUPPORT / module)!r}, run_name='__main__')"
    return start(["-c", code], sanitizer, extension, **more)


def fail(what: str, done: subprocess.CompletedProcess[str]) -> None:
    sys.exit(f"{what} (exit {done.returncode})\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")


def main(extension: str, sanitizer: str) -> None:
    for module in MODULES:
        expected = digests(module, None)
        done = digests(module, sanitizer, extension)
        if done.returncode or REPORTS[sanitizer] in done.stderr:
            fail(f"{module} under {sanitizer}", done)
        if expected.returncode or not expected.stdout or done.stdout != expected.stdout:
            fail(f"{module}: not what the ordinary build computes", done)
        print(f"{module}: {len(done.stdout.split())} outputs, each to the bit; nothing reported")
    if sanitizer == "thread":
        for module in MODULES:
            done = digests(module, sanitizer, extension, LYAPCUDA_TEST_RACE="1")
            if REPORTS[sanitizer] not in done.stderr:
                fail(f"{module}: a race was put in, and not reported", done)
            print(f"{module}: the race that was put in is reported")
        return
    code = "import sanitized; sanitized.use(); import pytest; import sys; sys.exit(pytest.main("
    files = [str(SUPPORT.parent / name) for name in TEST_FILES]
    code += f"{['-q', '-s', '-p', 'no:cacheprovider', *files]!r}))"
    done = start(["-c", code], sanitizer, extension)
    if done.returncode or REPORTS[sanitizer] in done.stderr:
        fail(" ".join(TEST_FILES), done)
    print(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main(*sys.argv[1:])
