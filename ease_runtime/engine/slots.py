"""Who sits where: the slots of a cache, and the sequences that have one. Runs nothing."""

from ease_runtime.engine.sequence import TokenSequence


class Slots:
    """`num_slots` places, each of one sequence or free."""

    def __init__(self, num_slots: int) -> None:
        self.taken: list[TokenSequence | None] = [None] * num_slots

    def __len__(self) -> int:
        return len(self.taken)

    @property
    def sequences(self) -> list[TokenSequence]:
        """Those that have a slot, in its order: their pending states live in the pool."""
        return [sequence for sequence in self.taken if sequence is not None]

    @property
    def running(self) -> list[TokenSequence]:
        """Those that have a slot and work to do."""
        return [
            sequence for sequence in self.taken if sequence is not None and sequence.finish_reason is None
        ]

    @property
    def has_room(self) -> bool:
        """Whether a slot is free."""
        return None in self.taken

    def seat(self, sequence: TokenSequence) -> None:
        """Give a sequence the first free slot."""
        assert self.has_room, "every slot is taken"
        sequence.slot = self.taken.index(None)
        self.taken[sequence.slot] = sequence

    def free(self, sequence: TokenSequence) -> None:
        """Take a sequence's slot away."""
        assert sequence.slot is not None, "a sequence without a slot has none to give"
        self.taken[sequence.slot] = None
        sequence.slot = None

    def take_over(self, sequence: TokenSequence, previous: TokenSequence, blocks: frozenset[int]) -> None:
        """Give a finished sequence's slot to another, with the K/V that both share.

        `blocks`: exits with a layer of their own.
        """
        assert previous.finish_reason is not None, "only a finished sequence gives its slot away"
        pairs = zip(previous.tokens, sequence.tokens, strict=False)
        common = next(
            (i for i, (a, b) in enumerate(pairs) if a != b), min(len(previous.tokens), len(sequence.tokens))
        )
        old = previous.counters
        new = sequence.counters
        shared = min(
            common, old.done[-1], len(sequence.tokens) - 1, *(old.block_done[k] for k in new.asked & blocks)
        )
        new.done = [shared] * len(new.done)
        new.block_done = [min(done, shared) for done in old.block_done]
        new.inside[:, :shared] = old.inside[:, :shared]
        slot = previous.slot
        assert slot is not None, "a sequence without a slot has none to give"
        self.taken[slot] = sequence
        sequence.slot = slot
        previous.slot = None
