"""The pool of KV blocks and the prefix cache over them: who holds which block, and which can be shared.

It counts and names blocks and never touches their contents. It alone writes a `KvState`. The key of a block
chains over all tokens before it and begins with the tenant and salt, so equal keys mean equal prefixes of one
tenant. A block whose contents no result has judged may hold NaN, so it is zeroed before its next owner gets
it. (Block tables: vLLM, arXiv 2309.06180. Prefix sharing: SGLang, arXiv 2312.07104.)
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from struct import pack

from stretto.types import is_about

KEY_BYTES = 16
INT64 = 8  # bytes of a token in what is hashed


@dataclass(slots=True, eq=False)
class KvState:
    """What one sequence holds of a pool. `tokens` is the sequence's own list, which the pool only reads."""

    tokens: list[int]
    root: tuple[str, str]  # tenant and salt: only sequences with the same root share blocks
    blocks: list[int] = field(default_factory=list[int])
    keys: list[bytes] = field(default_factory=list[bytes])  # of its full blocks, as far as they were needed
    published: int = 0  # blocks, from the first, that others can share
    computed: int = 0  # tokens whose keys and values are in the blocks, or in a launched step
    judged: int = 0  # of these, those that were judged before it had them, or by its first token
    drawn: bool = False  # whether it has drawn a token while it held them, which judges all before that one
    left: list[int] = field(default_factory=list[int])  # blocks that it gave back before they were judged

    @property
    def all_judged(self) -> int:
        """The tokens that a finite result followed from: their keys and values are no NaN."""
        return max(self.judged, len(self.tokens) - 1) if self.drawn else self.judged


