"""Does leaving early still cost what was promised? A share of the answers runs again at full depth, and both
are compared.

An answer's own tokens go through the engine once more, without early exits: what full depth would have said
at each place, and how likely it makes each token. The risk is that of the bundle's certificate (ease-eval
calibrate), the mean over answers: `disagreement`, the share of the tokens that full depth says differently,
of greedy answers only; or `loss`, the nats that a token lost, within [0, 1]. One answer runs at a time, and
none while requests wait.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from ease_runtime.engine.engine import Engine
from ease_runtime.engine.sampling import Given, Greedy
from ease_runtime.engine.sequence import TokenSequence
from ease_runtime.policies import make_policy

EPSILON = 0.05  # chance to call it drift where there is none


@dataclass
class Shadow:
    """Compares `share` of the answers that the certificate is about; of all early ones where there is no
    certificate.
    """

    engine: Engine
    share: float
    certificate: dict[str, Any] | None = None  # the manifest's `calibration`
    credit: float = 0.0  # answers that are due
    answer: TokenSequence | None = None  # what is being compared
    again: TokenSequence | None = None  # the same at full depth
    num_tokens: int = 0
    risks: list[float] = field(default_factory=list)  # an answer each

    @property
    def kind(self) -> str:
        """Which risk."""
        return str(self.certificate["risk"]) if self.certificate else "disagreement"

    def consider(self, answer: TokenSequence) -> None:
        """An answer has ended: run it again if it is its turn."""
        if not self.concerns(answer):
            return
        self.credit += self.share
        if self.credit < 1.0:
            return
        self.credit = min(self.credit, 2.0)
        if self.again is not None or self.engine.waiting:
            return
        self.credit -= 1.0
        prompt = answer.tokens[: answer.num_prompt]
        ids = [token.id for token in answer.produced]
        self.answer = answer
        self.again = self.engine.start(
            prompt, max_new_tokens=len(ids), sampler=Given([*prompt, *ids]), num_logprobs=1
        )

    def concerns(self, answer: TokenSequence) -> bool:
        """Whether an answer left early, under the certificate's thresholds where there is one."""
        if (
            not answer.decision.policy.thresholds
            or answer.request.catch_up == "verify"
            or answer.error
            or not answer.produced
        ):
            return False
        if self.kind == "disagreement" and not isinstance(answer.request.sampler, Greedy):
            return False
        known = self.certificate
        if known is None:
            return True
        if answer.decision.policy.name != known["policy"]:  # before it is loaded: a bundle may name anything
            return False
        promised = make_policy(known["policy"], known["thresholds"], self.engine.stack.exit_layers)
        return answer.decision.policy == promised and answer.request.catch_up == known["catch_up"]

    def look(self) -> bool:
        """After a pass: whether a comparison has come to its end, and counts."""
        if self.again is None or self.answer is None:
            return False
        gone = (
            self.again.finish_reason is None
            and self.again.slot is None
            and self.again not in self.engine.waiting
        )
        if self.again.finish_reason is None and not gone:
            return False
        answer = self.answer
        again = self.again
        self.answer = None
        self.again = None
        if gone or again.error:
            return False
        pairs = list(zip(answer.produced, again.produced, strict=True))
        if self.kind == "disagreement":
            harms = [float(full.top_logprobs[0][0] != early.id) for early, full in pairs]
        else:
            harms = [min(max(full.logprob - early.logprob, 0.0), 1.0) for early, full in pairs]
        self.num_tokens += len(harms)
        self.risks.append(sum(harms) / len(harms))
        return True

    @property
    def risk(self) -> float | None:
        """The mean over the answers so far."""
        return sum(self.risks) / len(self.risks) if self.risks else None

    @property
    def drift(self) -> bool | None:
        """Whether the risk is above the promise beyond chance (Hoeffding, one-sided); None where nothing is
        promised.
        """
        if self.certificate is None:
            return None
        if self.risk is None:
            return False
        return self.risk - math.sqrt(math.log(1.0 / EPSILON) / (2 * len(self.risks))) > float(
            self.certificate["delta"]
        )

    def report(self) -> dict[str, Any]:
        """For /health."""
        promised = float(self.certificate["delta"]) if self.certificate else None
        counts = {"answers": len(self.risks), "tokens": self.num_tokens}
        return {
            "share": self.share,
            **counts,
            "kind": self.kind,
            "risk": self.risk,
            "promised": promised,
            "drift": self.drift,
        }
