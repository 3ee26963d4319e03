"""Converting half precision to fp32 in a Triton kernel that does little else."""

import os

from folio.device import can_compile

if can_compile():
    import triton
    from triton import language as tl

    _ASSEMBLY = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1")

    @triton.jit
    def to_fp32(w):
        """w in fp32; of bf16, by one instruction per value, where Triton's conversion takes 1.5.

        It is not declared pure, so that the compiler leaves it in a loop over sequences: outside,
        converted weights would need twice the registers.
        """
        if w.dtype == tl.bfloat16 and _ASSEMBLY:
            return tl.inline_asm_elementwise(
                "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [w],
                dtype=tl.float32, is_pure=False, pack=2,
            )  # fmt: skip
        else:
            return w.to(tl.float32)
