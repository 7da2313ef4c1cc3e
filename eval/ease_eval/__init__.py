"""ease_eval: what early exits cost in perplexity and save in time, measured through the runtime's
own engine.
"""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read by onnxruntime when it is imported, so before that
