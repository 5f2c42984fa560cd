"""The cluster cache as a simulation: recorded selections, policies of eviction, hits.

A cache belongs to one (layer, KV head), holds whole clusters and has room for `capacity` tokens. A
step selects clusters; those that it finds in the cache are hits, the others are read from the host
store. Then the policy evicts until the tokens fit. What the step itself uses is no victim, as in
the product: attention reads it there. Two exceptions: where a step alone is larger than the cache,
what is left over is read and not kept, lowest score first; and with `bypass` a step's own clusters
may be evicted like any other, as if they were attended from a buffer beside the cache.

Clusters are not in clusterkv-replay's dump, but with a budget of all tokens a dump is a ranking of
all clusters, each whole: `recover` takes it apart. The selection at any budget is then the shortest
prefix of that ranking with as many tokens (`select`). Of that the last cluster is attended to in
part and cached whole. A ranking under queries of zeros, where all scores are equal, is the order of
the clusters' numbers.
"""

import collections
import itertools
import math
from dataclasses import dataclass

import numpy as np


class RecoveryError(Exception):
    """A dump that is no ranking of whole clusters; the message says why."""


@dataclass(frozen=True)
class Head:
    """One (layer, KV head)."""

    sizes: list             # tokens of each cluster
    rankings: list          # per step all clusters, in falling score
    positions: list = None  # of each cluster's tokens
    scores: np.ndarray = None  # [steps, clusters], float32; 0 before a cluster is in a ranking


def recover(positions, numbered):
    """Head of `positions` [steps, budget]: per step all candidates, in falling cluster score, -1
    beyond the last; and of `numbered`, all candidates of the last step in order of cluster number.

    A cluster's tokens stand together at every step, in rising position. So position q belongs to
    the cluster of p < q if both became candidates at the same step and q has followed p ever since.
    Two clusters that are neighbours at every step would be taken for one; comparing the simulated
    cache with the product's hits and bytes would show it, since they count clusters and tokens.
    """
    steps, width = positions.shape
    tokens = int(positions.max(initial=-1)) + 1
    first = np.full(tokens, steps)
    follower = np.full(tokens, -1)
    for step in range(steps):
        listed = positions[step][positions[step] >= 0]
        if listed.size == width and width < tokens:
            raise RecoveryError(f"step {step}: {width} positions fill the budget; it must hold all")
        times = np.bincount(listed, minlength=tokens)
        if times.max(initial=0) > 1 or (times[first < step] == 0).any():
            raise RecoveryError(f"step {step}: a candidate stands twice or is missing")
        following = np.append(listed[1:], -1)
        new = first[listed] > step
        first[listed[new]] = step
        follower[listed[new]] = following[new]
        follower[listed[follower[listed] != following]] = -1
    joined = follower > np.arange(tokens)
    joined[joined] = first[follower[joined]] == first[joined.nonzero()[0]]
    candidates = (first < steps).nonzero()[0]
    if not np.array_equal(np.sort(numbered), candidates):
        raise RecoveryError("the numbered candidates are others than the last step's")
    return _chains(positions, numbered, np.where(joined, follower, -1))


def _chains(positions, numbered, follower):
    """Head of clusters that are chains of followers."""
    cluster = np.full(follower.size, -1)
    heads = np.zeros(follower.size, bool)
    heads[numbered] = True
    heads[follower[follower >= 0]] = False
    clusters = []
    for position in numbered[heads[numbered]]:
        chain = []
        while position >= 0:
            cluster[position] = len(clusters)
            chain.append(int(position))
            position = follower[position]
        clusters.append(chain)
    if list(itertools.chain(*clusters)) != numbered.tolist():
        raise RecoveryError("the numbered candidates are in clusters of their own")
    rankings = [cluster[listed[heads[listed]]].tolist()
                for listed in (row[row >= 0] for row in positions)]
    return Head([len(chain) for chain in clusters], rankings, clusters)


