#!/usr/bin/env bash
# bash benchmarks/all.sh    makes every figure of README.md and docs/results.md anew, the quick ones first
#
# On two cores, one thread a run and nothing beside: reference run 2 minutes, nine more seeds 15, gamma 2 2, examples 15,
# labour flows 12, market, planner and game 15, the field's tables 45, moments 20, calibrations 80, what single mechanisms
# buy 60; about four and a half hours in all. The paper's preset (1,800 s, benchmarks/paper/) and J groups
# (benchmarks/groups/) are not made anew. Benchmarks keep what this version has run, so a stop loses one run.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
run() { "$python" "$@" || [ $? -eq 1 ]; }  # 1: a row of the verdict fails, which the tables show
keep() { cp "runs/$1/metrics.json" "benchmarks/$2.json"; }

run deepham_ks.py
cp metrics.json benchmarks/seeds/seed0.json
for seed in 1 2 3 4 5 6 7 8 9; do
  run deepham_ks.py --seed $seed --output-dir runs/seed$seed
  keep seed$seed seeds/seed$seed
done
run deepham_ks.py --gamma 2 --output-dir runs/gamma2
keep gamma2 gamma2
for example in labour_flows davila stochastic_beta ar1; do
  run examples/$example.py --output-dir runs/$example
  keep $example examples/$example
done
"$python" benchmarks/labour_flows.py
"$python" benchmarks/planner.py
"$python" benchmarks/field.py
"$python" benchmarks/moments.py
"$python" benchmarks/calibrations.py
"$python" benchmarks/ablation.py
"$python" examples/one_iteration.py 12 docs/one_iteration.png
"$python" tools/readme_tables.py
