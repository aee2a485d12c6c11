"""Server-sent events: payloads out of a stream of bytes (WHATWG HTML standard, section 9.2)."""

from __future__ import annotations


class SseReader:
    """Cuts a byte stream into the payloads of its events.

    Knows ``data`` lines, several of which make one payload joined by a line feed; comments and other fields are
    skipped. Lines end in LF or CRLF; a lone CR, which the standard also allows, is taken as part of its line, since no
    JSON payload has one.
    """

    __slots__ = ("_lines", "_rest")

    def __init__(self) -> None:
        self._rest: list[bytes] = []  # bytes of the line that has not ended
        self._lines: list[bytes] = []  # data lines of the event that has not ended

    def feed(self, data: bytes) -> list[bytes]:
        """Take bytes as they came; give the payloads of the events that they complete."""
        if (
            data.startswith(b"data: ")
            and data.endswith(b"\n\n")
            and not self._rest
            and not self._lines
            and b"\r" not in data
        ):
            # Whole events, as nearly every read of a token stream is: two line feeds each if they have one line.
            events = data[6:-2].split(b"\n\ndata: ")
            if data.count(b"\n") == 2 * len(events):
                return events
        last = data.rfind(b"\n")
        if last < 0:
            self._rest.append(data)
            return []
        self._rest.append(data[:last])
        block = b"".join(self._rest)
        self._rest = [data[last + 1 :]] if last + 1 < len(data) else []
        payloads = []
        lines = self._lines
        for raw in block.split(b"\n"):
            line = raw[:-1] if raw.endswith(b"\r") else raw
            if line.startswith(b"data:"):
                lines.append(line[6:] if line.startswith(b"data: ") else line[5:])
            elif not line and lines:
                payloads.append(lines[0] if len(lines) == 1 else b"\n".join(lines))
                lines.clear()
            elif line == b"data":
                lines.append(b"")
        return payloads
