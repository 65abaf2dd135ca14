#!/usr/bin/env bash
# What the engine does on a GPU, in under 8 minutes and without internet: benchmarks/gpu_card.py says what is measured.
#
#   benchmarks/gpu.sh --fetch DIR [--for 3.11]   with internet, once: fills DIR with wheels for that Python (2.8 GB)
#   benchmarks/gpu.sh [--wheels DIR] ...         on the machine with the GPU; DIR is benchmarks/wheels by default
#   benchmarks/gpu.sh --python PATH ...          installs nothing: this Python has all that is needed
#   benchmarks/gpu.sh --dry-run ...              the same steps with tiny shapes on the CPU; figures mean nothing
#
# All other options are those of `python -m benchmarks.gpu_card --help`. Packages that Python has already stay as they
# are; the others come from DIR and go into a virtual environment under the folder of --out.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
limit=470 # seconds for everything, installation included
wheels=$root/benchmarks/wheels fetch='' for='' python='' out=$root/benchmarks/results/gpu
options=()
while (($#)); do
    case $1 in
        --fetch) fetch=$2 && shift ;;
        --for) for=$2 && shift ;;
        --wheels) wheels=$2 && shift ;;
        --python) python=$2 && shift ;;
        --out) out=$2 && shift ;;
        *) options+=("$1") ;;
    esac
    shift
done

# The packages that the engine, the workloads and the tests on the card import.
requirements() {
    (cd "$root" && "$1" docker/requirements.py server gpu bench)
    printf '%s\n' hypothesis prometheus-client pytest pytest-timeout pytest-xdist
}

if [[ $fetch ]]; then
    maker=${python:-python3}
    mkdir -p "$fetch"
    requirements "$maker" >"$fetch/requirements.txt"
    target=()
    if [[ $for ]]; then
        target=(--python-version "$for" --implementation cp --abi "cp${for/./}" --abi abi3 --abi none)
        for glibc in {5..39}; do target+=(--platform "manylinux_2_${glibc}_x86_64"); done
        target+=(--platform manylinux2014_x86_64 --platform linux_x86_64)
    fi
    # The versions of the image `gpu`, as torch's CUDA builds each need one version of triton.
    "$maker" -m pip download --only-binary=:all: "${target[@]}" --dest "$fetch" \
        --constraint "$root/docker/constraints-gpu.txt" --requirement "$fetch/requirements.txt"
    du -sh "$fetch"
    exit
fi

mkdir -p "$out"
if [[ ! $python ]]; then
    python3 -m venv --system-site-packages "$out/venv"
    python=$out/venv/bin/python
    requirements "$python" >"$out/requirements.txt"
    timeout 200 "$python" -m pip install --quiet --no-index --find-links "$wheels" --requirement "$out/requirements.txt"
fi
export PYTHONPATH=$root/backends:$root/gateway:$root/clients/python/src:$root
cd "$root"
exec "$python" -m benchmarks.gpu_card --out "$out" --seconds $((limit - SECONDS)) "${options[@]}"