def select(head, budget):
    """Per step the clusters chosen at `budget` tokens, in falling score; the last may be cut."""
    selections = []
    for ranking in head.rankings:
        taken, count = 0, 0
        while taken < budget and count < len(ranking):
            taken += head.sizes[ranking[count]]
            count += 1
        selections.append(ranking[:count])
    return selections


class Lru:
    """Least recently used, and the base of all policies.

    A policy orders the clusters of one cache by how much they are worth keeping: `uses` sees every
    step, `value` is asked only afterwards, and the least goes first. Of equals the lower number
    does, as in the product.
    """

    def __init__(self, head, selections, capacity):
        self.head, self.selections, self.capacity = head, selections, capacity
        self.last = [-1] * len(head.sizes)

    def uses(self, step, hits):
        """The step's clusters are self.selections[step], of which `hits` (a set) were found."""
        del hits
        for cluster in self.selections[step]:
            self.last[cluster] = step

    def value(self, cluster):
        return self.last[cluster]

    def victims(self, candidates):
        """The candidates, the first to be evicted first; the caller stops when there is room."""
        return iter(sorted(candidates, key=lambda c: (self.value(c), c)))

    def drop(self, cluster):
        """A cluster is not kept although `victims` did not name it: its step was too large."""


class Lru2(Lru):
    """LRU-2: by the last step but one that used it; remembers what it has evicted."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.before = [-1] * len(self.head.sizes)

    def uses(self, step, hits):
        for cluster in self.selections[step]:
            self.before[cluster] = self.last[cluster]
        super().uses(step, hits)

    def value(self, cluster):
        return self.before[cluster], self.last[cluster]


class AgedFrequency(Lru):
    """LFU with aging (LRFU): uses, each worth half as much every HALF_LIFE steps."""

    HALF_LIFE = 16

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.count = [0.0] * len(self.head.sizes)

    def uses(self, step, hits):
        for cluster in self.selections[step]:
            age = step - self.last[cluster]
            self.count[cluster] = 1.0 + self.count[cluster] * 2.0 ** (-age / self.HALF_LIFE)
        super().uses(step, hits)

    def value(self, cluster):
        # The logarithm of the aged count, but for a term that is the same for all.
        return math.log2(self.count[cluster]) + self.last[cluster] / self.HALF_LIFE


class GreedyDual(Lru):
    """GreedyDual-Size-Frequency: uses since it came / tokens, on top of the last victim's value."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.worth = [0.0] * len(self.head.sizes)
        self.frequency = [0] * len(self.head.sizes)
        self.floor = 0.0

    def uses(self, step, hits):
        for cluster in self.selections[step]:
            self.frequency[cluster] = self.frequency[cluster] + 1 if cluster in hits else 1
            self.worth[cluster] = self.floor + self.frequency[cluster] / self.head.sizes[cluster]

    def value(self, cluster):
        return self.worth[cluster]

    def victims(self, candidates):
        for cluster in super().victims(candidates):
            self.floor = max(self.floor, self.worth[cluster])
            yield cluster


class SegmentedLru(Lru):
    """Segmented LRU: what is used a second time is protected, in up to 80 % of the tokens."""

    PROTECTED = 0.8

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.probation = collections.OrderedDict()
        self.protected = collections.OrderedDict()

    def uses(self, step, hits):
        sizes = self.head.sizes
        # The lowest score first: of one step the highest is then the most recent.
        for cluster in reversed(self.selections[step]):
            if cluster in hits:
                self.probation.pop(cluster, None)
                self.protected.pop(cluster, None)
                self.protected[cluster] = True
            else:
                self.probation[cluster] = True
        tokens = sum(sizes[cluster] for cluster in self.protected)
        while tokens > self.PROTECTED * self.capacity:
            cluster, _ = self.protected.popitem(last=False)
            self.probation[cluster] = True
            tokens -= sizes[cluster]

    def victims(self, candidates):
        for cluster in list(itertools.chain(self.probation, self.protected)):
            if cluster in candidates:
                self.drop(cluster)
                yield cluster

    def drop(self, cluster):
        self.probation.pop(cluster, None)
        self.protected.pop(cluster, None)


