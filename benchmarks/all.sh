#!/bin/sh
# Every figure of benchmarks/README.md on one GPU, as JSON and PNG into a folder; 5 to 6 minutes on an H200.
#
#     sh benchmarks/all.sh OUT [BANDWIDTH TFLOPS]      GB/s and TFLOP/s of the device; measured where not given
#
# A command that fails is named at the end, and the others still run.
out=${1:?the folder for the results}
limits=${3:+--bandwidth $2 --tflops $3}
mkdir -p "$out"
failed=
bench() {  # NAME COMMAND [OPTIONS]...
    name=$1
    shift
    echo "== bench $*"
    # shellcheck disable=SC2086 # the limits are several words
    python3 -m nanoengine bench "$@" $given --json "$out/$name.json" || failed="$failed $name"
}
plot() {  # FILE: the option, where there is what draws
    ! python3 -c 'import matplotlib' 2>/dev/null || echo "--plot $out/$1"
}
given="$limits $(plot throughput.png)"
bench throughput throughput
given=$limits
bench llama throughput --shape llama-3.2-1b --workload d1 --workload d256 --passes 3
bench attention attention
bench sampler sampler --passes 3 --case greedy --case temperature --case top_k=50,top_p=0.95 --case min_p=0.05
bench prefill prefill --passes 3
given="$limits $(plot latency.png)"
bench latency latency --passes 3 --rate 200
given=$limits
bench prefix prefix --passes 3
given=
bench startup startup --passes 3
[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
