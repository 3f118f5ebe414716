"""What of a program file decides the bits that it computes."""

from __future__ import annotations

import hashlib

from pellucid.contract.facts import ContractDigest
from pellucid.core import abi
from pellucid.errors import WeightFormatError
from pellucid.program.builder import DIGEST_BYTES
from pellucid.program.file import ProgramFile
from pellucid.program.scheme import DTYPE_NAMES


def weight_digests(file: ProgramFile) -> dict[str, bytes]:
    """The SHA-256 of each weight's packed bytes, by name, as it was taken while the weight was packed.

    Raises:
        WeightFormatError: the file has none: it is of an older version, or damaged.
    """
    names, data = [str(weight[0]) for weight in file.meta["weights"]], file.sections["data"]
    at = file.meta.get("digests")
    end = at + DIGEST_BYTES * len(names) if type(at) is int and at >= 0 else None
    if end is None or end > data.nbytes:
        raise WeightFormatError(f"{file.path.name}: the digests of its weights are absent: compile the model again")
    table = data[at:end].tobytes()
    return {name: table[i * DIGEST_BYTES : (i + 1) * DIGEST_BYTES] for i, name in enumerate(names)}


def contract_of(file: ProgramFile, isa: str, kv_cache_dtype: str) -> ContractDigest:
    """The contract of a program that runs with these kernels and this cache. Raises as `weight_digests`."""
    try:
        return _contract(file, isa, kv_cache_dtype)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise WeightFormatError(f"{file.path.name}: the names of its weights are damaged: {error}") from None


def _contract(file: ProgramFile, isa: str, kv_cache_dtype: str) -> ContractDigest:
    digests = weight_digests(file)
    whole = hashlib.sha256(file.sections["config"].data)
    for name, rows, cols, dtype, *_ in file.meta["weights"]:
        whole.update(repr((name, rows, cols, dtype)).encode() + digests[name])
    tables = hashlib.sha256(b"".join(digests[name] for name in file.meta["rotary"]))
    bundle = file.sections["tokenizer"].tobytes()
    return ContractDigest(
        recipe=abi.recipe(),
        isa=isa,
        weights=whole.hexdigest()[:32],
        formats=tuple(sorted({DTYPE_NAMES[weight[3]] for weight in file.meta["weights"]})),
        kv_cache_dtype=kv_cache_dtype,
        rotary=tables.hexdigest()[:32],
        ops=hashlib.sha256(file.sections["ops"].data).hexdigest()[:32],
        tokenizer="" if bundle == b"null" else hashlib.sha256(bundle).hexdigest()[:32],
    )
