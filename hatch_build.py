"""The README for a package index, where its links and images have to be absolute.

They point to `Repository` of `[project.urls]` in pyproject.toml. Without one they would lead nowhere: links are
then their text, and images are left out.
"""

import re
import tomllib
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface


class CustomMetadataHook(MetadataHookInterface):
    """Sets the field `readme`, which pyproject.toml lists as dynamic."""

    def update(self, metadata: dict) -> None:
        root = Path(self.root)
        project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
        text = with_absolute_links((root / "README.md").read_text(), project.get("urls", {}).get("Repository"))
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def with_absolute_links(text: str, repository: str | None) -> str:
    """Markdown with its relative links and images at `repository` (https://github.com/owner/name), if there is one."""
    if repository is None:
        text = re.sub(r"!\[[^\]]*\]\((?!http)[^)]*\)\n*", "", text)
        return re.sub(r"\[([^\]]*)\]\((?!http|#)[^)]*\)", r"\1", text)
    raw = repository.replace("//github.com/", "//raw.githubusercontent.com/")
    text = re.sub(r"(!\[[^\]]*\]\()(?!http|#)", rf"\1{raw}/main/", text)
    return re.sub(r"((?<!!)\[[^\]]*\]\()(?!http|#)", rf"\1{repository}/blob/main/", text)
