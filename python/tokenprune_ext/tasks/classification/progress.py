# SPDX-License-Identifier: Apache-2.0
"""What an evaluation has done so far, on disk: a killed run goes on where it stopped."""

import glob
import hashlib
import json
import os
from pathlib import Path

from ..._errors import UserError


class ProgressFile:
    """Finished batches of an evaluation, one JSON line each; the first line says what is evaluated.

    Every process writes a file of its own (``FILE``, ``FILE.1``, ...), so that nothing is ever written by two. A line that
    a killed process left unfinished is ignored. The number of processes may change between runs.

    Args:
        path: of the file, or None: nothing is kept.
        settings: everything that the numbers depend on, as plain values.
        rank: of this process.
    """

    def __init__(self, path: str | None, settings: dict, rank: int = 0):
        self.path = None if path is None else Path(path)
        self.settings = json.loads(json.dumps(settings))
        self.rank = rank
        self._file = None

    @property
    def digest(self) -> str:
        """Hash of the settings."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()

    def read(self) -> dict[int, dict]:
        """Finished batches of all processes, by number.

        Raises:
            UserError: a file belongs to another evaluation, or is none.
        """
        if self.path is None:
            return {}
        done: dict[int, dict] = {}
        for path in [self.path, *map(Path, sorted(glob.glob(glob.escape(str(self.path)) + ".[0-9]*")))]:
            if path.is_file():
                done.update(self._read(path))
        return done

    def _read(self, path):
        try:
            lines = path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the state file {path}: {error}") from None
        if not lines:
            return {}
        head = _parsed(lines[0])
        if head is None or "digest" not in head:
            raise UserError(f"{path} is not a state file of tokenprune eval")
        if head["digest"] != self.digest:
            raise UserError(
                f"the state file {path} belongs to another evaluation ({self._difference(head)}): delete it, or choose "
                "another --state"
            )
        records = filter(None, map(_parsed, lines[1:]))
        return {record["batch"]: record for record in records if "batch" in record}

    def _difference(self, head):
        theirs = head.get("settings", {})
        for key, value in self.settings.items():
            if theirs.get(key) != value:
                return f"{key} was {_short(theirs.get(key))}, is {_short(value)}"
        return "other settings"

    def add(self, record: dict) -> None:
        """Keep one finished batch.

        Raises:
            UserError: the file cannot be written.
        """
        if self.path is None:
            return
        try:
            if self._file is None:
                self._file = self._open()
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"cannot write the state file {self.path}: {error.strerror or error}") from None

    def check_writable(self) -> None:
        """Fail before the work, not after it.

        Raises:
            UserError: the file cannot be written.
        """
        if self.path is not None and self._file is None:
            try:
                self._file = self._open()
            except OSError as error:
                raise UserError(f"cannot write the state file {self.path}: {error.strerror or error}") from None

    def _open(self):
        path = self.path if self.rank == 0 else Path(f"{self.path}.{self.rank}")
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_bytes() if path.is_file() else b""
        file = open(path, "a")  # noqa: SIM115 - stays open over the whole evaluation
        if not text:
            file.write(json.dumps({"digest": self.digest, "settings": self.settings}) + "\n")
        elif not text.endswith(b"\n"):  # the last line was cut off
            file.write("\n")
        file.flush()
        return file

    def close(self) -> None:
        """Close the file, and make sure that it is on disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None


def _parsed(line):
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _short(value):
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
