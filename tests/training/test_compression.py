"""Numbers: rounding against the plainest way to do it, graphs against torch, files against what wrote them."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers

from training.compression import dynamic_int8, w8a8
from training.contract import Graph, strings
from training.export import export
from training.model import predict
from training.models import encoder
from training.models.generator import TEMPLATE, Generator
from training.spec.models import Encoder


def naive(weight: torch.Tensor, scale: torch.Tensor) -> list[list[int]]:
    """Round to nearest (ties to even), one number at a time."""
    return [
        [max(-127, min(127, round(float(np.float32(value) / np.float32(step))))) for value in row]
        for row, step in zip(weight.tolist(), scale.flatten().tolist(), strict=True)
    ]


def test_int8_weights_are_those_of_the_plainest_rounding() -> None:
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    whole, scale = w8a8.round_to_nearest(weight)
    assert whole.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert scale.shape == (24, 1)
    assert whole.tolist() == naive(weight, scale)


def test_no_row_is_worse_than_with_the_widest_scale() -> None:
    weight = torch.randn(24, 400, generator=torch.Generator().manual_seed(0)).pow(3)
    whole, scale = w8a8.round_to_nearest(weight)
    widest = weight.abs().amax(1, keepdim=True) / 127
    plain = torch.tensor(naive(weight, widest)) * widest
    chosen_error = (whole * scale - weight).square().sum(1)
    plain_error = (plain - weight).square().sum(1)
    assert (chosen_error <= plain_error * (1 + 1e-5)).all()
    assert (chosen_error < plain_error).any()


def test_rows_of_zeros_stay_zeros() -> None:
    whole, scale = w8a8.round_to_nearest(torch.zeros(2, 3))
    assert not whole.any()
    assert torch.isfinite(scale).all()


@pytest.fixture
def embedder(base: str) -> encoder.Embedder:
    return encoder.load(Encoder(package=base, licence="none", tokens_max=16))


@pytest.fixture
def classifier(embedder: encoder.Embedder) -> encoder.Classifier:
    torch.manual_seed(0)
    classifier = encoder.Classifier(embedder, ("a", "b", "c"))
    classifier.eval()
    return classifier


def session(graph: Graph) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(graph.content, options, providers=["CPUExecutionProvider"])


def tokens(classifier: encoder.TextModel, texts: list[str]) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    """Ids and mask."""
    return [it.numpy() for it in classifier.feed({"text": strings(texts)})]


TEXTS = [
    ["my parcel"],
    ["where is my order please", "pay"],
    ["card declined"] * 5 + ["where is my parcel the order has not"],
]


@pytest.mark.parametrize("texts", TEXTS, ids=len)
def test_the_exported_graph_answers_as_torch_at_every_shape(classifier: encoder.Classifier, texts: list[str]) -> None:
    graph = session(export(classifier))
    ids, mask = tokens(classifier, texts)
    scores, logits = graph.run(["scores", "logits"], {"input_ids": ids, "attention_mask": mask})
    with torch.inference_mode():
        want_scores, want_logits = classifier(torch.from_numpy(ids), torch.from_numpy(mask))
    np.testing.assert_allclose(scores, want_scores.numpy(), atol=1e-5)
    np.testing.assert_allclose(logits, want_logits.numpy(), atol=1e-5)
    np.testing.assert_allclose(scores.sum(1), 1, atol=1e-5)


def test_the_mask_is_what_the_encoder_makes_of_it_itself(embedder: encoder.Embedder) -> None:
    ids, mask = (torch.from_numpy(it) for it in tokens(embedder, TEXTS[2]))
    with torch.inference_mode():
        hidden = embedder.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        [embedding] = embedder(ids, mask)
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    torch.testing.assert_close(embedding, torch.nn.functional.normalize(mean, dim=-1), rtol=0, atol=1e-6)
    assert not {"Range", "Where"} & {
        node.op_type for node in onnx.load_from_string(export(embedder).content).graph.node
    }


def test_exporting_a_model_does_not_change_its_answers(embedder: encoder.Embedder) -> None:
    # The exporter restores the mode that it found: one module left in training mode would mean dropout from here on.
    before = predict(embedder, {"text": strings(["where is my parcel"])})["embedding"]
    export(embedder)
    np.testing.assert_array_equal(predict(embedder, {"text": strings(["where is my parcel"])})["embedding"], before)


def test_embeddings_have_length_one_and_do_not_feel_padding(classifier: encoder.Classifier) -> None:
    graph = session(export(classifier.embedder))
    ids, mask = tokens(classifier, ["my parcel"])
    wide = np.zeros((1, 16), np.int64)
    wide_mask = wide.copy()
    wide[:, : ids.shape[1]], wide_mask[:, : ids.shape[1]] = ids, mask
    (tight,) = graph.run(["embedding"], {"input_ids": ids, "attention_mask": mask})
    (padded,) = graph.run(["embedding"], {"input_ids": wide, "attention_mask": wide_mask})
    np.testing.assert_allclose(np.linalg.norm(tight, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(tight, padded, atol=1e-5)


def test_int8_is_smaller_and_close(classifier: encoder.Classifier) -> None:
    whole = export(classifier.embedder)
    small = dynamic_int8.quantize(whole)
    ids, mask = tokens(classifier, ["where is my parcel"])
    inputs = {"input_ids": ids, "attention_mask": mask}
    (want,), (got,) = session(whole).run(None, inputs), session(small).run(None, inputs)
    assert len(small.content) < len(whole.content)
    assert (want * got).sum() > 0.99


def test_int8_answers_a_row_alike_whatever_is_beside_it(classifier: encoder.Classifier) -> None:
    small = session(dynamic_int8.quantize(export(classifier)))
    ids, mask = tokens(classifier, [*TEXTS[1], *TEXTS[2]])
    (together,) = small.run(["logits"], {"input_ids": ids, "attention_mask": mask})
    for row, answer in enumerate(together):
        length = mask[row].sum()
        alone = {"input_ids": ids[row : row + 1, :length], "attention_mask": mask[row : row + 1, :length]}
        np.testing.assert_allclose(small.run(["logits"], alone)[0][0], answer, atol=1e-5)


def test_a_graph_of_int8_has_its_weights_scaled_within_the_product(classifier: encoder.Classifier) -> None:
    nodes = onnx.load_from_string(dynamic_int8.quantize(export(classifier)).content).graph.node
    kinds = Counter(node.op_type for node in nodes)
    assert kinds["MatMulIntegerToFloat"] >= 6
    assert not kinds["MatMulInteger"]


def test_int8_by_token_leaves_a_convolution_as_it_is() -> None:
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    weight = np.random.default_rng(0).normal(size=(2, 3, 3)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["given", "weight"], ["answer"])],
        "conv",
        [helper.make_tensor_value_info("given", kind, ["n", 3, "tokens"])],
        [helper.make_tensor_value_info("answer", kind, ["n", 2, "left"])],
        [onnx.numpy_helper.from_array(weight, "weight")],
    )
    whole = Graph(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    )
    given = {"given": np.random.default_rng(1).normal(size=(1, 3, 9)).astype(np.float32)}
    np.testing.assert_array_equal(
        session(dynamic_int8.quantize(whole)).run(None, given)[0], session(whole).run(None, given)[0]
    )


def test_int8_scales_each_token_by_its_own_largest(classifier: encoder.Classifier) -> None:
    # Another provider, or a fusion, that took one scale for all would still be close; so layers are looked at by numpy.
    weight = np.array([[1.0, -2.0], [0.5, 3.0], [-1.0, 0.25]], np.float32)
    given = np.array([[[1.0, 2.0, 3.0], [100.0, 50.0, -25.0]]], np.float32)
    whole = linear(weight)
    answer = session(dynamic_int8.quantize(whole)).run(None, {"given": given})[0]
    scale = np.abs(given).max(axis=-1, keepdims=True) / 127
    weight_scale = np.abs(weight).max(axis=0) / 127
    want = (np.round(given / scale) @ np.round(weight / weight_scale)) * scale * weight_scale
    np.testing.assert_allclose(answer, want, rtol=1e-2, atol=2e-2)


def linear(weight: np.ndarray[Any, np.dtype[np.float32]]) -> Graph:
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["given", "weight"], ["answer"])],
        "linear",
        [helper.make_tensor_value_info("given", kind, ["n", "tokens", weight.shape[0]])],
        [helper.make_tensor_value_info("answer", kind, ["n", "tokens", weight.shape[1]])],
        [onnx.numpy_helper.from_array(weight, "weight")],
    )
    opset = [helper.make_opsetid("", 17)]
    return Graph(helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString())


def test_texts_longer_than_the_limit_are_cut_and_keep_their_special_tokens(classifier: encoder.Classifier) -> None:
    ids, mask = tokens(classifier, ["my " * 50, "my"])
    assert ids.shape == mask.shape == (2, 16)
    assert (ids[0, 0], ids[0, -1]) == (2, 3)
    assert mask.sum(1).tolist() == [16, 3]
    assert classifier.tokenizer.truncation is classifier.tokenizer.padding is None


@pytest.fixture
def network() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def test_w8a8_takes_every_linear_layer_but_the_head(network: transformers.LlamaForCausalLM) -> None:
    weights = w8a8.quantize(Generator(network, None, tokens_max=64))
    whole = {name for name, tensor in weights.tensors.items() if tensor.dtype == torch.int8}
    assert len(whole) == 2 * 7
    assert all(name.endswith("_proj.weight") for name in whole)
    assert {f"{name}_scale" for name in whole} <= weights.tensors.keys()
    assert weights.tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert "lm_head.weight" not in weights.tensors  # tied: it is the embedding


def test_w8a8_files_are_read_by_an_implementation_of_their_own(
    network: transformers.LlamaForCausalLM, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    from training.package import _update_json

    weights = w8a8.quantize(Generator(network, None, tokens_max=64))
    network.config.save_pretrained(tmp_path)
    _update_json(tmp_path / "config.json", weights.config)
    save_file(weights.tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        want, got = network(ids).logits, again(ids).logits
    assert torch.nn.functional.cosine_similarity(want, got, dim=-1).min() > 0.99
    assert not torch.equal(want, got)


def render(messages: list[dict[str, object]], **options: object) -> str:
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=__import__("tokenizers").Tokenizer(__import__("tokenizers").models.WordLevel({"a": 0}, "a"))
    )
    tokenizer.chat_template = TEMPLATE.read_text("utf-8")
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    assert isinstance(text, str)
    return text


def test_the_chat_template_is_chatml() -> None:
    messages: list[dict[str, object]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    assert render(messages, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    )


def test_without_a_system_message_the_model_s_own_comes_first() -> None:
    assert render([{"role": "user", "content": "Hi"}]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
    )


def test_tools_calls_and_results_reach_the_model() -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
    text = render(
        [
            {"role": "user", "content": "Paris?"},
            {"role": "assistant", "content": None, "tool_calls": [call, call]},
            {"role": "tool", "content": "18 degrees"},
        ],
        tools=[tool],
    )
    assert '<tools>\n{"type": "function", "function": {"name": "weather"' in text
    one = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    assert f"<|im_start|>assistant\n{one}\n{one}<|im_end|>\n" in text
    assert "<|im_start|>user\n<tool_response>\n18 degrees\n</tool_response><|im_end|>\n" in text
