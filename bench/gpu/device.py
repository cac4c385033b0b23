"""What the device is, how the extension was built, and whether one op runs there.

python -m gpu.device [--rehearse]
"""

from __future__ import annotations

import argparse
import sys

import torch

from gpu.lines import Lines
from lyapcuda import ops


def about(rehearse: bool) -> dict[str, object]:
    """The device and the build, by name."""
    build = {f"built: {name}": value for name, value in ops.build_info().items()}
    if rehearse:
        return {"device": "CPU (rehearsal)", "torch": torch.__version__, **build}
    found = torch.cuda.get_device_properties(0)
    clock, width = (getattr(found, name, 0) for name in ("memory_clock_rate", "memory_bus_width"))
    peak = 2e3 * clock * width / 8  # kHz, bits, two transfers a clock
    return {
        "device": found.name,
        "architecture": f"{found.major}.{found.minor}",
        "processors": found.multi_processor_count,
        "memory, GB": round(found.total_memory / 1e9, 1),
        "L2, MB": getattr(found, "L2_cache_size", 0) / 1e6 or None,
        "peak, GB/s": round(peak / 1e9, 1) or None,
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        **build,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="on the CPU")
    rehearse = parser.parse_args().rehearse
    if not rehearse and "cuda" not in str(ops.build_info()["backend"]):
        sys.exit(f"the extension is built without CUDA: {ops.build_info()}")
    source = torch.randn(1, 100003, device="cpu" if rehearse else "cuda")
    copied = torch.zeros_like(source)
    one = torch.ones(1, 1, dtype=torch.float64, device=source.device)
    ops.combine_(copied, source, one)
    if not torch.equal(copied, source):
        sys.exit("combine_ by 1 left something else than a copy")
    Lines.of_environment().write("device", about=about(rehearse))


if __name__ == "__main__":
    main()
