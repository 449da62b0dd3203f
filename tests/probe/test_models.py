from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import probe
from activations_cache.errors import DataError as ActivationsDataError
from probe.errors import DataError, LoadError
from probe.models import pad, token_strings, wrap


def llama(**settings):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 50,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=32, num_key_value_heads=2, **settings)).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=32)).eval()


@pytest.fixture(scope="module")
def stories(shared_data):
    return probe.load(shared_data / "stories260K", device="cpu")


@pytest.mark.parametrize("make", [lambda: llama(tie_word_embeddings=True), llama, gpt2], ids=["tied", "untied", "gpt2"])
def test_the_bridge_shares_storage_and_leaves_the_model_as_it_was(make, tmp_path):
    model = wrap(make())
    before = {name: p.clone() for name, p in model.hf.state_dict().items()}
    ids = torch.randint(0, 50, (2, 7))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        own = model.hf(input_ids=ids, attention_mask=mask).logits
        theirs = model.bridge(ids, attention_mask=mask)
        torch.testing.assert_close(theirs, own, atol=1e-5, rtol=0)
        weight = next(
            p for name, p in model.hf.named_parameters() if name.endswith(("down_proj.weight", "mlp.c_proj.weight"))
        )
        weight.mul_(2.0)  # an edit in place must show in the bridge
        edited = model.hf(input_ids=ids, attention_mask=mask).logits
        assert not torch.allclose(edited, own)
        torch.testing.assert_close(model.bridge(ids, attention_mask=mask), edited, atol=1e-5, rtol=0)
        weight.div_(2.0)
    model.hf.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert set(again.state_dict()) == set(before)
    assert all(torch.equal(again.state_dict()[name], p) for name, p in before.items())


def test_the_bridge_is_made_again_when_a_parameter_was_replaced():
    model = wrap(llama())
    first = model.bridge
    assert model.bridge is first
    layer = model.hf.model.layers[0].mlp.down_proj
    layer.weight = torch.nn.Parameter(torch.zeros_like(layer.weight))
    assert model.bridge is not first


def test_load_gives_the_checkpoints_own_weights_and_dtype(shared_data, stories):
    raw = AutoModelForCausalLM.from_pretrained(shared_data / "stories260K")
    assert stories.dtype == torch.float32 and stories.dims.n_layers == 5 and stories.dims.d_model == 64
    assert all(torch.equal(p, q) for p, q in zip(stories.hf.parameters(), raw.parameters(), strict=True))
    assert "LlamaForCausalLM" in repr(stories) and "n_layers" in stories._repr_html_()


def test_load_keeps_bfloat16_and_casts_when_asked(tmp_path):
    llama().to(torch.bfloat16).save_pretrained(tmp_path)
    assert probe.load(tmp_path).dtype == torch.bfloat16
    assert probe.load(tmp_path, dtype="float32").dtype == torch.float32
    assert probe.load(tmp_path, dtype=torch.float16).dtype == torch.float16
    assert probe.load(tmp_path).tokenizer is None
    with pytest.raises(DataError, match="no tokenizer"):
        probe.load(tmp_path).tokens("a")


def test_the_tokenizer_is_never_changed(stories):
    assert stories.tokenizer.pad_token is None
    stories.tokens(["Once", "Once upon a time"])
    _ = stories.bridge
    assert stories.tokenizer.pad_token is None and stories.pad_id == 2


@pytest.mark.parametrize("name", ["stories260K", "gpt2"])
def test_left_and_right_padding_give_the_same_logits(name, request):
    if name == "gpt2":
        hf, rows = gpt2(), [[3, 4, 5], [6, 7, 8, 9, 10]]
    else:
        model = request.getfixturevalue("stories")
        hf = model.hf
        rows = [model.tokens(t)["input_ids"][0].tolist() for t in ("Once", "Once upon a time there was")]
    with torch.no_grad():
        alone = [hf(input_ids=torch.tensor([row])).logits[0] for row in rows]
        for side in ("left", "right"):
            logits = hf(**pad(rows, 0, side)).logits
            for i, row in enumerate(rows):
                own = logits[i, -len(row) :] if side == "left" else logits[i, : len(row)]
                torch.testing.assert_close(own, alone[i], atol=2e-5, rtol=0)


def test_bos_is_what_was_asked_for(stories):
    def first(**settings):
        return stories.tokens("Once upon", **settings)["input_ids"][0].tolist()

    bos = stories.tokenizer.bos_token_id
    assert first(bos=True).count(bos) == 1 and first(bos=True)[0] == bos
    assert bos not in first(bos=False)
    assert first(bos=True)[1:] == first(bos=False)
    assert first() == stories.tokenizer("Once upon")["input_ids"]


def test_chat_template(shared_data):
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "stories260K")
    with pytest.raises(Exception, match="chat template"):
        wrap(llama(), tokenizer).tokens("Once", chat=True)
    tokenizer.chat_template = "{% for m in messages %}User: {{ m['content'] }}\nBot:{% endfor %}"
    model = wrap(llama(), tokenizer)
    ids = model.tokens("Once", chat=True, bos=False)["input_ids"][0]
    assert "User:" in tokenizer.decode(ids) and "Bot:" in tokenizer.decode(ids)


