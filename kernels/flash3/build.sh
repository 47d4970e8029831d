#!/bin/sh
# Builds FlashAttention-3's forward pass for Hopper into libflash3.so beside this file, where
# kernels/flash_attention_3.py looks for it: bfloat16, heads of 128, no mask (forward.cu); some minutes on one core.
# Needs nvcc (CUDA 12.3 or newer), and git and the network, or folders with the sources at these commits:
#
#     FLASH_ATTENTION=/path/to/flash-attention CUTLASS=/path/to/cutlass kernels/flash3/build.sh
#
# No GPU and no PyTorch is needed. Nothing of theirs (BSD-3-Clause both) is part of this repository.
set -eu

FLASH_ATTENTION=${FLASH_ATTENTION:-https://github.com/Dao-AILab/flash-attention.git}
FLASH_ATTENTION_COMMIT=0251105a2fb19d2957484b7f023cd8c115286ced
CUTLASS=${CUTLASS:-https://github.com/NVIDIA/cutlass.git}
CUTLASS_COMMIT=7127592069c2fe01b041e174ba4345ef9b279671 # the one that flash-attention has as its submodule
NVCC=${NVCC:-nvcc}

fail() {
    echo "error: $1" >&2
    exit 2
}
command -v "$NVCC" >/dev/null || fail "no nvcc: install the CUDA toolkit (12.3 or newer), or say where it is with NVCC"

here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# fetched REPOSITORY COMMIT NAME PART: prints where that part of it lies; a folder is taken as it is
fetched() {
    if [ -d "$1/$4" ]; then
        echo "$1/$4"
        return
    fi
    command -v git >/dev/null || fail "no git: install it"
    git init -q "$work/$3"
    git -C "$work/$3" fetch -q --depth 1 "$1" "$2" || fail "cannot fetch commit $2 from $1"
    git -C "$work/$3" checkout -q "$2" -- "$4"
    echo "$work/$3/$4"
}
flash=$(fetched "$FLASH_ATTENTION" "$FLASH_ATTENTION_COMMIT" flash hopper)
cutlass=$(fetched "$CUTLASS" "$CUTLASS_COMMIT" cutlass include)

echo "compiling with $NVCC: some minutes"
"$NVCC" -shared -o "$work/libflash3.so" "$here/forward.cu" -I "$flash" -I "$cutlass" \
    -gencode arch=compute_90a,code=sm_90a -O3 -std=c++17 --use_fast_math --expt-relaxed-constexpr \
    --expt-extended-lambda -DNDEBUG -DCUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED -DCUTLASS_ENABLE_GDC_FOR_SM90 \
    -Xcompiler -fPIC,-fvisibility=hidden -Xlinker --no-undefined -Xptxas -v 2>"$work/log" || {
    cat "$work/log" >&2
    fail "nvcc failed"
}
grep -E "registers|spill" "$work/log" | sed 's/^ptxas info *: //' || true
mv "$work/libflash3.so" "$here/libflash3.so"
echo "built $here/libflash3.so"
