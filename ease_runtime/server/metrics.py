"""What a server counts, for Prometheus."""

from collections.abc import Iterable

from ease_runtime.ort.stack import Stack

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """One server's figures, in a registry of their own."""

    def __init__(self, stack: Stack, num_slots: int) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "ease_requests", "Requests by how they ended.", ["endpoint", "outcome"], registry=registry
        )
        self.prompt_tokens = Counter("ease_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.shared_tokens = Counter(
            "ease_shared_prompt_tokens",
            "Tokens of prompts that did not run, since another text began with them.",
            registry=registry,
        )
        self.generated_tokens = Counter("ease_generated_tokens", "Tokens generated.", registry=registry)
        self.drafted = Counter(
            "ease_drafted_tokens",
            "Drafts that full depth has judged (verify).",
            ["drafter"],
            registry=registry,
        )
        self.accepted = Counter(
            "ease_accepted_tokens",
            "Drafts that full depth agreed with (verify).",
            ["drafter"],
            registry=registry,
        )
        self.queue = Gauge("ease_queue_length", "Completions that wait for a slot.", registry=registry)
        self.running = Gauge("ease_running", "Completions that have a slot.", registry=registry)
        Gauge("ease_slots", "Completions that can run together.", registry=registry).set(num_slots)
        Gauge(
            "ease_verify_exact",
            "1 when verify gives the tokens of full depth to the bit here, 0 when up to rounding.",
            registry=registry,
        ).set(stack.exact)
        Gauge("ease_captured_graphs", "Passes that are CUDA graphs by now.", registry=registry).set_function(
            lambda: stack.captured().num_graphs
        )
        Gauge("ease_captured_bytes", "What these took of the GPU's memory.", registry=registry).set_function(
            lambda: stack.captured().num_bytes
        )
        self.passes = Counter("ease_passes", "Graph passes.", registry=registry)
        self.rows = Counter(
            "ease_pass_rows",
            "Completions in all passes; over ease_passes_total it is the mean batch.",
            registry=registry,
        )
        self.mean_batch = Gauge(
            "ease_mean_batch", "Completions in a pass, in the mean since the start.", registry=registry
        )
        self.depth = Histogram(
            "ease_token_depth_layers",
            "Layers that tokens used.",
            buckets=stack.exit_layers,
            registry=registry,
        )
        self.first_token = Histogram(
            "ease_first_token_seconds",
            "From the request to its first token.",
            buckets=SECONDS,
            registry=registry,
        )
        self.duration = Histogram(
            "ease_request_seconds", "From the request to its end.", buckets=SECONDS, registry=registry
        )
        self.shadowed = Counter(
            "ease_shadowed_answers", "Answers that ran again at full depth (--shadow).", registry=registry
        )
        self.shadow_risk = Gauge(
            "ease_shadow_risk", "Mean risk of these answers, as the certificate counts it.", registry=registry
        )
        self.shadow_drift = Gauge(
            "ease_shadow_drift",
            "1 when that is above the certificate's promise beyond chance.",
            registry=registry,
        )
        self.num_passes = 0
        self.num_rows = 0

    def note_pass(self, num_rows: int, num_running: int, num_waiting: int, depths: Iterable[int]) -> None:
        """One pass of the engine, and the tokens that came out of it."""
        self.num_passes = self.num_passes + 1
        self.num_rows = self.num_rows + num_rows
        self.passes.inc()
        self.rows.inc(num_rows)
        self.mean_batch.set(self.num_rows / self.num_passes)
        self.running.set(num_running)
        self.queue.set(num_waiting)
        for depth in depths:
            self.generated_tokens.inc()
            self.depth.observe(depth)

    def note_shadow(self, risk: float, drift: bool) -> None:
        """One more answer has been compared with full depth; the risk of all so far."""
        self.shadowed.inc()
        self.shadow_risk.set(risk)
        self.shadow_drift.set(drift)

    def text(self) -> bytes:
        """Prometheus' text format."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)