class S3Fifo(Lru):
    """S3-FIFO: a small queue of newcomers (10 % of the tokens), a main one, and ghosts."""

    SMALL = 0.1

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.small, self.main = collections.deque(), collections.deque()
        self.small_tokens = 0
        self.ghosts = collections.OrderedDict()
        self.ghost_tokens = 0
        self.frequency = {}

    def uses(self, step, hits):
        for cluster in self.selections[step]:
            if cluster in hits:
                self.frequency[cluster] = min(3, self.frequency[cluster] + 1)
                continue
            self.frequency[cluster] = 0
            if self.ghosts.pop(cluster, False):
                self.ghost_tokens -= self.head.sizes[cluster]
                self.main.append(cluster)
            else:
                self.small.append(cluster)
                self.small_tokens += self.head.sizes[cluster]

    def victims(self, candidates):
        left = set(candidates)
        while left:
            from_small = self.small_tokens >= self.SMALL * self.capacity or not self.main
            victim = self._from_small(left) if from_small else self._from_main(left)
            if victim is None:  # that queue has only what this step uses
                victim = self._from_main(left) if from_small else self._from_small(left)
            if victim is not None:
                left.discard(victim)
                yield victim

    def drop(self, cluster):
        if cluster in self.main:
            self.main.remove(cluster)
        else:
            self.small.remove(cluster)
            self.small_tokens -= self.head.sizes[cluster]

    def _from_small(self, left):
        for _ in range(len(self.small)):
            cluster = self.small.popleft()
            if cluster not in left:
                self.small.append(cluster)
                continue
            self.small_tokens -= self.head.sizes[cluster]
            if self.frequency[cluster] > 1:
                self.main.append(cluster)
                continue
            self._remember(cluster)
            return cluster
        return None

    def _from_main(self, left):
        for _ in range(4 * len(self.main)):  # enough for every frequency to fall to 0
            cluster = self.main.popleft()
            if cluster in left and self.frequency[cluster] == 0:
                return cluster
            if cluster in left:
                self.frequency[cluster] -= 1
            self.main.append(cluster)
        return None

    def _remember(self, cluster):
        self.ghosts[cluster] = True
        self.ghost_tokens += self.head.sizes[cluster]
        while self.ghost_tokens > (1.0 - self.SMALL) * self.capacity:
            oldest, _ = self.ghosts.popitem(last=False)
            self.ghost_tokens -= self.head.sizes[oldest]


class MeanScore(Lru):
    """By a running mean of the scores (Select's, of all clusters) under the queries so far,
    divided by a power of the tokens."""

    SHARE = np.float32(0.2)  # of the mean, of each step
    BY_SIZE = 0.0

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.mean = np.zeros(len(self.head.sizes), np.float32)
        self.weights = np.array(self.head.sizes, np.float32) ** np.float32(self.BY_SIZE)
        self.values = None

    def uses(self, step, hits):
        seen = self.head.rankings[step]
        self.mean[seen] += self.SHARE * (self.head.scores[step, seen] - self.mean[seen])
        self.values = self.mean / self.weights

    def value(self, cluster):
        return self.values[cluster]


class MeanScoreByRoot(MeanScore):
    """As the product: between all hits alike and all tokens alike."""

    BY_SIZE = 0.5


class MeanScoreBySize(MeanScore):
    """All hits alike: what a token of the cache is worth."""

    BY_SIZE = 1.0


