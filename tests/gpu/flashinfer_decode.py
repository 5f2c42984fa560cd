"""FlashInfer's decode attention over full KV, as a yardstick for ours.

    flashinfer_decode.py [--shapes CONTEXT:BATCH,...] [--layouts NHD,HND] [--variants NAME,...]

Needs PyTorch and FlashInfer only; exit code 3 if they cannot be imported. A layer of
Llama-3.1-8B in bf16: 32 query heads, 8 KV heads of 128. K and V lie in pages of 16 tokens, which
every sequence has in random order. A CUDA graph attends over the KV of several layers one after the
other, more than L2 holds; a layer's time is the graph's by CUDA events, divided by their number.

One sequence of a replay is compared with a float32 reference. Prints one JSON object: the device,
versions, the device's copy rate (bytes read and written) and a row per shape, layout and variant.
`bytes` are those of K and V of a layer, each once. A variant that does not run here has `error`
instead of figures. Exit code 1 if a result is wrong, or none is there.
"""

import argparse
import functools
import json
import math
import statistics
import sys
from typing import NamedTuple

try:
    import flashinfer
    import torch
    from flashinfer.decode import xqa_batch_decode_with_kv_cache
except (ImportError, OSError) as reason:
    print(f"FlashInfer cannot be imported: {reason}", file=sys.stderr)
    sys.exit(3)

QUERY_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
PAGE = 16
DTYPE = torch.bfloat16
SCALE = 1 / math.sqrt(HEAD_DIM)
TOLERANCE = 2e-2  # of the largest absolute value of the reference
WORKSPACE_BYTES = 256 << 20
MOST_LAYERS = 32  # Llama-3.1-8B's
SHAPES = "32768:1,32768:16,131072:1,131072:4"


class Shape(NamedTuple):
    context: int
    batch: int

    @property
    def pages(self):
        """Of a sequence."""
        return self.context // PAGE

    @property
    def elements(self):
        """Of K, and of V, of a layer."""
        return self.batch * self.context * KV_HEADS * HEAD_DIM

    @property
    def bytes(self):
        return 2 * self.elements * DTYPE.itemsize


class Layer(NamedTuple):
    key: torch.Tensor
    value: torch.Tensor
    out: torch.Tensor


def device_int32(values):
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def indptr(shape):
    return device_int32([i * shape.pages for i in range(shape.batch + 1)])


def workspace():
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")


def prepare_wrapper(shape, layout, table, tensor_cores, backend):
    last_page = device_int32([PAGE] * shape.batch)
    attention = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace(), layout, use_cuda_graph=True, use_tensor_cores=tensor_cores,
        paged_kv_indptr_buffer=indptr(shape), paged_kv_indices_buffer=table.flatten().clone(),
        paged_kv_last_page_len_buffer=last_page.clone(), backend=backend)
    attention.plan(indptr(shape), table.flatten(), last_page, QUERY_HEADS, KV_HEADS, HEAD_DIM, PAGE,
                   q_data_type=DTYPE, kv_data_type=DTYPE)
    return lambda query, layer: attention.run(query, (layer.key, layer.value), out=layer.out)


def prepare_xqa(shape, layout, table):
    scratch, lengths = workspace(), device_int32([shape.context] * shape.batch)
    return lambda query, layer: xqa_batch_decode_with_kv_cache(
        query, (layer.key, layer.value), scratch, table, lengths, shape.context, bmm1_scale=SCALE,
        out=layer.out, kv_layout=layout)


def prepare_persistent(shape, layout, table):
    attention = flashinfer.BatchAttention(layout, "cuda")
    attention.plan(device_int32(range(shape.batch + 1)), indptr(shape), table.flatten(),
                   device_int32([shape.context] * shape.batch), QUERY_HEADS, KV_HEADS, HEAD_DIM,
                   HEAD_DIM, PAGE, q_data_type=DTYPE, kv_data_type=DTYPE)
    lse = torch.empty(shape.batch, QUERY_HEADS, dtype=torch.float32, device="cuda")
    return lambda query, layer: attention.run(query, (layer.key, layer.value), layer.out, lse)


# Each makes, for a shape, a layout and a page table, a function that enqueues a layer's attention.
VARIANTS = {
    "cuda-cores": functools.partial(prepare_wrapper, tensor_cores=False, backend="auto"),
    "tensor-cores-auto": functools.partial(prepare_wrapper, tensor_cores=True, backend="auto"),
    "tensor-cores-fa2": functools.partial(prepare_wrapper, tensor_cores=True, backend="fa2"),
    "xqa": prepare_xqa,
    "tensor-cores-fa3": functools.partial(prepare_wrapper, tensor_cores=True, backend="fa3"),
    "persistent": prepare_persistent,
}


def seconds(work, repeats):
    """Of each of `repeats` calls, by the device's events."""
    for _ in range(3):
        work()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in events:
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in events]


