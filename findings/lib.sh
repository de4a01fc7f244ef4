# What every finding begins with: `environment PACKAGE==VERSION ...` makes a temporary folder with
# those packages and sets PY; `finding` runs the Python on its input there.
set -eu

environment() {
  WORK=$(mktemp -d)
  trap 'rm -rf "$WORK"' EXIT
  "${PYTHON:-python3}" -m venv "$WORK/venv"
  PY=$WORK/venv/bin/python
  "$PY" -m pip install -q "$@"
}

finding() {
  (cd "$WORK" && "$PY" -W ignore -)
}
