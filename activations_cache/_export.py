"""Export of a site to .npy or .safetensors, streamed in blocks of bounded memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from activations_cache._batches import as_tensor, torch_type
from activations_cache._reader import BLOCK_BYTES, Reader, chosen_rows
from activations_cache._shards import IntArray, read
from activations_cache.errors import CacheError, DataError, NumericsError
from activations_cache.store import PARTIAL, TORCH_TYPES, fsync

# names in the file formats of the types that a site can be exported as
NUMPY_NAMES = {
    torch.float16: "<f2",
    torch.float32: "<f4",
    torch.float64: "<f8",
    torch.int16: "<i2",
    torch.int32: "<i4",
    torch.int64: "<i8",
}
SAFETENSORS_NAMES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
}


def export(
    reader: Reader,
    site: str,
    path: Path,
    dtype: torch.dtype | str | None,
    *,
    rows: Any,
    overwrite: bool,
    progress: bool,
) -> Path:
    """See `Reader.export`."""
    spec = reader.spec(site)
    kind = torch_type(dtype) or TORCH_TYPES[spec.dtype]
    if spec.floating != kind.is_floating_point:
        raise DataError(f"{spec.name} holds {spec.dtype}; it cannot be exported as {_name(kind)}")
    chosen = None if rows is None else chosen_rows(rows, len(reader))
    shape = (len(reader) if chosen is None else len(chosen), *spec.shape)
    header = _header(reader, spec.name, path, kind, shape)
    if path.exists() and (not overwrite or path.is_dir()):
        what = "is a directory" if path.is_dir() else "exists already; pass overwrite=True to replace it"
        raise CacheError(f"{path} {what}")
    _replace(path, lambda file: _write(file, header, reader, spec.name, kind, chosen, progress))
    return path


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _header(reader: Reader, site: str, path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
    """What comes before the values in the file."""
    if path.suffix == ".npy":
        if dtype not in NUMPY_NAMES:
            raise DataError(f'numpy has no {_name(dtype)}; pass dtype="float32", or export to a .safetensors file')
        return _numpy_header(NUMPY_NAMES[dtype], shape)
    if path.suffix == ".safetensors":
        if dtype not in SAFETENSORS_NAMES:
            raise DataError(f"a site cannot be exported as {_name(dtype)}")
        return _safetensors_header(reader, site, SAFETENSORS_NAMES[dtype], dtype.itemsize, shape)
    raise DataError(f"the file must end in .npy or .safetensors; got {path.name!r}")


def _numpy_header(descr: str, shape: tuple[int, ...]) -> bytes:
    """The format of numpy.lib.format, version 1.0."""
    from io import BytesIO

    held = BytesIO()
    np.lib.format.write_array_header_1_0(held, {"descr": descr, "fortran_order": False, "shape": shape})
    return held.getvalue()


def _safetensors_header(reader: Reader, site: str, kind: str, itemsize: int, shape: tuple[int, ...]) -> bytes:
    """Eight bytes of length, then JSON, padded with spaces to a multiple of eight (the format of safetensors)."""
    size = int(np.prod(shape, dtype=np.int64)) * itemsize
    metadata = {
        "format": "pt",
        "site": site,
        "model": reader.model.name,
        "weights_hash": reader.model.weights_hash,
        "cache": ", ".join(reader.identities),
    }
    entry = {"dtype": kind, "shape": list(shape), "data_offsets": [0, size]}
    text = json.dumps({"__metadata__": metadata, site: entry}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _replace(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Write beside the final name and rename; a failure leaves nothing."""
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        fsync(path.parent)
    except OSError as error:
        raise CacheError(f"{path} cannot be written: {error}; nothing of it is left") from error
    finally:
        partial.unlink(missing_ok=True)


def _write(
    file: IO[bytes],
    header: bytes,
    reader: Reader,
    site: str,
    dtype: torch.dtype,
    rows: IntArray | None,
    progress: bool,
) -> None:
    """Write the header and the rows. Plain writes: a memory map of a full disk would end the process by a signal."""
    from tqdm.auto import tqdm

    source, spec = reader._source, reader.spec(site)
    total = source.rows if rows is None else len(rows)
    step = max(1, BLOCK_BYTES // max(1, spec.row_bytes))
    file.write(header)
    with tqdm(total=total, unit="row", unit_scale=True, desc=f"export {site}", disable=not progress) as bar:
        for start in range(0, total, step):
            stop = min(start + step, total)
            raw = read(source, site, start, stop) if rows is None else source.gather(site, rows[start:stop])
            file.write(_bytes(as_tensor(raw, spec.dtype), dtype, site).data)
            bar.update(stop - start)


def _bytes(values: Tensor, dtype: torch.dtype, site: str) -> npt.NDArray[np.uint8]:
    """The values in another type, as bytes."""
    cast = values.to(dtype)
    if values.is_floating_point() and not torch.isfinite(cast).all():
        largest = float(values.double().abs().max())
        raise NumericsError(
            f'{site} has a value of magnitude {largest:.6g}, which {_name(dtype)} cannot hold; pass dtype="float32"'
        )
    if not values.is_floating_point() and not torch.equal(cast.to(torch.int64), values.to(torch.int64)):
        raise NumericsError(f'{site} has values that {_name(dtype)} cannot hold; pass dtype="int32"')
    return cast.contiguous().reshape(-1).view(torch.uint8).numpy()
