"""What the built package says of where it comes from: addresses, and a README whose links work outside the repository.

The repository's address stands nowhere in it, so that a fork needs no change: on GitHub it is in the environment, elsewhere
git knows it. Where nobody does, as in an archive, there are no addresses, and links stay as they are.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|#)([^)]+)\)")
IMAGE = re.compile(r'(<img[^>]*src=")(?!https?://)([^"]+)')


def repository(root: Path) -> str | None:
    """Find the address of the repository on GitHub; ``None`` where nobody knows it."""
    name = os.environ.get("GITHUB_REPOSITORY")
    if not name:
        asked = subprocess.run(["git", "remote", "get-url", "origin"], cwd=root, capture_output=True, text=True, check=False)
        found = re.search(r"github\.com[:/]([\w.-]+/[\w.-]+?)(?:\.git)?\s*$", asked.stdout)
        name = found.group(1) if found else None
    return f"https://github.com/{name}" if name else None


def with_absolute_links(text: str, address: str, version: str) -> str:
    """Let links and images of a README lead to the files of a version."""
    raw = address.replace("https://github.com", "https://raw.githubusercontent.com") + f"/v{version}/"

    def absolute(link: re.Match[str]) -> str:
        is_image, words, path = link.groups()
        return f"{is_image}[{words}]({raw if is_image else f'{address}/blob/v{version}/'}{path})"

    return IMAGE.sub(rf"\g<1>{raw}\g<2>", LINK.sub(absolute, text))


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
