"""What a kernel is, by its name: heads, families, a user's own, and the names that break naive tools."""

from pathlib import Path

import pytest

from counterflow.analysis import classify_name, read_families
from counterflow.analysis.classes import COMMUNICATION, KINDS, read_own_families
from counterflow.analysis.names import split_name
from tests.support.made_trace import load_oracle
from tests.support.running import refuses

NAMES = {
    "void dpsk::ep::internode::combine<false, 8, __nv_bfloat16>(int4*, nvshmem_team_t)": "ep_combine",
    "void deep_ep::intranode::notify_dispatch<8>(int const*, ncclComm*)": "ep_notify",
    "void deep_ep::internode::cached_notify<false>(int)": "ep_notify",
    "void deep_ep::internode_ll::dispatch<true, 3, 7168>(void*, float*)": "ep_dispatch",
    "void deep_ep::layout::get_dispatch_layout<256, 32, 8>(long const*)": "ep_layout",
    "deep_ep::elastic::dispatch_impl<4>(int)": "ep_dispatch",
    "primus_turbo::deep_ep::intranode::combine<int>(int)": "ep_combine",
    "_ZN7deep_ep9internode8dispatchILb0ELi8EEEvP4int4": "ep_dispatch",
    "_ZN7deep_ep9intranode7barrierILi8EEEvPPii": "ep_notify",
    "void hybrid_ep::dispatch_kernel<hybrid_ep::Config>(Params)": "ep_dispatch",
    "hybrid_ep::device_sync_kernel(int*)": "ep_notify",
    "void hybrid_ep::permute_kernel<float>(float*)": "permutation",
    "nccl_ep_jit_ht_dispatch_kernel": "ep_dispatch",
    "nccl_ep_jit_ht_combine_kernel": "ep_combine",
    "EpDispatchIntraNodeKernel_bf16": "ep_dispatch",
    "void mori::moe::EpCombineInterNodeKernelV1<float>(Args)": "ep_combine",
    "void uccl::internode::dispatch<true>(int)": "ep_dispatch",
    "ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)": "reduce_scatter",
    "ncclKernel_AllReduce_RING_LL_Sum_float(ncclDevComm*, unsigned long, ncclWork*)": "all_reduce",
    "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)": "send_recv",
    "ncclSymkDevKernel_AllGather_LLMC(ncclSymkDevWorkArgs4K)": "all_gather",
    "ncclDevKernel_Generic_4(ncclDevKernelArgsStorage<4096ul>)": "other_communication",
    "mscclKernel_Sum_half_LL(ncclDevComm*)": "other_communication",
    "nvshmemi_transfer_rma_p2p": "other_communication",
    "void multimem_all_reduce_kernel<c10::BFloat16, 16>(float*)": "all_reduce",
    "void vllm::cross_device_reduce_1stage<__nv_bfloat16, 8>(vllm::RankData*)": "all_reduce",
    "void flash::flash_fwd_splitkv_mla_combine_kernel<float, 512>(Params)": "attention",
    "void cutlass::device_kernel<flash::FlashAttnFwdCombine<cute::tuple<int> > >(Params)": "attention",
    "_fwd_kernel_ep_scatter_2": "permutation",
    "void fbgemm_gpu::permute_2D_lengths_kernel<int>(int)": "permutation",
    "void cutlass::device_kernel<dpsk::grouped_gemm::cuda::fp8_ptp128c::GemmKernel>(Params)": "gemm",
    "void cutlass::device_kernel<dpsk::grouped_gemm::cuda::m_grouped_fp8_ptp128c::GemmKernel>(Params)": "grouped_gemm",
    "void dpsk::grouped_gemm::cuda::utils::transpose<512, 128, 4, 4>(unsigned char const*)": "cast",
    "void moe::permute<deep_ep::internode::SourceMeta>(nvshmem_team_t, ncclComm*)": "permutation",
    "std::enable_if<ncclIs<int>, void>::type mine::scale_kernel<int>(int)": "other",
    "void (anonymous namespace)::softmax_warp_forward<float>(float*)": "softmax",
    "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNN": "gemm",
    "Cijk_Ailk_Bljk_HHS_BH_MT128x128x32_MI32x32x8x1.kd": "gemm",
    "void transformer_engine::normalization::rmsnorm_fwd_tuned_kernel<int>(Params)": "norm",
    "my_secret_kernel": "other",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_classified_by_its_head(name: str) -> None:
    assert classify_name(name) == NAMES[name]


@pytest.mark.parametrize("name", NAMES)
def test_the_independent_analyser_says_the_same_of_communication(name: str) -> None:
    found = load_oracle().comm_kind(name)
    expected = NAMES[name] if NAMES[name] in COMMUNICATION else None
    assert ("other_communication" if found == "other" else found) == expected


def test_where_the_name_says_nothing_the_argument_does() -> None:
    name = "ncclDevKernel_Generic_4(ncclDevKernelArgsStorage<4096ul>)"
    pairs = {"_allgather_base": "all_gather", "allreduce": "all_reduce", "all_to_allv": "all_to_all", "x": "other_communication"}
    assert {collective: classify_name(name, collective) for collective in pairs} == pairs
    # A name that says something is believed: torch's all-to-all is a kernel that sends and receives.
    assert classify_name("ncclDevKernel_SendRecv", "all_to_allv") == "send_recv"


def test_heads() -> None:
    assert split_name("void a::b<c<d>, (e)2>(f<g>)") == ("a::b", "b", "void a::b<c<d>, (e)2>")
    assert split_name("_ZN2at6native12_GLOBAL__N_16kernelIfEEvi").head == "at::native::_GLOBAL__N_1::kernel"
    assert split_name("_Z10axpy_naivefPf").function == "axpy_naive"
    assert split_name("void (anonymous namespace)::f<1>(int) [clone .kd]").head == "anonymous::f"
    for odd in ("", "(", "<", "_Z", "_ZN", "_ZN99999999999x", ">>>", "a<b", "operator()"):
        split_name(odd)


def test_every_family_has_a_source_and_some_kind_is_of_each() -> None:
    families = read_own_families()
    assert all(family.name and family.source for family in families)
    kinds = {family.kind for family in families} | {kind for family in families for kind, _ in family.kinds}
    assert kinds == set(KINDS) - {"other", "send_recv"} | {"send_recv"}


def test_a_users_families_come_first(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[[family]]\nname = "mine"\nhead = "my_secret"\nkind = "all_to_all"\nsource = "me"\n')
    families = read_families(path)
    assert classify_name("MY_SECRET_kernel<3>", None, families) == "all_to_all"
    assert classify_name("my_gemm", None, families) == "gemm"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "allowed: [[family]]"),
        ("x = 1", "x"),
        ("[[family]]\nhead = 'a'", "no kind"),
        ("[[family]]\nkind = 'gemm'", "neither head nor whole"),
        ("[[family]]\nhead = '('\nkind = 'gemm'", "no regular expression"),
        ("[[family]]\nhead = 'a'\nkind = 'all_redcue'", "all_redcue"),
        ("[[family]]\nhead = 7\nkind = 'gemm'", "head 7"),
        ("[[family]]\nhead = 'a'\nkind = 'gemm'\ncolour = 'red'", "colour"),
        ("[[family]", "cannot be read"),
    ],
)
def test_a_bad_table_is_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with refuses(said):
        read_families(path)
