"""What this machine could do at best: memory bandwidth, and products a second in bfloat16 and int8, by the core's own kernels.

    python benchmarks/roofline.py [--threads N]

Bandwidth: one row times a bfloat16 matrix that no cache holds. Peak: 512 rows times a matrix of 2,048 x 1,024. The best of several runs.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

from pellucid.ops import abi
from pellucid.ops.spec import OP_KINDS


def _linear_seconds(context: abi.Context, dtype: int, rows: int, out: int, width: int, repeats: int) -> float:
    data = abi.aligned_bytes(abi.packed_bytes(out, width, dtype))
    data[:] = 1
    weight = abi.Weight(data, out, width, dtype, abi.PANELS)
    x, y = np.ones((rows, width), np.float32), np.zeros((rows, out), np.float32)
    op = np.zeros(1, abi.OP_DTYPE)
    op["kind"], op["in"], op["out"], op["weight"] = OP_KINDS["linear"], [0, -1, -1], [0, -1], [0, -1]
    op["in_width"], op["out_width"] = [width, 0, 0], [out, 0]
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        abi.run_op(context, op, rows, [(x.ctypes.data, width)], [(y.ctypes.data, out)], [weight])
        best = min(best, time.perf_counter() - began)
    return best


def measure(threads: int) -> dict[str, float]:
    """Bytes a second, and operations a second (a multiplication and an addition are two)."""
    context = abi.Context(threads, spin_us=2000)
    rows, out, width = 512, 2048, 1024
    flops = 2 * rows * out * width
    wide = 65_536
    found = {
        "bytes_per_second": wide * 2048 * 2 / _linear_seconds(context, abi.BF16, 1, wide, 2048, 12),
        "bf16": flops / _linear_seconds(context, abi.BF16, rows, out, width, 20),
        "int8": flops / _linear_seconds(context, abi.I8, rows, out, width, 20),
    }
    context.close()
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=0)
    print(json.dumps(measure(parser.parse_args().threads)))


if __name__ == "__main__":
    main()
