"""The same work in PyTorch: as the paper's code does it, and as well as PyTorch can."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from ur_jax.encoders.zoo import ENCODERS
from ur_jax.performance import torch_networks, work
from ur_jax.performance.timing import Workload

PUBLISHED = "PyTorch, as published"
BEST = "PyTorch, best"


def workloads(name: str, size: work.Size) -> list[Workload]:
    """PyTorch's implementations of a work; none where there is nothing to compare with.

    "As published" is eager float32 and back-propagates into the weights as well; "best" has frozen
    weights, the case's dtype, channels-last layout and, where it works, `torch.compile`.
    """
    make = {"u_pgd": _u_pgd, "forward": _forward, "noisy": _noisy, "center": _center}.get(name)
    if make is None:
        return []
    if name == "center":
        return [make(size)]
    try:
        network = torch_networks.make_network(ENCODERS[size.encoder])
    except ValueError:
        return []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.cuda.empty_cache()  # the memory of the case before
    images = torch.from_numpy(work.random_images(size)).permute(0, 3, 1, 2).contiguous().to(device)
    published = make(network.to(device), images, size, PUBLISHED)
    return [published, _best(make, size, images)]


def _best(make: Callable[..., Workload], size: work.Size, images: torch.Tensor) -> Workload:
    """Frozen, in the case's dtype, channels last, compiled where that works."""
    last = torch.channels_last
    network = torch_networks.make_network(ENCODERS[size.encoder]).to(images.device)
    inner = network.get_submodule("network").to(dtype=getattr(torch, size.dtype))
    inner.to(memory_format=last)  # pyright: ignore[reportCallIssue]
    network.requires_grad_(False)
    images = images.contiguous(memory_format=last)
    try:
        return make(torch.compile(network), images, size, BEST)
    except Exception as error:  # whatever a compiler may raise, the comparison goes on
        note = f"torch.compile failed ({type(error).__name__}); eager"
        return make(network, images, size, BEST)._replace(note=note)


def _u_pgd(network, images, size, name):
    """U-PGD with its history, over the eps and step size of the paper."""
    eps, step_size = 0.05, 0.001

    def attack():
        network.zero_grad(set_to_none=True)
        with torch.no_grad():
            clean = network(images)
            delta = torch.empty_like(images).uniform_(-eps, eps)
            attacked = (images + delta).clamp_(0, 1)
        history = []
        for _ in range(size.num_steps):
            attacked.requires_grad_(True)
            representations = network(attacked)
            objective = (representations - clean).square().sum()
            if name == PUBLISHED:  # into the weights as well
                objective.backward()
                gradient = attacked.grad
                assert gradient is not None
            else:
                (gradient,) = torch.autograd.grad(objective, attacked)
            with torch.no_grad():
                attacked = attacked + step_size * gradient.sign()
                attacked = torch.minimum(torch.maximum(attacked, images - eps), images + eps)
                attacked = attacked.clamp_(0, 1)
                away, delta = representations - clean, (attacked - images).flatten(1)
                history.append([x.norm(p, dim=1) for x in (away, delta) for p in (1, 2, torch.inf)])
                history[-1].append(F.cosine_similarity(representations, clean))
        with torch.no_grad():
            return network(attacked), history

    return _workload(name, attack, len(images) * size.num_steps)


def _forward(network, images, size, name):
    """Representations of a batch."""

    def run():
        with torch.no_grad():
            return network(images)

    return _workload(name, run, len(images))


def _noisy(network, images, size, name):
    """Representations of noisy samples of one image, in batches."""
    num_batches = -(-size.num_samples // len(images))

    def run():
        with torch.no_grad():
            for _ in range(num_batches):
                noisy = images[:1] + work.SIGMA * torch.randn_like(images)
                output = network(noisy)
        return output

    return _workload(name, run, num_batches * len(images))


def _center(size):
    """The medians of all distances, one sample after the other as the published code has it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dimension = work.make_encoder(size.encoder, size.dtype).dimension
    rows = torch.from_numpy(work.random_rows(size.num_center, dimension)).to(device)

    def run():
        return [torch.median(torch.norm(rows - row, dim=1)) for row in rows]

    return _workload(PUBLISHED, run, 1)


def _workload(name: str, run: Callable[[], Any], items: float) -> Workload:
    """Runs once, which compiles and chooses algorithms."""
    on_gpu = torch.cuda.is_available()

    def waiting():
        result = run()
        if on_gpu:
            torch.cuda.synchronize()
        return result

    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    waiting()
    seconds = time.perf_counter() - started
    memory = torch.cuda.max_memory_allocated() if on_gpu else None
    return Workload(name, waiting, items, seconds, memory=memory)
