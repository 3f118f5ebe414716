"""What this machine could do at best, by the core's own kernels: `python benchmarks/roofline.py [--threads N]`. Prints JSON.

Bytes read a second, and operations a second by type of product, as `pellucid.bench.limits` measures them.
"""

from __future__ import annotations

import argparse
import json

from pellucid.bench.limits import measure_limits


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=0)
    print(json.dumps(measure_limits(parser.parse_args().threads).as_dict()))


if __name__ == "__main__":
    main()
