# SPDX-License-Identifier: Apache-2.0
"""Runs the ops in a process of its own, where instruction set and threads are set from outside.

python ops_worker.py results FILE   what every mixing op gives on all shapes, saved with torch
python ops_worker.py threads        prints as JSON how busy each thread was, for each op
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import ops_cases as cases
import torch

from fastnas import ops
from fastnas._extension import cpu_instruction_set
from fastnas.ops.mixed_batch_norm import mix_apart
from fastnas.ops.separable_group import run_separable_group


def mixing_calls(count, shape, dtype, layout):
    """Every op that has vectorised kernels: its output and what to differentiate it by."""
    xs, weights = cases.make_inputs(count, shape, dtype, layout)
    n, c, h, w = shape
    norms = cases.make_norms(count, c)
    affine = cases.affine_parameters(norms)
    yield "mixed_sum", ops.mixed_sum(xs, weights), [weights, *xs]
    yield "mixed_batch_norm", ops.mixed_batch_norm(xs, weights, norms), [weights, *xs, *affine]
    flipped = weights.flip(0)  # seven targets: a whole group of them and a part of one
    rows = [weights, flipped, 2 * weights, weights - flipped, -weights, weights / 2, flipped / 4]
    rows = torch.stack(rows).detach().requires_grad_()
    for name, norms in (("plain", None), ("normed", cases.make_norms(count, c))):
        ys = ops.multi_target_sum(xs, rows, norms)
        affine = cases.affine_parameters(norms or [])
        yield f"multi_target_sum/{name}", torch.stack(ys), [rows, *xs, *affine]
    for scale in (1, 2):
        x = cases.make((n, 3 * c, scale * h, scale * w), dtype, layout, seed=5).requires_grad_()
        norms = cases.make_norms(count, c)
        affine = cases.affine_parameters(norms)
        y = ops.partial_channel_mix(x, xs, weights, 3, norms)
        yield f"partial_channel_mix/{scale}", y, [x, weights, *xs, *affine]
    for k in (2, 3):
        rests = [
            cases.make((n, (k - 1) * c, h, w), dtype, layout, seed=80 + i).requires_grad_()
            for i in range(count)
        ]
        parts = ops.partial_channel_node(xs[0], rests, weights, k)
        yield f"partial_channel_node/{k}", torch.cat(parts[::-1], 1), [xs[0], weights, *rests]
    with torch.no_grad():
        yield "gate_gradient", ops.gate_gradient(xs[0], xs, weights), []
    kernels = [cases.make((c, 1, k, k), dtype, seed=60 + k).requires_grad_() for k in (3, 5, 5)]
    for stride in (1, 2):
        ys = ops.depthwise_group(xs[0], kernels, [1, 1, 2], stride)
        yield f"depthwise_group/{stride}", torch.stack(ys), [xs[0], *kernels]
    for stride in (1, 2):
        yield f"pool_pair/{stride}", torch.stack(ops.pool_pair(xs[0], stride)), xs[:1]
    if n * h * w > 1 or n * h * w == 0:
        norm = cases.make_norms(3, c)[2]
        (y,) = ops.batch_norm_depthwise(xs[0], norm, kernels[:1], [1])
        yield "batch_norm_depthwise", y, [xs[0], kernels[0], *norm.parameters()]
    matrices = [cases.make((c, c, 1, 1), dtype, seed=70 + k).requires_grad_() for k in range(3)]
    wide = cases.make((c + 3, c, 1, 1), dtype, seed=80).requires_grad_()
    yield "relu_pointwise", ops.relu_pointwise(xs[0], wide), [xs[0], wide]
    for stride in (1, 2):
        ys = ops.separable_group(xs[0], kernels, matrices, [1, 1, 2], stride)
        yield f"separable_group/{stride}", torch.stack(ys), [xs[0], *kernels, *matrices]
    if n * h * w > 1 or n * h * w == 0:
        ys, carriers = run_separable_group(xs[0], kernels, matrices, [1, 1, 2], carry=True)
        carriers = dict(enumerate(carriers))  # none in half precision
        y = mix_apart(ys, ys[0].new_tensor([0.5, -1.0, 2.0]), cases.make_norms(3, c), carriers)
        yield "carried", y, xs[:1]  # those of the weights vanish before a norm of one channel


def results():
    """Outputs and gradients on all shapes, by name; the rounding of every half-precision number."""
    found = {}
    for count, shape in cases.SHAPES:
        for dtype in cases.DTYPES:
            for layout in cases.LAYOUTS:
                case = f"{cases.ids((count, shape))}-{cases.ids(dtype)}-{layout}"
                for name, y, leaves in mixing_calls(count, shape, dtype, layout):
                    grads = torch.autograd.grad(y, leaves, cases.like_output(y)) if leaves else ()
                    found[f"{name}-{case}"] = [y.detach(), *grads]
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        for weight in (1.0, 0.3, 1.5, 1.0 + 2.0**-12, 2.0**-11):
            found[f"rounding-{cases.ids(dtype)}-{weight}"] = [
                ops.mixed_sum([bits.view(dtype)], [weight])
            ]
    return found


def run_times():
    """Seconds that each thread of this process has run."""
    return {
        int(task.name): int((task / "schedstat").read_text().split()[0]) / 1e9
        for task in Path("/proc/self/task").iterdir()
    }


def busy_threads(function, seconds=0.05):
    """Share of the work of each thread, largest first, while ``function`` runs again and again."""
    function()  # starts the threads
    before = run_times()
    total = 0.0
    while total < seconds:
        function()
        spent = [t - before.get(task, 0.0) for task, t in run_times().items()]
        total = sum(spent)
    return sorted((t / total for t in spent), reverse=True)


def large_calls(layout):
    """Each op that has work for several threads, forward and backward."""
    xs, weights = cases.make_inputs(2, (32, 16, 32, 32), torch.float32, layout)
    x = cases.make((32, 64, 32, 32), torch.float32, layout)
    rest, wide = x[:, 16:], torch.ones_like(x)
    norms = [torch.nn.BatchNorm2d(16, affine=False) for _ in xs]
    grad, table = torch.ones_like(xs[0]), torch.ones(2, 16)
    norm = (table, table, [1, 1], [1e-5, 1e-5], [0, 0], [], [])
    rows = torch.stack([weights, weights.flip(0)])
    raw, need = torch.ops.fastnas, ([1, 1], True)
    backward = raw.partial_channel_mix_backward
    kernels = [torch.ones(16, 1, k, k) for k in (3, 5)]
    matrices = [torch.ones(16, 16, 1, 1) for _ in kernels]
    return {
        "mixed_sum": lambda: ops.mixed_sum(xs, weights),
        "mixed_sum_backward": lambda: raw.mixed_sum_backward(grad, xs, weights, *need),
        "mixed_batch_norm": lambda: ops.mixed_batch_norm(xs, weights, norms),
        "mixed_batch_norm_backward": lambda: raw.mixed_batch_norm_backward(
            grad, xs, weights, *norm, *need
        ),
        "multi_target_sum": lambda: ops.multi_target_sum(xs, rows, norms),
        "multi_target_sum_backward": lambda: raw.multi_target_sum_backward(
            [grad, grad], xs, rows, *norm, *need
        ),
        "partial_channel_mix": lambda: ops.partial_channel_mix(x, xs, weights, 4),
        "partial_channel_mix_backward": lambda: backward(
            wide, rest, [32, 32], xs, weights, 4, *norm, True, *need
        ),
        "partial_channel_node": lambda: ops.partial_channel_node(xs[0], [rest, rest], weights, 4),
        "partial_channel_node_backward": lambda: raw.partial_channel_node_backward(
            grad, wide[:, 16:], [rest, rest], weights, 4, True, *need
        ),
        "gate_gradient": lambda: ops.gate_gradient(grad, xs, weights),
        "depthwise_group": lambda: ops.depthwise_group(xs[0], kernels, [1, 2]),
        "depthwise_group_backward": lambda: raw.depthwise_group_backward(
            [grad, grad], [1, 1], xs[0], [32, 32], kernels, [1, 2], 1, True, True, [1, 1]
        ),
        "pool_pair": lambda: ops.pool_pair(xs[0]),
        "relu_pointwise": lambda: ops.relu_pointwise(xs[0], matrices[0]),
        "relu_pointwise_backward": lambda: raw.relu_pointwise_backward(
            grad, xs[0], matrices[0], True, True
        ),
        "pool_pair_backward": lambda: raw.pool_pair_backward(grad, grad, xs[0], [32, 32], 1),
        "batch_norm_depthwise": lambda: ops.batch_norm_depthwise(xs[0], norms[0], kernels, [1, 2]),
        "batch_norm_depthwise_backward": lambda: raw.batch_norm_depthwise_backward(
            [grad, grad],
            [1, 1],
            xs[0],
            table[0],
            table[0],
            1,
            1e-5,
            None,
            None,
            kernels,
            [1, 2],
            1,
            True,
            False,
            [1, 1],
        ),
        "separable_group": lambda: ops.separable_group(xs[0], kernels, matrices, [1, 2]),
        "separable_group_backward": lambda: raw.separable_group_backward(
            [grad, grad],
            [1, 1],
            xs[0],
            table[0, :0],
            table[0, :0],
            0,
            0.0,
            None,
            None,
            kernels,
            matrices,
            [1, 2],
            1,
            True,
            False,
            [1, 1],
            [1, 1],
            [],
            [],
        ),
    }


def threads():
    """Shares with two threads, and with one."""
    report = {}
    for layout in cases.LAYOUTS:
        for name, function in large_calls(layout).items():
            shares = {}
            for number in (2, 1):
                torch.set_num_threads(number)
                with torch.no_grad():
                    shares[number] = busy_threads(function)
            report[f"{name}-{layout}"] = shares
    return report


def main():
    if sys.argv[1] == "results":
        torch.set_num_threads(1)
        torch.save({"isa": cpu_instruction_set(), "results": results()}, sys.argv[2])
    else:
        print(json.dumps(threads()))


if __name__ == "__main__":
    main()