def copy_rate(memory):
    """Bytes read and written per second, at best."""
    half = memory.numel() // 2
    source, target = memory[:half], memory[half:2 * half]
    return 2 * half * memory.itemsize / min(seconds(lambda: target.copy_(source), 20))


def make_layers(shape, layout, memory):
    page = (PAGE, KV_HEADS) if layout == "NHD" else (KV_HEADS, PAGE)
    count = min(memory.numel() // (2 * shape.elements), MOST_LAYERS)
    parts = [part.view(-1, *page, HEAD_DIM)
             for part in memory[:count * 2 * shape.elements].split(shape.elements)]
    return [Layer(key, value, torch.zeros(shape.batch, QUERY_HEADS, HEAD_DIM, dtype=DTYPE,
                                          device="cuda"))
            for key, value in zip(parts[::2], parts[1::2])]


def reference(query, layer, pages, layout):
    """Attention of one sequence, whose heads `query` has and whose `pages` are given."""
    def tokens(cache):
        taken = cache[pages] if layout == "NHD" else cache[pages].transpose(1, 2)
        return taken.reshape(-1, KV_HEADS, HEAD_DIM).float()
    groups = query.float().view(KV_HEADS, -1, HEAD_DIM)
    weights = torch.einsum("hgd,thd->hgt", groups * SCALE, tokens(layer.key)).softmax(-1)
    return torch.einsum("hgt,thd->hgd", weights, tokens(layer.value)).view(QUERY_HEADS, HEAD_DIM)


def measure(shape, layout, variant, memory, repeats):
    """Figures of a row."""
    torch.manual_seed(shape.context + shape.batch)
    table = torch.randperm(shape.batch * shape.pages, device="cuda").int().view(shape.batch, -1)
    query = torch.randn(shape.batch, QUERY_HEADS, HEAD_DIM, device="cuda").to(DTYPE)
    layers = make_layers(shape, layout, memory)
    attend = VARIANTS[variant](shape, layout, table)
    attend(query, layers[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in layers:
            attend(query, layer)
    times = [time / len(layers) for time in seconds(graph.replay, repeats)]
    expected = reference(query[-1], layers[-1], table[-1].long(), layout)
    worst = ((layers[-1].out[-1].float() - expected).abs().max() / expected.abs().max()).item()
    median = statistics.median(times)
    return {"layers": len(layers), "median_us": round(median * 1e6, 2),
            "least_us": round(min(times) * 1e6, 2), "bytes": shape.bytes,
            "gb_per_s": round(shape.bytes / median / 1e9, 1), "relative_error": round(worst, 5),
            "right": worst <= TOLERANCE}


def measure_all(options, memory, rate):
    for variant in options.variants:  # the outer loop: after a fault nothing more runs
        for shape in options.shapes:
            for layout in options.layouts:
                row = {"context": shape.context, "batch": shape.batch, "layout": layout,
                       "variant": variant}
                try:
                    row |= measure(shape, layout, variant, memory, options.repeats)
                    row["of_copy_rate"] = round(row["gb_per_s"] * 1e9 / rate, 3)
                except Exception as error:  # what FlashInfer raises for what it lacks
                    row["error"] = f"{type(error).__name__}: {error}"[:400]
                print(json.dumps(row), file=sys.stderr)
                yield row


def shapes(text):
    parsed = [Shape(*map(int, shape.split(":"))) for shape in text.split(",")]
    if any(shape.context % PAGE for shape in parsed):
        raise argparse.ArgumentTypeError(f"a context is no multiple of {PAGE}")
    return parsed


def some_of(names):
    def parse(text):
        chosen = text.split(",")
        if not set(chosen) <= set(names):
            raise argparse.ArgumentTypeError(f"choose from {','.join(names)}")
        return chosen
    return parse


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", type=shapes, default=SHAPES, help="CONTEXT:BATCH,...")
    parser.add_argument("--layouts", type=some_of(["NHD", "HND"]), default="NHD,HND")
    parser.add_argument("--variants", type=some_of(VARIANTS), default=",".join(VARIANTS))
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--kv-gb", type=float, default=8, help="of all layers; at least of two")
    options = parser.parse_args()
    device = torch.cuda.get_device_properties(0)
    needed = max(2 * shape.bytes for shape in options.shapes)
    memory = torch.empty(max(int(options.kv_gb * 1e9), needed) // DTYPE.itemsize, dtype=DTYPE,
                         device="cuda")
    rate = copy_rate(memory.normal_())
    memory.normal_()  # no longer two equal halves
    rows = list(measure_all(options, memory, rate))
    print(json.dumps({
        "op": "flashinfer-decode", "device": device.name,
        "multiprocessors": device.multi_processor_count,
        "versions": {"flashinfer": flashinfer.__version__, "torch": torch.__version__,
                     "cuda": torch.version.cuda},
        "copy_gb_per_s": round(rate / 1e9, 1), "rows": rows}, indent=1))
    ran = [row for row in rows if "right" in row]
    return 0 if ran and all(row["right"] for row in ran) else 1


if __name__ == "__main__":
    sys.exit(main())
