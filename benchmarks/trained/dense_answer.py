"""Write the dense edge detector's answer to the demo's photograph, which the package ships.

The weights are fetched if they are not there yet. Run it again when the photograph changes:
python benchmarks/trained/dense_answer.py
"""

from __future__ import annotations

import argparse

from opentrans.trained import load
from opentrans.trained.edges import edge_map, photograph, png
from opentrans.trained.shipped import FILES, FOLDER
from opentrans_kernels.masks import atomic_write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", metavar="FILE", help="a file of one's own instead")
    options = parser.parse_args()
    picture = png(edge_map(load("hed", options.weights).module, photograph()))
    atomic_write(FOLDER / FILES["coffee-dense"], picture)
    print(f"wrote {FOLDER / FILES['coffee-dense']}, {len(picture)} bytes")


if __name__ == "__main__":
    main()
