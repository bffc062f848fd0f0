"""An export as one download: a zip of what was written, uncompressed, since weights hardly shrink.

Flow: a temporary folder, written by the engine -> a temporary file without a name -> the response, which closes it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import BinaryIO, TypeVar
from zipfile import ZIP_STORED, ZipFile, ZipInfo

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from editors.errors import ExportUnwritable

PIECE_BYTES = 1 << 20
Facts = TypeVar("Facts")


def archived(write: Callable[[Path], Facts]) -> tuple[Facts, BinaryIO]:
    """What `write` returns, and the files that it put into the folder it was given, as a zip; the folder is gone.

    Equal files give equal bytes. Whoever takes the zip closes it. Raises ExportUnwritable, and what `write` raises.
    """
    try:
        with TemporaryDirectory(prefix="mend-export-") as folder:
            facts = write(Path(folder))
            return facts, _zipped(Path(folder))
    except OSError as error:
        raise ExportUnwritable(
            f"there is no room for the export among the temporary files of the service ({error}); "
            "set TMPDIR to a folder that has some"
        ) from error


def _zipped(folder: Path) -> BinaryIO:
    zipped = TemporaryFile()  # noqa: SIM115 - the response closes it
    try:
        with ZipFile(zipped, "w", ZIP_STORED) as entries:
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                entry = ZipInfo(path.relative_to(folder).as_posix())  # dated 1980, whenever it was written
                entry.file_size = path.stat().st_size
                entry.external_attr = 0o644 << 16
                with path.open("rb") as source, entries.open(entry, "w") as destination:
                    shutil.copyfileobj(source, destination, PIECE_BYTES)
                path.unlink()  # so that the disk holds little more than one copy of all
    except BaseException:
        zipped.close()
        raise
    return zipped


class ArchiveResponse(StreamingResponse):
    """Sends a zip and closes it, whether or not the client stays until the end."""

    media_type = "application/zip"

    def __init__(self, zipped: BinaryIO, name: str) -> None:
        self._zipped = zipped
        length = zipped.seek(0, 2)
        zipped.seek(0)
        super().__init__(
            iter(lambda: zipped.read(PIECE_BYTES), b""),
            headers={"Content-Length": str(length), "Content-Disposition": f'attachment; filename="{name}"'},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._zipped:
            await super().__call__(scope, receive, send)
