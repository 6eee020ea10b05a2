#!/bin/sh
# All that rests on one testbed, from its weights on, into build/evidence/NAME and then into data:
# `make evidence`. Interrupted, the same command goes on; what is there is not made again.
set -e
name=$1
out=build/evidence/$name
seats=.venv/bin/seats
export OMP_NUM_THREADS=1
mkdir -p "$out"

make() {  # FILE, then a command without --out
    file=$out/$1
    mkdir -p "${file%/*}"
    shift
    test -s "$file" || "$@" --model "$name" --out "$file"
}

demo() {  # what it writes, whether or not it agrees with what was there before
    rm -rf "$out/demo"
    $seats demo --model "$name" --out "$out/demo" || test -s "$out/demo/results/kept_$name.json"
    for kind in profiles schedules results; do
        cp "$out/demo/$kind"/* data/$kind/
    done
}

make profiles/$name.nc $seats probe --limit 192  # `derive`, as the demo
profile="--profile $out/profiles/$name.nc"
make profiles/captions/$name.nc $seats probe --answers text --limit 64
if test "$name" = testbed-gemma4; then  # the weaker one: no more is shown of it
    make results/captions/$name.json $seats eval --methods random --trr 35,10 --limit 100 --seed 3 --answers text
    cp -r "$out/profiles" "$out/results" data/
    demo
    exit
fi
make flows/$name.nc $seats flow --limit 200
make flows/${name}_time.nc $seats flow --limit 200 --edges time
make flows/${name}_heads.nc $seats flow --limit 64 --heads --window 1 --edges 'visual->text,audio->text,question->last'
cp "$out"/flows/*.nc data/flows/  # flow-study reads the shipped ones
make results/flow_$name.json $seats flow-study
make results/turns_$name.json $seats turns
make schedules/${name}_tuned.json $seats tune $profile --budget 20 --evidence $out/results/tune_$name.json
make schedules/${name}_tuned-family.json $seats tune $profile --by family --budget 20 \
    --evidence $out/results/tune_${name}_family.json
for method in divprune-om+late visionzip-om+late omnipack+late downsample; do  # no schedule file: the chain is what is wanted
    found=$out/results/tune_${name}_$method.json
    test -s "$found" || $seats tune $profile --model "$name" --budget 20 --method $method --max-change 20 \
        --out "$out/schedules/${name}_$method.json" --evidence "$found"
done
make schedules/${name}_tuned-text.json $seats tune --profile $out/profiles/captions/$name.nc --answers text \
    --budget 8 --limit 1200 --evidence $out/results/captions/tune_$name.json
test -s $out/results/check_$name.json || $seats check $out/results/tune_$name.json --model $name --limit 1000 \
    --out $out/results/check_$name.json
make results/eval_$name.json $seats eval $profile --methods all,late,ablations --trr 35,25,15,10 --limit 600 --seed 2 \
    --tuned $out/results/tune_$name.json --tuned $out/results/tune_${name}_divprune-om+late.json \
    --tuned $out/results/tune_${name}_visionzip-om+late.json
make results/rivals/$name.json $seats eval $profile --methods seats --trr 35,25,15,10 --limit 600 --seed 2 \
    --tuned $out/results/tune_$name.json --tuned $out/results/tune_${name}_omnipack+late.json \
    --tuned $out/results/tune_${name}_downsample.json
make results/captions/$name.json $seats eval $profile --methods divprune-om,random --trr 35,25,15,10 --limit 250 --seed 3 \
    --answers text --tuned $out/results/captions/tune_$name.json
for kind in profiles schedules results flows; do
    cp -r "$out/$kind" data/
done
demo  # last: its example shows the chain that was found
test "$name" = testbed || exit 0  # the shipped profile of the first testbed
$seats transfer --trr 10 --out data/results/task_sensitivity.json --overwrite
$seats sample-size --out data/results/questions_needed.json --overwrite
$seats simulate --out data/results/boundary_coverage.json --overwrite
