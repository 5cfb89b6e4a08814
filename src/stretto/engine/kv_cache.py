"""The pool of KV blocks and the prefix tree over them: who holds which block, and which can be shared.

It counts and names blocks and never touches their contents. A block's key chains over everything before it,
starting from the request's tenant and salt, so equal keys mean equal beginnings of the same tenant: the tree
is the set of these chains. (Block tables: vLLM, arXiv 2309.06180. Prefix sharing: SGLang, arXiv 2312.07104.)
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from hashlib import blake2b

from stretto.engine.sequence import Sequence

KEY_BYTES = 16


class BlockPool:
    """`total` blocks of `size` tokens. A block is free, held (by `refs` sequences), or idle: held by nobody
    and kept, oldest use first, because its contents can still serve a prompt that begins alike."""

    def __init__(self, total: int, size: int, *, share: bool = True) -> None:
        self.total = total
        self.size = size
        self._share = share
        self._free = list(range(total - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._refs = [0] * total
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._expected: dict[bytes, Sequence] = {}

    @property
    def available(self) -> int:
        """Blocks that can be handed out now."""
        return len(self._free) + len(self._idle)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.size)

    def match(self, seq: Sequence) -> tuple[list[int], int]:
        """The longest known beginning of `seq` (at least one token is left to compute), as blocks, and how
        many of those are idle: taking them makes that many blocks fewer available."""
        found: list[int] = []
        if self._share:
            for key in self._keys(seq, (len(seq.tokens) - 1) // self.size):
                block = self._block_of.get(key)
                if block is None:
                    break
                found.append(block)
        return found, sum(1 for block in found if self._refs[block] == 0)

    def next_key(self, seq: Sequence, matched: int) -> bytes | None:
        """The key of the first block that `seq` would compute and others could share; None: there is none."""
        if not self._share or matched >= (len(seq.tokens) - 1) // self.size:
            return None
        return self._keys(seq, matched + 1)[matched]

    def expects(self, key: bytes) -> bool:
        """Whether a running sequence is computing the block of this key: cheaper to wait than to redo."""
        return key in self._expected

    def adopt(self, seq: Sequence, matched: list[int]) -> None:
        """Give an admitted sequence the blocks that `match` found, and note which ones it will compute."""
        for block in matched:
            if self._refs[block] == 0:
                del self._idle[block]
            self._refs[block] += 1
        seq.blocks = list(matched)
        seq.published = len(matched)
        seq.computed = len(matched) * self.size
        if self._share:
            for key in self._keys(seq, (len(seq.tokens) - 1) // self.size)[len(matched) :]:
                self._expected.setdefault(key, seq)

    def extend(self, seq: Sequence, tokens: int) -> None:
        """Make room for the first `tokens` tokens of `seq`. The schedule has counted: there is room."""
        for _ in range(self.blocks_for(tokens) - len(seq.blocks)):
            block = self._free.pop() if self._free else self._evict()
            self._refs[block] = 1
            seq.blocks.append(block)

    def publish(self, seq: Sequence) -> None:
        """Let others share the full blocks that `seq` has computed since the last call."""
        full = min(seq.computed, len(seq.tokens)) // self.size
        if not self._share or full <= seq.published:
            return
        keys = self._keys(seq, full)
        for index in range(seq.published, full):
            key, block = keys[index], seq.blocks[index]
            if self._expected.get(key) is seq:
                del self._expected[key]
            if key not in self._block_of:
                self._block_of[key] = block
                self._key_of[block] = key
        seq.published = full

    def trim(self, seq: Sequence) -> None:
        """Take back the blocks beyond its computed tokens: wrong guesses had them. Nobody shares those."""
        left = self.blocks_for(seq.computed)
        for block in reversed(seq.blocks[left:]):
            self._refs[block] = 0
            self._free.append(block)
        del seq.blocks[left:]
        seq.tabled = min(seq.tabled, left)

    def release(self, seq: Sequence) -> None:
        """Take back all blocks of `seq`; what it published stays findable until the room is needed."""
        for block in reversed(seq.blocks):
            self._refs[block] -= 1
            if self._refs[block] == 0:
                if block in self._key_of:
                    self._idle[block] = None
                else:
                    self._free.append(block)
        for key in seq.keys[seq.published :]:
            if self._expected.get(key) is seq:
                del self._expected[key]
        seq.blocks = []
        seq.published = 0
        seq.computed = 0
        seq.tabled = 0
        seq.drafted = 0

    def forget(self, seq: Sequence) -> list[int]:
        """Share nothing of `seq` any more, since its numbers went wrong; returns the blocks it alone
        holds.
        """
        for block in seq.blocks:
            key = self._key_of.pop(block, None)
            if key is not None:
                del self._block_of[key]
        return [block for block in seq.blocks if self._refs[block] == 1]

    def freed_by(self, seq: Sequence) -> int:
        """Blocks that releasing `seq` would make available."""
        return sum(1 for block in seq.blocks if self._refs[block] == 1)

    def check(self, held: list[Sequence]) -> None:
        """Raise AssertionError unless every block is free, idle or held, counted right, and held in one
        tenant.
        """
        refs = [0] * self.total
        owner: dict[int, tuple[str, str]] = {}
        for seq in held:
            for block in seq.blocks:
                refs[block] += 1
                root = (seq.request.tenant, seq.request.salt)
                assert owner.setdefault(block, root) == root, f"block {block} is shared between tenants"
        assert refs == self._refs, "reference counts differ from what the sequences hold"
        loose = [*self._free, *self._idle]
        assert len(loose) == len(set(loose)) == sum(1 for count in refs if not count), "blocks were lost"
        assert all(refs[block] == 0 for block in loose), "a held block is on a free list"
        assert {block: key for key, block in self._block_of.items()} == self._key_of, (
            "the tree's two maps differ"
        )
        assert all(owner in held for owner in self._expected.values()), "a block is expected from nobody"

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        return block

    def _keys(self, seq: Sequence, count: int) -> list[bytes]:
        """The keys of the first `count` full blocks of `seq`, computed once."""
        keys, size = seq.keys, self.size
        while len(keys) < count:
            start = len(keys) * size
            parent = keys[-1] if keys else repr((seq.request.tenant, seq.request.salt)).encode()
            tokens = array("q", seq.tokens[start : start + size]).tobytes()
            keys.append(blake2b(tokens, digest_size=KEY_BYTES, key=blake2b(parent).digest()).digest())
        return keys[:count] if len(keys) > count else keys
