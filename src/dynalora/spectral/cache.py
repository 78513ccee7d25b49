"""Decompositions on disk: one file for each, named after its content, at most so many bytes in all.

Several processes may use the folder at once. A file appears whole or not at all (it is written beside its place and
then renamed), and since its name says what it was made from, two that write the same file write the same thing. A file
is believed only if its contents match the digest it carries; whatever else is found under the name is made anew.
"""

from __future__ import annotations

import hashlib
import os
import time
import uuid
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dynalora.common.files import cache_folder
from dynalora.errors import ConfigError

SIZE_VARIABLE = "DYNALORA_DECOMPOSITION_CACHE_GIB"
"""Environment variable with the size of the cache in GiB; 0 turns it off."""

_DEFAULT_GIB = 2.0
_SUFFIX = ".safetensors"
_PARTIAL = ".partial"
_ABANDONED = 3600.0  # seconds after which nobody is still writing a partial file

_warned = False


@dataclass(frozen=True)
class DecompositionCache:
    """Tensors by key, in one folder.

    Attributes:
        folder: Where the files are; made when first needed.
        max_bytes: Size of all files together; the least recently used go first.
    """

    folder: Path
    max_bytes: int

    def read(self, key: str) -> dict[str, Tensor] | None:
        """The tensors kept under a key, on the CPU; None where there are none, or none that are intact."""
        path = self._path(key)
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                digest = (file.metadata() or {}).get("digest")
                tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        except (OSError, SafetensorError, ValueError, KeyError, RuntimeError):
            return None
        if digest != _digest(key, tensors):
            return None
        with suppress(OSError):  # a cache that can only be read is of use too
            os.utime(path)  # the time of last use
        return tensors

    def write(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Keep tensors under a key. Where that cannot be, say so once and go on without."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
        if sum(tensor.nbytes for tensor in tensors.values()) > self.max_bytes:
            return
        path = self._path(key)
        partial = path.with_name(f"{path.name}.{os.getpid()}-{uuid.uuid4().hex}{_PARTIAL}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                save_file(tensors, partial, metadata={"digest": _digest(key, tensors)})
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
            self._trim()
        except (OSError, SafetensorError) as error:
            _warn_once(self.folder, error)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{_SUFFIX}"

    def _trim(self) -> None:
        """Delete the least recently used files beyond the size, and what interrupted writers left."""
        files = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                # Another process may delete a file at any moment.
                with suppress(FileNotFoundError):
                    if entry.name.endswith(_SUFFIX):
                        status = entry.stat()
                        files.append((status.st_mtime_ns, status.st_size, entry.path))
                    elif entry.name.endswith(_PARTIAL) and time.time() - entry.stat().st_mtime > _ABANDONED:
                        os.unlink(entry.path)
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.max_bytes:
                break
            Path(path).unlink(missing_ok=True)
            total -= size


def open_cache() -> DecompositionCache | None:
    """The cache in dynalora's cache folder, or None if its size is set to 0.

    Raises:
        ConfigError: The environment sets a size that is no number of at least 0.
    """
    size = os.environ.get(SIZE_VARIABLE, "").strip()
    try:
        gib = float(size) if size else _DEFAULT_GIB
    except ValueError:
        gib = -1.0
    if not 0 <= gib < float("inf"):
        raise ConfigError(f"{SIZE_VARIABLE} must be a number of GiB of at least 0, got {size!r}")
    if gib == 0:
        return None
    return DecompositionCache(cache_folder() / "decompositions", int(gib * 2**30))


def _digest(key: str, tensors: dict[str, Tensor]) -> str:
    """Of the key too, so that a file under another's name is noticed."""
    digest = hashlib.sha256(key.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _warn_once(folder: Path, error: Exception) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"Decompositions cannot be kept in {folder} ({error}), so they are computed anew each time; make the "
            "folder writable, or set DYNALORA_CACHE to one that is.",
            RuntimeWarning,
            stacklevel=2,
        )
