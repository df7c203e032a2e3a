"""Prints the README's two set-up commands, one a line: its first two ```bash blocks."""

import re
from pathlib import Path

readme = (Path(__file__).parents[1] / "README.md").read_text()
for block in re.findall(r"```bash\n(.*?)```", readme, re.DOTALL)[:2]:
    print(re.sub(r"\s*\\\n\s*", " ", block.strip()))
