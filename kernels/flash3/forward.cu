// FlashAttention-3's forward pass (Shah et al., arXiv 2407.08608) for what a video's tokens need and nothing
// else: bfloat16, heads of 128, no mask, one length. Compiled by build.sh against flash-attention's own headers,
// called through C by kernels/flash_attention_3.py, so that neither PyTorch's headers nor Python's are needed.

#include "flash_fwd_launch_template.h"

namespace {

constexpr int HEAD_WIDTH = 128;

template <int Cluster>
void run(Flash_fwd_params& params, cudaStream_t stream) {
    run_flash_fwd<90, HEAD_WIDTH, HEAD_WIDTH, Cluster, cutlass::bfloat16_t, cutlass::bfloat16_t,
                  /*causal*/ false, /*local*/ false, /*softcap*/ false, /*varlen*/ false, /*paged*/ false,
                  /*append*/ false, /*qv*/ false, /*pack*/ false, /*split*/ false, /*v_colmajor*/ false>(
        params, stream);
}

}  // namespace

// q, k, v, out: bfloat16 [batch,tokens,heads,128] whose last axis is contiguous; strides: in elements, those of
// batch, token and head, of q, k, v and out in turn. sums: float32 [batch,heads,tokens], is written. Where a
// launch fails, flash-attention says why and ends the process.
extern "C" __attribute__((visibility("default"))) void flash3_forward(const void* q, const void* k, const void* v, void* out, float* sums, int batch,
                               int tokens, int heads, const int64_t* strides, float scale, int multiprocessors,
                               cudaStream_t stream) {
    Flash_fwd_params params = {};
    params.q_ptr = const_cast<void*>(q);
    params.k_ptr = const_cast<void*>(k);
    params.v_ptr = const_cast<void*>(v);
    params.o_ptr = out;
    params.softmax_lse_ptr = sums;
    params.q_batch_stride = strides[0], params.q_row_stride = strides[1], params.q_head_stride = strides[2];
    params.k_batch_stride = strides[3], params.k_row_stride = strides[4], params.k_head_stride = strides[5];
    params.v_batch_stride = strides[6], params.v_row_stride = strides[7], params.v_head_stride = strides[8];
    params.o_batch_stride = strides[9], params.o_row_stride = strides[10], params.o_head_stride = strides[11];
    params.v_dim_stride = 1;
    params.b = params.b_k = batch;
    params.seqlen_q = params.seqlen_k = tokens;
    params.h = params.h_k = heads;
    params.d = params.d_rounded = params.dv = params.dv_rounded = HEAD_WIDTH;
    params.scale_softmax = scale;
    params.window_size_left = params.window_size_right = -1;
    params.num_splits = 1;
    params.is_bf16 = true;
    params.arch = 90;
    params.num_sm = multiprocessors;
    // two programs share what they read where there is an even number of them for each head
    constexpr int rows = std::get<0>(tile_size_fwd_sm90(HEAD_WIDTH, HEAD_WIDTH, false, false));
    (tokens + rows - 1) / rows % 2 ? run<1>(params, stream) : run<2>(params, stream);
}
