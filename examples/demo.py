"""Show what every package does, on a CPU, with the small models of this repository: `make demo`."""

import argparse
import time
from pathlib import Path

from examples.atman import atman_section
from examples.page import write_page
from examples.scar import scar_section
from examples.tfree import tfree_section

SECTIONS = (tfree_section, atman_section, scar_section)


def main() -> None:
    """Run every section and write `out/index.html`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the page and its pictures")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    write_page([make_section(out) for make_section in SECTIONS], out / "index.html")
    print(f"\nWrote {out / 'index.html'} in {time.perf_counter() - begin:.0f} s. Open it in a browser.")


if __name__ == "__main__":
    main()
