"""The static KV cache of section 3: keys and values of N paths, each row as long as its path.

Launch fills every row with the prompt and then a token at a time. Check writes the [STOP]
positions into slots behind each row without making any row longer, so that there is nothing to
take back. Resume keeps k rows and frees the memory of the others. Three paths, of which one is
kept:

    Launch   0  P P P P t t t t . .              P  prompt     t  new token
             1  P P P P t t t t . .              .  dead slot: at index >= length, masked
             2  P P P P t t t t . .
    Check    0  P P P P t t t t S S   0.08       S  m [STOP] positions; each reads its own row, and
             1  P P P P t t t t S S   0.61          the head turns the last one into a score
             2  P P P P t t t t S S   0.13
    after    1  P P P P t t t t . .              bit for bit as before, and as long: S is dead again
    Resume   0  P P P P t t t t t t t t . . .    row 1, copied to a new, longer buffer

Layers write at index >= length and read. Lengths change only here, at the word of the decoder
(`advance`) and of the sampler. Letters: B rows, T new positions, K key/value heads, D head_dim.
"""
import numpy as np
import torch


class KVCache:
    """Keys and values, one buffer (rows, K, capacity, D) a layer, and each row's length.

    `lengths` (B,) int64 lies on the device. `counts`, the same numbers on the host, say how large
    a pass is without asking the device. Dead slots hold finite numbers: a pass may load one, but
    the mask gives it a weight of exactly 0.
    """

    def __init__(self, layers, rows, kv_heads, capacity, head_dim, device="cpu",
                 dtype=torch.float32):
        # Zeros, not empty: a dead slot is multiplied by an attention weight of 0; 0 * nan is nan.
        shape = (rows, kv_heads, capacity, head_dim)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(layers)]
        self.lengths = torch.zeros(rows, device=device, dtype=torch.int64)
        self.counts = np.zeros(rows, dtype=np.int64)

    @property
    def rows(self):
        """How many rows are in use."""
        return len(self.counts)

    @property
    def capacity(self):
        """How many positions a row can hold."""
        return self.keys[0].shape[2]

    @property
    def longest(self):
        """The length of the longest row."""
        return int(self.counts.max(initial=0))

    @property
    def nbytes(self):
        """Bytes of all buffers, dead slots included."""
        return sum(buffer.nbytes for buffer in self.keys + self.values)

    def slots(self, count):
        """Where every row's next `count` positions go: (B, K, count), in a buffer seen as (-1, D).
        Raises ValueError if they do not fit."""
        if self.longest + count > self.capacity:
            raise ValueError(
                f"KV cache: {self.longest} + {count} positions do not fit its capacity of "
                f"{self.capacity}")
        kv_heads = self.keys[0].shape[1]
        device = self.lengths.device
        heads = torch.arange(self.rows * kv_heads, device=device)
        first = heads * self.capacity  # slot of each (row, head)
        next_slot = first.view(self.rows, kv_heads) + self.lengths[:, None]
        return next_slot[..., None] + torch.arange(count, device=device)

    def write(self, layer, slots, keys, values):
        """Put keys and values (B, K, T, D) at `slots` (B, K, T). The lengths stay as they are.
        Returns the layer's two buffers with the new positions in them: where a gradient must flow
        to these, copies, and the cache stays as it is."""
        index = slots.flatten()
        return _put(self.keys[layer], index, keys), _put(self.values[layer], index, values)

    def advance(self, count):
        """The `count` positions last written to every row now belong to it."""
        self.lengths += count
        self.counts += count

    def set_lengths(self, lengths):
        """Cut every row to its length in `lengths` (a list of ints), as after a padded prefill."""
        fits = all(0 <= length <= count for length, count in zip(lengths, self.counts))
        if len(lengths) != self.rows or not fits:
            raise ValueError(
                f"KV cache: cannot cut {self.rows} rows of {self.counts.tolist()} positions to "
                f"{lengths}")
        self.counts = np.array(lengths, dtype=np.int64)
        self.lengths.copy_(torch.from_numpy(self.counts))

    def copy_rows(self, rows, source, source_rows):
        """Row rows[i] becomes a copy of row source_rows[i] of another cache, `source`."""
        target = torch.tensor(rows, device=self.lengths.device)
        origin = torch.tensor(source_rows, device=self.lengths.device)
        span = source.longest
        for mine, theirs in zip(self.keys + self.values, source.keys + source.values):
            mine[target, :, :span] = theirs[origin, :, :span]
        self.lengths[target] = source.lengths[origin]
        self.counts[rows] = source.counts[source_rows]

    def keep(self, rows):
        """Row j becomes the old row rows[j] (all different), in place; only rows that move are
        copied. The buffers stay where they are, and so does their memory: `rebuild` frees it."""
        moves = [(j, row) for j, row in enumerate(rows) if row != j]
        if moves:
            target, source = torch.tensor(moves, device=self.lengths.device).T
            for buffer in self.keys + self.values:
                buffer[target, :, :self.longest] = buffer[source, :, :self.longest]
            self.lengths[target] = self.lengths[source]
        self.lengths = self.lengths[:len(rows)]
        self.counts = self.counts[rows]

    def rebuild(self, rows, capacity):
        """Row j becomes a copy of the old row rows[j] (one may be copied several times), in new
        buffers of `capacity` positions; the old ones are freed. It goes buffer by buffer, so that
        old and new are never held together in full."""
        longest = self.longest
        if capacity < longest:
            raise ValueError(
                f"KV cache: {longest} positions do not fit a capacity of {capacity}")
        index = torch.tensor(rows, device=self.lengths.device)
        for buffers in (self.keys, self.values):
            for layer, old in enumerate(buffers):
                new = old.new_zeros(len(rows), old.shape[1], capacity, old.shape[3])
                new[:, :, :longest] = old[index, :, :longest]
                buffers[layer] = new
        self.lengths = self.lengths[index]
        self.counts = self.counts[rows]


def _put(buffer, index, new):
    """Write positions `new` (B, K, T, D) at `index` of a buffer -> the buffer that holds them."""
    positions = buffer.view(-1, buffer.shape[-1])
    new = new.reshape(-1, buffer.shape[-1])
    if new.requires_grad:  # training [STOP]: gradients flow through a copy of the whole buffer
        return positions.index_copy(0, index, new).view_as(buffer)
    positions.index_copy_(0, index, new)
    return buffer
