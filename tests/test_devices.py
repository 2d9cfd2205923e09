"""What depends on the device: precision, copies, checkpointing, compiling, frozen weights."""

import copy
import inspect
import subprocess
import sys
import textwrap
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import GPT2LMHeadModel

from minippo.app import stages
from minippo.app.launch import pick_device, prepared
from minippo.config import RunConfig
from minippo.engine.devices import (
    at_least_float32,
    autocast,
    checkpoint_layers,
    compile_forward,
    precision,
    stored_as,
    to_device,
)
from minippo.engine.packing import pack, packed_logits, packed_values
from minippo.engine.passes import cache_argument, cache_of
from minippo.generation import generate
from minippo.models import RewardModel, ValueModel, frozen_copy, tiny_gpt2
from minippo.optim import adamw

CPU = torch.device("cpu")


@pytest.fixture
def policy():
    return tiny_gpt2(40, n_layer=3, n_embd=16, n_head=2, n_positions=64)


@pytest.fixture
def batch():
    """Tokens and attention mask of two queries, one of them padded, and their responses."""
    tokens = torch.randint(2, 40, (2, 24))
    mask = torch.ones(2, 24, dtype=torch.bool)
    mask[0, :3] = False
    mask[1, 20:] = False
    return tokens, mask


def in_bfloat16():
    """Whether a matrix product is in bfloat16 under minippo's autocast."""
    with autocast(CPU):
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_precision_holds_inside_and_is_given_back():
    assert not in_bfloat16()
    with precision("bf16"):
        assert in_bfloat16()
        with precision("off"):
            assert not in_bfloat16()
        assert in_bfloat16()
    with pytest.raises(KeyError), precision("bf16"):
        raise KeyError
    assert not in_bfloat16()


def test_auto_is_float32_on_the_cpu_and_bfloat16_on_cuda():
    with precision("auto"):
        assert not in_bfloat16()
        if torch.cuda.is_available():
            assert autocast(torch.device("cuda"))._enabled
        else:  # torch says that it would have
            with pytest.warns(UserWarning, match="CUDA is not available"):
                autocast(torch.device("cuda"))
    with precision("off"), warnings.catch_warnings():
        warnings.simplefilter("error")
        autocast(torch.device("cuda"))


def test_tf32_is_asked_for_and_given_back():
    assert torch.get_float32_matmul_precision() == "highest"
    with precision(tf32=True):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == "highest"


def test_formulas_get_float32_and_float64_stays():
    for half in (torch.bfloat16, torch.float16):
        assert at_least_float32(torch.ones(1, dtype=half)).dtype == torch.float32
    assert at_least_float32(torch.ones(1, dtype=torch.float64)).dtype == torch.float64


