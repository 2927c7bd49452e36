# SPDX-License-Identifier: Apache-2.0
"""Arguments of every op of the library, by op: usual, unusual and empty ones."""

from __future__ import annotations

import ops_cases as cases
import torch

F32, BF16 = torch.float32, torch.bfloat16


def tensors(count, shape, device, dtypes=(F32,), layouts=("contiguous",)):
    return [
        cases.make(shape, dtypes[k % len(dtypes)], layouts[k % len(layouts)], device, seed=k)
        for k in range(count)
    ]


def norm_tail(channels, device, running=True):
    """kinds, eps, affine, gammas, betas (and running statistics): batch, plain, running, affine."""
    one = torch.ones(channels, device=device)
    tail = [[1, 0, 2, 1], [1e-5, 0.0, 1e-5, 1e-3], [0, 0, 0, 1], [2 * one], [one.clone()]]
    return [*tail, [one / 2], [3 * one]] if running else tail


def samples(device):
    """Arguments of every raw op, by name."""
    both = ("channels_last", "contiguous")
    size = (2, 3, 4, 5)
    w4, c3 = torch.randn(4, device=device), torch.rand(4, 3, device=device)
    for layouts in (("contiguous",), ("channels_last",), ("sliced_last", "expanded"), both):
        for dtypes in ((F32,), (BF16,), (BF16, F32)):
            xs = tensors(4, size, device, dtypes, layouts)
            grad = tensors(1, size, device, (torch.promote_types(dtypes[0], dtypes[-1]),), layouts)[
                0
            ]
            name = f"{'-'.join(layouts)}-{'-'.join(map(cases.ids, dtypes))}"
            yield name, "mixed_sum", (xs, w4)
            yield name, "mixed_sum_backward", (grad, xs, w4, [1, 0, 1, 1], True)
            yield name, "mixed_batch_norm", (xs, w4, *norm_tail(3, device), [])
            if torch.device(device).type == "cpu":  # the statistics of the first are known
                carriers = [c3, *[c3[:0]] * 3]
                arguments = (xs, w4, *norm_tail(3, device), carriers)
                yield f"{name}-carried", "mixed_batch_norm", arguments
            tail = norm_tail(3, device, running=False)
            yield (
                name,
                "mixed_batch_norm_backward",
                (grad, xs, w4, c3, c3 + 1, *tail, [1, 1, 0, 1], True),
            )
            if torch.device(device).type == "cpu":
                arguments = (grad, xs, w4, c3, c3 + 1, *tail, [2, 1, 0, 2], True)
                yield f"{name}-carried", "mixed_batch_norm_backward", arguments
            for h, w in ((4, 5), (8, 10)):
                dtype = F32 if h == 8 else dtypes[-1]  # wider than the candidates', or as they are
                rest = tensors(1, (2, 6, h, w), device, (dtype,), layouts[-1:])[0]
                wide = tensors(1, (2, 9, 4, 5), device, (grad.dtype,), layouts)[0]
                yield f"{name}-{h}", "partial_channel_mix", (rest, xs, w4, 3, *norm_tail(3, device))
                arguments = (wide, rest, [h, w], xs, w4, 3, c3, c3 + 1, *tail)
                yield (
                    f"{name}-{h}",
                    "partial_channel_mix_backward",
                    (*arguments, True, [1, 0, 1, 1], True),
                )
    yield from target_samples(device)
    nothing = [w4.new_empty(0)] * 4
    grad, tail = tensors(1, size, device)[0], norm_tail(3, device, running=False)
    yield "unsaved", "mixed_sum_backward", (grad, [], w4, [1, 0, 1, 1], False)
    tail[0], tail[2], tail[3], tail[4] = [0, 0, 2, 2], [0] * 4, [], []
    yield (
        "unsaved",
        "mixed_batch_norm_backward",
        (grad, nothing, w4, c3, c3 + 1, *tail, [1] * 4, False),
    )
    wide = tensors(1, (2, 9, 4, 5), device)[0]
    arguments = (wide, nothing[0], [4, 5], nothing, w4, 3, c3, c3 + 1, *tail)
    yield "unsaved", "partial_channel_mix_backward", (*arguments, True, [1] * 4, False)
    yield "unneeded", "partial_channel_mix_backward", (*arguments, False, [0] * 4, False)
    empty = tensors(4, (0, 3, 4, 5), device, layouts=both)
    yield "empty", "mixed_sum", (empty, w4)
    yield "empty", "mixed_batch_norm", (empty, w4, *norm_tail(3, device), [])
    logits, counts = torch.randn(3, 4, device=device), torch.tensor([4, 0, 2], device=device)
    yield "one", "sample_paths", (logits, None, 1, 2, False)
    yield "two", "sample_paths", (logits.bfloat16(), counts, -1, 2**40, True)
    grad = torch.randn(3, 2, device=device)
    first, second = (torch.tensor(i, device=device) for i in ([1, -1, 0], [2, -1, -1]))
    yield "one", "sample_paths_backward", (grad, logits, None, first, second - 3 * (second > 0))
    yield "two", "sample_paths_backward", (grad, logits.bfloat16(), counts, first, second)
    xs = tensors(3, size, device, (F32, BF16), both)
    yield "gates", "gate_gradient", (xs[0], xs[1:], w4, [1, 0, 0, 1])
    yield "nothing", "gate_gradient", (xs[0], [], w4.double(), [0] * 4)
    alpha, beta = torch.randn(9, 4, device=device), torch.zeros(3, device=device)
    for name, dtype, node in (("edge", F32, False), ("node", BF16, True)):
        cell = (alpha.to(dtype), beta, [2, 3, 4], 0.5, node)
        yield name, "sparse_connections", cell
        yield name, "sparse_connections_backward", (alpha.t().contiguous().t(), *cell, node)
    cell = (alpha[:0], beta[:0], [], 1.0, False)
    yield "empty", "sparse_connections", cell
    yield "empty", "sparse_connections_backward", (alpha[:0], *cell, False)
    yield from depthwise_samples(device)
    yield from node_samples(device)
    yield from pool_samples(device)
    yield from relu_samples(device)
    yield from norm_depthwise_samples(device)
    yield from separable_samples(device)
    yield from each_samples(device)
    yield from statistics_samples(device)


