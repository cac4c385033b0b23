"""One section of the measurements, a row at a time.

    python -m gpu.sections NAME [--rehearse]        # names: gpu.stages.BENCHES

GB/s are the bytes that have to move over the time taken, whatever a form really moves. The copy is
torch's copy_, in the same rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from gpu import compiled, graphs, panels, training, vectors
from gpu.lines import Lines
from gpu.timing import Bench

SECTIONS: dict[str, Callable[[Bench], None]] = {
    "copy": vectors.copy,
    "ops": vectors.vector_work,
    "gpt": training.gpt,
    "resnet18": training.resnet18,
    "panels": panels.panels,
    "graphs": graphs.graphs,
    "compiled": compiled.compiled,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=SECTIONS)
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU")
    options = parser.parse_args()
    SECTIONS[options.name](Bench(Lines.of_environment(), options.rehearse))


if __name__ == "__main__":
    main()
