"""What bounds the convolutional net on the CPU: the time of a step, of its layers alone, and of getting its memory.

Each kind of layer is a program of its own, forward and backward, at the shapes of the step. A product of matrices of as
many operations as the convolutions shows what the processor could do. XLA's CPU backend allocates the scratch memory of
a program at every call. glibc takes pieces of more than 32 MiB from the kernel each time, page by page, unless
``MALLOC_MMAP_THRESHOLD_`` and ``MALLOC_TRIM_THRESHOLD_`` say otherwise, so every other process has these set. Run it
with ``python benchmarks/layers.py``.
"""

import json
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import by_hand
import workloads
from timing import Report, ratio

STEP, CONVOLUTIONS, PRODUCT = "a step by hand", "its convolutions", "a product of as many operations"
KEEPING = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}


def convolve(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def pool(x):
    return nnx.max_pool(nnx.relu(x), (2, 2), strides=(2, 2))


def with_gradients(layer, *args):
    """Returns a function without arguments that computes a layer and its gradients with respect to ``args``."""
    cotangent = jax.random.normal(jax.random.key(1), jax.eval_shape(layer, *args).shape)

    def scalar(*args):
        return jnp.vdot(layer(*args), cotangent)

    compiled = jax.jit(jax.value_and_grad(scalar, tuple(range(len(args)))))
    return lambda: compiled(*args)


def calls_of(workload):
    """Returns functions that return arrays by name, the operations of the convolutions, and the scratch in bytes."""
    model, images = workload.make_model(), jnp.asarray(workload.batch["input"])
    state, step = by_hand.make_step(model, workload.loss_fn, workload.optimizer())
    compiled = jax.jit(step).lower(state, workload.batch).compile()
    first, second = (conv.kernel[...] for conv in (model.conv1, model.conv2))
    inner = pool(model.conv1(images))
    outputs = model.conv1(images), model.conv2(inner)
    # The images need no gradient.
    convolutions = [
        with_gradients(lambda kernel: convolve(images, kernel), first),
        with_gradients(convolve, inner, second),
    ]
    pools = [with_gradients(pool, x) for x in outputs]
    forward = [jax.jit(pool).lower(x).compile() for x in outputs]
    operations = 2 * 2 * images[..., 0].size * first.size + 3 * 2 * inner[..., 0].size * second.size
    matrix = jnp.ones((round((operations / 2) ** (1 / 3)),) * 2)
    product = jax.jit(jnp.matmul)
    calls = {
        STEP: lambda: compiled(state, workload.batch),
        CONVOLUTIONS: lambda: [layer() for layer in convolutions],
        "its pooling": lambda: [layer() for layer in pools],
        "  forward only": lambda: [layer(x) for layer, x in zip(forward, outputs, strict=True)],
        PRODUCT: lambda: product(matrix, matrix),
    }
    return calls, operations, compiled.memory_analysis().temp_size_in_bytes


def measure(workload, count):
    """Prints the seconds of each call, the median of ``count``, as JSON."""
    calls, operations, scratch = calls_of(workload)
    seconds = {}
    for name, call in calls.items():
        jax.block_until_ready(call())
        times = []
        for _ in range(count):
            start = time.perf_counter()
            jax.block_until_ready(call())
            times.append(time.perf_counter() - start)
        seconds[name] = float(np.median(times))
    print(json.dumps([seconds, operations, scratch]))


def in_a_process(settings, quick):
    command = [sys.executable, __file__, "--child", *(["--quick"] if quick else [])]
    printed = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **settings}
    ).stdout
    return json.loads(printed.splitlines()[-1])


def main():
    report = Report(
        __doc__, repeats=5, options={"--child": {"action": "store_true", "help": "measure in this process"}}
    )
    workload = workloads.images()
    if report.options.child:
        measure(workload, 2 if report.quick else 50)
        return
    turns = [[in_a_process(settings, report.quick) for settings in ({}, KEEPING)] for _ in range(report.repeats)]
    ((_, operations, scratch), _), *_ = turns
    rows = []
    for name in turns[0][0][0]:
        default, keeping = ([turn[index][0][name] for turn in turns] for index in range(2))
        steps = [[turn[index][0][STEP] for turn in turns] for index in range(2)]
        rows.append(
            {
                "what": name,
                "ms": float(np.median(default)) * 1e3,
                "x step": ratio(default, steps[0]),
                "ms, keeping memory": float(np.median(keeping)) * 1e3,
                "x step ": ratio(keeping, steps[1]),
                "keeping, x default": ratio(keeping, default),
                "Gflop/s": operations / float(np.median(keeping)) / 1e9 if name in (CONVOLUTIONS, PRODUCT) else "",
            }
        )
    about = f"{operations / 1e6:.0f} Mflop in convolutions, {scratch / 2**20:.0f} MiB of scratch"
    report.table(f"{workload.name}, batch {workload.batch_size}, {about}", rows)
    report.close()


if __name__ == "__main__":
    main()
