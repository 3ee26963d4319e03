"""The forward and the backward pass of GPT for training on a GPU, without autograd."""

import torch

from folio.gpt.fused import attention
from folio.gpt.fused.blocks import FusedBlocks
from folio.gpt.fused.embeddings import FusedEmbeddings
from folio.gpt.fused.head import FusedHead
from folio.gpt.model import GPT

_MAX_CHANNELS = 4096  # for more, a kernel of the layer norms has too little shared memory


def supports(model: torch.nn.Module) -> bool:
    """Whether FusedPasses can do what the model's loss does, on this GPU: NVIDIA's, from Ampere on,
    since Triton's matrix products are slow on older ones."""
    if type(model) is not GPT or not torch.version.cuda:
        return False
    p, weight = model.params, model.transformer.wte.weight
    is_new = torch.cuda.get_device_capability(weight.device) >= (8, 0)
    sizes = p.n_embd <= _MAX_CHANNELS and attention.supports(p.n_embd, p.n_head, weight.dtype)
    return is_new and sizes


class FusedPasses:
    """`loss_and_gradients` does what GPT.loss and its `backward` do, with fewer kernels.

    Each call overwrites `grad` of all parameters: tensors in the parameters' precision that are
    allocated once.
    """

    def __init__(self, model: GPT, fp8_head: bool = False):
        """model: on a GPU, in half precision. Its token embedding's memory is replaced.

        fp8_head: compute the head's products in fp8 (see fp8.py).
        """
        self.embeddings = FusedEmbeddings(model)
        self.blocks = FusedBlocks(model)
        self.head = FusedHead(model, fp8_head)
        device = model.transformer.wte.weight.device
        # It goes before the second streams of the blocks and the head, whose priority is 0: their
        # products fill the GPU, and nothing is waiting for them.
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    @torch.no_grad()
    def loss_and_gradients(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        scale: torch.Tensor | float = 1.0,
        soft: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss, without a gradient. Arguments as in GPT.loss; x and y are on the GPU."""
        if self._stream is None:
            return self._run(x, y, scale, soft)
        stream = torch.cuda.current_stream()
        self._stream.wait_stream(stream)
        with torch.cuda.stream(self._stream):
            loss = self._run(x, y, scale, soft)
        stream.wait_stream(self._stream)
        return loss

    def _run(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        scale: torch.Tensor | float,
        soft: torch.Tensor | None,
    ) -> torch.Tensor:
        hidden = self.blocks.forward(self.embeddings.forward(x))
        rows = hidden.view(-1, hidden.shape[-1])
        loss, d_rows = self.head(rows, y.reshape(-1), scale, soft)
        d_x = self.blocks.backward(d_rows.view_as(hidden))
        self.head.join()
        self.embeddings.backward(d_x, self.head.gradient)
        self.blocks.join()
        return loss
