"""Products with weights of different forms: microseconds by the number of rows, and whether rows keep their
bits.

    python experiments/weight_forms.py     # -> docs/experiments/weight-forms.json

On one thread, all forms of a shape in turns.
"""

import json
import platform
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

from ease_common.files import write_whole

OUT = Path("docs/experiments/weight-forms.json")
SHAPES = ((576, 960), (576, 3072), (1536, 576), (2048, 8192))  # inputs, outputs: SmolLM2's, and one of 1B's
ROWS = (1, 2, 4, 8, 64, 256)
TURNS = {8: 60, 64: 12, 256: 5}  # by the largest number of rows
RNG = np.random.default_rng(0)


def product(shape: tuple[int, int], form: str) -> onnx.ModelProto:
    """A product, by its form: "fp32", or bits, block, and "zeros" or "sums" where it has these."""
    width, outputs = shape
    arrays: dict[str, Any]
    if form == "fp32":
        arrays = {"w": RNG.normal(size=shape).astype(np.float32)}
        nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    else:
        bits, block, *more = form.split()
        blocks = -(-width // int(block))
        size = int(block) * int(bits) // 8
        arrays = {
            "w": RNG.integers(0, 256, (outputs, blocks, size)).astype(np.uint8),
            "s": RNG.random((outputs, blocks), np.float32),
        }
        if "zeros" in more:
            arrays["z"] = RNG.integers(0, 256, (outputs, -(-blocks * int(bits) // 8))).astype(np.uint8)
        attributes: dict[str, Any] = {"bits": int(bits), "block_size": int(block), "accuracy_level": 4}
        attributes |= {"K": width, "N": outputs}
        given = ["x", *arrays]
        name = "products" if "sums" in more else "y"
        nodes = [helper.make_node("MatMulNBits", given, [name], domain="com.microsoft", **attributes)]
        if "sums" in more:
            arrays |= {"shape": np.array([0, -1, int(block)]), "axis": np.array([-1])}
            arrays["offsets"] = RNG.random((blocks, outputs), np.float32)
            nodes += [
                helper.make_node("Reshape", ["x", "shape"], ["blocks"]),
                helper.make_node("ReduceSum", ["blocks", "axis"], ["sums"], keepdims=0),
                helper.make_node("MatMul", ["sums", "offsets"], ["of_offsets"]),
                helper.make_node("Add", ["products", "of_offsets"], ["y"]),
            ]
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", width])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    weights = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "product", [x], [y], weights)
    imports = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=11)


FORMS = (
    *("fp32", "4 32 zeros", "4 32", "4 64", "4 128", "4 128 zeros", "4 32 sums", "4 16"),
    *("8 32 zeros", "8 32", "8 64", "8 128", "8 16"),
)


def timed(sessions: dict[str, ort.InferenceSession], x: Any) -> dict[str, float]:
    """Microseconds of each, the 20th percentile of some turns, one after the other."""
    took: dict[str, list[float]] = {form: [] for form in sessions}
    for _ in range(next(turns for rows, turns in TURNS.items() if len(x) <= rows)):
        for form, session in sessions.items():
            session.run(None, {"x": x})
            began = time.perf_counter()
            session.run(None, {"x": x})
            took[form].append(time.perf_counter() - began)
    return {form: round(float(np.percentile(seconds, 20)) * 1e6, 1) for form, seconds in took.items()}


def inexact(session: ort.InferenceSession, width: int) -> list[int]:
    """Numbers of rows at which some row has other bits than among sixteen."""
    x = RNG.normal(size=(16, width)).astype(np.float32)
    whole = session.run(None, {"x": x})[0]
    return [n for n in range(1, 9) if not np.array_equal(session.run(None, {"x": x[:n]})[0], whole[:n])]


@click.command()
def main() -> None:
    """Every form at every shape."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    rows = []
    for shape in SHAPES:
        sessions = {
            form: ort.InferenceSession(product(shape, form).SerializeToString(), options) for form in FORMS
        }
        times = {
            count: timed(sessions, RNG.normal(size=(count, shape[0])).astype(np.float32)) for count in ROWS
        }
        for form, session in sessions.items():
            found = {str(count): times[count][form] for count in ROWS}
            ours = {"shape": list(shape), "form": form, "microseconds": found}
            rows.append({**ours, "other_bits_at": inexact(session, shape[0])})
    cpu = next(line for line in open("/proc/cpuinfo") if line.startswith("model name"))  # noqa: SIM115
    place = {
        "cpu": cpu.split(":")[1].strip(),
        "onnxruntime": ort.__version__,
        "python": platform.python_version(),
    }
    write_whole(OUT, json.dumps({**place, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
