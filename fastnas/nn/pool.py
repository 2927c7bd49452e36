# SPDX-License-Identifier: Apache-2.0
"""Average pooling with the right gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["AVERAGE_POOLS", "AvgPool2d"]


class AvgPool2d(nn.AvgPool2d):
    """``nn.AvgPool2d``, whose gradient on CUDA is right in channels_last, too.

    Releases of PyTorch compute another gradient there, without a word, as soon as there is padding
    (its issue 188344; seen with 2.11 on an H200: off by 87 % of the largest entry). Input and
    gradient are brought to the contiguous format then; the output comes in that of the input.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Pool ``x`` of shape ``(N, C, H, W)`` or ``(C, H, W)``."""
        if not (x.is_cuda and x.requires_grad and x.dim() == 4) or x.is_contiguous():
            return super().forward(x)
        y = super().forward(x.contiguous())
        # Channels may be innermost without being all there are, as a part of them is.
        return y.contiguous(memory_format=torch.channels_last) if x.stride(1) == 1 else y


AVERAGE_POOLS = (nn.AvgPool2d, AvgPool2d)
"""The classes that compute an average as these modules do; a subclass may do something else."""