class BlockPool:
    """`total` blocks of `size` tokens each.

    A block is free, held by one or more sequences, or idle. Nobody holds an idle block; its contents are kept
    for prompts with the same prefix until the block is needed, least recently used first. A late block is
    free, but a step in flight will soon judge it; it is handed out last, which saves zeroing it.
    """

    def __init__(self, total: int, size: int, *, share: bool = True) -> None:
        self.total = total
        self.size = size
        self._share = share
        self._free = list(range(total - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._late: dict[int, None] = {}
        self._unjudged: dict[int, list[int]] = {}  # with the blocks that were given back together with it
        self._stale: list[int] = []  # handed out unjudged since the last call of `stale`
        self._refs = [0] * total
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._root_of: dict[int, tuple[str, str]] = {}
        self._expected: dict[bytes, KvState] = {}

    @property
    def available(self) -> int:
        """Blocks that can be handed out now."""
        return len(self._free) + len(self._idle) + len(self._late)

    def blocks_for(self, tokens: int) -> int:
        """How many blocks hold so many tokens."""
        return -(-tokens // self.size)

    def match(self, kv: KvState) -> tuple[list[int], int]:
        """The blocks of the longest cached prefix, and how many of those are idle.

        Adopting an idle block makes one block fewer available. At least one token is left to compute.
        """
        found: list[int] = []
        for key in self._shared_keys(kv):
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found, sum(1 for block in found if self._refs[block] == 0)

    def next_key(self, kv: KvState, matched: int) -> bytes | None:
        """The key of the first block after `matched` ones; None when others could not share that block."""
        keys = self._shared_keys(kv)
        return keys[matched] if matched < len(keys) else None

    def expected(self, kv: KvState) -> int:
        """The tokens of its longest prefix that are cached, or that a running sequence is computing."""
        blocks = 0
        for key in self._shared_keys(kv):
            if key not in self._block_of and key not in self._expected:
                break
            blocks += 1
        return blocks * self.size

    def expects(self, key: bytes) -> bool:
        """Whether a running sequence is computing the block of this key: waiting costs less than redoing."""
        return key in self._expected

    def adopt(self, kv: KvState, matched: list[int], *, claim: bool = True) -> None:
        """Give an admitted sequence the blocks that `match` found, and record which ones it will compute.

        Without `claim` nothing is recorded, so no other sequence waits for those blocks.
        """
        for block in matched:
            if self._refs[block] == 0:
                del self._idle[block]
            self._refs[block] += 1
        kv.blocks = list(matched)
        kv.published = len(matched)
        kv.computed = len(matched) * self.size
        kv.judged = self._judged_among(matched) * self.size
        kv.left = []
        if claim:
            for key in self._shared_keys(kv)[len(matched) :]:
                self._expected.setdefault(key, kv)

    def extend(self, kv: KvState, tokens: int) -> None:
        """Hand out the blocks that its first `tokens` tokens need. The scheduler has made sure they exist."""
        for _ in range(-(-tokens // self.size) - len(kv.blocks)):
            block = self._free.pop() if self._free else self._evict()
            if block in self._unjudged:
                del self._unjudged[block]
                self._stale.append(block)
            self._refs[block] = 1
            kv.blocks.append(block)

    def stale(self) -> list[int]:
        """The blocks handed out since the last call that must be zeroed before a step uses them."""
        stale, self._stale = self._stale, []
        return stale

    def judge(self, kv: KvState, tokens: int) -> None:
        """Count its first `tokens` tokens as judged: a step drew its first token, after them, from finite
        logits. If it has given its blocks back since that step was launched, they need not be zeroed."""
        if not kv.blocks:
            for block in kv.left:
                if self._unjudged.get(block) is kv.left:
                    del self._unjudged[block]
                    if block in self._late:
                        del self._late[block]
                        self._free.append(block)
            kv.left = []
        elif self._unjudged:
            for block in kv.blocks[kv.judged // self.size : self.blocks_for(tokens)]:
                self._unjudged.pop(block, None)
        kv.judged, kv.drawn = tokens, bool(kv.blocks)

    def advance(self, kv: KvState, tokens: int) -> None:
        """Count `tokens` more tokens as computed: a step that computes them was launched."""
        kv.computed += tokens

    def publish(self, kv: KvState) -> None:
        """Let others share the full blocks computed since the last call."""
        if not self._share:
            return
        full = min(kv.computed, len(kv.tokens)) // self.size
        if full <= kv.published:
            return
        keys = self._keys(kv, full)
        for index in range(kv.published, full):
            key, block = keys[index], kv.blocks[index]
            if self._expected.get(key) is kv:
                del self._expected[key]
            if key not in self._block_of:
                self._block_of[key] = block
                self._key_of[block] = key
                self._root_of[block] = kv.root
        kv.published = full

    def trim(self, kv: KvState, tokens: int) -> None:
        """Count only the first `tokens` tokens as computed, and take back the blocks beyond them.

        Only rejected draft tokens were there, so nobody shares those blocks.
        """
        kv.computed = tokens
        left = self.blocks_for(tokens)
        for block in reversed(kv.blocks[left:]):
            self._refs[block] = 0
            self._free.append(block)
        del kv.blocks[left:]

    def release(self, kv: KvState, *, late: bool = False) -> None:
        """Take back all blocks. Published ones can still be matched until they are needed. `late`: a step in
        flight draws a token for it, which will judge the last ones."""
        judged = kv.all_judged
        kv.left = [] if 0 < judged == kv.computed else kv.blocks[judged // self.size :]
        self._unjudged.update(dict.fromkeys(kv.left, kv.left))
        awaited = set(kv.left) if late and judged else ()
        for block in reversed(kv.blocks):
            self._refs[block] -= 1
            if self._refs[block] == 0:
                if block in self._key_of:
                    self._idle[block] = None
                elif block in awaited:
                    self._late[block] = None
                else:
                    self._free.append(block)
        for key in kv.keys[kv.published :]:
            if self._expected.get(key) is kv:
                del self._expected[key]
        kv.blocks = []
        kv.published = 0
        kv.computed = 0
        kv.drawn = False

    def forget(self, kv: KvState, *, wrong: bool) -> None:
        """Stop sharing its blocks that are not judged. `wrong`: count none of its blocks as judged."""
        if wrong:
            kv.judged, kv.drawn = 0, False
        for block in kv.blocks[kv.all_judged // self.size :]:
            self._unshare(block)

    def drop(self, tenant: str, subject: str | None) -> tuple[list[int], int]:
        """Stop sharing a tenant's blocks, or those whose salt names the subject. Returns the idle ones, which
        become free, and the number of those that sequences still hold."""
        found = [
            block
            for block, (owner, salt) in self._root_of.items()
            if owner == tenant and (subject is None or is_about(salt, subject))
        ]
        for block in found:
            self._unshare(block)
        idle = [block for block in found if block in self._idle]
        for block in idle:
            del self._idle[block]
            self._unjudged.pop(block, None)  # the caller zeroes it
        self._free += idle
        return idle, len(found) - len(idle)

    def freed_by(self, kv: KvState) -> int:
        """Blocks that `release` would make available."""
        return sum(1 for block in kv.blocks if self._refs[block] == 1)

    def check(self, held: Iterable[KvState]) -> None:
        """Raise AssertionError unless every block is free, idle or held, counted right, and of one root."""
        holders = set(held)
        refs = [0] * self.total
        owner: dict[int, tuple[str, str]] = {}
        for kv in holders:
            for block in kv.blocks:
                refs[block] += 1
                assert owner.setdefault(block, kv.root) == kv.root, f"block {block} is shared between tenants"
        assert refs == self._refs, "reference counts differ from what the sequences hold"
        loose = [*self._free, *self._idle, *self._late]
        assert len(loose) == len(set(loose)) == sum(1 for count in refs if not count), "blocks were lost"
        assert all(refs[block] == 0 for block in loose), "a held block is on a free list"
        assert self._late.keys() <= self._unjudged.keys(), "a judged block is late"
        assert not self._stale, "blocks that may hold NaN were handed out"
        assert {block: key for key, block in self._block_of.items()} == self._key_of, (
            "the tree's two maps differ"
        )
        assert self._root_of.keys() == self._key_of.keys(), "a shared block has no root"
        assert all(owner in holders for owner in self._expected.values()), "a block is expected from nobody"

    def _judged_among(self, blocks: list[int]) -> int:
        """How many of these blocks, from the first, are judged."""
        if not self._unjudged:
            return len(blocks)
        return next((n for n, block in enumerate(blocks) if block in self._unjudged), len(blocks))

    def _evict(self) -> int:
        """Take the block that was idle for longest, or else a late one."""
        if not self._idle:
            return self._late.popitem()[0]
        block, _ = self._idle.popitem(last=False)
        self._unshare(block)
        return block

    def _unshare(self, block: int) -> None:
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key], self._root_of[block]

    def _shared_keys(self, kv: KvState) -> list[bytes]:
        """The keys of the full blocks before its last token, which others may share."""
        return self._keys(kv, (len(kv.tokens) - 1) // self.size) if self._share else []

    def _keys(self, kv: KvState, count: int) -> list[bytes]:
        """The keys of the first `count` full blocks; each is computed once."""
        keys, done, width = kv.keys, len(kv.keys), INT64 * self.size
        if done < count:
            key = keys[-1] if keys else _root_key(kv.root)
            tokens = kv.tokens[done * self.size : count * self.size]
            packed = pack(f"{len(tokens)}q", *tokens)
            for start in range(0, len(packed), width):
                key = blake2b(key + packed[start : start + width], digest_size=KEY_BYTES).digest()
                keys.append(key)
        return keys[:count] if len(keys) > count else keys


def _root_key(root: tuple[str, str]) -> bytes:
    """What the keys of a tenant and salt begin with. BLAKE2 keeps it apart from the keys of blocks."""
    return blake2b(repr(root).encode(), digest_size=KEY_BYTES, person=b"root").digest()
