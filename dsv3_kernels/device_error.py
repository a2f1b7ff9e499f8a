"""What a kernel found out of range in device memory, where a check before the launch would have to wait.

The kernel stays inside its allocations and stores a code in its device's error word
(csrc/kernels/error.cuh, `launch.error_flag`); the next launch on that device, or `synchronize`, raises it and
clears the word.
"""

import enum


class DeviceValueError(ValueError):
    """A tensor on a GPU held values out of range. `code` says which; what the op returned is not valid."""

    def __init__(self, code: int, device: str) -> None:
        self.code, self.device = code, device
        what, mend = _MESSAGES.get(code, (f"a kernel reported the unknown error {code}", _REBUILD))
        super().__init__(
            f"{what}, in an earlier call on {device}: what it returned is not valid. Mend: {mend}"
        )


class ErrorCode(enum.IntEnum):
    """As in csrc/kernels/error.cuh."""

    NONE = 0
    GROUPED_GEMM_OFFSETS = 1
    MASKED_GEMM_COUNTS = 2
    WGRAD_OFFSETS = 3
    QUANTIZE_OFFSETS = 4
    DISPATCH_EXPERTS = 5
    DISPATCH_FORM = 6
    DISPATCH_OVERFLOW = 7


_REBUILD = "clear the kernel cache, its kernels are of another version"
_OFFSETS = "offsets as [0, *sizes].cumsum(0), int32, of the rows there are; print group_offsets.tolist()"
_RUNNING_SUM = "held values that descend, do not start at 0 or"
_MESSAGES: dict[int, tuple[str, str]] = {
    ErrorCode.GROUPED_GEMM_OFFSETS: (
        f"grouped_fp8_gemm: group_offsets {_RUNNING_SUM} end past M, the rows of a",
        _OFFSETS,
    ),
    ErrorCode.MASKED_GEMM_COUNTS: (
        "masked_grouped_fp8_gemm: counts held a value outside 0 to max_m, the rows of a group of a",
        "clamp what fills counts to a.data.shape[1]; print counts.tolist()",
    ),
    ErrorCode.WGRAD_OFFSETS: (
        f"fp8_wgrad: group_offsets {_RUNNING_SUM} need more than T, the token columns of the operands",
        "pass the offsets that both operands were quantised with; print group_offsets.tolist()",
    ),
    ErrorCode.QUANTIZE_OFFSETS: (
        f"quantize_1x128_t or another op that transposes: group_offsets {_RUNNING_SUM} end past the rows of "
        "what is quantised",
        _OFFSETS,
    ),
    ErrorCode.DISPATCH_EXPERTS: (
        "dispatch: topk_idx of this rank or another held an expert out of range, or twice in its row",
        "pass distinct experts 0 to num_experts - 1 in a row, or -1 for none",
    ),
    ErrorCode.DISPATCH_FORM: (
        "dispatch: ranks passed different kinds of x (FP8 or BF16), topk_weights or expert_order",
        "pass the same on all ranks",
    ),
    ErrorCode.DISPATCH_OVERFLOW: (
        "dispatch: max_recv_tokens of this rank or another was less than the rows it was sent",
        "raise it; print tokens_per_expert.sum()",
    ),
}
