"""The state of the random generators that a run draws from, and what a process takes of a checkpoint."""

import torch
from accelerate import Accelerator
from torch import Tensor

from kdtrain.console import say


def random_state(device: torch.device) -> Tensor:
    """The state of the generators that dropout and samplers draw from, as one row of bytes."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states).to(device)


def set_random_state(state: Tensor) -> None:
    """The inverse of `random_state`."""
    size = len(torch.get_rng_state())
    # Copies: torch 2.13 reads a view from the start of its storage, which is the state of another process.
    torch.set_rng_state(state[:size].cpu().clone())
    if len(state) > size:
        torch.cuda.set_rng_state(state[size:].cpu().clone())


def own_part(tensors: dict[str, Tensor], accelerator: Accelerator) -> Tensor:
    """This process's running sums out of a checkpoint's tensors; the random state of the process is set.

    Where another number of processes resumes, the sums are divided evenly and dropout draws other numbers.
    """
    sums, count = tensors["sums"].to(accelerator.device), accelerator.num_processes
    if len(sums) == count:
        set_random_state(tensors["random"][accelerator.process_index])
        return sums[accelerator.process_index]
    if accelerator.is_main_process:
        say(
            f"the checkpoint is of {len(sums)} processes, {count} go on: the same steps, up to the order of sums"
        )
    # The norm, which every process adds whole, is divided by the number of processes later.
    whole = sums.sum(0) / count
    whole[-1] = sums[:, -1].mean()
    return whole