def target_samples(device):
    """Arguments of the two ops of multi_target_sum: without norms, with them, with little."""
    size, w = (2, 3, 4, 5), torch.randn(2, 4, device=device)
    w[:, 2], mean, var = 0, torch.rand(4, 3, device=device), torch.rand(4, 3, device=device) + 1
    plain = [[0] * 4, [0.0] * 4, [0] * 4, [], []]
    both = ("channels_last", "contiguous")
    for layouts in (("contiguous",), ("channels_last",), ("sliced_last", "expanded"), both):
        for dtypes in ((F32,), (BF16,), (BF16, F32)):
            xs = tensors(4, size, device, dtypes, layouts)
            wide = torch.promote_types(dtypes[0], dtypes[-1])
            grads = tensors(2, size, device, (wide,), layouts)
            name = f"{'-'.join(layouts)}-{'-'.join(map(cases.ids, dtypes))}"
            yield name, "multi_target_sum", (xs, w, *plain, [], [])
            yield name, "multi_target_sum", (xs, w, *norm_tail(3, device))
            first = (grads, xs, w, w[0, :0], w[0, :0], *plain)
            yield name, "multi_target_sum_backward", (*first, [1, 0, 1, 1], True)
            first = (grads, xs, w, mean, var, *norm_tail(3, device, running=False))
            yield name, "multi_target_sum_backward", (*first, [1, 1, 0, 1], True)
    nothing = [w.new_empty(0)] * 4
    first = (grads, nothing, w, w[0, :0], w[0, :0], *plain)
    yield "unsaved", "multi_target_sum_backward", (*first, [1, 0, 1, 1], False)
    empty = tensors(4, (0, 3, 4, 5), device, layouts=both)
    yield "empty", "multi_target_sum", (empty, w, *plain, [], [])
    yield "empty", "multi_target_sum", (empty, w, *norm_tail(3, device))
    first = (empty[:2], empty, w, w[0, :0], w[0, :0], *plain)
    yield "empty", "multi_target_sum_backward", (*first, [1] * 4, True)


