"""Files of dumps: written at once or not at all, and never outside the folder that was named."""

from __future__ import annotations

import os
from pathlib import Path
from uuid import uuid4


class Folder:
    """A folder to write to. Raises `OSError` where it cannot, also for a name that leads out of the folder."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def write(self, name: str, content: str | bytes) -> Path:
        """Write one file, whole or not at all: several processes may write to one folder, and readers see no half.

        A link in the place of the file is replaced, and not followed.
        """
        path = self.path / name
        self.path.mkdir(parents=True, exist_ok=True)
        if not path.parent.resolve().is_relative_to(self.path.resolve()):
            raise PermissionError(f"{path} is not inside of {self.path}")
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_name(f".{path.name}.{uuid4().hex}")
        data = content.encode("utf-8") if isinstance(content, str) else content
        try:
            with half.open("xb") as file:
                file.write(data)
            half.replace(path)
        finally:
            half.unlink(missing_ok=True)
        return path
