#!/usr/bin/env bash
# bash benchmarks/all.sh [--list] [--missing] [step ...]
#
# Makes every committed figure of README.md and docs/results.md anew, the cheap ones first. Its first lines say what it
# runs and how many seconds that took in the committed runs: training, grid and judging, without start and pictures.
# With names of steps it runs these alone. --list: says so and runs nothing. --missing: keeps what this version has run.
# A step that fails is named at the end; where it has written nothing the committed file stays. PYTHON names another
# Python than that of .venv.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}"

# name | files of its figures | command; `run FILE script flags` makes one run and keeps its metrics.json as FILE
STEPS=(
  "one_iteration | docs/one_iteration.png | python examples/one_iteration.py 12 docs/one_iteration.png"
  "operations | benchmarks/operations.json | python benchmarks/operations.py"
  "reference | benchmarks/seeds/seed0.json | run benchmarks/seeds/seed0.json deepham_ks.py --output-dir ."
  "gamma2 | benchmarks/gamma2.json | run benchmarks/gamma2.json deepham_ks.py --gamma 2 --output-dir runs/gamma2"
)
for seed in 1 2 3 4 5 6 7 8 9; do
  file=benchmarks/seeds/seed$seed.json
  STEPS+=("seed$seed | $file | run $file deepham_ks.py --seed $seed --output-dir runs/seed$seed")
done
for name in labour_flows ar1 davila castaneda stochastic_beta; do
  file=benchmarks/examples/$name.json
  STEPS+=("$name | $file | run $file examples/$name.py --output-dir runs/$name")
done
STEPS+=(
  "moments | benchmarks/moments/seed{0,1,2}.json benchmarks/moments/unemployment.json | python benchmarks/moments.py"
  "planner | benchmarks/planner/{market,planner_seed0,game,cis_market,cis_planner}.json | python benchmarks/planner.py"
  "paper | benchmarks/paper/metrics.json | run benchmarks/paper/metrics.json deepham_ks.py --preset paper --output-dir runs/paper"
  "labour | benchmarks/labour_flows.json | python benchmarks/labour_flows.py"
  "calibrations | benchmarks/calibrations/{00..19}_seed{0,1}.json | python benchmarks/calibrations.py"
  "field | benchmarks/field/{benchmark,risk-aversion,stochastic-beta,aiyagari}.json | python benchmarks/field.py"
  "two | benchmarks/groups/two.json | run benchmarks/groups/two.json examples/groups.py --groups 2 --spread 0.0136 --beta 0.9862 --output-dir runs/two"
  "seven | benchmarks/groups/seven.json | run benchmarks/groups/seven.json examples/groups.py --groups 7 --spread 0.0068 --beta 0.9862 --moments groups --output-dir runs/seven"
  "ablation | benchmarks/ablation.json | python benchmarks/ablation.py"
)

list=false missing=false asked=" "
for word in "$@"; do
  case "$word" in
    --list) list=true ;;
    --missing) missing=true ;;
    *) [[ " ${STEPS[*]%% |*} " == *" $word "* ]] || { echo "$word: no such step; bash benchmarks/all.sh --list has them" >&2; exit 2; }
       asked+="$word " ;;
  esac
done

seconds() {  # of the runs behind these files
  "$PYTHON" - "$@" <<'END'
import json, sys
def of(x):
    taken = x.get("seconds") if isinstance(x, dict) else None
    if taken is None:
        return sum(map(of, x.values() if isinstance(x, dict) else x if isinstance(x, list) else ()))
    return sum(taken.get(k, 0) for k in ("training", "grid", "accuracy")) if isinstance(taken, dict) else taken
try:
    found = [of(json.load(open(name))) for name in sys.argv[1:]]
    print(f"{sum(found):,.0f} s" if all(found) else "not measured")
except (OSError, ValueError):
    print("not measured")
END
}

current() {  # whether this version made all of these files
  "$PYTHON" - "$@" <<'END'
import json, re, sys
version = re.search(r'^__version__ = "(.*)"', open("deepham_ks.py", encoding="utf-8").read(), re.M)[1]
try:
    sys.exit(not all(json.load(open(name)).get("version") == version for name in sys.argv[1:]))
except (OSError, ValueError):
    sys.exit(1)
END
}

python() { "$PYTHON" "$@"; }

ended() {  # the line in which a run ended that left no figures
  "$PYTHON" -c 'import json, sys; print(json.load(open(sys.argv[1])).get("error", ""))' "$1" 2>/dev/null
}

run() {  # FILE script flags, of which the last is the folder; status 1, a row that fails, still has figures
  local file=$1 folder=${!#} status=0
  touch "$before/start"
  "$PYTHON" "${@:2}" || status=$?
  [ "$folder/metrics.json" -nt "$before/start" ] && mkdir -p "$(dirname "$file")" && cp "$folder/metrics.json" "$file" &&
    [ $status -le 1 ]
}

restore() {  # what was there before, where nothing has taken its place
  local file
  for file in "${files[@]}"; do
    [ -f "$before/$file" ] && [ ! -f "$file" ] && mv "$before/$file" "$file" && echo "$file stays as it was"
  done
  rm -rf "$before"
}

chosen=()
for step in "${STEPS[@]}"; do
  [[ $asked == " " || $asked == *" ${step%% |*} "* ]] && chosen+=("$step")
done
echo "${#chosen[@]} steps, seconds of the committed runs:"
for step in "${chosen[@]}"; do
  IFS='|' read -r name files command <<<"$step"
  printf '  %-16s %-14s %s\n' "$name" "$(eval "seconds $files")" "$command"
done
$list && exit

failed=()
for step in "${chosen[@]}"; do
  IFS='|' read -r name files command <<<"$step"
  name=${name// /}
  eval "files=($files)"
  if $missing && current "${files[@]}"; then
    echo "$name: kept, this version has run it"
    continue
  fi
  echo "== $name: $command"
  before=$(mktemp -d)
  trap restore EXIT
  $missing || for file in "${files[@]}"; do  # or the benchmark would keep them
    [ -f "$file" ] && mkdir -p "$before/$(dirname "$file")" && mv "$file" "$before/$file"
  done
  good=true
  eval "$command" || good=false
  for file in "${files[@]}"; do
    [ -f "$file" ] && [ -z "$(ended "$file")" ] || { echo "$name: no figures in $file $(ended "$file")"; good=false; }
  done
  $good || failed+=("$name")
  restore
  trap - EXIT
done
"$PYTHON" tools/readme_tables.py || failed+=("tools/readme_tables.py")
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}" >&2; exit 1; }