def depthwise_samples(device):
    """Arguments of the two ops of depthwise_group."""
    kernels = [cases.make((3, 1, k, k), F32, device=device, seed=k) for k in (3, 5, 1)]
    for layout in ("contiguous", "channels_last", "sliced_last", "expanded"):
        for dtype in (F32, BF16):
            for stride, (h, w) in ((1, (4, 5)), (2, (7, 10))):
                x = tensors(1, (2, 3, h, w), device, (dtype,), (layout,))[0]
                grads = tensors(2, (2, 3, 4, 5), device, (dtype,), (layout,))
                name = f"{layout}-{cases.ids(dtype)}-{stride}"
                yield name, "depthwise_group", (x, kernels, [1, 2, 3], stride, stride == 1)
                tail = ([h, w], kernels, [1, 2, 3], stride)
                arguments = (grads, [1, 0, 1], x, *tail, True, True, [1, 1, 0])
                yield name, "depthwise_group_backward", arguments
                arguments = (grads, [1, 0, 1], x.new_empty(0), *tail, False, True, [0, 0, 0])
                yield f"unsaved-{name}", "depthwise_group_backward", arguments
                arguments = (grads, [1, 0, 1], x, *tail, True, False, [0, 0, 1])
                yield f"weights-{name}", "depthwise_group_backward", arguments
    empty = tensors(1, (0, 3, 4, 5), device)[0]
    yield "empty", "depthwise_group", (empty, kernels[:1], [1], 1, True)
    arguments = ([empty], [1], empty, [4, 5], kernels[:1], [1], 1, True, True, [1])
    yield "empty", "depthwise_group_backward", arguments


def node_samples(device):
    """Arguments of the two ops of partial_channel_node: both gradients, either, without rests."""
    w3 = torch.randn(3, device=device)
    for layout in ("contiguous", "channels_last", "sliced_last", "expanded"):
        for dtype in (F32, BF16):
            (mixed,) = tensors(1, (2, 3, 4, 5), device, (dtype,), (layout,))
            rests = tensors(3, (2, 6, 4, 5), device, (dtype, F32), (layout, "contiguous"))
            (grad,) = tensors(1, (2, 6, 4, 5), device, (dtype,), (layout,))
            name, backward = f"{layout}-{cases.ids(dtype)}", "partial_channel_node_backward"
            yield name, "partial_channel_node", (mixed, rests, w3, 3)
            yield name, backward, (mixed, grad, rests, w3, 3, True, [1, 0, 1], True)
            yield f"mixed-{name}", backward, (mixed, None, rests, w3, 3, False, [1, 1, 1], True)
            yield f"unsaved-{name}", backward, (None, grad, [], w3, 3, True, [0, 1, 0], False)
    mixed, rest = (tensors(1, (0, c, 4, 5), device)[0] for c in (3, 6))
    yield "empty", "partial_channel_node", (mixed, [rest] * 3, w3, 3)
    arguments = (mixed, rest, [rest] * 3, w3, 3, True, [1, 1, 1], True)
    yield "empty", "partial_channel_node_backward", arguments


def pool_samples(device):
    """Arguments of the two ops of pool_pair: both gradients, either, without x."""
    for layout in ("contiguous", "channels_last", "sliced_last", "expanded"):
        for dtype in (F32, BF16):
            for stride, (h, w) in ((1, (4, 5)), (2, (7, 10))):
                x = tensors(1, (2, 3, h, w), device, (dtype,), (layout,))[0]
                a, b = tensors(2, (2, 3, 4, 5), device, (dtype,), (layout,))
                name, tail = f"{layout}-{cases.ids(dtype)}-{stride}", ([h, w], stride)
                yield name, "pool_pair", (x, stride, False)
                if torch.device(device).type == "cpu" and dtype == F32:
                    yield f"{name}-carried", "pool_pair", (x, stride, True)
                yield name, "pool_pair_backward", (a, b, x, *tail)
                numbers = cases.make((4, 3), F32, device=device)
                carried = ([a, b], [numbers, numbers[:0]], [b], [numbers], a, b, x, stride)
                if torch.device(device).type == "cpu":
                    yield name, "pool_pair_carried_backward", carried
                yield f"max-{name}", "pool_pair_backward", (a, None, x, *tail)
                yield f"unsaved-{name}", "pool_pair_backward", (None, b, x.new_empty(0), *tail)
    empty = tensors(1, (0, 3, 4, 5), device)[0]
    if torch.device(device).type == "cpu":
        carried = ([empty], [numbers], [], [], empty, empty, empty, 1)
        yield "empty", "pool_pair_carried_backward", carried
    yield "empty", "pool_pair", (empty, 1, False)
    yield "empty", "pool_pair_backward", (empty, empty, empty, [4, 5], 1)


