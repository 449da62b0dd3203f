"""The hashes of models, configurations and tokenizers: one value in memory and on disk, sensitive to every bit."""

from __future__ import annotations

import copy
import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from activations_cache import hashing
from activations_cache.errors import DataError, ModelError

SIZES = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def build(name: str, dtype: torch.dtype = torch.float32, **extra: object) -> torch.nn.Module:
    """A tiny random model of the named family, with norms and biases away from their initial values."""
    import transformers as tf

    torch.manual_seed(0)
    config = {
        "llama": lambda: tf.LlamaConfig(**SIZES, **extra),
        "gpt2": lambda: tf.GPT2Config(vocab_size=48, n_positions=32, n_embd=16, n_layer=2, n_head=4, **extra),
        "neox": lambda: tf.GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}, **extra),
        "gemma2": lambda: tf.Gemma2Config(**SIZES, head_dim=4, **extra),
        "mixtral": lambda: tf.MixtralConfig(**SIZES, num_local_experts=12, **extra),
        "olmoe": lambda: tf.OlmoeConfig(**SIZES, num_experts=12, num_experts_per_tok=2, **extra),
        "qwen3_moe": lambda: tf.Qwen3MoeConfig(
            **SIZES, head_dim=4, num_experts=12, moe_intermediate_size=8, num_experts_per_tok=2, **extra
        ),
        "gpt_oss": lambda: tf.GptOssConfig(**SIZES, head_dim=4, num_local_experts=4, layer_types=None, **extra),
    }[name]()
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)


def brute_force(tensors: dict[str, torch.Tensor]) -> str:
    """The definition, written out: SHA-256 over sorted lines of name, type, shape and the SHA-256 of the bytes."""
    types = {torch.float32: "F32", torch.bfloat16: "BF16"}
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        raw = bytes(tensor.contiguous().view(torch.uint8).flatten().tolist())
        shape = ",".join(str(n) for n in tensor.shape)
        total.update(f"{name}\t{types[tensor.dtype]}\t{shape}\t{hashlib.sha256(raw).hexdigest()}\n".encode())
    return total.hexdigest()


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "gemma2", "mixtral", "olmoe", "qwen3_moe", "gpt_oss"])
def test_memory_disk_and_definition_agree(name, tmp_path):
    from transformers import AutoModelForCausalLM

    model = build(name)
    model.save_pretrained(tmp_path)
    on_disk = load_file(tmp_path / "model.safetensors")
    in_memory = dict(hashing.checkpoint_tensors(model))

    assert in_memory.keys() == on_disk.keys()
    assert all(torch.equal(in_memory[key], on_disk[key]) for key in on_disk)
    expected = brute_force(on_disk)
    assert hashing.weights_hash(model) == expected
    assert hashing.checkpoint_hash(tmp_path) == expected
    assert hashing.weights_hash(AutoModelForCausalLM.from_pretrained(tmp_path)) == expected


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_sharded_bfloat16_checkpoint_has_the_hash_of_the_model(name, tmp_path):
    from transformers import AutoModelForCausalLM

    model = build(name, torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert hashing.checkpoint_hash(tmp_path) == hashing.weights_hash(model) == hashing.weights_hash(loaded)


def test_conversion_to_memory_inverts_conversion_to_the_checkpoint():
    mapping = hashing.CheckpointMap(build("mixtral"))
    fused = [group for group in mapping.groups if len(group.checkpoint) > 1]
    assert {len(group.checkpoint) for group in fused} == {12, 24}
    for group in mapping.groups:
        back = mapping.to_memory(mapping.read(group))
        assert set(back) == set(group.memory)
        assert all(torch.equal(back[name], mapping.state[name]) for name in group.memory)


def test_ties_count_once(tmp_path):
    model = build("llama", tie_word_embeddings=True)
    names = [name for name, _ in hashing.checkpoint_tensors(model)]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names

    # some published checkpoints hold the tied head a second time
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert hashing.checkpoint_hash(tmp_path) == hashing.weights_hash(model)


def test_every_bit_and_the_type_count():
    model = build("llama")
    before = hashing.weights_hash(model)
    weight = model.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        weight.view(torch.int32)[3, 5] ^= 1  # the last bit of one entry's mantissa
    changed = hashing.weights_hash(model)
    with torch.no_grad():
        weight.view(torch.int32)[3, 5] ^= 1
    assert changed != before
    assert hashing.weights_hash(model) == before
    assert hashing.weights_hash(model.to(torch.bfloat16)) != before


def test_number_of_threads_does_not_matter():
    model = build("mixtral")
    assert hashing.weights_hash(model, threads=1) == hashing.weights_hash(model, threads=5)


def test_combine_digests_is_the_same_hash():
    model = build("llama")
    entries = [
        (name, hashing.dtype_name(t.dtype), t.shape, hashing.tensor_digest(t))
        for name, t in hashing.checkpoint_tensors(model)
    ]
    assert hashing.combine_digests(reversed(entries)) == hashing.weights_hash(model)


def test_config_hash_ignores_what_does_not_change_the_model(tmp_path):
    from transformers import LlamaConfig

    config = LlamaConfig(**SIZES)
    model = build("llama")
    model.save_pretrained(tmp_path)
    reloaded = LlamaConfig.from_pretrained(tmp_path)
    assert hashing.config_hash(config) == hashing.config_hash(reloaded)
    assert hashing.config_hash(config) == hashing.config_hash(json.loads(json.dumps(reloaded.to_dict())))
    assert hashing.config_hash(config) != hashing.config_hash(LlamaConfig(**{**SIZES, "num_hidden_layers": 3}))


def word_tokenizer(words: str):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<unk>", "<pad>", *words.split()])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", pad_token="<pad>")


def test_tokenizer_hash_survives_use_and_saving(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = word_tokenizer("a b c")
    before = hashing.tokenizer_hash(tokenizer)
    tokenizer(["a b", "a"], padding="max_length", truncation=True, max_length=7)
    tokenizer.save_pretrained(tmp_path)
    assert hashing.tokenizer_hash(tokenizer) == before
    assert hashing.tokenizer_hash(AutoTokenizer.from_pretrained(tmp_path)) == before


def test_tokenizer_hash_sees_vocabulary_and_template():
    tokenizer = word_tokenizer("a b c")
    templated = copy.deepcopy(tokenizer)
    templated.chat_template = "{{ messages }}"
    hashes = {hashing.tokenizer_hash(t) for t in (tokenizer, templated, word_tokenizer("a b d"))}
    assert len(hashes) == 3


def test_bad_checkpoints_are_clear_errors(tmp_path):
    with pytest.raises(DataError, match=r"model\.safetensors"):
        hashing.checkpoint_hash(tmp_path)
    model = build("llama")
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[0]
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(DataError, match="missing"):
        hashing.checkpoint_hash(tmp_path)
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="readable"):
        hashing.checkpoint_hash(tmp_path)


def test_what_is_no_model_is_a_clear_error():
    with pytest.raises(ModelError, match=r"probe\.load"):
        hashing.weights_hash("a name")
