"""How a Triton kernel takes over from the one before it, so that as little time as possible passes.

- Each kernel first loads its weights, and only then needs the results of the one before it. With
  "programmatic dependent launch" (CUDA programming guide, from compute capability 9.0), it starts
  when all programs of that kernel have started, so the weights of several kernels are on their way.
- For a small batch, a kernel does not wait for the end of the one before it, but for its results:
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
    def _value(packed):
        return packed.to(tl.int32).to(tl.float32, bitcast=True)

    @triton.jit
    def _other_tag(packed, tag):
        return ((packed >> 32).to(tl.int32) != tag).to(tl.int32)

    @triton.jit
    def _add_each(a, b, c, d, e, f):
        return a + d, b + e, c + f

    @triton.jit
    def _peek(place, stride, tag, parts: tl.constexpr, size: tl.constexpr):
        """The values in `parts` arrays [size] that are `stride` apart, whatever their tags; the
        number of tags that are not `tag`; the sum of the values, and of their squares."""
        values = ()
        missing = tl.zeros([size], tl.int32)
        first, second = tl.zeros([size], tl.float32), tl.zeros([size], tl.float32)
        for i in tl.static_range(parts):
            packed = tl.load(place + i * stride + tl.arange(0, size), volatile=True)
            value = _value(packed)
            missing += _other_tag(packed, tag)
            first += value
            second += value * value
            values += (value,)  # type: ignore
        missing, first, second = tl.reduce((missing, first, second), 0, _add_each)
        return values, missing, first, second

    @triton.jit
    def receive(place, stride, tag, parts: tl.constexpr, size: tl.constexpr):
        """The values in `parts` arrays [size] that are `stride` apart, as soon as all of them have
        the tag; their sum and the sum of their squares."""
        values, missing, first, second = _peek(place, stride, tag, parts, size)
        while missing > 0:
            values, missing, first, second = _peek(place, stride, tag, parts, size)
        return values, first, second

    @triton.jit
    def receive_one(place, tag):
        """Wait for a single value: many programs that repeat large loads would delay others."""
        while _other_tag(tl.load(place, volatile=True), tag) > 0:
            pass

    @triton.jit
    def receive_some(place, tag, inside):
        """The values in an array of places."""
        packed = tl.load(place, inside, other=0, volatile=True)
        while tl.max(tl.where(inside, _other_tag(packed, tag), 0), 0) > 0:
            packed = tl.load(place, inside, other=0, volatile=True)
        return _value(packed)
