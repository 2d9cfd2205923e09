"""How often the host waits for the device: never in the update, a stated number elsewhere.

Proved on a fake device (fake_cuda.py), which is itself proved first.
"""

import pytest
import torch
from fake_cuda import FakeCuda, fake_device


@pytest.fixture(scope="module")
def device():
    return fake_device()


@pytest.fixture
def gpu(device):
    with FakeCuda() as gpu:
        yield gpu


def kinds(gpu):
    return [wait.kind for wait in gpu.waits]


ASKING = {
    "item": ("scalar", lambda x: x[0].item()),
    "float": ("scalar", lambda x: float(x.sum())),
    "int": ("scalar", lambda x: int(x[1])),
    "bool": ("scalar", lambda x: bool(x[1] > 0)),
    "if any": ("scalar", lambda x: 1 if (x > 0).any() else 0),
    "equal": ("scalar", lambda x: torch.equal(x, x)),
    "allclose": ("scalar", lambda x: torch.allclose(x, x)),
    "cpu": ("to host", lambda x: x.cpu()),
    "to cpu": ("to host", lambda x: x.to("cpu")),
    "to cpu, non_blocking": ("to host", lambda x: x.to("cpu", non_blocking=True)),
    "tolist": ("to host", lambda x: x.tolist()),
    "copy to the host": ("to host", lambda x: torch.empty(3).copy_(x)),
    "mask": ("shape", lambda x: x[x > 0]),
    "write by mask": ("shape", lambda x: x.index_put_((x > 0,), x[:2] + 1)),
    "nonzero": ("shape", lambda x: x.nonzero()),
    "where": ("shape", lambda x: torch.where(x > 0)),
    "masked_select": ("shape", lambda x: x.masked_select(x > 0)),
    "unique": ("shape", lambda x: x.unique()),
    "repeat_interleave": ("shape", lambda x: x.repeat_interleave((x + 1).long())),
    "blocking copy": ("to device", lambda x: torch.ones(3).to(x.device)),
    "tensor": ("to device", lambda x: torch.tensor([1.0], device=x.device)),
    "new_tensor": ("to device", lambda x: x.new_tensor([1.0])),
    "indices of the host": ("to device", lambda x: x[torch.tensor([0, 1])]),
    "list of indices": ("to device", lambda x: x[[0, 1]]),
    "pageable": ("pageable", lambda x: torch.ones(3).to(x.device, non_blocking=True)),
}


@pytest.mark.parametrize("name", ASKING)
def test_the_fake_notices(gpu, name):
    kind, ask = ASKING[name]
    x = torch.arange(3.0, device=gpu.device)
    assert not gpu.waits
    ask(x)
    assert kinds(gpu) == [kind]
    assert gpu.waits[0].place.startswith("test_host_syncs.py:")


def test_numpy_and_mixed_devices_are_refused_as_by_cuda(gpu):
    x = torch.arange(3.0, device=gpu.device)
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()
    with pytest.raises(RuntimeError, match="one device"):
        x + torch.ones(3)


QUIET = {
    "arithmetic": lambda x: (x * 2 + 1).softmax(-1).cumsum(-1),
    "a number of the host": lambda x: x * torch.tensor(2.0),
    "masked_fill": lambda x: x.masked_fill(x > 1, 0),
    "write a number by mask": lambda x: x.index_put_((x > 0,), torch.zeros_like(x[0])),
    "indices": lambda x: x[torch.arange(2, device=x.device)],
    "slice": lambda x: x[1:],
    "factories": lambda x: torch.full((3,), 2.0, device=x.device) + x.new_zeros(3),
    "pinned copy": lambda x: torch.ones(3).pin_memory().to(x.device, non_blocking=True),
    "repeat": lambda x: x.repeat_interleave(2),
}


@pytest.mark.parametrize("name", QUIET)
def test_the_fake_leaves_alone(gpu, name):
    QUIET[name](torch.arange(3.0, device=gpu.device))
    assert gpu.waits == []


def test_arithmetic_and_gradients_are_those_of_the_cpu(gpu):
    def gradient(device):
        torch.manual_seed(0)
        layer = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU(), torch.nn.Linear(4, 1))
        layer.to(device)
        x = torch.arange(8.0).view(2, 4).to(device)
        layer(x).square().mean().backward()
        return [p.grad.cpu() for p in layer.parameters()]

    for fake, real in zip(gradient(gpu.device), gradient("cpu")):
        assert type(fake) is torch.Tensor and torch.equal(fake, real)
