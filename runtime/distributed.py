"""Several processes, a GPU each: questions are divided among them, and so are masters, gradients
and the optimiser's state.

    torchrun --nproc_per_node=8 train.py --preset gpu             # eight GPUs of one machine;
                                                                  README has several machines
    python memory.py --ranks 8                                    # what a rank holds, and what goes
                                                                  over the wires; computed

The idea. Trees have nothing to do with each other, so each rank grows those of its share of the
questions, alone: its sampler has a whole copy of the weights, in the compute type. To train, a rank
needs every block's weights for a moment, and holds but a slice of the masters: torch's
`fully_shard` gathers a block in the compute type when it is computed, lets it go behind it, and
sums its gradient into slices (FSDP2; ZeRO, arXiv 1910.02054, stage 3). What is left to be said is
here:

    share      which questions are mine                  total     counts of all ranks, before the
               first backward
    shard      the model, block by block                 whole     one parameter again, for the
               sampler and for files
    rank0      who writes                                run       who says what went wrong, and how
               all of them end

With one process each of these does nothing, and train.py is plain torch.

Letters: W ranks (processes).
"""

import contextlib
import datetime
import functools
import hashlib
import os
import sys
import threading
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from model import GPT
from runtime.flags import BadInput, guarded, processes

# for a rank that has nothing to do while rank 0 makes a base, or writes a large state
PATIENCE = datetime.timedelta(hours=12)
SILENCE = 120  # seconds after which a rank that gives no sign of life is taken for dead
GRACE = 2  # seconds for the rank that failed to be the first to end


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def size():
    """W"""
    return dist.get_world_size() if dist.is_initialized() else 1


# ---- who has what --------------------------------------------------------------------------------


