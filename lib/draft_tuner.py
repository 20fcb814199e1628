"""How many tokens the MTP head should draft in a step, found while the engine runs."""
from itertools import pairwise

PROBES = 2      # steps that are timed before a number of drafts is judged [O]


def drafts_that_pay(rates: list[float], cost: list[float]) -> int:
    """The number of drafts that gives most tokens for its time; 0: plain decoding is faster.

    rates[j]: how often draft j+1 is accepted where all before it are; cost[K]: seconds of a step
    with K drafts. A step gives 1 + r1 + r1 r2 + ... tokens. Plain decoding gets a bonus of a tenth,
    since times are noisy and a wrong yes costs more than a wrong no. [O]
    """
    expected, alive, best = 1.0, 1.0, (1.1 / cost[0], 0)
    for k, rate in enumerate(rates, 1):
        alive *= rate
        expected += alive
        best = max(best, (expected / cost[k], k))
    return best[1]


class DraftTuner:
    """Chooses the number of drafts, from how many are accepted and how long steps take. [O]

    Whether drafts pay can't be known beforehand. It depends on the machine (a step with three
    drafts took our CPU 2.4 to 3.7 times as long as a plain one; a GPU that waits for memory should
    need little more than one), on the number of running requests, and on the acceptance, which
    falls when RL moves the trunk away from its head. So the engine reports every speculative step.
    Once no number of drafts pays, `best` is 0, and the engine decodes plainly until `reset`.

    most: drafts at most; adapt: False always makes that many.
    """

    def __init__(self, most: int, adapt: bool):
        self.most, self.adapt = most, adapt
        self.reset()

    def reset(self):
        """Forget all measurements, since new weights may be accepted more often."""
        self.best = self.most
        self.tested, self.accepted = [0.0] * self.most, [0.0] * self.most
        self.seconds = {}   # (size, K): steps, seconds of the trunk, seconds of the head

    @property
    def rates(self) -> list[float]:
        """How often each draft was accepted where all before it were."""
        return [a / max(1.0, t) for a, t in zip(self.accepted, self.tested)]

    def choose(self, n: int) -> int:
        """How many drafts the next step of n requests should make."""
        if not self.adapt:
            return self.most
        size = n.bit_length()           # batches of 4 to 7 take about the same time
        for k in (self.most, 1, 0):     # a step without drafts gives the trunk's time for one token
            if self.seconds.get((size, k), (0,))[0] < PROBES:
                return k
        if self.tested[0] > 32:         # enough for a rate; a single request can get to 50 here
            self.best = drafts_that_pay(self.rates, self._costs(size))
        return self.best

    def note(self, alive: list[int], trunk: float, head: float):
        """Take in a step: alive[j] requests accepted j drafts or more, so alive[0] is all of them
        and the last index K; `trunk` and `head` took so many seconds."""
        for j, (tested, accepted) in enumerate(pairwise(alive)):
            self.tested[j] = 0.98 * self.tested[j] + tested     # the last 50 steps or so count
            self.accepted[j] = 0.98 * self.accepted[j] + accepted
        key = alive[0].bit_length(), len(alive) - 1
        steps, *least = self.seconds.get(key, (0, trunk, head))
        # The shortest time is kept, as noise only lengthens; it grows, so that old records fade.
        self.seconds[key] = (steps + 1, min(1.02 * least[0], trunk), min(1.02 * least[1], head))

    def _costs(self, size: int) -> list[float]:
        """Seconds of a step with 0, 1, ... most drafts: a line through those of 1 and most. Plain
        decoding needs no head."""
        one, most = (sum(self.seconds[size, k][1:]) for k in (1, self.most))
        slope = max(0.0, most - one) / max(1, self.most - 1)
        return [self.seconds[size, 0][1]] + [one + k * slope for k in range(self.most)]