class Belady(Lru):
    """Evicts the cluster whose next use is farthest away; it knows the future.

    Optimal where all clusters are of one size. With several sizes (and several uses a step) finding
    the optimum is hard, and this greedy rule is a near-optimum reference, not a proven bound:
    `upper_bound` is one. Of clusters with the same next use the largest goes first.
    """

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.later = [[] for _ in self.head.sizes]  # steps of use, the next one last
        for step in range(len(self.selections) - 1, -1, -1):
            for cluster in self.selections[step]:
                self.later[cluster].append(step)
        self.step = -1

    def uses(self, step, hits):
        self.step = step
        for cluster in self.selections[step]:
            self.later[cluster].pop()

    def value(self, cluster):
        steps = self.later[cluster]
        return (-steps[-1] if steps else -math.inf), -self.head.sizes[cluster]


class BeladySize(Belady):
    """Evicts the largest product of tokens and steps until the next use."""

    def value(self, cluster):
        steps = self.later[cluster]
        return -(steps[-1] - self.step) * self.head.sizes[cluster] if steps else -math.inf


@dataclass
class Outcome:
    """Per step, of one (layer, KV head) or summed over some."""

    selected: np.ndarray       # clusters
    hits: np.ndarray           # clusters
    missed_tokens: np.ndarray  # read from the host store
    held_tokens: np.ndarray    # in the cache after the step

    def __add__(self, other):
        return Outcome(*(getattr(self, name) + getattr(other, name)
                         for name in self.__dataclass_fields__))


def simulate(head, selections, capacity, make_policy, bypass=False):
    """Outcome of a cache of `capacity` tokens that starts empty."""
    policy = make_policy(head, selections, capacity)
    sizes, resident, held, rows = head.sizes, set(), 0, []
    for step, selected in enumerate(selections):
        hits = {cluster for cluster in selected if cluster in resident}
        missed = sum(sizes[cluster] for cluster in selected if cluster not in hits)
        policy.uses(step, hits)
        held += missed
        resident.update(selected)
        if held > capacity:
            candidates = resident if bypass else resident.difference(selected)
            for victim in policy.victims(frozenset(candidates)):
                resident.remove(victim)
                held -= sizes[victim]
                if held <= capacity:
                    break
        for cluster in reversed(selected):  # a step that is larger than the cache
            if held <= capacity:
                break
            policy.drop(cluster)
            resident.remove(cluster)
            held -= sizes[cluster]
        rows.append((len(selected), len(hits), missed, held))
    return Outcome(*np.array(rows, dtype=np.int64).reshape(-1, 4).T)


def keep_last(head, selections, steps):
    """Outcome of the paper's cache (ClusterKV, arXiv 2412.03213): what the last `steps` steps
    selected is kept, and nothing else, however many tokens it is."""
    sizes, rows = head.sizes, []
    for step, selected in enumerate(selections):
        kept = set().union(*selections[max(0, step - steps):step])
        hits = sum(cluster in kept for cluster in selected)
        missed = sum(sizes[cluster] for cluster in selected if cluster not in kept)
        after = set().union(*selections[max(0, step - steps + 1):step + 1])
        rows.append((len(selected), hits, missed, sum(sizes[cluster] for cluster in after)))
    return Outcome(*np.array(rows, dtype=np.int64).reshape(-1, 4).T)


def upper_bound(head, selections, capacity):
    """A number of hits that no policy can exceed, with or without bypass.

    A hit takes its cluster's tokens from one use to the next, and all hits together take at most
    capacity × steps of those token steps: the cheapest are counted until they are used up (PFOO-L:
    Berger, Beckmann, Harchol-Balter, "Practical Bounds on Optimal Caching with Variable Object
    Sizes", 2018). Loose, since a cache that has room at one time may overflow at another.
    """
    costs, last = [], {}
    for step, selected in enumerate(selections):
        for cluster in selected:
            if cluster in last and head.sizes[cluster] <= capacity:
                costs.append(head.sizes[cluster] * (step - last[cluster]))
            last[cluster] = step
    total = np.cumsum(np.sort(np.array(costs, dtype=np.int64)))
    return int(np.searchsorted(total, capacity * (len(selections) - 1), side="right"))
