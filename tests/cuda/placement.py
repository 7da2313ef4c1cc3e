"""Where ONNX Runtime puts the nodes of each graph, on the CUDA provider: prints a JSON object, run over the
stand-ins.

python tests/cuda/placement.py BUNDLE...      # {path: {"CUDAExecutionProvider": {"Gemm": 14, ...}}, or path:
"why it does not load"}
"""

import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

import onnx
import onnxruntime as ort

CUDA = "CUDAExecutionProvider"


def placed(path: Path) -> dict[str, Counter[str]] | str:
    """Op types by provider; copies that ONNX Runtime puts between providers stand under "copies"."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        try:
            session = ort.InferenceSession(str(path), options, providers=[CUDA], enable_fallback=0)
        except Exception as error:  # ONNX Runtime's exceptions share no base of their own
            return str(error).splitlines()[0]
        nodes = onnx.load(options.optimized_model_filepath, load_external_data=False).graph.node
    found: dict[str, Counter[str]] = {}
    for part in session.get_provider_graph_assignment_info():
        found.setdefault(part.ep_name, Counter()).update(node.op_type for node in part.get_nodes())
    if copies := Counter(node.op_type for node in nodes if node.op_type.startswith("Memcpy")):
        found["copies"] = copies
    return found


print(
    json.dumps(
        {str(path): placed(path) for bundle in sys.argv[1:] for path in sorted(Path(bundle).glob("*.onnx"))}
    )
)
