# SPDX-License-Identifier: Apache-2.0
"""The fused operations, differentiable; the reference where a device has no kernels."""

from fastnas.ops.batch_norm_depthwise import batch_norm_depthwise
from fastnas.ops.depthwise_group import depthwise_group
from fastnas.ops.gate_gradient import gate_gradient
from fastnas.ops.mixed_batch_norm import mixed_batch_norm
from fastnas.ops.mixed_sum import mixed_sum
from fastnas.ops.multi_target_sum import multi_target_sum
from fastnas.ops.partial_channel_mix import partial_channel_mix
from fastnas.ops.partial_channel_node import partial_channel_node
from fastnas.ops.pool_pair import pool_pair
from fastnas.ops.relu_pointwise import relu_pointwise
from fastnas.ops.sample_paths import Paths, sample_paths
from fastnas.ops.separable_each import separable_each
from fastnas.ops.separable_group import separable_group
from fastnas.ops.sparse_connections import sparse_connections

__all__ = [
    "Paths",
    "batch_norm_depthwise",
    "depthwise_group",
    "gate_gradient",
    "mixed_batch_norm",
    "mixed_sum",
    "multi_target_sum",
    "partial_channel_mix",
    "partial_channel_node",
    "pool_pair",
    "relu_pointwise",
    "sample_paths",
    "separable_each",
    "separable_group",
    "sparse_connections",
]
