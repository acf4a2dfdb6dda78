"""LoRA's products against peft's own, and what they cost besides."""

import pytest
import torch
from peft.tuners.lora.layer import Linear
from torch.utils._python_dispatch import TorchDispatchMode

from diffalign.models import loading, lora
from diffalign.runtime.memory import Live

PRODUCTS = ("aten.mm.", "aten.addmm.", "aten.addmm_.", "aten.bmm.")


def layers(dtype=torch.float32, bias=True, rows=(3, 7)):
    """A model of two linear layers with LoRA, its input, and the layers."""
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.to_q, model.to_k = torch.nn.Linear(24, 40, bias), torch.nn.Linear(40, 16, bias)
    model.to(dtype).requires_grad_(False)
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_k"]), model)
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.data = torch.randn(p.shape)
    x = torch.randn(*rows, 24, dtype=dtype, requires_grad=True)
    return model, x, trained


def passed(model, x, trained):
    """Output, and gradients to the input and what is trained."""
    out = model.to_k(model.to_q(x))
    return [out, *torch.autograd.grad(out.float().square().sum(), [x, *trained])]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(5,), (3, 7), (2, 3, 4)])
def test_lean_products_are_pefts_in_float32(bias, rows):
    model, x, trained = layers(bias=bias, rows=rows)
    theirs = passed(model, x, trained)
    lora.make_lean(model)
    assert type(model.to_q).forward is not Linear.forward
    for ours, expected in zip(passed(model, x, trained), theirs, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5 * float(expected.detach().abs().max()))


def test_bfloat16_products_are_as_near_to_the_exact_ones_as_its_rounding():
    model, x, trained = layers(torch.bfloat16)
    lora.make_lean(model)
    found = passed(model, x, trained)
    exact, x64, trained64 = layers()
    exact.double()
    with torch.no_grad():
        for p, q in zip(exact.parameters(), model.parameters(), strict=True):
            p.copy_(q.double())
    expected = passed(exact, x.detach().double().requires_grad_(), [p for p in exact.parameters() if p.requires_grad])
    for ours, right in zip(found, expected, strict=True):
        assert float((ours.double() - right).norm() / right.norm()) < 2e-2  # a few roundings of 2^-8
    assert all(g.dtype == torch.float32 for g in found[2:])


def test_without_a_graph_the_same_bits_come_out():
    model, x, _ = layers()
    lora.make_lean(model)
    with torch.no_grad():
        sampled = model.to_q(x)
    assert torch.equal(sampled, model.to_q(x))


def test_only_the_trained_adapter_as_it_is_goes_the_short_way():
    """Whatever else peft can be told gives what peft gives: merged ones, none."""
    model, x, _ = layers()
    plain = model.to_q(x)
    lora.make_lean(model)
    layer = model.to_q
    layer.merge()
    torch.testing.assert_close(layer(x), plain, rtol=1e-4, atol=1e-4)
    layer.unmerge()
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x))


class _Wide(TorchDispatchMode):
    """Counts products of float32."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func).startswith(PRODUCTS) and any(
            isinstance(a, torch.Tensor) and a.dtype == torch.float32 for a in args
        ):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["shapes-sd3", "shapes-sd", "shapes-flux", "shapes-wan"])
def test_m12_no_float32_product_under_a_bfloat16_base(name):
    pipe, _ = loading.load(name, torch.bfloat16)
    (module,) = lora.denoisers(pipe).values()
    called = []
    handle = module.register_forward_pre_hook(lambda m, a, k: called.append((a, k)), with_kwargs=True)
    from diffalign.shapes import models

    call = {k: v for k, v in models.call(name).items() if k != "num_inference_steps"}
    pipe("a photo of two stars", num_inference_steps=2, output_type="latent", **call)
    handle.remove()
    args, kwargs = called[0]
    with torch.no_grad():
        base = module(*args, **kwargs)[0]
    trained = lora.attach(pipe, 4, 8.0, None, 0)
    listed = lora.layers(pipe)
    linear = [layer for layer in listed if isinstance(layer.base_layer, torch.nn.Linear)]
    assert linear and len({len(listed), len(linear)}) == 1
    with _Wide() as seen:
        found = module(*args, **kwargs)[0]
        found.float().square().mean().backward()
    # What is no LoRA of ours: time embeddings that the network itself keeps in float32.
    with lora.disabled(listed), _Wide() as own:
        assert torch.equal(module(*args, **kwargs)[0], base)
    assert seen.found == own.found
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trained.values())


def test_no_float32_copy_of_an_input_is_kept():
    """peft's own layers keep one a layer: four bytes for every two."""

    def kept(lean):
        model, x, _ = layers(torch.bfloat16, rows=(64, 64))
        if lean:
            lora.make_lean(model)
        with Live() as live:
            out = model.to_q(x)
        return live.now - out.nbytes

    x = layers(torch.bfloat16, rows=(64, 64))[1]
    assert kept(False) > 2 * x.nbytes
    assert kept(True) < 0.5 * x.nbytes  # A x, and A and B in its precision