def share(count):
    """This rank's range of `count` things: contiguous, in the order of ranks, equal where W divides
    count."""
    return range(count * rank() // size(), count * (rank() + 1) // size())


def total(numbers):
    """{name: number} of this rank -> {name: sum over ranks}. The names, and their order, must be
    the same everywhere."""
    return reduced(numbers, dist.ReduceOp.SUM)


def most(number):
    """The largest of all ranks' numbers."""
    return reduced(dict(number=number), dist.ReduceOp.MAX)["number"]


def reduced(numbers, how):
    if size() == 1:
        return numbers
    values = torch.tensor([float(number) for number in numbers.values()], dtype=torch.float64)
    dist.all_reduce(values, how)
    return dict(zip(numbers, values.tolist()))


def everyone(thing):
    """[thing of rank 0, thing of rank 1, ...] on every rank; a thing is whatever pickle takes."""
    things = [thing] * size()
    if size() > 1:
        dist.all_gather_object(things, thing)
    return things


def from_rank0(make):
    """What make() gives on rank 0, on every rank."""
    box = [make() if rank() == 0 else None]
    if size() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def agree(what, thing):
    """BadInput when ranks do not have the same `thing`: what follows would be two runs in one."""
    if len(set(everyone(hashlib.sha256(repr(thing).encode()).hexdigest()))) > 1:
        raise BadInput(
            f"the processes of this run do not have the same {what}: all machines need the same "
            "code, flags and files"
        )


def rank0(write):
    """A function that rank 0 calls, and that is passed over on other ranks."""
    return functools.wraps(write)(
        lambda *args, **keywords: write(*args, **keywords) if rank() == 0 else None
    )


# ---- the model -----------------------------------------------------------------------------------


def shard(model):
    """Cuts a model whose weights are equal on all ranks into slices: fp32 masters, gathered in the
    compute type block by block -> it.

    Embeddings, last norm and head stay fp32 when gathered, as one process has them: the gradient of
    the head is a sum over chunks of tokens. Gradients are summed over ranks, not averaged:
    denominators count all ranks' rows already.
    """
    if size() > 1:
        mesh = init_device_mesh(model.embed.weight.device.type, (size(),))
        policy = MixedPrecisionPolicy(
            param_dtype=model.compute, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh)
        for part in (*model.blocks, model):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # without it a factor is NCCL's alone
    return model


def released(model):
    """Lets go of what a forward pass without a backward pass has left gathered: fully_shard keeps
    the root's own parameters, for a backward pass that is not coming, and until then they are no
    slices."""
    if size() > 1:
        model.reshard()


def whole(x, dtype=None):
    """A tensor as it is; of a slice the whole, gathered in the type asked for (all ranks must
    call)."""
    return x.detach().to(dtype or x.dtype).full_tensor() if isinstance(x, DTensor) else x


def local(x):
    """This rank's part of a tensor, with the same memory."""
    return x.to_local() if isinstance(x, DTensor) else x


def broadcast(model):
    """Gives every rank the parameters of rank 0's model -> the model."""
    for parameter in model.parameters() if size() > 1 else ():
        dist.broadcast(parameter.detach(), 0)
    return model


def gathered(model):
    """model.state_dict() with whole parameters, gathered one by one: of a model in slices on rank
    0's CPU, and None on other ranks."""
    found = {parameter: on_rank0(parameter.detach(), parameter) for parameter in model.parameters()}
    return {
        name: found[parameter] for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def gathered_optimizer(optimizer, params):
    """optimizer.state_dict() with whole tensors, as `gathered` has them."""
    state, params = optimizer.state_dict(), list(params)
    moments = {
        i: {name: on_rank0(value, params[i]) for name, value in found.items()}
        for i, found in state["state"].items()
    }
    return state | dict(state=moments)


def on_rank0(value, like):
    """`value`, a slice as `like` is one (moments on the host are bare), whole on rank 0's CPU; None
    on the others. Else as it is."""
    if not isinstance(like, DTensor) or value.dim() == 0:
        return value
    value = (value if isinstance(value, DTensor) else as_slice(value, like)).full_tensor()
    return value.cpu() if rank() == 0 else None


def as_slice(value, like):
    """This rank's part of a tensor -> the slice that `like` would be of it."""
    return DTensor.from_local(
        value.to(like.device),
        like.device_mesh,
        like.placements,
        shape=like.shape,
        stride=like.stride(),
    )


def scattered_optimizer(state, params):
    """What gathered_optimizer gave, read by every rank -> the same in slices."""

    def part(value, like):
        if not isinstance(like, DTensor) or value.dim() == 0:
            return value
        pieces = value.chunk(size())  # as fully_shard cuts them; there may be fewer than ranks
        return as_slice(pieces[rank()] if rank() < len(pieces) else value[:0], like)

    params = list(params)
    return state | dict(
        state={
            i: {name: part(value, params[i]) for name, value in found.items()}
            for i, found in state["state"].items()
        }
    )


def traffic(config, compute, ranks, passes, reference=False):
    """-> {what: bytes} that a rank receives in a step (and sends as many), computed: rings, which
    move (W - 1) / W of a tensor.

    passes: micro-batches of a rank, all minibatches and layers together. A reference's embeddings
    stay once gathered. tests/test_parallel.py counts what torch is asked to move.
    """
    with torch.device("meta"):
        model = GPT(config)
    wide, (numbers, blocks) = (
        compute.itemsize,
        [sum(p.numel() for p in part.parameters()) for part in (model, model.blocks)],
    )
    moved = {
        "gathered forward": passes * (wide * blocks + 4 * (numbers - blocks)),
        "gathered backward": passes * wide * blocks,
        "gradients": passes * 4 * numbers,
        "reference": passes * wide * blocks if reference else 0,
        "sampler": wide * numbers,
    }
    return {what: count * (ranks - 1) / ranks for what, count in moved.items()}


# ---- begin, fail, and end ------------------------------------------------------------------------


def run(main):
    """guarded(main) on each of the processes that torchrun started; without it, in this one.

    Rank 0 alone has a screen. The first rank to fail says why, in its own words; the others, which
    would wait for it in a collective (NCCL's for hours), are ended within seconds, and need not say
    that they lost it.
    """
    if processes() == 1:
        return guarded(main)
    store, code = join(), 0
    threading.Thread(target=watch, args=(store.clone(),), daemon=True).start()
    first = lambda: says_so(store)
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - to the end of the process
    try:
        # most: together, so that nobody's end looks like a failure
        guarded(lambda: [main(), most(0)], first, lost)
    except SystemExit as end:
        code = end.code or 0
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a reader that has left
            stream.flush()
    if code:
        time.sleep(1)  # others look twice a second who has failed
    os._exit(code)  # threads of torch's may abort when Python ends under them


def says_so(store):
    """Whether this process is the first that fails. So it is taken to be when the store is gone
    too."""
    try:
        return store.add(key("failed"), 1) == 1
    except RuntimeError:
        return True


def key(name):
    """Its name in the store, which torchrun keeps when it starts everything anew
    (--max-restarts)."""
    return name + os.environ.get("TORCHELASTIC_RESTART_COUNT", "")


def lost(error):
    """What to say of an exception of a collective, whose cause lies in another process; nothing for
    any other."""
    if isinstance(error, dist.DistError) or "gloo" in str(error):
        return (
            f"error: rank {rank()} lost another process, which the system may have ended "
            f"(memory?), or its way to it: {error}. "
            "What was saved is intact"
        )
    return ""


def join():
    """Sets up the processes' communication, counts and objects by gloo, tensors on CUDA by NCCL ->
    the store that they share."""
    if torch.cuda.is_available() and int(os.environ["LOCAL_RANK"]) < torch.cuda.device_count():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, number, count = next(dist.rendezvous("env://", timeout=PATIENCE))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(key("ranks"), store),
        rank=number,
        world_size=count,
        timeout=PATIENCE,
    )
    return store


def watch(store):
    """Ends this process when another one has failed, or died without a word: each gives signs of
    life, and looks for its neighbour's."""
    mine, neighbour = (key(f"alive{number % size()}") for number in (rank(), rank() + 1))
    seen, when = 0, time.monotonic()
    try:
        while not store.check([key("failed")]) and time.monotonic() - when < SILENCE:
            store.add(mine, 1)
            if (found := store.add(neighbour, 0)) != seen:
                seen, when = found, time.monotonic()
            time.sleep(0.5)
        if not store.check([key("failed")]):
            says_so(store)
            print(
                f"error: rank {(rank() + 1) % size()} gives no sign of life; what was saved is "
                "intact",
                file=sys.stderr,
                flush=True,
            )
    except RuntimeError:  # the store has gone with the machine that kept it
        pass
    time.sleep(GRACE)
    os._exit(1)