def relu_samples(device):
    """Arguments of the two ops of relu_pointwise: all gradients, either, none."""
    weight = cases.make((5, 3, 1, 1), F32, device=device)
    for layout in ("contiguous", "channels_last", "sliced_last", "expanded"):
        for dtype in (F32, BF16):
            x = tensors(1, (2, 3, 4, 5), device, (dtype,), (layout,))[0]
            g = tensors(1, (2, 5, 4, 5), device, (dtype,), (layout,))[0]
            yield f"{layout}-{cases.ids(dtype)}", "relu_pointwise", (x, weight)
            for needs in ((True, True), (True, False), (False, True), (False, False)):
                name = f"{layout}-{cases.ids(dtype)}-{needs}"
                yield name, "relu_pointwise_backward", (g, x, weight, *needs)
    empty, g = (tensors(1, (0, c, 4, 5), device)[0] for c in (3, 5))
    yield "empty", "relu_pointwise", (empty, weight)
    yield "empty", "relu_pointwise_backward", (g, empty, weight, True, True)


def norm_depthwise_samples(device):
    """Arguments of the two ops of batch_norm_depthwise."""
    kernels = [cases.make((3, 1, k, k), F32, device=device, seed=k) for k in (3, 5)]
    mean, var = torch.randn(3, device=device), torch.rand(3, device=device) + 0.5
    for layout in ("contiguous", "channels_last", "sliced_last"):
        for dtype in (F32, BF16):
            for kind, stride in ((1, 1), (2, 2)):
                x = tensors(1, (2, 3, 6, 8), device, (dtype,), (layout,))[0]
                affine = (None, None) if kind == 1 else (var, mean)
                running = (None, None) if kind == 1 else (mean, var)
                name = f"{layout}-{cases.ids(dtype)}-{kind}"
                tail = (kernels, [1, 2], stride)
                yield name, "batch_norm_depthwise", (x, kind, 0.1, *affine, *running, *tail)
                shape = (2, 3, 6 // stride, 8 // stride)
                grads = tensors(1, shape, device, (dtype,), (layout,))
                first = (grads, [0, 1], x, mean, var, kind, 0.1, *affine, *tail)
                yield name, "batch_norm_depthwise_backward", (*first, True, True, [0, 1])
                yield name, "batch_norm_depthwise_backward", (*first, False, False, [1, 1])
    empty = tensors(1, (0, 3, 4, 5), device)[0]
    arguments = (empty, 1, 0.1, var, mean, None, None, kernels[:1], [1], 1)
    yield "empty", "batch_norm_depthwise", arguments
    arguments = ([empty], [1], empty, mean, var, 1, 0.1, var, mean, kernels[:1], [1], 1)
    yield "empty", "batch_norm_depthwise_backward", (*arguments, True, True, [1])


def separable_samples(device):
    """Arguments of the two ops of separable_group, with channels that are fused and others."""
    for channels in (4, 3):
        kernels = [cases.make((channels, 1, k, k), F32, device=device, seed=k) for k in (3, 5)]
        square = (channels, channels, 1, 1)
        matrices = [cases.make(square, F32, device=device, seed=k) for k in (3, 5)]
        mean, var = torch.randn(channels, device=device), torch.rand(channels, device=device) + 0.5
        for layout in ("contiguous", "channels_last", "sliced_last"):
            for dtype in (F32, BF16):
                for kind, stride in ((0, 1), (1, 1), (2, 2)):
                    x = tensors(1, (2, channels, 6, 8), device, (dtype,), (layout,))[0]
                    affine = (None, None) if kind < 2 else (var, mean)
                    running = (None, None) if kind < 2 else (mean, var)
                    used = (mean, var) if kind else (mean[:0], var[:0])
                    name = f"{layout}-{cases.ids(dtype)}-{kind}-{channels}"
                    tail = (kernels, matrices, [1, 2], stride)
                    forward = (x, kind, 0.1, *affine, *running, *tail)
                    yield name, "separable_group", (*forward, None, False)
                    shape = (2, channels, 6 // stride, 8 // stride)
                    grads = tensors(1, shape, device, (dtype,), (layout,))
                    first = (grads, [0, 1], x, *used, kind, 0.1, *affine, *tail)
                    needs = (True, True, [0, 1], [0, 1], [], [])
                    yield name, "separable_group_backward", (*first, *needs)
                    needs = (False, False, [0, 1], [0, 0], [], [])
                    yield name, "separable_group_backward", (*first, *needs)
                    if (
                        torch.device(device).type == "cpu"
                    ):  # its output's gradient and its own in numbers
                        numbers = cases.make((4, channels), F32, seed=1)
                        forward = (*forward, numbers.abs(), dtype == F32)
                        yield f"{name}-carried", "separable_group", forward
                        needs = (2, True, [0, 1], [0, 1], grads, [numbers])
                        yield f"{name}-carried", "separable_group_backward", (*first, *needs)
        empty = tensors(1, (0, channels, 4, 5), device)[0]
        tail = (kernels[:1], matrices[:1], [1], 1)
        yield "empty", "separable_group", (empty, 1, 0.1, var, mean, None, None, *tail, None, False)
        first = ([empty], [1], empty, mean, var, 1, 0.1, var, mean, *tail)
        yield "empty", "separable_group_backward", (*first, True, True, [1], [1], [], [])


def each_samples(device):
    """Arguments of the two ops of separable_each: norms of every kind, in the batch and apart."""
    shape = (2, 4, 6, 8)
    kernels = [cases.make((4, 1, k, k), F32, device=device, seed=k) for k in (3, 5, 1)]
    matrices = [cases.make((4, 4, 1, 1), F32, device=device, seed=k) for k in (3, 5, 1)]
    mean, var = torch.randn(3, 4, device=device), torch.rand(3, 4, device=device) + 0.5
    norms = [1, 2, 1], [0.1, 0.0, 1e-5], [0, 1, 1], [*var[:2]], [*mean[:2]]
    for layouts in (("contiguous",), ("channels_last",), ("contiguous", "sliced_last")):
        for dtypes in ((F32,), (BF16,), (BF16, F32)):
            name = f"{'-'.join(layouts)}-{'-'.join(map(cases.ids, dtypes))}"
            xs = tensors(3, shape, device, dtypes, layouts)
            for stride, dilations in ((1, [1, 2, 3]), (2, [1, 2, 1])):
                tail = (kernels, matrices, dilations, stride)
                forward = (xs, *norms, [mean[2]], [var[2]], *tail)
                yield f"{name}-{stride}", "separable_each", (*forward, [], False)
                grads = tensors(3, (2, 4, 6 // stride, 8 // stride), device, dtypes, layouts)
                first = (grads, xs, mean, var, *norms, *tail)
                for needs in (([1, 0, 1], [0, 0, 1], [1, 1, 0], [0, 1, 1]), *[([0] * 3,) * 4]):
                    yield f"{name}-{stride}", "separable_each_backward", (*first, *needs, [], [])
                if torch.device(device).type == "cpu":
                    numbers = cases.make((4, 4), F32, seed=1)
                    carriers = [numbers.abs(), numbers[:0], numbers.abs()]
                    forward = (*forward, carriers, dtypes == (F32,))
                    yield f"{name}-{stride}-carried", "separable_each", forward
                    needs = ([2, 1, 0], *[[1, 0, 1]] * 3, grads, [numbers, numbers[:0], numbers])
                    yield f"{name}-{stride}-carried", "separable_each_backward", (*first, *needs)
    empty = tensors(3, (0, 4, 4, 5), device)
    tail = (kernels, matrices, [1, 1, 1], 1)
    yield "empty", "separable_each", (empty, *norms, [mean[2]], [var[2]], *tail, [], False)
    first = (empty, empty, mean, var, *norms, *tail)
    yield "empty", "separable_each_backward", (*first, *[[1] * 3] * 4, [], [])


def statistics_samples(device):
    """Arguments of update_running_statistics: norms with and without counters, an empty batch."""
    for name, dtype, momentum in (("float32", F32, 0.1), ("float64", torch.float64, 0.7)):
        mean, var = (torch.rand(4, 3, dtype=dtype, device=device) for _ in range(2))
        means = [
            torch.zeros(3, dtype=dtype, device=device),
            torch.zeros(6, dtype=dtype, device=device)[::2],
        ]
        variances = [torch.ones(3, dtype=dtype, device=device) for _ in range(2)]
        counters = [torch.tensor(4, device=device)]
        tail = (counters, mean, var, [3, 1], [momentum, 0.2])
        yield name, "update_running_statistics", (means, variances, *tail, 60)
    yield "uncounted", "update_running_statistics", (means, variances, [], *tail[1:], 2)
    yield "empty", "update_running_statistics", (means, variances, *tail, 0)
