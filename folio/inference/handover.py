"""How a Triton kernel takes over from the one before it, so that as little time as possible passes.

- Each kernel first loads its weights, and only then needs the results of the one before it. With
  "programmatic dependent launch" (CUDA programming guide, from compute capability 9.0), it starts
  when all programs of that kernel have started, so the weights of several kernels are on their way.
- With POLL, in a small batch, it does not wait for the end of that kernel, but for its results:
  every value is stored together with a tag, in a single access of 8 bytes, and readers repeat their
  loads until the tags are the expected ones, as in NCCL's LL protocol (prims_ll.h). A program only
  waits for programs that have started before it, so none waits forever. A tag is the number of a
  token plus that of a stage, and is never used twice, so values of earlier stages are not mistaken
  for later ones. A buffer can be used again in the next layer: its values are only replaced by
  programs whose inputs depend on all programs that read it.
"""

import torch

from folio import device

if device.can_compile():
    import triton
    from triton import language as tl
    from triton.language.extra import cuda

EARLY = True  # whether a kernel may start before the previous one has ended
POLL = False  # whether such a kernel waits for tags; otherwise for the end of the previous one
PREFETCH = False  # whether such a kernel brings the weights of a later one into the L2 cache
STAGES = 1_024  # by which the clock of the tags advances with each token; at most that many stages


def launch_options(x: torch.Tensor) -> dict[str, bool]:
    """The options of a launch that starts before the previous kernel has ended, if possible."""
    early = EARLY and x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
    return {"early": early, "launch_pdl": early} if early else {"early": False}


if device.can_compile():

    @triton.jit
    def let_next_start(early: tl.constexpr):
        """Let the next kernel start as soon as all programs of this one have."""
        if early:
            cuda.gdc_launch_dependents()

    @triton.jit
    def wait(early: tl.constexpr):
        """Wait until the previous kernel has ended and its results can be read."""
        if early:
            cuda.gdc_wait()

    @triton.jit
    def prefetch(weights, size, lines: tl.constexpr):
        """Bring this program's share of an array into the L2 cache: `lines` lines of 128 bytes."""
        line = tl.program_id(0) * lines + tl.arange(0, lines)
        elements: tl.constexpr = 1_024 // weights.dtype.element_ty.primitive_bitwidth
        place = weights + tl.minimum(line * elements, size - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [place.to(tl.int64)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip

    @triton.jit
    def send(place, values, tag, inside):
        """Store values in fp32, with the tag in the upper halves."""
        bits = values.to(tl.float32).to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        tl.store(place, bits | (tag.to(tl.int64) << 32), inside)

    @triton.jit
    def receive_one(place, tag, poll: tl.constexpr):
        """Wait for a single value: many programs that repeat large loads would delay others."""
        if poll:
            while (tl.load(place, volatile=True) >> 32).to(tl.int32) != tag:
                pass

    @triton.jit
    def look(place, inside, poll: tl.constexpr):
        """What is at `place` now, for `receive`; 0 outside."""
        return tl.load(place, inside, other=0, volatile=poll)

    @triton.jit
    def receive(packed, place, tag, inside, poll: tl.constexpr):
        """The values of `packed`; if `poll`, those at `place` as soon as they have the tag.

        Each thread waits for what it has loaded itself. A test by all threads together, with
        tl.max, could miss some: if there are fewer values than threads, several load the same one,
        and Triton's reductions use what one of them has loaded.
        """
        values = packed.to(tl.int32)
        if poll:
            values = tl.inline_asm_elementwise(
                """{
                .reg .pred other; .reg .b32 found; .reg .b64 both;
                mov.b64 {$0, found}, $1;
                AGAIN: setp.ne.b32 other, found, $3;
                @!other bra DONE;
                ld.volatile.global.b64 both, [$2];
                mov.b64 {$0, found}, both;
                bra AGAIN;
                DONE: }""",
                "=&r,l,l,r", [packed, place.to(tl.int64), tl.where(inside, tag, 0)],
                dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
        return values.to(tl.float32, bitcast=True)

    @triton.jit
    def everyone_has_received(poll: tl.constexpr):
        """Before any thread sends: what it causes to be replaced, another might still wait for."""
        if poll:
            tl.debug_barrier()

    @triton.jit
    def add_both(a, b, c, d):
        """For tl.reduce: two sums at once."""
        return a + c, b + d

    @triton.jit
    def moments(values, size: tl.constexpr, parts: tl.constexpr):
        """The sum of `parts` arrays [size], and that of the squares."""
        first, second = tl.zeros([size], tl.float32), tl.zeros([size], tl.float32)
        for i in tl.static_range(parts):
            first += values[i]
            second += values[i] * values[i]
        return tl.reduce((first, second), 0, add_both)
