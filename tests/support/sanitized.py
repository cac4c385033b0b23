"""The ops built with sanitizers, called from Python as in their own tests.

    python tests/support/sanitized.py build/asan/_C.so address     # or: build/tsan/_C.so thread

CMake (-DLYAPCUDA_SANITIZE=...) builds such an extension and runs this. AddressSanitizer and
UndefinedBehaviorSanitizer: every tail, type, number of rows and form of the table of ops
(tests/ops/test_table.py), on the extension and on the emulated CUDA backend, which is built with
the sanitizers too; wrong arguments; and once a read beyond a tensor's end on each backend, which
has to be reported. ThreadSanitizer: every op of the extension with parallel_for on four threads of
our own (csrc/tests/thread_shim.cpp); and once with a race put in, which has to be reported. All
that the ops leave must be the ordinary build's to the bit. torch itself is not instrumented.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).parent
TESTS = SUPPORT.parent / "ops"
EXTENSION = "LYAPCUDA_TEST_EXTENSION"
#: The word by which a sanitizer's report is known.
REPORTS = {"address": "ERROR: AddressSanitizer", "thread": "WARNING: ThreadSanitizer: data race"}
#: What runs under AddressSanitizer: files, and which of their tests.
FILES = ["test_table.py", "test_wrong_arguments.py"]
CHOSEN = "(test_table and (every_tail or scalars)) or (test_wrong_arguments and cpu)"
#: Prints what an extension makes of every op.
DIGESTS = "import op_digests; print(*op_digests.few_lines(), sep='\\n')"
#: A read beyond the end: of a tensor whose memory was taken away behind the element before.
OVERRUN = """
import torch, simt_library
from op_table import TABLE
with simt_library.use({library!r}) if {library!r} else simt_library.cpu():
    row = TABLE["gram"]
    arguments = row.arguments(row.inputs([300], 3), "with itself")
    whole = arguments["a"].clone()
    arguments["a"] = arguments["b"] = whole
    whole.untyped_storage().resize_(4 * (whole.numel() - 1))
    row.call(arguments)
"""


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


def start(code: str, sanitizer: str | None, extension: str = "", **more: str):
    """Runs Python code; under the sanitizer, with its extension."""
    path = [str(SUPPORT), str(TESTS), str(TESTS.parents[1]), *sys.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", f"import sanitized; {code}"]
    if sanitizer:
        command[2] = f"import sanitized; sanitized.use(); {code}"
        environment |= {
            EXTENSION: str(Path(extension).resolve()),
            "LD_PRELOAD": runtime(sanitizer),
            # Python frees little at its end.
            "ASAN_OPTIONS": "detect_leaks=0",
            # torch's own threads and locks aren't instrumented: nothing can be said of them.
            "TSAN_OPTIONS": "ignore_noninstrumented_modules=1 halt_on_error=1 exitcode=66",
        }
        if sanitizer == "thread":  # its shadow memory wants fixed addresses
            command = ["setarch", os.uname().machine, "-R", *command]
    return subprocess.run(command, env=environment | more, capture_output=True, text=True)


def fail(what: str, done: subprocess.CompletedProcess[str]) -> None:
    sys.exit(f"{what} (exit {done.returncode})\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")


def check_digests(extension: str, sanitizer: str, **more: str) -> None:
    expected = start(DIGESTS, None)
    done = start(DIGESTS, sanitizer, extension, **more)
    if done.returncode or REPORTS[sanitizer] in done.stderr:
        fail(f"the ops under {sanitizer}", done)
    if expected.returncode or not expected.stdout or done.stdout != expected.stdout:
        fail("not what the ordinary build computes", done)
    print(f"{len(done.stdout.splitlines())} calls, each to the bit; nothing reported")


def check_reported(what: str, done: subprocess.CompletedProcess[str], sanitizer: str) -> None:
    if REPORTS[sanitizer] not in done.stderr:
        fail(f"{what} was put in, and not reported", done)
    print(f"{what} that was put in is reported")


def main(extension: str, sanitizer: str) -> None:
    if sanitizer == "thread":
        check_digests(extension, sanitizer)
        done = start(DIGESTS, sanitizer, extension, LYAPCUDA_TEST_RACE="1")
        return check_reported("a race", done, sanitizer)
    check_digests(extension, sanitizer, LYAPCUDA_SIMD="baseline")
    emulated = {"LYAPCUDA_SIMT_SANITIZE": "address,undefined", "LYAPCUDA_TEST_SAMPLE": "1"}
    for library in ("", "simt"):
        done = start(f"exec({OVERRUN.format(library=library)!r})", sanitizer, extension, **emulated)
        check_reported(f"an overrun ({library or 'CPU'})", done, sanitizer)
    options = ["-q", "-s", "-p", "no:cacheprovider", "-k", CHOSEN]
    pytest = [*options, *(str(TESTS / name) for name in FILES)]
    code = f"import pytest, sys; sys.exit(pytest.main({pytest!r}))"
    done = start(code, sanitizer, extension, **emulated)
    if done.returncode or REPORTS[sanitizer] in done.stderr:
        fail(f"the tests under {sanitizer}", done)
    print(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main(*sys.argv[1:])
