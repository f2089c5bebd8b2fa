"""Enumerations of ``transformer_engine_torch`` with the values of its headers, and the names of what has no stand-in."""

import enum
from typing import Any

import torch


def _count(name: str, members: str) -> Any:
    return enum.IntEnum(name, {member: value for value, member in enumerate(members.split())})


DType: Any = enum.IntEnum(
    "DType",
    {
        "kByte": 0,
        "kInt32": 2,
        "kFloat32": 4,
        "kFloat16": 5,
        "kBFloat16": 6,
        "kFloat8E4M3": 7,
        "kFloat8E5M2": 8,
        "kFloat4E2M1": 10,
    },
)

TORCH_TYPES = {
    DType.kByte: torch.uint8,
    DType.kInt32: torch.int32,
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
    DType.kFloat8E4M3: torch.float8_e4m3fn,
    DType.kFloat8E5M2: torch.float8_e5m2,
}

Backend: Any = enum.IntEnum("Backend", {"NVTE_No_Backend": -1, "NVTE_F16_arbitrary_seqlen": 1, "NVTE_FP8": 2})

ENUMS = {
    "DType": DType,
    "NVTE_Fused_Attn_Backend": Backend,
    "FP8FwdTensors": _count(
        "FP8FwdTensors",
        "GEMM1_INPUT GEMM1_WEIGHT GEMM1_OUTPUT GEMM2_INPUT GEMM2_WEIGHT GEMM2_OUTPUT GEMM3_INPUT GEMM3_WEIGHT GEMM3_OUTPUT",
    ),
    "FP8BwdTensors": _count("FP8BwdTensors", "GRAD_OUTPUT1 GRAD_INPUT1 GRAD_OUTPUT2 GRAD_INPUT2 GRAD_OUTPUT3 GRAD_INPUT3"),
    "NVTE_Bias_Type": _count("NVTE_Bias_Type", "NVTE_NO_BIAS NVTE_PRE_SCALE_BIAS NVTE_POST_SCALE_BIAS NVTE_ALIBI"),
    "NVTE_Mask_Type": _count(
        "NVTE_Mask_Type",
        "NVTE_NO_MASK NVTE_PADDING_MASK NVTE_CAUSAL_MASK NVTE_PADDING_CAUSAL_MASK NVTE_CAUSAL_BOTTOM_RIGHT_MASK "
        "NVTE_PADDING_CAUSAL_BOTTOM_RIGHT_MASK",
    ),
    "NVTE_Softmax_Type": _count("NVTE_Softmax_Type", "NVTE_VANILLA_SOFTMAX NVTE_OFF_BY_ONE_SOFTMAX NVTE_LEARNABLE_SOFTMAX"),
    "NVTE_QKV_Format": _count(
        "NVTE_QKV_Format",
        "NVTE_SBHD NVTE_BSHD NVTE_THD NVTE_BSHD_2SBHD NVTE_SBHD_2BSHD NVTE_THD_2BSHD NVTE_THD_2SBHD NVTE_BHSD "
        "NVTE_QKV_Format_NOT_SET",
    ),
    "NVTE_QKV_Layout": _count(
        "NVTE_QKV_Layout",
        "NVTE_SB3HD NVTE_SBH3D NVTE_SBHD_SB2HD NVTE_SBHD_SBH2D NVTE_SBHD_SBHD_SBHD NVTE_BS3HD NVTE_BSH3D NVTE_BSHD_BS2HD "
        "NVTE_BSHD_BSH2D NVTE_BSHD_BSHD_BSHD NVTE_T3HD NVTE_TH3D NVTE_THD_T2HD NVTE_THD_TH2D NVTE_THD_THD_THD "
        "NVTE_SBHD_BSHD_BSHD NVTE_BSHD_SBHD_SBHD NVTE_THD_BSHD_BSHD NVTE_THD_SBHD_SBHD NVTE_Paged_KV_BSHD_BSHD_BSHD "
        "NVTE_Paged_KV_BSHD_SBHD_SBHD NVTE_Paged_KV_SBHD_BSHD_BSHD NVTE_Paged_KV_SBHD_SBHD_SBHD NVTE_Paged_KV_THD_BSHD_BSHD "
        "NVTE_Paged_KV_THD_SBHD_SBHD NVTE_BHSD_BHSD_BHSD NVTE_QKV_Layout_NOT_SET",
    ),
    "NVTEScalingMode": enum.IntEnum(
        "NVTEScalingMode",
        {
            "NVTE_DELAYED_TENSOR_SCALING": 0,
            "NVTE_MXFP8_1D_SCALING": 1,
            "NVTE_BLOCK_SCALING_1D": 2,
            "NVTE_BLOCK_SCALING_2D": 3,
            "NVTE_NVFP4_1D_SCALING": 4,
            "NVTE_INVALID_SCALING": 100,
        },
    ),
    "Float8BlockScaleTensorFormat": _count("Float8BlockScaleTensorFormat", "GEMM_READY COMPACT INVALID"),
    "CommOverlapType": _count("CommOverlapType", "RS AG"),
    "CommOverlapAlgo": _count(
        "CommOverlapAlgo",
        "BULK_OVERLAP_AG BULK_OVERLAP_RS SPLIT_PIPELINED_AG_P2P SPLIT_PIPELINED_RS SPLIT_PIPELINED_RS_P2P ATOMIC_GEMM_RS "
        "ATOMIC_GEMM_AG_P2P ATOMIC_GEMM_RS_P2P EXTERNAL_BULK_OVERLAP_AG",
    ),
    "NVTERoutingMapFormat": _count("NVTERoutingMapFormat", "BYTEMAP BITMAP_U8"),
    "NVTEQBHistogramMode": _count("NVTEQBHistogramMode", "TWO_KERNEL FUSED_ATOMIC"),
}

