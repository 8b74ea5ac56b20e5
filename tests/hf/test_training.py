"""Training what is float around frozen quantized layers, and torch.compile."""

import pytest
import torch
import transformers
from tiny_models import TINY, output, qlinears, save, tokens

from quanto_hf import QuantoConfig

TYPES = ("int8", "int4", "int2", "float8", "nf4", "fp4")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: save(name, tmp_path_factory.mktemp(name)) for name in ("llama", "opt")}


def load(folder, weights="int4", **kwargs):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=QuantoConfig(weights=weights, **kwargs)
    )


def loss_of(model):
    return model(input_ids=tokens(), labels=tokens()).loss


@pytest.mark.parametrize("activations", [None, "int8"], ids=str)
@pytest.mark.parametrize("weights", TYPES)
def test_biases_norms_and_embeddings_train_and_the_loss_falls(weights, activations, folders):
    model = load(folders["opt"], weights, activations=activations).train()
    stored = {n: t.clone() for n, t in model.state_dict().items() if ".weight_" in n}
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert any("q_proj.bias" in n for n in trainable) and any("layer_norm.weight" in n for n in trainable)
    model.config.dropout = 0.0
    for module in model.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    optimizer = torch.optim.SGD(trainable.values(), lr=1e-3)
    before = loss_of(model)
    before.backward()
    missing = [n for n, p in trainable.items() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert missing == []
    # the key bias shifts all scores of a query alike, and so has no gradient
    assert [n for n, p in trainable.items() if not p.grad.abs().max() > 1e-7 and "k_proj.bias" not in n] == []
    optimizer.step()
    assert loss_of(model) < before
    assert all(torch.equal(model.state_dict()[n], t) for n, t in stored.items())


@pytest.mark.parametrize("weights", TYPES)
def test_gradients_reach_the_embeddings_through_frozen_layers_as_in_the_dequantized_model(weights, folders):
    model = load(folders["llama"], weights)
    plain = load(folders["llama"], weights, dequantize=True)
    assert qlinears(model) and not qlinears(plain)
    for each in (model, plain):
        loss_of(each).backward()
    for (name, made), wanted in zip(
        [(n, p) for n, p in model.named_parameters() if p.requires_grad],
        [p for n, p in plain.named_parameters() if n.rpartition(".")[0] not in qlinears(model)],
        strict=True,
    ):
        torch.testing.assert_close(
            made.grad, wanted.grad, rtol=1e-3, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_gradient_checkpointing_gives_the_same_gradients(weights, reentrant, folders):
    gradients = []
    for checkpointing in (False, True):
        model = load(folders["llama"], weights).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
            assert model.is_gradient_checkpointing
        loss_of(model).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_no_float_weight_is_kept_for_the_backward_pass(folders):
    model = load(folders["llama"], "int8")
    sizes = set()

    def saved(tensor):
        sizes.add((tuple(tensor.shape), tensor.dtype))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
        loss = loss_of(model)
    loss.backward()
    shapes = {(layer.out_features, layer.in_features) for layer in qlinears(model).values()}
    shapes |= {shape[::-1] for shape in shapes}
    kept = {shape for shape, dtype in sizes if shape in shapes and dtype.is_floating_point}
    # q_proj and o_proj are square like nothing else in this model
    assert kept == set()


@pytest.mark.parametrize("weights", TYPES)
def test_a_compiled_forward_is_one_graph_and_equals_eager(weights, folders):
    torch._dynamo.reset()
    model = load(folders["llama"], weights)
    wanted = output(model, "llama")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        made = compiled(**TINY["llama"].inputs(), use_cache=False).logits
    torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5)


def test_lengths_do_not_recompile_a_dynamic_graph(folders):
    torch._dynamo.reset()
    model = load(folders["llama"], "int4")
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=count)
    with torch.no_grad():
        for length in (5, 9, 17, 33):
            made = compiled(input_ids=tokens(2, length), use_cache=False).logits
            wanted = model(input_ids=tokens(2, length), use_cache=False).logits
            torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1


def test_a_compiled_training_step_equals_eager(folders):
    torch._dynamo.reset()
    gradients = []
    for compile_it in (False, True):
        model = load(folders["llama"], "int4")
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compile_it else model
        run(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
        gradients.append(model.model.embed_tokens.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("weights", ["int8", "int4", "nf4", "float8"])
@pytest.mark.parametrize("saved", [False, True], ids=["on-the-fly", "saved"])
def test_what_is_loaded_in_inference_mode_can_be_trained_as_the_float_model_can(weights, saved, tmp_path):
    folder = save("llama", tmp_path / "float")
    config = {"quantization_config": QuantoConfig(weights)}
    if saved:
        transformers.AutoModelForCausalLM.from_pretrained(folder, **config).save_pretrained(tmp_path / "packed")
        folder, config = tmp_path / "packed", {}
    with torch.inference_mode():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **config)
    twin = transformers.AutoModelForCausalLM.from_pretrained(folder, **config)
    gradients = []
    for each in (model, twin):
        each.train()
        each(input_ids=tokens(), labels=tokens()).loss.backward()
        gradients.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 3
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
