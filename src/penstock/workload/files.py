"""Opening trace files: plain or gzip, UTF-8, with errors that name the file and the line."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from penstock.core.errors import PenstockError

_GZIP_MAGIC = b"\x1f\x8b"
_UTF8_BOM = b"\xef\xbb\xbf"


def row_error(path: Path, line: int, problem: str, remedy: str = "fix or delete the row") -> PenstockError:
    """A problem at one line, in the form ``azure.csv:17: ContextTokens is "abc", ...: fix or delete the row``.

    Parameters
    ----------
    path : Path
        The file; only its name is shown, as users pass the path themselves.
    line : int
        1-based line of the file.
    """
    return PenstockError(f"{path.name}:{line}: {problem}", remedy)


def read_bytes(path: Path) -> bytes:
    """The file's content, decompressed where it is gzip, checked to be UTF-8, without byte-order mark.

    Raises
    ------
    PenstockError
        For a missing, unreadable or empty file, a damaged gzip file, or bytes that are not UTF-8 (with the line).
    """
    data = _decompressed(path, path_bytes(path))
    if not data.strip():
        raise PenstockError(f"{path} is empty", "give a trace with rows")
    try:
        # Most trace files are ASCII, which is checked without building a second copy.
        if not data.isascii():
            data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise row_error(path, line, f"byte 0x{data[error.start]:02x} is not UTF-8", "save as UTF-8") from None
    return data.removeprefix(_UTF8_BOM)


def head(path: Path, size: int = 65536) -> bytes:
    """At most the first ``size`` bytes, decompressed, for telling the format; empty for an empty file."""
    raw = path_bytes(path, size)
    if raw.startswith(_GZIP_MAGIC):
        # A decompressor object, unlike gzip.decompress, accepts a file that goes on after the part read.
        try:
            raw = zlib.decompressobj(wbits=31).decompress(raw, size)
        except zlib.error as error:
            raise PenstockError(f"{path} is a damaged gzip file ({error})", "compress it again") from None
    return raw.removeprefix(_UTF8_BOM)


def path_bytes(path: Path, size: int = -1) -> bytes:
    """Raw bytes of the file, with an error a user can mend where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(size)
    except FileNotFoundError:
        raise PenstockError(f"{path} does not exist", "check the path") from None
    except OSError as error:
        raise PenstockError(f"cannot read {path} ({error.strerror})", "give a readable trace file") from None


def _decompressed(path: Path, raw: bytes) -> bytes:
    if not raw.startswith(_GZIP_MAGIC):
        return raw
    try:
        return gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise PenstockError(f"{path} is a damaged gzip file ({error})", "compress it again") from None