# Classes of user buffers, by which tensor-parallel communication overlaps with products.
BUFFERS = "CommOverlapHelper CommOverlapCore CommOverlapBase CommOverlapP2PBase CommOverlap CommOverlapP2P".split()

# Functions of the compiled module that have no stand-in; each raises with its name when it is called.
MISSING = """
    bulk_allocate bulk_overlap_ag_with_external_gemm clamped_dswiglu clamped_swiglu convert_bshd_to_thd convert_thd_to_bshd
    copy_data_ptrs_to_device copy_to_kv_cache cusolvermp_ctx_create cusolvermp_ctx_destroy dropout_bwd dropout_fwd dsituglu
    fa_prepare_bwd fa_prepare_fwd fused_attn_bwd fused_attn_fwd fused_moe_aux_loss_bwd fused_moe_aux_loss_fwd
    fused_moe_aux_loss_fwd_graph_safe fused_qkv_rope_backward fused_qkv_rope_forward fused_rope_backward fused_rope_forward
    fused_score_for_moe_aux_loss_bwd fused_score_for_moe_aux_loss_fwd fused_topk_with_score_function_bwd
    fused_topk_with_score_function_fwd fused_topk_with_score_function_qb_fwd group_dequantize group_quantize bgrad_group_quantize
    group_requantize_inplace group_scaled_swiglu group_scaled_clamped_swiglu grouped_swizzle_for_gemm
    get_grouped_gemm_setup_workspace_size moe_permute_bwd moe_permute_fwd moe_unpermute_bwd moe_unpermute_fwd
    multi_tensor_adam_capturable multi_tensor_adam_capturable_master multi_tensor_adam_fp8 multi_tensor_adam_param_remainder
    multi_tensor_compute_scale_inv_e8m0 multi_tensor_pad_last_dim multi_tensor_sgd multi_tensor_swizzle_scales_for_gemm_
    multi_tensor_swizzle_scales_for_gemm_unchecked_ multi_tensor_transpose_to_bhsd mxfp8_scaling_compute_partial_amax
    mxfp8_scaling_partial_cast newton_schulz nvfp4_2d_compute_partial_amax nvfp4_2d_multi_tensor_transpose nvfp4_2d_partial_cast
    nvfp4_2d_scale_transpose nvfp4_compute_global_scale nvfp4_compute_per_block_scale nvfp4_data_transpose
    nvfp4_expand_scale_to_fp8 nvfp4_fused_scale nvfp4_group_quantize_with_amax nvfp4_multi_tensor_2d_partial_cast
    nvfp4_multi_tensor_compute_partial_amax nvfp4_multi_tensor_fused_scale nvfp4_quantize_with_amax scaled_clamped_dswiglu
    scaled_clamped_swiglu scaled_dsituglu scaled_dsrelu scaled_dswiglu scaled_situglu scaled_srelu scaled_swiglu situglu
    splits_to_offsets splits_to_offsets_multi swizzle_scales_for_gemm_ te_general_grouped_gemm_for_discrete_in
    te_general_grouped_gemm_for_discrete_out te_general_grouped_gemm_for_grouped_tensor
    thd_copy_valid_tokens_from_per_split_to_rank_local thd_cp_rank_order_to_sequence_order thd_get_partitioned_indices
    thd_grad_correction thd_out_correction thd_read_half_tensor thd_read_second_half_lse thd_second_half_lse_correction
    thd_sequence_order_to_cp_rank_order
""".split()


def find_type(dtype: Any) -> torch.dtype:
    """Return torch's type for one of torch or of the enumeration ``DType``."""
    return dtype if isinstance(dtype, torch.dtype) else TORCH_TYPES[DType(int(dtype))]