def test_copies_to_the_cpu_are_none():
    x = torch.ones(3)
    assert to_device(x, CPU) is x


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_freed_memory_is_kept():
    program = """
        import ctypes, resource, torch
        ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # no huge pages: 100 MB are 1,500 pages or more
        from minippo.app.launch import keep_freed_memory
        def new_pages():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.ones(25_000_000)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        given_back = [new_pages() for _ in range(3)]
        does = keep_freed_memory()
        kept = [new_pages() for _ in range(20)]  # the heap has to grow first
        print(int(does), given_back[-1], kept[-1])
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    does, given_back, kept = map(int, subprocess.check_output(command, text=True).split())
    if not does:
        pytest.skip("this libc refuses")
    assert given_back > 1000 > 10 * kept


def test_every_stage_keeps_freed_memory(monkeypatch):
    calls = []
    monkeypatch.setattr(stages, "keep_freed_memory", lambda: calls.append(1))
    run = SimpleNamespace(config=RunConfig(), close=lambda: None)
    assert stages._closing(lambda run, x: x + len(calls))(run, 1) == 2  # before the stage begins


def test_an_unknown_device_is_refused_and_so_is_compiling_without_cuda(policy):
    with pytest.raises(ValueError, match="use auto, cpu or cuda"):
        pick_device("gpu")
    with pytest.raises(ValueError, match="--compile is for CUDA"):
        prepared(policy, RunConfig(device="cpu", compile=True))


# --- checkpointing ----------------------------------------------------------------------------


def gradients(model, forward):
    """Gradients of a scalar, and the bytes that were kept for the backward pass."""
    kept, own = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    model.zero_grad()
    with saved_tensors_hooks(pack, lambda x: x):
        loss = forward(model).square().mean()
    loss.backward()
    return [p.grad.clone() for p in model.parameters()], sum(kept.values())


MODELS = {
    "policy": lambda policy: policy,
    "reward": RewardModel.from_policy,
    "value": ValueModel.from_policy,
}


@pytest.mark.parametrize("name", MODELS)
def test_checkpointed_layers_give_the_same_gradients_and_keep_less(name, policy, batch):
    packed = pack(*batch, batch[1][:, -8:])
    forward = {
        "policy": lambda model: packed_logits(model, packed),
        "reward": lambda model: model(*batch),
        "value": lambda model: packed_values(model, packed),
    }[name]
    model = MODELS[name](policy)
    plain, all_bytes = gradients(model, forward)
    checkpoint_layers(model)
    again, fewer_bytes = gradients(model, forward)
    for got, expected in zip(again, plain):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    assert fewer_bytes < 0.5 * all_bytes


def test_a_checkpointed_model_samples_with_its_cache_and_its_copy_is_its_own(policy):
    query = torch.randint(2, 40, (3, 5))
    plain = generate(policy, query, torch.ones_like(query), 12, 1, 0, seed=0)
    checkpoint_layers(policy)
    copied = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()
    assert torch.equal(generate(copied, query, torch.ones_like(query), 12, 1, 0, seed=0), plain)


def test_rankings_are_read_whole_where_layers_are_checkpointed(policy):
    """A pass over a cache is not recomputed: there the option would do nothing."""
    reward_model = RewardModel.from_policy(policy)
    query, response = torch.randint(2, 40, (2, 5)), torch.randint(2, 40, (2, 2, 3))
    masks = torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 2, 3, dtype=torch.bool)
    tensors = (query, masks[0], response, masks[1])
    plain, all_bytes = gradients(reward_model, lambda m: m.score_candidates(*tensors))
    checkpoint_layers(reward_model)
    again, fewer_bytes = gradients(reward_model, lambda m: m.score_candidates(*tensors))
    assert fewer_bytes < 0.5 * all_bytes
    for got, expected in zip(again, plain):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(ValueError, match="Linear has no layers that can be recomputed"):
        checkpoint_layers(torch.nn.Linear(2, 2))


# --- compiling --------------------------------------------------------------------------------


def test_a_compiled_forward_gives_the_same_and_sampling_is_not_compiled(batch):
    policy = tiny_gpt2(40, n_layer=1, n_embd=16, n_head=2, n_positions=64)
    compiled, graphs = copy.deepcopy(policy), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def logits(model, length):
        rows = tuple(x[:, :length].contiguous() for x in batch)
        return packed_logits(model, pack(*rows, rows[1][:, -8:]))

    compile_forward(compiled, backend)
    query = torch.randint(2, 40, (3, 5))
    limits = (torch.ones_like(query), 4, 1, 0)
    sampled = [generate(m, query, *limits, seed=0) for m in (compiled, policy)]
    assert torch.equal(*sampled) and not graphs
    with torch.no_grad():
        for length in (24, 22, 18):
            torch.testing.assert_close(logits(compiled, length), logits(policy, length))
        logits(frozen_copy(compiled), 24)  # compiled is the model, not its copy
    assert len(graphs) == 1  # a length is no reason to compile again


# --- frozen weights ---------------------------------------------------------------------------


def test_frozen_weights_in_bfloat16_take_half_and_the_head_stays(policy, batch):
    reward_model = RewardModel.from_policy(policy)
    small = stored_as(frozen_copy(reward_model), "bfloat16")
    weights = dict(small.named_parameters())
    head = weights.pop("classifier.score.weight")
    assert head.dtype == torch.float32
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    got, expected = small(*batch), reward_model(*batch)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0, atol=0.02)
    assert {p.dtype for p in reward_model.parameters()} == {torch.float32}


def test_a_trained_parameter_takes_16_bytes_and_a_frozen_one_4_or_2(policy):
    # The arithmetic of docs/cuda.md: weight, gradient and the two moments of AdamW in float32.
    optimizer = adamw({"policy": policy}, {"policy": 1e-3})
    policy(torch.ones(1, 2, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    parameters = list(policy.parameters())
    moments = [x for state in optimizer.state.values() for x in state.values() if x.dim()]
    taken = sum(x.nbytes for x in (*parameters, *(p.grad for p in parameters), *moments))
    count = sum(p.numel() for p in parameters)
    assert taken == 16 * count
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        frozen = stored_as(frozen_copy(policy), dtype)
        assert sum(p.nbytes for p in frozen.parameters()) == size * count


# --- the cache under the name that a version of transformers gives it -----------------------------


def with_forward(forward):
    """A class of models with this forward."""
    return type("Model", (), {"forward": forward})


def test_a_cache_is_handed_on_under_the_name_that_the_model_gives_it():
    old = with_forward(lambda self, input_ids, past_key_values=None: None)
    new = with_forward(lambda self, input_ids, cache=None: None)
    assert (cache_argument(old), cache_argument(new)) == ("past_key_values", "cache")
    of_transformers = cache_argument(GPT2LMHeadModel)
    assert cache_argument(with_forward(lambda self, **inputs: None)) == of_transformers
    assert of_transformers in inspect.signature(GPT2LMHeadModel.forward).parameters


def test_what_a_pass_kept_is_found_under_either_name():
    assert cache_of(SimpleNamespace(past_key_values=1)) == 1
    assert cache_of(SimpleNamespace(cache=2)) == 2
