"""What a GPU would do, on the CPU: FlashAttention's kernel, a query at a time; CUDA graphs whose
replays run the recorded operations on the very tensors of the capture; and the bytes that an
allocator would hold.

They are second implementations, from the kernel's and from CUDA's documentation: what the engine
hands over (indices, lengths, windows; stale pointers, waits) is judged by them.
"""
import contextlib
import functools
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# -------------------------------------------------------------------------------- FlashAttention


def flash_attention_forward(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p,
                            is_causal, return_debug_mask, *, scale=None, window_size_left=None,
                            window_size_right=None, seqused_k=None, alibi_slopes=None,
                            block_table=None, num_splits=None):
    """aten::_flash_attention_forward of packed sequences: query and key (total, heads, D), starts
    (sequences + 1,) int32; of a sequence's keys the first seqused_k count.

    As the kernel's documentation has it, query i of a sequence sees the keys from i + S - T - left
    to i + S - T + right, itself included (S keys, T queries; a negative size is no bound); causal
    means right = 0; heads share the key heads in groups."""
    assert dropout_p == 0 and not return_debug_mask
    assert alibi_slopes is None and block_table is None and num_splits is None
    for tensor in (query, key, value):
        assert tensor.dim() == 3 and tensor.stride(-1) == 1
    for tensor in (cum_seq_q, cum_seq_k, seqused_k):
        assert tensor.dtype == torch.int32 and tensor.is_contiguous()
    assert cum_seq_q[-1] == len(query) and cum_seq_k[-1] == len(key) == len(value)
    assert len(cum_seq_q) == len(cum_seq_k) == len(seqused_k) + 1
    left = -1 if window_size_left is None else window_size_left
    right = -1 if window_size_right is None else window_size_right
    if is_causal:
        right = 0

    heads = query.shape[1]
    group = heads // key.shape[1]
    out = torch.full_like(query, torch.nan)
    logsumexp = query.new_full((heads, len(query)), torch.nan, dtype=torch.float32)
    for number in range(len(seqused_k)):
        first_query, behind = cum_seq_q[number:number + 2].tolist()
        first_key, behind_keys = cum_seq_k[number:number + 2].tolist()
        T = behind - first_query
        S = seqused_k[number].item()
        assert T <= max_q and 0 < S <= behind_keys - first_key <= max_k
        for i in range(T):
            middle = i + S - T
            low = 0 if left < 0 else max(0, middle - left)
            high = S - 1 if right < 0 else min(S - 1, middle + right)
            seen = slice(first_key + low, first_key + high + 1)
            for head in range(heads):
                keys = key[seen, head // group].double()
                scores = keys @ query[first_query + i, head].double() * scale
                result = scores.softmax(0) @ value[seen, head // group].double()
                out[first_query + i, head] = result.to(out.dtype)
                logsumexp[head, first_query + i] = scores.logsumexp(0)
    nothing = query.new_empty(0)
    return out, logsumexp, nothing, nothing, nothing


@contextlib.contextmanager
def flash_on_cpu(kernel=flash_attention_forward):
    """While this lasts, PyTorch has this kernel for the CPU: the operation is called by its own
    schema."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", kernel, "CPU")
    try:
        yield
    finally:
        library._destroy()


# ----------------------------------------------------------------------------------- CUDA graphs

# What waits for the device or copies from the host: it is forbidden in a capture.
FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "aten.equal", "bincount",
             "lift_fresh", "is_nonzero")


class Recording(TorchDispatchMode):
    """Writes down every operation with its very tensors."""

    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = str(function)
        assert not any(part in name for part in FORBIDDEN), f"{name} within a capture"
        result = function(*args, **kwargs)
        self.graph.operations.append((function, args, kwargs, result))
        return result


class Graph:
    """torch.cuda.CUDAGraph: a replay runs the operations again, on the memory that they were
    recorded with, and knows nothing of what Python has done since."""

    def __init__(self):
        self.operations = []
        self.replays = 0

    def replay(self):
        self.replays += 1
        for result in self._made():  # other graphs have used the pool's memory meanwhile
            if result.is_floating_point():
                result.fill_(torch.nan)
        for function, args, kwargs, result in self.operations:
            if not is_new(function, args, kwargs, result):
                if function._schema.is_mutable:
                    function(*args, **kwargs)
                continue
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)

    def _made(self):
        """The tensors that the graph's own operations made."""
        for function, args, kwargs, result in self.operations:
            if is_new(function, args, kwargs, result):
                yield from (leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))


def is_new(function, args, kwargs, result):
    """Whether an operation's result lies in memory of its own."""
    if function._schema.is_mutable:
        return False
    storages = set()
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, torch.Tensor):
            storages.add(leaf.untyped_storage().data_ptr())
    return not any(leaf.untyped_storage().data_ptr() in storages and leaf.numel()
                   for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))


class Stream:
    """torch.cuda.Stream: here there is only one."""

    def __init__(self, device=None):
        self.device = device

    def wait_stream(self, other):
        """Nothing to wait for."""


class Cuda:
    """Stands in for the parts of torch.cuda that a capture uses, and keeps account of them."""

    def __init__(self):
        self.graphs = []     # in the order of their captures
        self.places = set()  # (pool, stream) of the captures

    @contextlib.contextmanager
    def graph(self, graph, pool=None, stream=None):
        """torch.cuda.graph."""
        self.places.add((pool, stream))
        with Recording(graph):
            yield
        self.graphs.append(graph)

    def install(self, monkeypatch, step):
        """From now on the decode steps of module `step` are captured and replayed."""
        begin = step.DecodeStep.__init__

        def on_cuda(decode_step, model):
            begin(decode_step, model)
            decode_step.captured = True
            decode_step.group = 8

        monkeypatch.setattr(step.DecodeStep, "__init__", on_cuda)
        fresh = functools.cache(step.workshop.__wrapped__)  # what is cached now is of other graphs
        monkeypatch.setattr(step, "workshop", fresh)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", self.graph)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "current_stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())

    @property
    def captures(self):
        """How many decode steps were captured; the first graph only holds the pool."""
        return len(self.graphs) - 1

    @property
    def replays(self):
        return sum(graph.replays for graph in self.graphs)


# ----------------------------------------------------------------------------------------- memory


class Peak(TorchDispatchMode):
    """The most bytes that tensors made while this lasts hold at a time; on meta they hold none."""

    def __init__(self):
        super().__init__()
        self.live = 0
        self.bytes = 0
        self.tensors = {}  # storage -> how many tensors hold it

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {storage_of(leaf) for leaf in tree_leaves((args, kwargs)) if is_tensor(leaf)}
        result = function(*args, **kwargs)
        for tensor in filter(is_tensor, tree_leaves(result)):
            storage = storage_of(tensor)
            size = tensor.untyped_storage().nbytes()
            if storage not in self.tensors:
                if storage in given:  # of a tensor that was there before
                    continue
                self.tensors[storage] = 0
                self.live += size
                self.bytes = max(self.bytes, self.live)
            self.tensors[storage] += 1
            weakref.finalize(tensor, self._let_go, storage, size)
        return result

    def _let_go(self, storage, size):
        self.tensors[storage] -= 1
        if self.tensors[storage] == 0:
            del self.tensors[storage]
            self.live -= size


def is_tensor(leaf):
    return isinstance(leaf, torch.Tensor)


def storage_of(tensor):
    return tensor.untyped_storage()._cdata
