"""The builder's measurements of earlier builds, which make the next one faster."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from ddpmx.device.discovery import Gpus
from ddpmx.errors import OutputError
from ddpmx.formats.atomic import atomic_write, make_folder
from ddpmx.trt.library import Library


def timing_cache_name(library: Library, devices: Gpus) -> str:
    """The file name of a timing cache: measurements hold for one version and one architecture only."""
    return f"{library.flavour}-{library.version}-sm{devices.devices[0].sm}.timing".lower()


class TimingCache:
    """The builder's earlier measurements, in one file per library version and SM. TensorRT-RTX measures nothing."""

    def __init__(self, folder: Path | None, library: Library, devices: Gpus, config: Any) -> None:
        self._file = self._cache = None
        if folder is None or library.is_rtx:
            return
        try:
            self._file = make_folder(folder) / timing_cache_name(library, devices)
        except OutputError:
            return  # a cache only saves time
        data = b""
        with contextlib.suppress(OSError):
            data = self._file.read_bytes()
        for content in (data, b""):  # an empty one if the builder refuses the old one
            cache = config.create_timing_cache(content)
            if cache is not None and config.set_timing_cache(cache, False):
                self._cache = cache  # keep it alive: the configuration holds only its address
                break

    def save(self, config: Any) -> None:
        """Write the cache with the new measurements."""
        if self._file is not None and (cache := config.get_timing_cache()) is not None:
            with contextlib.suppress(OutputError), atomic_write(self._file) as stream:
                stream.write(memoryview(cache.serialize()))
