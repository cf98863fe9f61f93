"""Tests of finemem_jax/weights/tokenizer_files.py: tokenizers of GGUF files and of folders, read and written."""

import json

import gguf
import pytest
import transformers

import hf_folders
from finemem_jax.models import tokenizer
from finemem_jax.models.tokenizer import ByteTokenizer
from finemem_jax.weights import tokenizer_files
from tokenizer_texts import CHATS, random_texts, smollm_file


def test_another_kind_of_tokenizer_is_refused(tmp_path):
    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"\('llama', 'default'\) is not supported; use a GGUF with a gpt2/smollm, "):
        tokenizer_files.from_gguf(gguf.GGUFReader(path))


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [("llama-bpe", ["I", "'m", " in", " ", "198", "4", "x", "!!\n"]),
     ("qwen2", ["I", "'m", " in", " ", "1", "9", "8", "4", "x", "!!\n"])],
)  # fmt: skip
def test_pre_tokenizers_by_hand(pre, pieces):
    # Llama 3 keeps three digits together, Qwen none; a newline belongs to the punctuation before it.
    split = tokenizer_files._pre_tokenizer(pre).pre_tokenize_str("I'm in 1984x!!\n")
    assert [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece, _ in split] == pieces


def gguf_tokenizer(path, pre="qwen2", model="gpt2", template=hf_folders.CHATML):
    """The tokenizer of `hf_folders` as a GGUF file."""
    fields = json.loads(hf_folders.backend().to_str())
    added = {entry["id"]: entry for entry in fields["added_tokens"]}
    names = sorted(hf_folders.backend().get_vocab().items(), key=lambda item: item[1])
    plain, control, defined = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED
    kinds = [plain if i not in added else control if added[i]["special"] else defined for _, i in names]
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([name for name, _ in names])
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in fields["model"]["merges"]])
    writer.add_eos_token_id(dict(names)["<|im_end|>"])
    writer.add_eot_token_id(dict(names)["<|endoftext|>"])
    if template:
        writer.add_chat_template(template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gguf.GGUFReader(path)


def test_a_gguf_of_qwen_is_read_like_its_folder(tmp_path):
    file = tokenizer_files.from_gguf(gguf_tokenizer(tmp_path / "qwen.gguf"))
    folder = tokenizer_files.from_folder(hf_folders.write_tokenizer(tmp_path))
    text = "the thin <tool_call> in an <|im_end|> e\u0301"
    # Of what they have in common: the file splits as Qwen2 does, the folder as GPT-2.
    assert file.encode(text) == folder.encode(text)
    assert (file.vocab_size, file.end_ids) == (folder.vocab_size, folder.end_ids)
    assert file.frame(("user",)) == folder.frame(("user",))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"pre": "gpt-4o"}, "kind .*'gpt-4o'.* is not supported"), ({"template": None}, "the GGUF has no chat template")],
)
def test_ggufs_without_what_is_needed(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        tokenizer_files.from_gguf(gguf_tokenizer(tmp_path / "other.gguf", **changes))


@pytest.fixture
def folder(tmp_path):
    return hf_folders.write_tokenizer(tmp_path)


def test_a_folder_is_read(folder):
    tokens = tokenizer_files.from_folder(folder)
    ids = hf_folders.backend().get_vocab()
    assert tokens.vocab_size == len(ids) == max(ids.values()) + 1
    assert tokens.end_ids == (ids["<|im_end|>"], ids["<|endoftext|>"])
    assert tokens.encode("in the") == [ids["in"], ids["Ġthe"]]
    assert tokens.decode(tokens.encode("in the, ünï 日本")) == "in the, ünï 日本"
    assert tokens.frame(("user", "user")) == (
        "<|im_start|>user\n", "<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    )  # fmt: skip


def test_special_tokens_of_a_folder_are_text_in_content(folder):
    tokens = tokenizer_files.from_folder(folder)
    ids = hf_folders.backend().get_vocab()
    special = {ids[token] for token in hf_folders.SPECIAL}
    text = "".join(hf_folders.SPECIAL)
    assert special.isdisjoint(tokens.encode(text)) and tokens.decode(tokens.encode(text)) == text
    assert tokens.encode_template(text) == [ids[token] for token in hf_folders.SPECIAL]
    # What is added without being special ends no turn, and is the token that the model knows.
    assert tokens.encode("<tool_call>") == [ids["<tool_call>"]]
    assert tokens.token_bytes(ids["<tool_call>"]) == b"<tool_call>"


def test_rows_beyond_the_vocabulary_add_no_text(folder):
    # Embeddings are padded to round numbers, and nothing keeps a model from sampling such a row.
    tokens = tokenizer_files.from_folder(folder)
    beyond = [tokens.vocab_size, tokens.vocab_size + 100]
    assert tokens.decode([65, *beyond, 66]) == tokens.decode([65, 66])
    assert [tokens.token_bytes(i) for i in beyond] == [b"", b""]


def test_a_template_with_named_tokens_and_a_date(tmp_path):
    tokens = tokenizer_files.from_folder(hf_folders.write_tokenizer(tmp_path, hf_folders.LLAMA))
    before, after = tokens.frame(("user",))
    # The date never changes, or prompts would from one day to the next.
    assert before == "<|im_start|>Today: 26 Jul 2024<|head|>user<|end_head|>\n\n"
    assert after == "<|im_end|><|head|>assistant<|end_head|>\n\n"


@pytest.mark.parametrize("thinking", [False, True])
def test_thinking_is_the_templates_choice(tmp_path, thinking):
    template = hf_folders.CHATML + "{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    tokens = tokenizer_files.from_folder(hf_folders.write_tokenizer(tmp_path, template), thinking)
    assert tokens.frame(("user",))[1].endswith("assistant\n" if thinking else "</think>\n\n")


@pytest.mark.parametrize("place", ["list", "jinja"])
def test_where_templates_stand(tmp_path, place):
    other = "{{ 'never' }}"
    entries = [{"name": "tool_use", "template": other}, {"name": "default", "template": hf_folders.CHATML}]
    hf_folders.write_tokenizer(tmp_path, entries if place == "list" else other)
    if place == "jinja":
        (tmp_path / "chat_template.jinja").write_text(hf_folders.CHATML)
    assert tokenizer_files.from_folder(tmp_path).frame(("user",))[0] == "<|im_start|>user\n"


@pytest.mark.parametrize("file", ["generation_config.json", "config.json", "tokenizer_config.json"])
def test_where_end_tokens_stand(folder, file):
    end = hf_folders.backend().token_to_id("<|head|>")
    (folder / "generation_config.json").unlink()
    if file != "tokenizer_config.json":
        (folder / file).write_text(json.dumps({"eos_token_id": end}))
    expected = [] if file == "tokenizer_config.json" else [end]
    assert list(tokenizer_files.from_folder(folder).end_ids) == [
        *expected,
        hf_folders.backend().token_to_id("<|im_end|>"),
    ]


def test_a_template_that_refuses_roles(tmp_path):
    template = "{{ raise_exception('no system messages') }}"
    tokens = tokenizer_files.from_folder(hf_folders.write_tokenizer(tmp_path, template))
    with pytest.raises(ValueError, match=r"refuses messages with roles \('system',\) \(no system messages\)"):
        tokens.frame(("system",))


def test_saved_folders_are_the_same(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    tokens = tokenizer_files.from_folder(folder)
    tokens.save(out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }


def test_a_ggufs_tokenizer_becomes_a_folder(tmp_path):
    smollm = tokenizer_files.from_gguf(smollm_file())
    smollm.save(tmp_path)
    again = tokenizer_files.from_folder(tmp_path)
    chat = CHATS["worked example"]
    assert tokenizer.encode_chat(again, chat) == tokenizer.encode_chat(smollm, chat)
    assert all(again.encode(text) == smollm.encode(text) for text in random_texts(1000))
    assert (again.end_ids, again.vocab_size) == (smollm.end_ids, smollm.vocab_size)
    # And transformers makes of it what we do.
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": message.role, "content": "".join(message.parts)} for message in chat]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == list(tokenizer.encode_chat(smollm, chat).ids)
    assert theirs.eos_token_id in smollm.end_ids


def test_bytes_have_no_folder(tmp_path):
    with pytest.raises(ValueError, match=r"no Hugging Face form; .*model\.tokenizer='weights'"):
        ByteTokenizer().save(tmp_path)


def _write(folder, name, fields):
    (folder / name).write_text(fields if isinstance(fields, str) else json.dumps(fields))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", r"tokenizer\.json cannot be read as JSON .*fetch it again"),
        (
            "tokenizer.json",
            {"model": {"type": "Unigram"}},
            r"\('Unigram', None\) is not supported",
        ),
        (
            "tokenizer.json",
            {"model": {"type": "BPE"}, "decoder": {"type": "ByteLevel"}},
            r"tokenizer\.json cannot be read .*fetch it again",
        ),
        ("tokenizer_config.json", {"eos_token": "<|im_end|>"}, r"has no chat template; .*put a chat_template\.jinja"),
        ("generation_config.json", {"eos_token_id": 99_999}, r"eos_token_id 99999 is no token of .*tokenizer\.json"),
    ],
)
def test_wrong_folders(folder, name, content, message):
    _write(folder, name, content)
    with pytest.raises(ValueError, match=message):
        tokenizer_files.from_folder(folder)


def test_poor_folders(folder):
    (folder / "generation_config.json").unlink()
    _write(folder, "tokenizer_config.json", {"chat_template": hf_folders.CHATML})
    with pytest.raises(ValueError, match=r"names no end token; set eos_token in tokenizer_config\.json"):
        tokenizer_files.from_folder(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer\.json; put the model's own there"):
        tokenizer_files.from_folder(folder)
