"""What the built package says of where it comes from: addresses, and a README whose links work outside the repository.

The repository's address stands nowhere in it, so that a fork needs no change: git knows it. Where it does not, as in an
archive or without git, there are no addresses, and links stay as they are.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(```.*?```|`[^`\n]*`)|\]\((?!https?://|#)([^)\s]+)\)", re.DOTALL)  # or code, in which there are none
IMAGES = (".png", ".svg", ".gif", ".jpg")


def repository(root: Path) -> str | None:
    """Find the address of the repository on GitHub; ``None`` where git knows none, or is not there."""

    def asked(*arguments: str) -> str:
        try:
            return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False).stdout.strip()
        except OSError:
            return ""

    top = asked("rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() != root.resolve():  # a copy inside another repository is not that one
        return None
    found = re.search(r"github\.com[:/]([\w.-]+/[\w.-]+?)(?:\.git)?/?$", asked("remote", "get-url", "origin"))
    return f"https://github.com/{found.group(1)}" if found else None


def with_absolute_links(text: str, address: str, version: str) -> str:
    """Let links and images of a README lead to the files of a version."""
    raw = address.replace("https://github.com", "https://raw.githubusercontent.com")

    def absolute(found: re.Match[str]) -> str:
        code, path = found.groups()
        if code is not None:
            return str(code)
        return f"]({raw}/v{version}/{path})" if path.endswith(IMAGES) else f"]({address}/blob/v{version}/{path})"

    return LINK.sub(absolute, text)


class Addresses(MetadataHookInterface):
    """Hatch's hook for metadata that are worked out when the package is built."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add README and addresses."""
        root = Path(self.root)
        text, address = (root / "README.md").read_text(), repository(root)
        if address is not None:
            version = re.search(r'__version__ = "(.+)"', (root / "sb3_flipout" / "__init__.py").read_text())
            assert version is not None, "the package says its version"
            text = with_absolute_links(text, address, version.group(1))
            metadata["urls"] = {
                "Repository": address,
                "Documentation": f"{address}/tree/v{version.group(1)}/docs",
                "Changelog": f"{address}/blob/v{version.group(1)}/CHANGELOG.md",
                "Issues": f"{address}/issues",
            }
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
