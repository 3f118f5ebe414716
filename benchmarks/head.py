"""The output head alone, at large vocabularies: GB/s of weights read and 10^9 operations a second, by rows.

    python benchmarks/head.py --vocabulary 151936 --width 1024 --rows 1 16 32 --dtypes bf16 q8_0 int8

The best of the repeats counts: what a machine can do, not what its neighbours leave. Prints a line a case, then JSON.
"""

from __future__ import annotations

import argparse
import json

from pellucid.bench.limits import linear_seconds, measure_limits
from pellucid.core import abi

DTYPES = {"bf16": abi.BF16, "q8_0": abi.Q8_0, "int8": abi.I8, "q4_0": abi.Q4_0, "q4_1": abi.Q4_1, "q6_k": abi.Q6_K}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 32])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["bf16", "q8_0", "q6_k"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=12)
    asked = parser.parse_args()
    limits = measure_limits(asked.threads)
    print(f"limits: {limits.bytes_per_second / 1e9:.1f} GB/s", flush=True)
    context = abi.Context(asked.threads, spin_us=2000)
    found = []
    for name in asked.dtypes:
        size = abi.packed_bytes(asked.vocabulary, asked.width, DTYPES[name])
        for rows in asked.rows:
            seconds = linear_seconds(context, DTYPES[name], rows, asked.vocabulary, asked.width, asked.repeats)
            operations = 2 * rows * asked.vocabulary * asked.width / seconds
            found.append({"dtype": name, "rows": rows, "seconds": seconds, "bytes_per_second": size / seconds})
            print(
                f"{name:5} {rows:3} rows: {seconds * 1e3:7.2f} ms {size / seconds / 1e9:6.1f} GB/s {operations / 1e9:7.0f}e9/s"
            )
    context.close()
    print(
        json.dumps({"vocabulary": asked.vocabulary, "width": asked.width, "limits": limits.as_dict(), "cases": found})
    )


if __name__ == "__main__":
    main()
