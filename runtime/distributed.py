"""Several processes, a GPU each: they share the questions, and each holds a slice of the weights.

    torchrun --nproc_per_node=8 train.py --preset gpu      # eight GPUs of one machine

Rollouts of different questions are independent, so each rank samples those of its own share. Its
sampler has a whole copy of the weights in the compute type. For training, each rank holds a slice
of the fp32 weights, gradients and moments (FSDP2; ZeRO, arXiv 1910.02054, stage 3): a block's
weights are gathered when the block is computed, and its gradient is summed into slices.

With one process every function here does nothing, and train.py is plain torch.

Letters: W ranks (processes).
"""

import contextlib
import datetime
import functools
import hashlib
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from runtime.flags import BadInput, guarded, processes

# A collective that takes longer is an error. Ranks wait for rank 0 while it trains a base model or
# writes a large state, so minutes would be too short.
TIMEOUT = datetime.timedelta(hours=2)


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def size():
    """W"""
    return dist.get_world_size() if dist.is_initialized() else 1


# ---- counts and objects --------------------------------------------------------------------------


def share(count):
    """This rank's range of `count` items: contiguous, in the order of ranks, equal where W divides
    count."""
    return range(count * rank() // size(), count * (rank() + 1) // size())


def sum_over_ranks(numbers):
    """{name: number} of this rank -> {name: sum over ranks}. All ranks need the same names in the
    same order."""
    return reduced(numbers, dist.ReduceOp.SUM)


def max_over_ranks(number):
    """The largest of all ranks' numbers."""
    return reduced(dict(number=number), dist.ReduceOp.MAX)["number"]


def reduced(numbers, operation):
    if size() == 1:
        return numbers
    # one collective for all of them, in a type that counts tokens exactly
    values = torch.tensor([float(number) for number in numbers.values()], dtype=torch.float64)
    dist.all_reduce(values, operation)
    return dict(zip(numbers, values.tolist()))


def gather_objects(thing):
    """-> [object of rank 0, object of rank 1, ...] on every rank; any object that pickle takes."""
    things = [thing] * size()
    if size() > 1:
        dist.all_gather_object(things, thing)
    return things


def broadcast_object(make):
    """Calls make() on rank 0 -> its result, on every rank."""
    box = [make() if rank() == 0 else None]
    if size() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def agree(what, thing):
    """BadInput unless all ranks have an equal `thing`: different flags or data on two machines
    would otherwise be trained as one run."""
    # 64 characters are gathered from each rank, however long the thing is.
    digest = hashlib.sha256(repr(thing).encode()).hexdigest()
    if len(set(gather_objects(digest))) > 1:
        raise BadInput(
            f"the processes of this run do not have the same {what}: all machines need the same "
            "code, flags and files"
        )


def rank0(write):
    """Decorator: only rank 0 calls the function, other ranks return None."""

    @functools.wraps(write)
    def on_rank0(*args, **keywords):
        return write(*args, **keywords) if rank() == 0 else None

    return on_rank0


# ---- the model -----------------------------------------------------------------------------------


def broadcast(model):
    """Gives every rank the parameters of rank 0's model -> the model."""
    for parameter in model.parameters() if size() > 1 else ():
        dist.broadcast(parameter.detach(), 0)
    return model


def shard(model):
    """Cuts a model whose weights are equal on all ranks into slices, in place -> the model.

    Blocks are gathered in the compute type. Embeddings, last norm and head are gathered in fp32, as
    one process has them: the gradient of the head is a sum over chunks of tokens.
    """
    if size() > 1:
        mesh = init_device_mesh(model.embed.weight.device.type, (size(),))
        precision = MixedPrecisionPolicy(
            param_dtype=model.compute, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        # One unit for each block: its weights are gathered when it is computed, and freed again.
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=precision)
        fully_shard(model, mesh=mesh)
        for part in (*model.blocks, model):
            # a sum over ranks, not a mean: the denominators of the loss count all ranks' rows
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo knows no other factor than 1 / W
    return model


def release(model):
    """Frees what a forward pass without a backward pass left gathered. fully_shard keeps the
    embeddings and the head for the backward pass; until then they are not slices."""
    if size() > 1:
        model.reshard()


def full_tensors(model, dtype=None):
    """Iterates over the model's parameters as whole tensors in `dtype` (None: their own), in the
    order of model.parameters(). All ranks must iterate to the end."""
    release(model)
    for parameter in model.parameters():
        # cast before the gather: half of the bytes for a bf16 copy
        tensor = parameter.detach().to(dtype or parameter.dtype)
        yield tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def clip_gradient(model, limit):
    """Scales the gradient to a norm of at most `limit` -> its norm before, over all ranks' slices.
    A gradient that is not finite stays so; its norm shows it."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


# ---- states --------------------------------------------------------------------------------------


def full_state(model, optimizer):
    """-> weights {name: tensor}, moments {name of a parameter: {"step", "exp_avg", "exp_avg_sq"}},
    whole, on rank 0's CPU. Other ranks get two empty dicts. All ranks must call.

    Of a model on a CPU in one process these are its own tensors, not copies: save them at once.
    """
    release(model)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    # (torch would fill an optimizer without moments by a step on gradients of zero, and count it)
    moments = {}
    if optimizer.state:
        moments = get_optimizer_state_dict(model, optimizer, options=options)
        moments = moments.get("state", {})  # rank 0 alone has it
    return full_weights(model), moments


def full_weights(model):
    """The first of what `full_state` returns. All ranks must call."""
    release(model)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    # tied weights stay one tensor, or a file would hold them twice
    return {name: weights[first] for name, first in names(model).items()} if weights else {}


def load_full_state(model, optimizer, weights, moments):
    """Puts rank 0's weights and moments, of `full_state`, into a model and its optimizer, on any
    number of ranks. Learning rate and other settings of the optimizer stay. All ranks must call."""
    options = load_full_weights(model, weights)
    # Only rank 0 has moments, and setting them is a collective: all ranks must take the same
    # branch.
    if broadcast_object(lambda: bool(moments)):
        names_of = {parameter: name for name, parameter in model.named_parameters()}
        # torch takes names where the optimizer has tensors.
        groups = [
            group | dict(params=[names_of[parameter] for parameter in group["params"]])
            for group in optimizer.param_groups
        ]
        state = dict(state=moments, param_groups=groups) if rank() == 0 else {}
        set_optimizer_state_dict(model, optimizer, state, options=options)


def load_full_weights(model, weights):
    """Puts rank 0's weights into a model -> the options that did. All ranks must call."""
    release(model)
    options = StateDictOptions(
        full_state_dict=True, broadcast_from_rank0=size() > 1, strict=False
    )  # not strict: tied weights are loaded once
    first = {name: weights[name] for name in set(names(model).values()) & weights.keys()}
    set_model_state_dict(model, first if rank() == 0 else {}, options=options)
    return options


def names(model):
    """-> {name of a weight: the first name of the same parameter}: a tied head has two names."""
    first = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: first.setdefault(parameter, name) for name, parameter in named}