def test_generate_continues_greedily_whatever_the_padding(stories):
    prompts = ["Once upon a time", "Lily", "One day, a little boy named Tim went to the park. He"]
    together = stories.generate(prompts, max_new_tokens=8)
    assert together == [stories.generate(p, max_new_tokens=8)[0] for p in prompts]
    ids = stories.tokens(prompts[0])["input_ids"]
    with torch.no_grad():
        for _ in range(8):
            ids = torch.cat([ids, stories.hf(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert stories.tokenizer.decode(ids[0], skip_special_tokens=True).startswith(prompts[0] + together[0])


def test_too_long_a_text_is_an_error_or_cut_by_choice(stories):
    long = "Once upon a time " * 400
    with pytest.raises(Exception, match="512"):
        stories.tokens(long)
    assert stories.tokens(long, overflow="truncate")["input_ids"].shape[1] == 512


def worded(make=gpt2):
    from tests.probe.tiny import word_tokenizer

    return wrap(make(), word_tokenizer())


@pytest.mark.parametrize("length", [0, -1, 33])
def test_a_length_that_no_sequence_can_have_is_refused(length):
    with pytest.raises(DataError, match=rf"from 1 to the model's context of 32 tokens; got {length}"):
        worded().tokens("the old city", max_length=length, overflow="truncate")


def test_a_length_up_to_the_context_is_heeded():
    model = worded()
    assert model.tokens("the old city", max_length=1, overflow="truncate")["input_ids"].shape == (1, 1)
    assert model.tokens("the " * 31, max_length=32)["input_ids"].shape == (1, 32)
    with pytest.raises(ActivationsDataError, match="3 are allowed"):
        model.tokens("the old city", max_length=3)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_generating_beyond_the_context_is_refused_with_the_numbers(make):
    model = worded(make)
    prompts = ["the old city", "the " * 9]  # 4 and 10 tokens with BOS
    assert len(model.generate(prompts, max_new_tokens=22)) == 2
    with pytest.raises(DataError, match=r"10 tokens; with max_new_tokens=23 that makes 33, .* context is 32"):
        model.generate(prompts, max_new_tokens=23)
    with pytest.raises(DataError, match="at least 1; got 0"):
        model.generate(prompts, max_new_tokens=0)


@pytest.fixture
def checkpoint(tmp_path):
    llama().save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def test_what_is_no_model_is_refused(checkpoint, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for path, says in [
        (empty, "without a config.json"),
        (tmp_path / "absent", "no directory"),
        (checkpoint / "config.json", "is a file"),
    ]:
        with pytest.raises(LoadError, match=says):
            probe.load(path)
    with pytest.raises(LoadError, match="dtype must be"):
        probe.load(checkpoint, dtype="int8")
    with pytest.raises(LoadError, match="device"):
        probe.load(checkpoint, device="cuda:99" if not torch.cuda.is_available() else "nonsense")
    with pytest.raises(LoadError, match="no-such-organisation"):
        probe.load("no-such-organisation/no-such-model")


@pytest.mark.parametrize("harm", ["truncated", "lacking", "not a language model", "no weights", "bad config"])
def test_damaged_checkpoints_are_refused(harm, checkpoint):
    from safetensors.torch import load_file, save_file

    weights, config = checkpoint / "model.safetensors", checkpoint / "config.json"
    if harm == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif harm == "lacking":
        tensors = load_file(weights)
        tensors.pop("model.layers.1.mlp.down_proj.weight")
        save_file(tensors, weights, metadata={"format": "pt"})
    elif harm == "not a language model":
        config.write_text(json.dumps({"model_type": "vit", "architectures": ["ViTModel"]}))
    elif harm == "no weights":
        weights.unlink()
    else:
        config.write_text("{")
    with pytest.raises(LoadError):
        probe.load(checkpoint)


def test_a_directory_can_be_moved_and_loaded_again(checkpoint, tmp_path):
    shutil.move(checkpoint, tmp_path / "elsewhere")
    assert probe.load(tmp_path / "elsewhere").dims.n_layers == 2


@pytest.mark.parametrize("name", ["stories260K", "tinystories-656k", "tokenizers/gpt2"])
def test_str_tokens_keep_spaces_and_join_to_the_text(name, shared_data):
    from transformers import GPT2Tokenizer

    folder = shared_data / name
    tokenizer = (
        GPT2Tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
        if name.endswith("gpt2")
        else AutoTokenizer.from_pretrained(folder)
    )
    text = "Once upon a time, Lily's cat ran.  It sat"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(token_strings(tokenizer, ids)).strip() == text
    assert len(token_strings(tokenizer, ids)) == len(ids)


def test_the_bridge_takes_a_tokenizer_made_in_memory():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    raw.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="<unk>", bos_token="<unk>")
    model = wrap(llama(), tokenizer)
    ids = model.tokens("a b a")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(model.bridge(ids), model.hf(ids).logits, atol=1e-5, rtol=0)
    assert tokenizer.pad_token is None
