#!/usr/bin/env bash
# bash tools/versions.sh [--suite] [oldest] [colab] [newest]   run the script with other releases; a table of what passed
#
# oldest: what requirements.txt asks for at least; colab: what Google Colab has; newest: what pip finds. Each has an
# environment in .versions/ (several GB where pip finds no torch for the CPU alone), with the first of its Pythons that
# is found. In each, on the CPU: the smoke preset, --evaluate of its weights and, with --suite, the tests. Logs are in
# .versions/, which may be removed, and the table is for docs/promises.md. Exit status 1 where anything failed.
set -uo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" CUDA_VISIBLE_DEVICES=""

suite=false
if [ "${1:-}" = --suite ]; then suite=true; shift; fi
[ $# -gt 0 ] || set -- oldest colab newest

python_of() {  # the first of these versions that runs, under its name or where pyenv has it
  local version python
  for version in "$@"; do
    for python in "python$version" "$HOME/.pyenv/versions/$version".*/bin/python; do
      if "$python" -c "" 2>/dev/null; then echo "$python"; return; fi
    done
  done
  echo python3
}

tried() {  # a word for the table
  if "$@" >>"$log" 2>&1; then echo passed; else echo FAILED; fi
}

mkdir -p .versions
table=$(
  echo "| set | Python | torch | numpy | scipy | matplotlib | smoke | \`--evaluate\` | tests |"
  echo "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
  for name in "$@"; do
    case "$name" in
      oldest) pythons="3.10 3.11"; packages=$(sed -n 's/^\([a-z]*\)>=\(.*\)/\1==\2.*/p' requirements.txt) ;;
      colab) pythons="3.12 3.11"; packages="torch==2.11.* numpy==2.1.* -r requirements.txt" ;;
      newest) pythons="3.14 3.13 3.12"; packages="-r requirements.txt" ;;
      *) echo "$name: give oldest, colab or newest" >&2; exit 2 ;;
    esac
    home=.versions/$name log=.versions/$name.log
    : >"$log"
    if [ ! -e "$home/made" ]; then
      "$(python_of $pythons)" -m venv --clear "$home" >>"$log" 2>&1
      "$home/bin/python" -m pip install --quiet $packages >>"$log" 2>&1 && touch "$home/made"
    fi
    run="$home/bin/python deepham_ks.py --preset smoke --output-dir $home/run"
    smoke=$(tried $run) evaluate=$(tried $run --evaluate) tests="not run"
    if $suite; then
      "$home/bin/python" -m pip install --quiet -r requirements-dev.txt >>"$log" 2>&1
      tests=$(tried "$home/bin/python" -m pytest -q -n 2 --dist loadfile tests)
    fi
    versions=$("$home/bin/python" -c "import platform, torch, numpy, scipy, matplotlib
print(platform.python_version(), *(m.__version__ for m in (torch, numpy, scipy, matplotlib)), sep=' | ')")
    echo "| $name | $versions | $smoke | $evaluate | $tests |"
  done
) || exit
echo "$table"
[[ "$table" != *FAILED* ]]