# ---- begin and end -------------------------------------------------------------------------------


def run(main):
    """guarded(main) on each process that torchrun started; without torchrun, in this process.

    Rank 0 alone writes to stdout. If a rank fails, it prints the error and exits; torchrun then
    ends the other ranks. Their errors are consequences (a closed connection) and are not printed.
    """
    if processes() == 1:
        return guarded(main)
    store, code = join(), 0
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - to the end of the process
    try:
        guarded(lambda: to_the_end(main), first=lambda: is_first_failure(store))
    except SystemExit as end:
        code = end.code or 0
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a reader that has left
            stream.flush()
    os._exit(code)  # threads of torch may abort when Python ends under them


def join():
    """Connects the processes: counts and objects by gloo, tensors on CUDA by NCCL -> the store that
    they share."""
    if torch.cuda.is_available() and int(os.environ["LOCAL_RANK"]) < torch.cuda.device_count():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, number, count = next(dist.rendezvous("env://", timeout=TIMEOUT))
    # torchrun may keep its store when it restarts the processes (--max-restarts)
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=TIMEOUT)
    return store


def to_the_end(main):
    """main(), and a collective after it: a rank that ends early would look like a failure. BadInput
    for an error of a collective, whose cause lies in another process."""
    try:
        main()
        max_over_ranks(0)
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error).lower():
            raise BadInput(
                f"rank {rank()} lost the connection to another process, which the system may have "
                f"ended (out of memory?): {error}. What was saved is intact"
            ) from error
        raise


def is_first_failure(store):
    """Whether this rank is the first to fail; True as well if the store is gone."""
    try:
        # The store adds one process at a time, so exactly one of them gets 1.
        return store.add("failed", 1) == 1
    except RuntimeError:
        return True
