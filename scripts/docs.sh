#!/usr/bin/env bash
# Builds the documentation's site in build/site: any broken link, anchor or docstring fails.
# Uses mkdocs where it is installed, else a .venv-docs of its own. Arguments go to `mkdocs build`.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! command -v mkdocs >/dev/null; then
  python3 -m venv .venv-docs
  tools=$(.venv-docs/bin/python -c 'if True:
    import tomllib
    project = tomllib.load(open("pyproject.toml", "rb"))["project"]
    print(*project["optional-dependencies"]["docs"])')
  # shellcheck disable=SC2086  # one word a package
  .venv-docs/bin/pip --disable-pip-version-check install --quiet --constraint constraints.txt $tools
  export PATH="$PWD/.venv-docs/bin:$PATH"
fi
# Read statically: the package needs neither to be built nor to be imported.
NO_MKDOCS_2_WARNING=true exec mkdocs build --strict "$@"
