"""Run a bundle with ONNX Runtime; each token leaves as soon as it is sure.

Imports no torch, onnx or transformers.
"""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read by onnxruntime when it is imported, so before that

from ease_common.errors import BundleError, DeviceError, EaseError, RequestError
from ease_runtime.conversation import Conversation
from ease_runtime.engine.engine import Engine
from ease_runtime.generation import Completion, Timing, TokenEvent
from ease_runtime.llm import LLM
from ease_runtime.options import Options
from ease_runtime.policies import ExitPolicy, make_policy
from ease_runtime.policies.thresholds import Thresholds

__all__ = [
    "LLM",
    "BundleError",
    "Completion",
    "Conversation",
    "DeviceError",
    "EaseError",
    "Engine",
    "ExitPolicy",
    "Options",
    "RequestError",
    "Thresholds",
    "Timing",
    "TokenEvent",
    "make_policy",
]
