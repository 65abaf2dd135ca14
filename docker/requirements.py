"""Prints what the package and some extras require, for `pip install -r`: dependencies become a layer of their own.

`python requirements.py gateway`, beside pyproject.toml. It runs in a build, where nothing is installed yet.
"""

import re
import sys
from pathlib import Path

try:
    import tomllib
except ImportError:  # before Python 3.11, where only tests run this
    import tomli as tomllib

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
print("\n".join(project["dependencies"]))
for extra in sys.argv[1:]:
    for requirement in project["optional-dependencies"][extra]:
        if not re.match(r"tidewright\[", requirement):
            print(requirement)
