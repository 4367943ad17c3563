"""`stop.launch_check_resume` on the fast batch, where its rows fit the memory.
test_9_launch_check_resume (tests/test_invariants.py) compares them.
"""
import stop as story
from engine.refill import Batch
from plumbing import memory
from stop import row_capacities, stages_of


def launch_check_resume(model, stop, prompt_ids, n=64, keep=8, prefix=None, stages=None,
                        max_new_tokens=None, bar=None, **more):
    """`stop.launch_check_resume`. bar: a progress bar that counts tokens, its total n x the limit.
    ValueError too where the rows do not fit the free memory."""
    stages = stages_of(stop, keep, prefix, stages)
    limit = stop.limit(model, prompt_ids, max_new_tokens)

    def new_batch(*paths_and_how):  # made once the stages have been validated
        require_rows(model, n, stages, row_capacities(stop, prompt_ids, stages, limit))
        return Batch(*paths_and_how, bar=bar)

    return story.launch_check_resume(
        model, stop, prompt_ids, n, stages=stages, max_new_tokens=limit, new_batch=new_batch,
        **more)


def require_rows(model, n, stages, capacities):
    """Raise ValueError where the rows of a stretch do not fit the free memory: all prefixes are
    held until they are checked. capacities: positions of a row before each check, and behind the
    last."""
    element = model.model.embed_tokens.weight.element_size()
    free = memory.free_bytes(model.device)
    rows = [n] + [stage.keep * stage.branch for stage in stages]
    for count, capacity in zip(rows, capacities):
        needed = count * memory.row_bytes(model.config, capacity, element)
        if needed > free:
            raise ValueError(
                f"n: found {n}; {count} rows of {capacity:,} positions need "
                f"{needed / memory.GB:.1f} GB, {free / memory.GB:.1f} GB are free: lower --n, "
                "--keep or --prefix")
