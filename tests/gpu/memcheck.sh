#!/usr/bin/env bash
# compute-sanitizer's memcheck over small tests of each kind of kernel. First a planted fault, which it must see.
# From anywhere, where there is a GPU and compute-sanitizer: tests/gpu/memcheck.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
# One allocation a tensor: behind the caching allocator's large blocks, most faults would stay unseen.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1

memcheck() {
    compute-sanitizer --tool memcheck --error-exitcode 86 "$python" "$@"
}

if memcheck tests/gpu/out_of_bounds.py; then
    echo "memcheck did not see the planted fault" >&2
    exit 1
fi

# Tests that a CPU runs too, in the interpreter: their shapes are small. Graphs need the caching allocator.
memcheck -m pytest -q -p no:cacheprovider -m "not gpu" \
    -k "(bfloat16 or sampling or step_inputs or triton_paged) and not graph and not mutant" \
    tests/kernels tests/attention/test_triton_paged.py "$@"
