"""Makes the environments of the peers, each its own: `python benchmarks/setup_peers.py [FOLDER]`. Prints their interpreters.

llama.cpp is compiled from the sdist of llama-cpp-python for this machine's processor (some minutes).
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

PEERS: dict[str, tuple[list[str], dict[str, str]]] = {
    "llama.cpp": (
        ["--no-binary", "llama-cpp-python", "llama-cpp-python==0.3.36", "numpy"],
        {"CMAKE_ARGS": "-DGGML_NATIVE=ON"},
    ),
    "transformers": (["torch>=2.11,<2.14", "transformers>=5.0,<6", "safetensors"], {}),
}


def main(folder: Path) -> None:
    """Installs every peer."""
    for name, (requirements, environment) in PEERS.items():
        place = folder / name
        venv.create(place, with_pip=True)
        python = place / "bin" / "python"
        subprocess.run(
            [str(python), "-m", "pip", "install", *requirements], check=True, env={**os.environ, **environment}
        )
        print(f"--python {name}={python}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/peers"))
